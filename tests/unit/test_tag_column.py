"""Tags of all pictures as columns: what a plain loop over the captions finds, each tag once a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data import tag_column as module
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import CaptionRules, draw_caption
from sdxl_training.data.filters import Filter
from sdxl_training.data.listing import pictures_of
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.tag_column import TagColumn, tag_column

PIECES = [
    "a",
    "B",
    "ab",
    "Ä",
    "é",
    "東",
    "ß",
    "1girl",
    " ",
    "  ",
    "\t",
    "\xa0",
    "　",
    "\x1c",
    "_",
    ":",
    ":d",
    ",",
    ",,",
]
BRACKETS = ["(", ")", "[", "]", ":1.2)", "\\(", "\\)", "\\"]
texts = st.lists(st.sampled_from([*PIECES, *BRACKETS, "|", "\n"]), max_size=8).map("".join)
Row = tuple[list[str] | None, list[str] | None]
rows = st.lists(
    st.tuples(st.none() | st.lists(texts, max_size=2), st.none() | st.lists(texts, max_size=3)), min_size=1, max_size=7
)
rules = st.builds(
    SourceRules,
    separator=st.sampled_from([",", "|", ", ", ",,", " "]),
    kind=st.sampled_from(["tags", "tags", "prose"]),
    weights=st.booleans(),
    lines=st.booleans(),
    missing=st.just("empty"),
)
sources = st.lists(
    st.tuples(rules, rows, st.lists(st.sampled_from(["a", "New", "B", " x ", "(a:1.2)"]), max_size=2)),
    min_size=1,
    max_size=3,
)


class Place:
    """A source of which only names are asked."""

    def path(self, name: str) -> str:
        return name


@pytest.fixture(autouse=True, scope="module")
def slices() -> Iterator[None]:
    """Three rows at a time, so that most examples are cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS_AT_ONCE", 3)
        yield


def pictures(*described: tuple[SourceRules, Sequence[Row]]) -> Pictures:
    opened = []
    for number, (how, content) in enumerate(described):
        table = pictures_of(
            {
                "file": f"{number}-{i}",
                "name": f"{number}-{i}",
                "height": 64,
                "width": 64 + i,
                "captions": captions,
                "tags": tags,
            }
            for i, (captions, tags) in enumerate(content)
        )
        opened.append(IndexedSource(Place(), how, table))  # type: ignore[arg-type]
    return Pictures(opened)


def written(column: TagColumn) -> list[list[str]]:
    """Return each picture's tags; on the way it is checked that the column is in order."""
    names = list(column.names_K)
    assert names == sorted(set(names))
    assert column.tag_T.dtype == np.int32
    assert column.offsets[0] == 0
    assert column.offsets[-1] == len(column.tag_T)
    own = [column.tag_T[first:last].tolist() for first, last in zip(column.offsets, column.offsets[1:], strict=False)]
    assert all(numbers == sorted(set(numbers)) for numbers in own)
    assert set(range(len(names))) == {number for numbers in own for number in numbers}, "every name is some picture's"
    return [[names[number] for number in numbers] for numbers in own]


def by_hand(found: Pictures, added: Sequence[Sequence[str]]) -> list[list[str]]:
    expected = []
    for number, row in zip(found.source_P.tolist(), found.row_P.tolist(), strict=True):
        source = found.sources[number]
        tags = [*source.tags(row), *added[number]]
        if source.rules.weights:
            plain = ["".join(text for text, _ in parse_weights(tag)) for tag in tags]
            tags = [part for text in plain for part in text.split(source.rules.separator)]
        folded = {tag.strip().lower() for tag in tags}
        expected.append(sorted(folded - {""}))
    return expected


@given(described=sources)
def test_tags_are_those_of_a_loop_over_the_pictures(described):
    found = pictures(*((how, content) for how, content, _ in described))
    added = [own for _, _, own in described]
    assert written(tag_column(found, added)) == by_hand(found, added)


