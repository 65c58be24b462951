"""The kept column: read again exactly as it was made, and made anew when anything it was made from has changed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from sdxl_training.data import tag_cache
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.index_files import GENERATION_KEY
from sdxl_training.data.listing import pictures_of
from sdxl_training.data.picture_index import update_index
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.tag_cache import kept_tag_column
from sdxl_training.data.tag_column import TagColumn, tag_column
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from tests.pictures import RAMP, encoded

CAPTIONS = ["a, b", "b, c", "", "a, dragon|e", "(c:1.2)\nd"]
RULES = SourceRules(missing="empty")


@dataclass(frozen=True)
class Place:
    identity: str = "folder /one"


def pictures(
    captions: Sequence[str] = CAPTIONS, rules: SourceRules = RULES, generation: int = 1, place: str = "folder /one"
) -> Pictures:
    table = pictures_of(
        [
            {"file": str(i), "name": str(i), "height": 64, "width": 64, "captions": [caption]}
            for i, caption in enumerate(captions)
        ]
    ).replace_schema_metadata({GENERATION_KEY: b"%d" % generation})
    return Pictures([IndexedSource(Place(place), rules, table)])  # type: ignore[arg-type]


def assert_same(one: TagColumn, other: TagColumn) -> None:
    assert list(one.names_K) == list(other.names_K)
    np.testing.assert_array_equal(one.offsets, other.offsets)
    np.testing.assert_array_equal(one.tag_T, other.tag_T)
    assert one.tag_T.dtype == other.tag_T.dtype


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time the tags were counted."""
    counted: list[str] = []

    def count(found: Pictures, added: Sequence[Sequence[str]]) -> TagColumn:
        counted.append("counted")
        return tag_column(found, added)

    monkeypatch.setattr(tag_cache, "tag_column", count)
    return counted


@pytest.mark.parametrize("captions", [CAPTIONS, ["", " , "], ["x"], [f"tag {i}, all" for i in range(300)]])
def test_it_is_read_as_it_was_made(tmp_path: Path, made: list[str], captions: list[str]) -> None:
    first = kept_tag_column(tmp_path, pictures(captions), [["new"]])
    again = kept_tag_column(tmp_path, pictures(captions), [["new"]])
    assert made == ["counted"]
    for found in (first, again):
        assert_same(found, tag_column(pictures(captions), [["new"]]))
    again.tag_T[:] = 0  # bringing tags into another order changes them: the file stays as it is
    assert_same(kept_tag_column(tmp_path, pictures(captions), [["new"]]), first)


CHANGES: dict[str, Callable[[], tuple[Pictures, list[list[str]]]]] = {
    "separator": lambda: (pictures(rules=replace(RULES, separator="|")), [[]]),
    "kind": lambda: (pictures(rules=replace(RULES, kind="prose")), [[]]),
    "weights": lambda: (pictures(rules=replace(RULES, weights=True)), [[]]),
    "lines": lambda: (pictures(rules=replace(RULES, lines=True)), [[]]),
    "added tags": lambda: (pictures(), [["new"]]),
    "an index of other rows": lambda: (pictures(["a", "f", "g", "h", "i"], generation=2), [[]]),
    "pictures that take part": lambda: (pictures().subset(np.array([True, False, True, True, True])), [[]]),
    "another source": lambda: (pictures(["z"], place="folder /two"), [[]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_made_anew_when_something_changed(tmp_path: Path, made: list[str], change) -> None:
    kept_tag_column(tmp_path, pictures(), [[]])
    found, added = change()
    assert_same(kept_tag_column(tmp_path, found, added), tag_column(found, added))
    assert made == ["counted"] * 2
    assert_same(kept_tag_column(tmp_path, found, added), tag_column(found, added))
    assert made == ["counted"] * 2


def test_what_decides_nothing_changes_nothing(tmp_path: Path, made: list[str]) -> None:
    kept_tag_column(tmp_path, pictures(), [[]])
    kept_tag_column(tmp_path, pictures(rules=replace(RULES, repeats=5, weight=0.5)), [[]])
    assert made == ["counted"]


def test_a_damaged_file_is_said_and_made_anew(
    tmp_path: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, empty, of something else, or with any one byte changed."""
    captions = [f"tag {i % 40}, all, tag {i % 7}" for i in range(100)]
    expected = tag_column(pictures(captions), [[]])
    kept_tag_column(tmp_path, pictures(captions), [[]])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damages = [b"", b"no table", whole[:-1], whole[: len(whole) // 2], whole + b"\0"]
    for place in range(0, len(whole), 37):
        damages.append(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        made.clear()
        with caplog.at_level(logging.WARNING):
            assert_same(kept_tag_column(tmp_path, pictures(captions), [[]]), expected)
        assert made == ["counted"]
        assert path.read_bytes() == whole
    assert "damaged" in caplog.text
    assert path.name in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"tags-\w+\.arrow: cannot be written"):
        kept_tag_column(tmp_path / "file", pictures(), [[]])


def test_it_follows_the_captions_of_a_folder(tmp_path: Path, made: list[str]) -> None:
    """With the real index: a changed caption gives it another generation, and the tags are counted again."""
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    folder.mkdir()
    long_ago = 1_000_000_000
    for name, caption in (("a", "red, round"), ("b", "blue, round")):
        (folder / f"{name}.png").write_bytes(encoded(RAMP))
        (folder / f"{name}.txt").write_text(caption)
        for path in folder.iterdir():
            os.utime(path, (long_ago, long_ago))

    def names() -> list[str]:
        source = FolderSource(str(folder), processes=1)
        table = update_index(cache, source, SilentProgress(), processes=1)
        return list(kept_tag_column(cache, Pictures([IndexedSource(source, SourceRules(), table)]), [[]]).names_K)

    assert names() == ["blue", "red", "round"]
    assert names() == ["blue", "red", "round"]
    assert made == ["counted"]
    (folder / "b.txt").write_text("green, square")
    os.utime(folder / "b.txt", (long_ago + 5, long_ago + 5))
    assert names() == ["green", "red", "round", "square"]
    assert made == ["counted"] * 2
