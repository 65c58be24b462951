"""Batches in which every tag is drawn as often as any other, however rare.

Shape legend: P pictures, N records (a picture may have several, in different buckets), K tags.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from sdxl_training.weighting.tag_lists import Integers, Numbers, TagLists

LEAST_PICTURES = 5  # of a tag that is balanced: rarer ones are mostly typing errors


def balanced_odds(lists: TagLists, picture_N: Integers) -> Numbers:
    """Return the probability of each record where first a tag is drawn, evenly, and then a record that has it.

    Tags on fewer than LEAST_PICTURES pictures are not drawn, nor are those of categories that do not count; where that
    leaves none, all records are as likely. A drawn picture brings its other tags along, so common tags are still seen
    more often than rare ones, only not drawn more often.
    """
    records_P = np.bincount(picture_N, minlength=len(lists)).astype(np.float64)
    enough_K = lists.count(np.minimum(records_P, 1.0)) >= LEAST_PICTURES
    drawn_K = enough_K & (lists.share_C[lists.category_K] > 0)
    odds_N = lists.total(np.where(drawn_K, 1 / np.maximum(lists.count(records_P), 1.0), 0.0))[picture_N]
    total = odds_N.sum()
    return odds_N / total if total > 0 else np.full(len(picture_N), 1 / len(picture_N))


def draw_one_bucket(
    odds_N: Numbers, members: Sequence[Integers], counts: Sequence[int], generator: Generator
) -> Integers:
    """Return records of one bucket, with replacement. members, counts: each bucket's records, and how many to draw.

    A bucket is as likely as all its records together, so each draw is of any record by its odds: a rare tag comes as
    often as if buckets did not matter, and where it comes, its bucket is mostly one that holds much of it.
    """
    bucket = int(draw_with_odds(np.array([odds_N[own].sum() for own in members]), 1, generator)[0])
    return members[bucket][draw_with_odds(odds_N[members[bucket]], counts[bucket], generator)]


def draw_with_odds(odds_N: Numbers, count: int, generator: Generator) -> Integers:
    """Return places of `count` draws with these probabilities, with replacement."""
    reach_N = np.cumsum(odds_N)
    places = np.searchsorted(reach_N, generator.random(count) * reach_N[-1], side="right")
    return np.asarray(places.clip(0, len(odds_N) - 1))
