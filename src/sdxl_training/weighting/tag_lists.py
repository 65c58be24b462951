"""The tags of many pictures, and how values of tags become values of pictures.

Shape legend: P pictures, K tags, C categories, T appearances (a tag on a picture), G groups (tags of one category on
one picture), B some pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Numbers = NDArray[np.float64]
PICTURES_AT_ONCE = 2**16  # so that what is in between takes little memory however many pictures there are


@dataclass(frozen=True, slots=True)
class Groups:
    """Tags of some pictures, those of one picture and category together.

    tag_T: tag of each appearance. start_G: where a group begins. picture_G: its picture, counted from the first of
    these. share_G: how much its category counts in the picture, all of a picture's groups together 1.
    """

    tag_T: Integers
    start_G: Integers
    picture_G: Integers
    share_G: Numbers

    def lengths(self) -> Integers:
        """Return how many tags each group has."""
        return np.diff(self.start_G, append=len(self.tag_T))

    def sums(self, value_T: Numbers) -> Numbers:
        """Return the sum of each group's values."""
        return np.asarray(np.add.reduceat(value_T, self.start_G)) if len(value_T) else value_T


@dataclass(frozen=True, eq=False)
class TagLists:
    """Which tags each picture has, once each.

    names_K: tags, in order. category_K: number of each tag's category in `categories`. share_C: how much a category
    counts. offsets: of length P + 1; tag_T[offsets[p] : offsets[p + 1]] are picture p's tags, int32, by category.
    emphasis: tau of `spread`.
    """

    names_K: Sequence[str]
    categories: Sequence[str]
    category_K: Integers
    share_C: Numbers
    offsets: Integers
    tag_T: NDArray[np.int32]
    emphasis: float = 0.0

    @classmethod
    def of(
        cls,
        names_K: Sequence[str],
        category_of: Sequence[str],
        offsets: Integers,
        tag_T: NDArray[np.int32],
        shares: dict[str, float] | None = None,
        emphasis: float = 0.0,
    ) -> TagLists:
        """Bring each picture's tags into the order of their categories.

        category_of: the category of each tag. shares: of categories, 1 where nothing is said. tag_T is changed.
        """
        categories, category_K = np.unique(np.asarray(category_of, dtype=object), return_inverse=True)
        share_C = np.array([(shares or {}).get(name, 1.0) for name in categories], dtype=np.float64)
        for first, last in _slices(len(offsets) - 1):
            part = slice(offsets[first], offsets[last])
            group_T = np.repeat(np.arange(last - first) * len(categories), np.diff(offsets[first : last + 1]))
            group_T += category_K[tag_T[part]]
            tag_T[part] = np.sort(group_T * len(names_K) + tag_T[part]) % len(names_K)
        return cls(names_K, categories.tolist(), category_K.astype(np.int64), share_C, offsets, tag_T, emphasis)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.offsets) - 1

    def only(self, matters_K: NDArray[np.bool_]) -> TagLists:
        """Return the same pictures and names with nothing but these tags on the pictures."""
        kept_T = matters_K[self.tag_T]
        offsets = np.concatenate([[0], np.cumsum(kept_T, dtype=np.int64)])[self.offsets]
        return replace(self, offsets=offsets, tag_T=self.tag_T[kept_T])

    def of_picture(self, picture: int) -> NDArray[np.int32]:
        """Return the tags of a picture."""
        return self.tag_T[self.offsets[picture] : self.offsets[picture + 1]]

    def count(self, number_P: Numbers | Integers | None = None) -> Numbers:
        """Return for each tag the sum of the numbers of its pictures; without numbers, how many it has."""
        count_K = np.zeros(len(self.names_K))
        for first, last in _slices(len(self)):
            part = slice(self.offsets[first], self.offsets[last])
            lengths = np.diff(self.offsets[first : last + 1])
            number_T = None if number_P is None else np.repeat(np.asarray(number_P[first:last], np.float64), lengths)
            count_K += np.bincount(self.tag_T[part], number_T, minlength=len(count_K))
        return count_K

    def total(self, value_K: Numbers) -> Numbers:
        """Return of each picture the sum of its tags' values, whatever their categories."""
        total_P = np.zeros(len(self))
        for first, last in _slices(len(self)):
            part = slice(self.offsets[first], self.offsets[last])
            picture_T = np.repeat(np.arange(last - first), np.diff(self.offsets[first : last + 1]))
            total_P[first:last] = np.bincount(picture_T, value_K[self.tag_T[part]], minlength=last - first)
        return total_P

    def spread(self, value_K: Numbers) -> Numbers:
        """Return A(f) of each picture: the mean over its categories of the mean of its tags' values.

        With an emphasis tau > 0 the mean of tags is (1 / tau) ln mean exp(tau f), which leans to the largest value. A
        picture without tags, or with tags of categories that do not count, has 0.
        """
        spread_P = np.zeros(len(self))
        for first, last in _slices(len(self)):
            groups = self._groups(slice(self.offsets[first], self.offsets[last]), self.offsets[first : last + 1])
            value_G = self._mean(value_K[groups.tag_T], groups)
            spread_P[first:last] = np.bincount(groups.picture_G, groups.share_G * value_G, minlength=last - first)
        return spread_P

    def pull_back(self, pictures: Integers, gradient_B: Numbers, value_K: Numbers) -> tuple[Integers, Numbers]:
        """Return tags and the sum over these pictures of gradient_b dA_b / df of each, at the values value_K."""
        lengths = self.offsets[pictures + 1] - self.offsets[pictures]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        place_T = np.arange(offsets[-1]) + np.repeat(self.offsets[pictures] - offsets[:-1], lengths)
        groups = self._groups(place_T, offsets)
        grown_T, _ = self._grown(value_K[groups.tag_T], groups)
        per_group_G = groups.share_G * gradient_B[groups.picture_G] / groups.sums(grown_T)
        tags, where_T = np.unique(groups.tag_T, return_inverse=True)
        return tags, _sum(where_T, grown_T * np.repeat(per_group_G, groups.lengths()), len(tags))

    def _groups(self, places: slice | Integers, offsets: Integers) -> Groups:
        """Return the groups of pictures whose tags stand at these places of tag_T, at `offsets` among each other."""
        tag_T = self.tag_T[places].astype(np.int64)
        category_T = self.category_K[tag_T]
        picture_T = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        begins_T = np.ones(len(tag_T), bool)
        begins_T[1:] = (picture_T[1:] != picture_T[:-1]) | (category_T[1:] != category_T[:-1])
        start_G = np.flatnonzero(begins_T)
        picture_G, share_G = picture_T[start_G], self.share_C[category_T[start_G]]
        total_P = np.bincount(picture_G, share_G, minlength=len(offsets) - 1)[picture_G]
        share_G = np.divide(share_G, total_P, out=np.zeros_like(share_G), where=total_P > 0)
        return Groups(tag_T, start_G, picture_G, share_G)

    def _mean(self, value_T: Numbers, groups: Groups) -> Numbers:
        if not self.emphasis:
            return groups.sums(value_T) / groups.lengths()
        grown_T, largest_G = self._grown(value_T, groups)
        return np.asarray(largest_G + np.log(groups.sums(grown_T) / groups.lengths()) / self.emphasis)

    def _grown(self, value_T: Numbers, groups: Groups) -> tuple[Numbers, Numbers]:
        """Return exp(tau (f - largest f of the group)), and that largest one: nothing can overflow, or vanish whole."""
        largest_G = np.maximum.reduceat(value_T, groups.start_G) if len(value_T) else value_T
        return np.exp(self.emphasis * (value_T - np.repeat(largest_G, groups.lengths()))), largest_G


def _sum(place_T: Integers, value_T: Numbers, places: int) -> Numbers:
    return np.bincount(place_T, value_T, minlength=places).astype(np.float64)


def _slices(pictures: int) -> Iterator[tuple[int, int]]:
    for first in range(0, pictures, PICTURES_AT_ONCE):
        yield first, min(first + PICTURES_AT_ONCE, pictures)
