"""Meta-learned log weights of tags: margins that make a training step help a tag-balanced batch.

Inspired by the margin generator of Jiang et al. (Dynamic Loss for Robust Learning, TPAMI 45(12), arXiv:2211.12506);
there a margin is added to a class' logits, here to the logarithm of a tag's weight, since a diffusion model has
neither classes nor logits.

For L = (1 / B) sum w_i l_i and one SGD step of rate lr, d L_meta / d w_i = -(lr / B) <grad l_i, grad L_meta>. Here w_i
is all that a sample's loss is multiplied by: the weight of its source times that of its tags. The rate only scales the
margins' gradient, which Adam does not see, so it is left out.

Shape legend: K tags, B samples of a training batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdxl_training.weighting.tag_lists import Integers, Numbers, TagLists

BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-12
DECAY = 0.5  # of theta, per learning rate: Adam makes steps of noise as long as others, which would add up to the limit


@dataclass(frozen=True, slots=True)
class MarginRule:
    """learning_rate: of theta, by Adam. max_factor: exp of the largest margin."""

    learning_rate: float = 0.05
    max_factor: float = 3.0


def weight_gradients(inner_B: Numbers) -> Numbers:
    """Return d L_meta / d w_i up to the learning rate, given <grad l_i, grad L_meta> of each sample."""
    return -inner_B / len(inner_B)


class TagMargins:
    """Margins phi_k = ln(max_factor) tanh(theta_k), moved by measured inner products."""

    def __init__(self, lists: TagLists, rule: MarginRule) -> None:
        self.lists = lists
        self.rule = rule
        self._theta_K = np.zeros(len(lists.names_K))
        self._moments_2K = np.zeros((2, len(lists.names_K)))
        self._measured_K = np.zeros(len(lists.names_K))

    def learn(self, picture_B: Integers, weight_B: Numbers, inner_B: Numbers) -> None:
        """Descend L_meta by one measurement.

        weight_B: what the samples' losses are multiplied by now, source weights included. inner_B: <grad l_i,
        grad L_meta>; samples where it is not finite are passed over. ln w_i = A(phi)_i + ln s_i - ln Z, s_i of the
        source, with Z such that the mean of w is 1: within the batch the mean of the gradient is taken out, as moving
        all weights at once changes nothing.
        """
        finite_B = np.isfinite(inner_B)
        if not finite_B.any():
            return
        gradient_B = weight_B[finite_B] * weight_gradients(inner_B[finite_B])
        gradient_B -= weight_B[finite_B] * gradient_B.sum() / weight_B[finite_B].sum()
        tags, gradient_K = self.lists.pull_back(picture_B[finite_B], gradient_B, self.log_weights())
        gradient_K = gradient_K * np.log(self.rule.max_factor) * (1 - np.tanh(self._theta_K[tags]) ** 2)
        self._step(tags, gradient_K)

    def _step(self, tags: Integers, gradient_K: Numbers) -> None:
        """Move the tags of this batch by Adam, each by its own count; others stay."""
        self._measured_K[tags] += 1
        first, second = self._moments_2K
        first[tags] = BETA_1 * first[tags] + (1 - BETA_1) * gradient_K
        second[tags] = BETA_2 * second[tags] + (1 - BETA_2) * gradient_K**2
        mean_K = first[tags] / (1 - BETA_1 ** self._measured_K[tags])
        root_K = np.sqrt(second[tags] / (1 - BETA_2 ** self._measured_K[tags]))
        self._theta_K[tags] -= self.rule.learning_rate * (mean_K / (root_K + EPSILON) + DECAY * self._theta_K[tags])

    def log_weights(self) -> Numbers:
        """Return the margins."""
        return np.asarray(np.log(self.rule.max_factor) * np.tanh(self._theta_K))

    def state(self) -> dict[str, Numbers]:
        """Return everything that has to be saved."""
        return {"theta": self._theta_K, "moments": self._moments_2K, "measured": self._measured_K}

    def load(self, state: Mapping[str, Numbers]) -> None:
        """Put a saved state back; raises ValueError where it is of other tags."""
        if state["theta"].shape != self._theta_K.shape:
            raise ValueError(f"the saved state has {len(state['theta'])} tags, these pictures {len(self._theta_K)}")
        self._theta_K, self._measured_K = state["theta"].copy(), state["measured"].copy()
        self._moments_2K = state["moments"].copy()
