"""How far a picture's caption is believed: whether it helps the model, beside other pictures with the same tags.

The probe compares a sample's loss with and without its caption at the same noise and level: g = ln loss(no caption) -
ln loss(caption) estimates how likely the caption makes the picture, the diffusion analogue of a classifier's log
p(label | picture). A picture whose g is among the lowest of its tags counts less. The idea of trusting labels by rank
within their class is that of Jiang et al. (TPAMI 45(12), arXiv:2211.12506), whose label corrector this is inspired by;
here nothing is relabelled.

Shape legend: P pictures, B probed samples, T appearances of tags on probed pictures, L bins of noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdxl_training.weighting.residuals import LARGEST, LEVEL_DECAY, LEVELS
from sdxl_training.weighting.tag_lists import Integers, Numbers, TagLists

FEW = 4.0  # probes with the mean gain that each picture has beforehand: else those probed once would be at both ends


@dataclass(frozen=True, slots=True)
class TrustRule:
    """Knobs of `trust_of_ranks`; min_probed: probed pictures a tag needs before it judges any."""

    least: float = 0.3
    quantile: float = 0.98
    width: float = 0.005
    min_probed: int = 50


def trust_of_ranks(rank_B: Numbers, rule: TrustRule) -> Numbers:
    """Return rho = 1 - (1 - least) sigmoid((q - quantile) / width); q: rank of -g in 0 to 1, 1 helps least."""
    steepness_B = np.clip((rank_B - rule.quantile) / rule.width, -700, 700)
    return np.asarray(1 - (1 - rule.least) / (1 + np.exp(-steepness_B)))


class CaptionGains:
    """Mean gain of each probed picture's caption, in units of the spread at its noise level, less sure where few."""

    def __init__(self, lists: TagLists, rule: TrustRule) -> None:
        self.lists = lists
        self.rule = rule
        self._sum_P, self._number_P = np.zeros(len(lists)), np.zeros(len(lists))
        self._moments_3L = np.zeros((3, LEVELS))  # discounted number, sum and sum of squares

    def see(self, picture_B: Integers, level_B: Integers, gain_B: Numbers) -> None:
        """Take note of gains; what is not finite is passed over, and so are a level's first two.

        None counts more than LARGEST spreads: a level's first spread may be tiny by chance.
        """
        finite_B = np.isfinite(gain_B)
        picture_B, level_B, gain_B = picture_B[finite_B], level_B[finite_B], gain_B[finite_B]
        number_L, sum_L, square_L = self._moments_3L
        mean_L = sum_L / np.maximum(number_L, 1e-12)
        deviation_L = np.sqrt(np.maximum(square_L / np.maximum(number_L, 1e-12) - mean_L**2, 0.0))
        known_B = deviation_L[level_B] > 0
        standard_B = (gain_B - mean_L[level_B])[known_B] / deviation_L[level_B][known_B]
        np.add.at(self._sum_P, picture_B[known_B], np.clip(standard_B, -LARGEST, LARGEST))
        np.add.at(self._number_P, picture_B[known_B], 1.0)
        new_3L = np.stack([np.bincount(level_B, gain_B**power, minlength=LEVELS) for power in range(3)])
        self._moments_3L = LEVEL_DECAY ** new_3L[0] * self._moments_3L + new_3L

    def log_trust(self) -> Numbers:
        """Return ln rho of each picture; 0 for those that have not been probed, or whose tags are on too few.

        A picture's rank is the mean of its ranks among the probed pictures of each of its tags.
        """
        probed = np.flatnonzero(self._number_P)
        rank_P, judged_P = np.zeros(len(self.lists)), np.zeros(len(self.lists))
        if not len(probed):
            return rank_P
        tags = [self.lists.of_picture(picture) for picture in probed.tolist()]
        lengths = [len(own) for own in tags]
        picture_T, tag_T = np.repeat(probed, lengths), np.concatenate(tags)
        loss_T = -(self._sum_P / (self._number_P + FEW))[picture_T]
        order_T = np.lexsort((picture_T, loss_T, tag_T))
        counts_K = np.bincount(tag_T, minlength=len(self.lists.names_K))
        first_K = np.cumsum(counts_K) - counts_K
        sorted_tag_T, sorted_picture_T = tag_T[order_T], picture_T[order_T]
        rank_T = (np.arange(len(tag_T)) - first_K[sorted_tag_T] + 0.5) / counts_K[sorted_tag_T]
        judging_T = counts_K[sorted_tag_T] >= self.rule.min_probed
        np.add.at(rank_P, sorted_picture_T[judging_T], rank_T[judging_T])
        np.add.at(judged_P, sorted_picture_T[judging_T], 1.0)
        log_P = np.zeros(len(self.lists))
        judged = judged_P > 0
        log_P[judged] = np.log(trust_of_ranks(rank_P[judged] / judged_P[judged], self.rule))
        return log_P

    def state(self) -> dict[str, Numbers]:
        """Return everything that has to be saved."""
        return {"gain_sum": self._sum_P, "gain_number": self._number_P, "gain_moments": self._moments_3L}

    def load(self, state: Mapping[str, Numbers]) -> None:
        """Put a saved state back; raises ValueError where it is of other pictures."""
        if state["gain_sum"].shape != self._sum_P.shape:
            raise ValueError(f"the saved state has {len(state['gain_sum'])} pictures, here are {len(self._sum_P)}")
        self._sum_P, self._number_P = state["gain_sum"].copy(), state["gain_number"].copy()
        self._moments_3L = state["gain_moments"].copy()
