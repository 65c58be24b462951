"""Pictures with tags as tests write them, and what a plain Python loop makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from sdxl_training.weighting.tag_lists import TagLists

Written = Sequence[Sequence[str]]
"""The tags of each picture."""

CATEGORY = {"a": "one", "b": "one", "c": "two", "d": "two", "e": "two", "f": "three", "g": "four"}
written_tags = st.lists(st.lists(st.sampled_from(sorted(CATEGORY)), unique=True), min_size=1, max_size=12)
tag_values = st.fixed_dictionaries(dict.fromkeys(sorted(CATEGORY), st.floats(-3, 3)))
category_shares = st.dictionaries(
    st.sampled_from(sorted(set(CATEGORY.values()))), st.sampled_from([0.0, 0.25, 1.0, 3.0])
)


def lists_of(
    pictures: Written,
    category: Mapping[str, str] | None = None,
    shares: Mapping[str, float] | None = None,
    emphasis: float = 0.0,
    names: Sequence[str] | None = None,
) -> TagLists:
    """Return these pictures' tags. category: of each tag, by default one for all. names: more tags than are used."""
    names = sorted({tag for own in pictures for tag in own} | set(names or ()))
    number = {name: i for i, name in enumerate(names)}
    offsets = np.cumsum([0, *(len(own) for own in pictures)])
    tag_T = np.array([number[tag] for own in pictures for tag in own], np.int32)
    category_of = [(category or {}).get(name, "general") for name in names]
    return TagLists.of(names, category_of, offsets, tag_T, dict(shares or {}), emphasis)


def values_of(lists: TagLists, value: Mapping[str, float]) -> np.ndarray:
    """Return the values of these lists' tags in their order."""
    return np.array([value[name] for name in lists.names_K], np.float64)


def spread_by_hand(
    own: Sequence[str],
    value: Mapping[str, float],
    category: Mapping[str, str] | None = None,
    shares: Mapping[str, float] | None = None,
    emphasis: float = 0.0,
) -> float:
    """Return A(f) of one picture as section 8.3 of the project's notes on the science writes it."""
    groups: dict[str, list[float]] = {}
    for tag in own:
        groups.setdefault((category or {}).get(tag, "general"), []).append(value[tag])
    share = {name: (shares or {}).get(name, 1.0) for name in groups}
    if not sum(share.values()):
        return 0.0

    def mean(values: list[float]) -> float:
        if not emphasis:
            return sum(values) / len(values)
        return math.log(sum(math.exp(emphasis * one) for one in values) / len(values)) / emphasis

    return sum(share[name] * mean(values) for name, values in groups.items()) / sum(share.values())
