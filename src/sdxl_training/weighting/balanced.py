"""Batches in which rare tags are as frequent as common ones.

Shape legend: P pictures, M pictures to choose from, K tags.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from sdxl_training.weighting.tag_lists import Integers, Numbers, TagLists

LEAST_PICTURES = 5  # of a tag that is balanced: rarer ones are mostly typing errors


def balanced_odds(lists: TagLists, picture_M: Integers) -> Numbers:
    """Return the probability of each picture where first a tag is drawn, evenly, and then a picture that has it.

    Tags on fewer than LEAST_PICTURES of these pictures are not drawn; where that leaves none, all pictures are as
    likely.
    """
    member_P = np.bincount(picture_M, minlength=len(lists)).astype(np.float64)
    count_K = lists.count(member_P)
    drawn_K = count_K >= LEAST_PICTURES
    odds_M = lists.total(np.where(drawn_K, 1 / np.maximum(count_K, 1), 0.0))[picture_M]
    total = odds_M.sum()
    return odds_M / total if total > 0 else np.full(len(picture_M), 1 / len(picture_M))


def draw_with_odds(odds_M: Numbers, count: int, generator: Generator) -> Integers:
    """Return places of `count` draws with these probabilities, with replacement."""
    reach_M = np.cumsum(odds_M)
    places = np.searchsorted(reach_M, generator.random(count) * reach_M[-1], side="right")
    return np.asarray(places.clip(0, len(odds_M) - 1))
