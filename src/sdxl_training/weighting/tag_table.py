"""What there is to say of each tag: counts, weight, and during a run how well it is learnt.

Shape legend: P pictures, K tags.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdxl_training.weighting.residuals import TagResiduals
from sdxl_training.weighting.tag_lists import Numbers, TagLists

Flags = NDArray[np.bool_]
LEAST_SEEN = 20  # appearances before a tag is called learnt or not
SURE = 2.0  # standard errors from the other tags' loss, likewise
BY_CHANCE = 0.5 * math.erfc(SURE / math.sqrt(2))  # share of equal tags that chance alone takes so far to one side


@dataclass(frozen=True, slots=True)
class TagRow:
    """One tag. pictures: with it. images: of an epoch. weight: mean weight of those images.

    static_factor: how much the tag itself counts by frequency or override, None where nobody has looked. seen:
    appearances in training. relative_loss: its loss over that of other tags of its category at equal noise levels,
    shrunk to 1 for rare tags; 1 where nothing is known. standard_errors: how far above theirs it is, below 0: under
    it. trend: ln of how that has moved of late, below 0: down.
    """

    tag: str
    category: str
    pictures: int
    images: int
    weight: float
    static_factor: float | None = None
    seen: int = 0
    relative_loss: float = 1.0
    standard_errors: float = 0.0
    trend: float = 0.0


@dataclass(frozen=True, eq=False)
class TagFigures:
    """Columns of all tags, from which rows are made.

    share_P, weight_P: of the pictures. static_K: the tags' log weights. followed: whether losses are noted.
    """

    lists: TagLists
    pictures_K: Numbers
    images_K: Numbers
    weight_K: Numbers
    seen_K: Numbers
    relative_K: Numbers
    standard_errors_K: Numbers
    trend_K: Numbers
    share_P: Numbers
    weight_P: Numbers
    static_K: Numbers | None
    followed: bool

    def row(self, number: int) -> TagRow:
        """Return the row of a tag."""
        return TagRow(
            tag=self.lists.names_K[number],
            category=self.lists.categories[self.lists.category_K[number]],
            pictures=int(self.pictures_K[number]),
            images=int(self.images_K[number]),
            weight=round(float(self.weight_K[number]), 4),
            static_factor=None if self.static_K is None else round(math.exp(self.static_K[number]), 4),
            seen=int(self.seen_K[number]),
            relative_loss=round(math.exp(self.relative_K[number]), 4),
            standard_errors=round(float(self.standard_errors_K[number]), 2),
            trend=round(float(self.trend_K[number]), 4),
        )

    def rows(self, numbers: Sequence[int]) -> tuple[TagRow, ...]:
        """Return the rows of some tags."""
        return tuple(self.row(int(number)) for number in numbers)

    def most_frequent(self, count: int) -> tuple[TagRow, ...]:
        """Return the tags of most images."""
        return self.rows(_largest(self.images_K, count))

    def rarest(self, count: int) -> tuple[TagRow, ...]:
        """Return the tags of fewest images that some image has."""
        return self.rows(_largest(np.where(self.images_K > 0, -self.images_K, -np.inf), count))

    def judged(self) -> Flags:
        """Return which tags have been seen often enough to be called learnt or not."""
        return np.asarray(self.seen_K >= LEAST_SEEN)

    def behind(self) -> Flags:
        """Return which tags surely lose more than others."""
        return np.asarray(self.judged() & (self.standard_errors_K > SURE) & (self.relative_K > 0))

    def ahead(self) -> Flags:
        """Return which tags surely lose less than others."""
        return np.asarray(self.judged() & (self.standard_errors_K < -SURE) & (self.relative_K < 0))

    def not_yet_learned(self, count: int) -> tuple[TagRow, ...]:
        """Return tags that surely lose more than others, the worst first."""
        return self.rows(_largest(np.where(self.behind(), self.relative_K, -np.inf), count))

    def learned(self, count: int) -> tuple[TagRow, ...]:
        """Return tags that surely lose less than others, the best first."""
        return self.rows(_largest(np.where(self.ahead(), -self.relative_K, -np.inf), count))

    def spread_over_frequency(self, count: int) -> list[int]:
        """Return the numbers of so many tags from the commonest to the rarest on several pictures, evenly by rank."""
        frequent = np.lexsort((np.arange(len(self.images_K)), -self.images_K))
        frequent = frequent[self.pictures_K[frequent] > 1]
        places = np.unique(np.linspace(0, len(frequent) - 1, min(count, len(frequent))).astype(int))
        return [int(number) for number in frequent[places]]


def tag_figures(
    lists: TagLists,
    pictures_K: Numbers,
    images_K: Numbers,
    share_P: Numbers,
    weight_P: Numbers,
    residuals: TagResiduals | None = None,
    static_K: Numbers | None = None,
) -> TagFigures:
    """Return the columns. weight_P: the pictures' weights now. residuals: None before training."""
    share_K = lists.count(share_P)
    weight_K = np.divide(lists.count(share_P * weight_P), share_K, out=np.ones_like(share_K), where=share_K > 0)
    seen_K = relative_K = errors_K = trend_K = np.zeros(len(images_K))
    if residuals is not None:
        seen_K = residuals.seen()
        about = (residuals.relative(), residuals.standard_errors(), residuals.trend())
        relative_K, errors_K, trend_K = (np.where(seen_K > 0, value_K, 0.0) for value_K in about)
    return TagFigures(
        lists,
        pictures_K,
        images_K,
        weight_K,
        seen_K,
        relative_K,
        errors_K,
        trend_K,
        share_P,
        weight_P,
        static_K,
        followed=residuals is not None,
    )


def _largest(value_K: Numbers, count: int) -> list[int]:
    """Return the numbers of the largest finite values, equal ones by number."""
    found = heapq.nsmallest(count, np.flatnonzero(np.isfinite(value_K)).tolist(), key=lambda k: (-value_K[k], k))
    return [int(number) for number in found]
