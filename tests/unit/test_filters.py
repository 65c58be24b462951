"""Filters by tag: the same rows as reading every picture's tags would give, and few are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.filters import Filter
from sdxl_training.data.pictures import IndexedSource, SourceRules
from tests.indexed import Nowhere, index_of

words = st.sampled_from(["red", "red hair", "(red:1.3)", "hair", "\\(a\\)", "(red, hair:1.2)", "", " ", "x", "a (b)"])
captions = st.lists(words, min_size=1, max_size=3).map(",".join)
row = st.fixed_dictionaries({"captions": st.none() | st.lists(captions, max_size=2), "tags": st.lists(words)})
tags = st.lists(st.sampled_from(["red", "red hair", "hair", "(a)", "a b", "a (b)", "(red:1.3)"]), max_size=2).map(tuple)


def source_of(rows, **rules) -> IndexedSource:
    return IndexedSource(Nowhere(), SourceRules(missing="empty", **rules), index_of(rows))


@given(
    rows=st.lists(row, min_size=1, max_size=4),
    any_tag=tags,
    no_tag=tags,
    weights=st.booleans(),
    lines=st.booleans(),
    kind=st.sampled_from(["tags", "prose"]),
)
def test_filters_by_tag_are_those_of_all_tags(rows, any_tag, no_tag, **rules):
    source = source_of(rows, only=Filter(any_tag=any_tag, no_tag=no_tag), **rules)
    expected = []
    for number in range(len(rows)):
        own = {*source.tags(number), *(source.plain_tags(number) if rules["weights"] else ())}
        expected.append((not any_tag or bool(own & set(any_tag))) and not own & set(no_tag))
    assert source.usable().tolist() == expected


@pytest.mark.parametrize(
    ("caption", "passes"),
    [
        ("(red hair:1.3), x", False),
        ("x, ((red) hair)", False),
        ("(x, red hair:1.1)", False),
        ("[red hair]", False),
        ("red hair", False),
        ("(red hair band:1.3)", True),
        (r"red \(hair\)", True),
    ],
)
def test_emphasis_does_not_hide_a_tag(caption, passes):
    rows = [{"captions": [caption]}]
    assert source_of(rows, weights=True, only=Filter(no_tag=("red hair",))).usable().tolist() == [passes]
    assert source_of(rows, weights=True, only=Filter(any_tag=("red hair",))).usable().tolist() == [not passes]


def test_tags_are_read_only_where_one_may_be():
    table = index_of([{"captions": ["a cat, dog"]}, {"captions": ["dog"]}, {"tags": ["cat"]}])
    read = []

    def tags(row):
        read.append(row)
        return ("cat",)

    everything = np.ones(3, bool)
    assert Filter(no_tag=("cat",)).passes(table, everything, tags).tolist() == [False, True, False]
    assert Filter(any_tag=("cat",)).passes(table, everything, tags).tolist() == [True, False, True]
    assert read == [0, 2] * 2
