"""Captions are searched as columns; what is found is what reading each one would find."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sdxl_training.assemble import captions as checks
from sdxl_training.assemble.captions import refuse_huge_weights
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import CaptionRules, whole_captions
from sdxl_training.data.pictures import SourceRules
from sdxl_training.data.text_search import rows_with
from sdxl_training.records import UserError
from tests.indexed import index_of, pictures_with

texts = st.lists(
    st.sampled_from(["(", ")", "[", "]", "\\", ":", "1", "20", ".", ",", " ", "\v", "\n", "a", ":3)", ":20)", "(a"]),
    max_size=12,
).map("".join)
rows = st.lists(
    st.fixed_dictionaries({"captions": st.lists(texts, min_size=1, max_size=2), "tags": st.lists(texts, max_size=2)}),
    min_size=1,
    max_size=4,
)


def refused(caption: str) -> bool:
    try:
        parse_weights(caption)
    except UserError:
        return True
    return False


def named(rules: CaptionRules, rows: list[dict[str, Any]], kind: str) -> set[str]:
    """Return the pictures that are refused."""
    pictures = pictures_with(rows, SourceRules(kind=kind, weights=True))
    try:
        refuse_huge_weights((rules,), pictures, np.arange(len(rows)))
    except UserError as error:
        return {line.split(":")[0] for line in str(error).splitlines()}
    return set()


@given(rows=rows, kind=st.sampled_from(["tags", "prose"]), front=st.sampled_from([(), ("b",)]))
@example([{"captions": ["x" + "(" * 25 + "a" + ")" * 25], "tags": []}], "prose", ())
@example([{"captions": ["((a:1.9) (b) c:1), ([(a:3.4)]:3.4)"], "tags": []}], "tags", ())
def test_every_weight_that_is_too_large_is_found(rows, kind, front):
    rules = CaptionRules(kind=kind, weights=True, templates=("{caption} {tags}", "{tags}"), front=front)
    pictures = pictures_with(rows, SourceRules(kind=kind, weights=True))
    expected = {
        record.path
        for record in pictures
        if any(refused(caption) for caption in whole_captions(record.captions, rules, record.tags))
    }
    assert named(rules, rows, kind) == expected


@given(rows=rows, template=st.sampled_from(["({caption}:9.9)", "({caption})", "{caption}:20)"]))
def test_brackets_around_captions_count_too(rows, template):
    rules = CaptionRules(kind="prose", weights=True, templates=(template,), front=("(b",))
    pictures = pictures_with(rows, SourceRules(kind="prose", weights=True))
    if any(refused(caption) for caption in whole_captions(["a"], rules)):
        with pytest.raises(UserError, match=r"data\.captions\.templates and data\.sources\.0\.add_tags: caption"):
            refuse_huge_weights((rules,), pictures, np.arange(len(rows)))
        return
    expected = {record.path for record in pictures if any(map(refused, whole_captions(record.captions, rules)))}
    assert named(rules, rows, "prose") == expected


def test_captions_without_such_a_weight_are_not_read(monkeypatch):
    monkeypatch.setattr(checks, "parse_weights", None)
    rows = [{"captions": ["miku (vocaloid), (red hair:1.3), at 12:30 [a]"]}, {"captions": ["(a), (b:9.9)"], "tags": []}]
    refuse_huge_weights((CaptionRules(weights=True),), pictures_with(rows, SourceRules(weights=True)), np.arange(2))


def test_pictures_that_take_no_part_are_not_refused():
    pictures = pictures_with([{"captions": ["(a:2023)"]}, {"captions": ["b"]}], SourceRules(weights=True))
    rules = (CaptionRules(weights=True),)
    refuse_huge_weights(rules, pictures, np.array([1]))
    with pytest.raises(UserError, match="a weight of 2023"):
        refuse_huge_weights(rules, pictures, np.array([0, 1]))


def test_rows_are_found_by_captions_and_by_tags():
    table = index_of([{"captions": ["x", "a cat"]}, {"tags": ["cats"]}, {}, {"captions": [], "tags": [None, "dog"]}])
    assert rows_with(table, partial(pc.match_substring, pattern="cat")).tolist() == [True, True, False, False]


def test_without_emphasis_no_picture_is_looked_for(monkeypatch):
    monkeypatch.setattr(checks, "rows_with", None)
    refuse_huge_weights((CaptionRules(),), pictures_with([{"captions": ["(a:20)"]}]), np.arange(1))
