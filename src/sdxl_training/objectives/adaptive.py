"""Dynamic noise scheduling: levels whose loss is larger are drawn more often, and count less for it.

Levels are drawn through a uniform number u in [0, 1). This module cuts that interval into bins of equal probability
and draws bin k with probability p_k proportional to the root of the running second moment of its weighted loss, which
is the importance sampling that minimises the variance of the loss (Nichol & Dhariwal 2021, section 3.3). The sample is
then multiplied by (1 / K) / p_k, so that the expected loss and its gradient stay those of the base density.

Shape legend: B samples, K bins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_training.objectives.densities import quantile


@dataclass(frozen=True)
class AdaptiveSettings:
    """Knobs of `AdaptiveLevels`.

    bins: number of bins of equal base probability. warmup_samples: losses every bin must have seen before any is
    favoured. decay: share of the running moment that survives one more loss in its bin. uniform_share: share of draws
    that stay uniform, so no sample counts more than 1 / uniform_share. every_steps: steps between two refreshes.
    """

    bins: int
    warmup_samples: int
    decay: float
    uniform_share: float
    every_steps: int


class PlainLevels:
    """The base density itself."""

    def remap(self, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the draws as they are, and importance weights of 1."""
        return uniform_B, torch.ones_like(uniform_B)

    def see(self, uniform_B: Tensor, losses_B: Tensor) -> None:
        """Do nothing."""

    def after_update(self, step: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class AdaptiveLevels:
    """The base density with probabilities that follow the loss. All ranks hold the same state.

    Losses gather on the device; probabilities are read back only every `every_steps` updates. The moments move by the
    losses of whole updates, so the state does not depend on how a global batch is cut.
    """

    def __init__(self, settings: AdaptiveSettings, device: torch.device) -> None:
        self.settings = settings
        self._seen_2K = torch.zeros(2, settings.bins, device=device)
        self._moment_K = torch.zeros(settings.bins, device=device)
        self._count_K = torch.zeros(settings.bins, device=device)
        self._probability_K = torch.full((settings.bins,), 1 / settings.bins, dtype=torch.float64)

    def remap(self, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws in which bin k has probability p_k, and the importance weight (1 / K) / p_k of each."""
        drawn_B = quantile(self._probability_K, uniform_B)
        return drawn_B, 1 / (self.settings.bins * self._probability_K[self._bin(drawn_B)])

    def see(self, uniform_B: Tensor, losses_B: Tensor) -> None:
        """Take note of each sample's weighted loss, importance apart; what is not finite is not seen."""
        bin_B = self._bin(uniform_B).to(losses_B.device, non_blocking=True)
        squared_B = losses_B.detach().float().square()
        finite_B = squared_B.isfinite()
        noted_2B = torch.stack([torch.where(finite_B, squared_B, 0.0), finite_B.float()])
        self._seen_2K.index_add_(1, bin_B, noted_2B)

    def after_update(self, step: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Move the moments by what update number `step` has seen on all ranks; refresh at the interval."""
        sum_K, count_K = sum_over_ranks(self._seen_2K)
        self._seen_2K = torch.zeros_like(self._seen_2K)
        self._count_K = self._count_K + count_K
        # A running mean until `decay` takes over: the first losses are not drowned in the zero it starts from.
        keep_K = torch.minimum(1 - count_K / self._count_K.clamp(min=1), self.settings.decay**count_K)
        mean_K = sum_K / count_K.clamp(min=1)
        self._moment_K = torch.where(count_K > 0, keep_K * self._moment_K + (1 - keep_K) * mean_K, self._moment_K)
        if (step + 1) % self.settings.every_steps == 0:
            self._refresh()

    def probabilities(self) -> Tensor:
        """Return each bin's probability, float64 on the CPU."""
        return self._probability_K.clone()

    def state(self) -> dict[str, Tensor]:
        """Return everything that has to be saved between two updates."""
        return {"moment": self._moment_K, "count": self._count_K, "probability": self._probability_K}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved state back; raises ValueError for another number of bins."""
        if len(state["probability"]) != self.settings.bins:
            raise ValueError(f"the saved state has {len(state['probability'])} bins, this density {self.settings.bins}")
        device = self._moment_K.device
        self._moment_K, self._count_K = state["moment"].to(device), state["count"].to(device)
        self._probability_K = state["probability"].cpu()

    def forget(self) -> None:
        """Drop what has been seen since the last update, as after a rehearsal."""
        self._seen_2K = torch.zeros_like(self._seen_2K)

    def _bin(self, uniform_B: Tensor) -> Tensor:
        return (uniform_B * self.settings.bins).long().clamp(0, self.settings.bins - 1)

    def _refresh(self) -> None:
        moment_K, count_K = self._moment_K.double().cpu(), self._count_K.cpu()
        root_K = moment_K.sqrt()
        if count_K.min() < self.settings.warmup_samples or not root_K.sum() > 0:
            return
        share = self.settings.uniform_share
        self._probability_K = share / self.settings.bins + (1 - share) * root_K / root_K.sum()


LevelDraw = PlainLevels | AdaptiveLevels
