"""Where captions are tags, what is counted is what is trained: a caption's own, or those given in its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.assemble.dataset import find_pictures
from sdxl_training.config.schema import Config
from sdxl_training.data.captions import CaptionRules, draw_caption, split_tags
from sdxl_training.data.pictures import SourceRules
from sdxl_training.data.tag_column import tag_column
from sdxl_training.rng import Stream, numpy_generator
from sdxl_training.tracking.progress import SilentProgress
from tests.indexed import pictures_with

words = st.sampled_from(["a", "b c", "d,e", " f ", "(g:1.2)", "(h,i:1.2)", "", ","])
rows = st.lists(
    st.fixed_dictionaries(
        {
            "captions": st.none() | st.lists(words | st.sampled_from(["a, b", "x,(y, z)"]), max_size=2),
            "tags": st.none() | st.lists(words, max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
)


@given(rows=rows, weights=st.booleans(), lines=st.booleans(), separator=st.sampled_from([",", ", ", " "]))
def test_what_is_counted_is_what_is_trained(rows, weights, lines, separator):
    reading = SourceRules(separator=separator, weights=weights, lines=lines, missing="empty")
    pictures = pictures_with(rows, reading)
    column = tag_column(pictures, [()])
    for record, source_row, (first, end) in zip(pictures, pictures.row_P, pairwise(column.offsets), strict=True):
        generator = numpy_generator(0, Stream.CAPTION, 0, record.sample_id)
        rules = CaptionRules(separator=separator, weights=weights)
        trained = draw_caption(record.captions[:1], rules, generator, record.tags)
        assert trained is not None
        assert split_tags(trained, separator, weights) == record.tags
        plain = pictures.sources[0].plain_tags(int(source_row)) if weights else record.tags
        counted = [column.names_K[tag] for tag in column.tag_T[first:end]]
        assert counted == sorted({tag.strip().lower() for tag in plain} - {""})


@dataclass
class Heard(SilentProgress):
    """Remembers what was said."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)


def test_tags_beside_a_caption_of_tags_do_not_count():
    beside = {"tags": ["a", "b"]}
    rows = [{"captions": ["caption 1"], **beside}, beside, {"captions": ["a, b"], **beside}]
    pictures = pictures_with(rows)
    assert [record.tags for record in pictures] == [("caption 1",), ("a", "b"), ("a", "b")]
    assert pictures.with_unused_tags.tolist() == [0]
    prose = pictures_with(rows[:1], SourceRules(kind="prose"))
    assert prose[0].tags == ("a", "b")
    assert not len(prose.with_unused_tags)


@pytest.mark.parametrize(("kind", "said"), [("tags", 1), ("prose", 0)])
def test_a_start_says_that_tags_are_not_used(tmp_path, kind, said):
    for number, caption in enumerate([{"caption": "one", "tags": ["a"]}, {"tags": ["a"]}, {"caption": "two"}]):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(json.dumps(caption))
    data = {
        "sources": [{"path": str(tmp_path)}],
        "resolution": 64,
        "captions": {"kind": kind, "extension": ".json"},
        "cache": {"path": str(tmp_path / "cache")},
        "buckets": {"generator": "list", "sizes": [[64, 64]]},
    }
    progress = Heard()
    find_pictures(Config.model_validate({"data": data}), progress)
    heard = [text for text in progress.said if "1 pictures have other tags beside their captions" in text]
    assert len(heard) == said
    assert all(text.endswith(f"the first: {tmp_path}/0.png") for text in heard)