@given(captions=st.lists(st.none() | texts, min_size=1, max_size=7), separator=st.sampled_from([",", "|"]))
def test_they_are_the_tags_that_training_shows(captions, separator):
    """Where nothing is dropped, the caption of a visit says these and no others."""
    content = [(None if caption is None else [caption], None) for caption in captions]
    found = pictures((SourceRules(separator=separator, missing="empty"), content))
    rule = CaptionRules(separator=separator, front=("New",))
    drawn = [draw_caption(record.captions, rule, np.random.default_rng(0), record.tags) or "" for record in found]
    shown = [sorted({tag.strip().lower() for tag in caption.split(separator)} - {""}) for caption in drawn]
    assert written(tag_column(found, [["New"]])) == shown


def test_a_tag_counts_once_a_picture():
    content = [(["Dragon, dragon , DRAGON,dragon"], None), (["dragon"], None), (["dragons"], ["Dragon", "dragon"])]
    column = tag_column(pictures((SourceRules(), content)), [["dragon"]])
    assert written(column) == [["dragon"], ["dragon"], ["dragon", "dragons"]], "a caption's own tags, and the added one"


def test_only_pictures_that_take_part_are_counted():
    """Neither those a filter leaves out, nor those that cannot be read, nor duplicates."""
    content = [(["a, x"], None), (["b, x"], None), (["c"], None), (["d"], None)]
    found = pictures((SourceRules(only=Filter(no_tag=("b",))), content))
    assert written(tag_column(found, [[]])) == [["a", "x"], ["c"], ["d"]]
    fewer = found.subset(np.array([False, True, True]))
    assert written(tag_column(fewer, [[]])) == [["c"], ["d"]]
    broken = pictures_of(
        [
            {"file": "1", "name": "1", "height": 9, "width": 9, "captions": ["a"]},
            {"file": "2", "name": "2", "reason": "truncated"},
        ]
    )
    readable = Pictures([IndexedSource(Place(), SourceRules(), broken)])  # type: ignore[arg-type]
    assert written(tag_column(readable, [[]])) == [["a"]]


def test_emphasis_is_no_part_of_a_tag():
    content = [([r"(red, blue:1.3), [green], \(x\), ((a))"], None)]
    column = tag_column(pictures((SourceRules(weights=True), content)), [["(Blue, new:1.1)"]])
    assert written(column) == [["(x)", "a", "blue", "green", "new", "red"]]
    beside = [(["A sentence."], ["(red:1.2)", "blue"])]
    column = tag_column(pictures((SourceRules(weights=True, kind="prose"), beside)), [[]])
    assert written(column) == [["blue", "red"]]
    column = tag_column(pictures((SourceRules(), content)), [[]])
    assert "(red" in written(column)[0], "unless weights are off, where brackets are text"


def test_prose_has_only_the_tags_beside_it():
    content = [(["A dog, running."], None), (["A cat, asleep."], ["cat", "Asleep"])]
    column = tag_column(pictures((SourceRules(kind="prose"), content)), [["photo"]])
    assert written(column) == [["photo"], ["asleep", "cat", "photo"]]


@pytest.mark.parametrize("kind", ["tags", "prose"])
def test_no_tags_at_all(kind):
    content = [([""], None), (None, None), ([" , ,"], []), (None, [" "])]
    column = tag_column(pictures((SourceRules(kind=kind, missing="empty"), content)), [[]])
    assert written(column) == [[], [], [], []]
    assert list(column.names_K) == []


def test_many_pictures_of_many_tags(monkeypatch):
    """More than one slice, of more tags than a slice has; the names of all are merged and in order."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 64)
    generator = np.random.default_rng(0)
    tags = [[f"tag {n}" for n in generator.integers(0, 500, generator.integers(0, 9))] for _ in range(1000)]
    found = pictures((SourceRules(missing="empty"), [([", ".join(own)], None) for own in tags]))
    assert written(tag_column(found, [[]])) == [sorted(set(own)) for own in tags]
