"""How well each tag is learnt: its pictures' losses beside those of all pictures at the same noise level.

A plain mean of a tag's losses would measure which noise levels were drawn. So every loss is first compared with the
running mean of its level; what is left, the residual, is gathered by tag.

Shape legend: G samples of an update, K tags, L bins of noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sdxl_training.weighting.tag_lists import Integers, Numbers, TagLists

LEVELS = 32
LEVEL_DECAY = 0.99  # of a level's mean log loss, per loss
LARGEST = 3.0  # residual: a factor of 20; in gains of captions: spreads
FASTER = 4  # so many times shorter is the memory that the trend compares with
SMALLEST_ERROR = 1e-9  # of a mean residual: rounding alone sets no tag apart


@dataclass(frozen=True, slots=True)
class ResidualRule:
    """half_life: appearances of a tag after which a loss counts half. shrinkage: appearances with residual 0 added."""

    half_life: float = 200.0
    shrinkage: float = 20.0


class TagResiduals:
    """Running residuals of tags; a function of the losses of whole updates, however they are cut among processes."""

    def __init__(self, lists: TagLists, rule: ResidualRule) -> None:
        self.lists = lists
        self.rule = rule
        tags = len(lists.names_K)
        self._level_mean_L, self._level_count_L = np.zeros(LEVELS), np.zeros(LEVELS)
        self._seen_K = np.zeros(tags)
        # Discounted number and sum of residuals, with the long memory and with the short one.
        self._number_2K, self._sum_2K = np.zeros((2, tags)), np.zeros((2, tags))
        # With the long memory: discounted sum of squared residuals, and sum of squared discounts.
        self._squares_K, self._squared_discounts_K = np.zeros(tags), np.zeros(tags)
        self._decay_2 = 0.5 ** (np.array([1.0, FASTER]) / rule.half_life)

    def see(self, picture_G: Integers, level_G: Integers, loss_G: Numbers) -> None:
        """Take note of an update: which picture each sample shows, its bin of noise levels, its unweighted loss.

        picture -1: the caption was dropped, so the loss says nothing of tags. Losses that are not finite or not
        positive are passed over. A level's first losses give it its mean and say nothing of tags either.
        """
        told_G = np.isfinite(loss_G) & (loss_G > 0) & (picture_G >= 0)
        picture_G, level_G, log_G = picture_G[told_G], level_G[told_G], np.log(loss_G[told_G])
        known_G = self._level_count_L[level_G] > 0
        residual_G = np.clip(log_G - self._level_mean_L[level_G], -LARGEST, LARGEST)
        self._gather(picture_G[known_G], residual_G[known_G])
        self._move_levels(level_G, log_G)

    def _gather(self, picture_G: Integers, residual_G: Numbers) -> None:
        tags = [self.lists.of_picture(picture) for picture in picture_G.tolist()]
        if not tags:
            return
        residual_T = np.repeat(residual_G, [len(own) for own in tags])
        tag_U, where_T = np.unique(np.concatenate(tags), return_inverse=True)
        count_U = np.bincount(where_T, minlength=len(tag_U))
        sum_U = np.bincount(where_T, residual_T, minlength=len(tag_U))
        squares_U = np.bincount(where_T, residual_T**2, minlength=len(tag_U))
        keep_2U = self._decay_2[:, None] ** count_U
        self._seen_K[tag_U] += count_U
        self._number_2K[:, tag_U] = keep_2U * self._number_2K[:, tag_U] + count_U
        self._sum_2K[:, tag_U] = keep_2U * self._sum_2K[:, tag_U] + sum_U
        self._squares_K[tag_U] = keep_2U[0] * self._squares_K[tag_U] + squares_U
        self._squared_discounts_K[tag_U] = keep_2U[0] ** 2 * self._squared_discounts_K[tag_U] + count_U

    def _move_levels(self, level_G: Integers, log_G: Numbers) -> None:
        count_L = np.bincount(level_G, minlength=LEVELS)
        mean_L = np.bincount(level_G, log_G, minlength=LEVELS) / np.maximum(count_L, 1)
        self._level_count_L += count_L
        # A running mean until the decay takes over: the first losses are not drowned in the zero it starts from.
        keep_L = np.minimum(1 - count_L / np.maximum(self._level_count_L, 1), LEVEL_DECAY**count_L)
        self._level_mean_L = np.where(
            count_L > 0, keep_L * self._level_mean_L + (1 - keep_L) * mean_L, self._level_mean_L
        )

    def seen(self) -> Numbers:
        """Return how often each tag has been seen."""
        return self._seen_K.copy()

    def relative(self) -> Numbers:
        """Return z of each tag: its shrunk mean residual less the mean of its category, weighted by appearances.

        exp(z) is how many times the loss of other pictures with tags of that category. Tags that have not been seen
        have the value of a tag with residual 0, less the mean.
        """
        number_K = self._number_2K[0]
        return self._centred(_share(self._sum_2K[0], number_K + self.rule.shrinkage), number_K)

    def standard_errors(self) -> Numbers:
        """Return how many standard errors each tag's mean residual, not shrunk, lies above the mean of its category.

        A standard error is sigma / sqrt(n): sigma of the tag's own residuals, n the number of equal appearances that
        would vary as much as its discounted ones. 0 for tags that have been seen less than twice.
        """
        number_K = self._number_2K[0]
        mean_K = _share(self._sum_2K[0], number_K)
        effective_K = _share(number_K**2, self._squared_discounts_K)
        variance_K = np.maximum(_share(self._squares_K, number_K) - mean_K**2, 0.0)
        error_K = np.sqrt(_share(variance_K, effective_K - 1))  # n - 1: the variance is about the tag's own mean
        above_K = self._centred(mean_K, number_K) / np.maximum(error_K, SMALLEST_ERROR)
        return np.where(effective_K > 1, above_K, 0.0)

    def trend(self) -> Numbers:
        """Return how z has lately moved; below 0 a tag catches up, and where nothing moves it is 0.

        That is the mean residual of the short memory less that of the long one, shrunk like z by what is in the short
        one, less the mean of the category.
        """
        number_K = self._number_2K[1]
        long_K, short_K = _share(self._sum_2K, self._number_2K)
        return self._centred((short_K - long_K) * _share(number_K, number_K + self.rule.shrinkage), number_K)

    def _centred(self, value_K: Numbers, number_K: Numbers) -> Numbers:
        """Return the values less the mean of each category, weighted by the numbers."""
        category_K = self.lists.category_K
        sum_C, number_C = (np.bincount(category_K, of_K).astype(np.float64) for of_K in (number_K * value_K, number_K))
        return np.asarray(value_K - _share(sum_C, number_C)[category_K])

    def log_weights(self, strength: float, max_factor: float) -> Numbers:
        """Return D_k = clip(strength z_k, +-ln max_factor); 0 for tags that have not been seen."""
        limit = np.log(max_factor)
        return np.where(self._seen_K > 0, np.clip(strength * self.relative(), -limit, limit), 0.0)

    def state(self) -> dict[str, Numbers]:
        """Return everything that has to be saved."""
        return {
            "level_mean": self._level_mean_L,
            "level_count": self._level_count_L,
            "seen": self._seen_K,
            "number": self._number_2K,
            "sum": self._sum_2K,
            "squares": self._squares_K,
            "squared_discounts": self._squared_discounts_K,
        }

    def load(self, state: Mapping[str, Numbers]) -> None:
        """Put a saved state back; raises ValueError where it is of other tags."""
        if state["seen"].shape != self._seen_K.shape:
            raise ValueError(f"the saved state has {len(state['seen'])} tags, these pictures {len(self._seen_K)}")
        self._level_mean_L, self._level_count_L = state["level_mean"].copy(), state["level_count"].copy()
        self._seen_K = state["seen"].copy()
        self._number_2K, self._sum_2K = state["number"].copy(), state["sum"].copy()
        self._squares_K, self._squared_discounts_K = state["squares"].copy(), state["squared_discounts"].copy()


def _share(sum_K: Numbers, number_K: Numbers) -> Numbers:
    """Return sum / number, 0 where the number is 0."""
    return np.divide(sum_K, number_K, out=np.zeros_like(sum_K), where=number_K > 0)
