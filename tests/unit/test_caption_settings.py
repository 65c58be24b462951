"""No caption setting is lost on its way from the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sdxl_training.assemble.captions import build_tokenizer, caption_rules
from sdxl_training.assemble.sources import captions_are, open_pictures, open_source, source_rules
from sdxl_training.config.data import Captions, Source, source_kind
from sdxl_training.config.schema import Config
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.filters import Filter
from sdxl_training.data.pictures import SourceRules
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.text import CaptionTokenizer, plain_text
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from tests.tiny_sdxl import tiny_pipeline

SETTINGS = {
    "kind": "prose",
    "alternatives": "lines",
    "extension": ".caption",
    "separator": "; ",
    "templates": ["{tags}. {caption}"],
    "shuffle": False,
    "keep_first": 3,
    "tag_dropout": 0.2,
    "caption_dropout": 0.3,
    "null_mode": "empty_string",
    "weights": True,
    "max_tokens": 225,
    "missing": "leave_out",
}
SOURCES = [{"path": "a"}, {"path": "b", "add_tags": {"front": ["x", "y"], "back": ["z"]}}]


@pytest.fixture
def config() -> Config:
    """Every setting has another value than its default."""
    config = Config.model_validate({"data": {"sources": SOURCES, "captions": SETTINGS}})
    assert all(getattr(config.data.captions, name) != value for name, value in Captions().model_dump().items())
    return config


def test_a_table_beside_pictures_is_named_where_captions_are_looked_for(tmp_path: Path) -> None:
    told = "it is the file with the picture's name and the ending .txt"
    assert captions_are(Source(path=str(tmp_path)), ".txt") == told
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.jsonl").touch()
    advice = "; to read those in metadata.jsonl, set data.sources[].table: metadata.jsonl"
    assert captions_are(Source(path=str(tmp_path)), ".txt") == told + advice


@pytest.mark.parametrize("name", ["a.tar", "A.TAR", "a.tar.gz", "a.tgz", "s3://b/a.tar.zst"])
def test_tars_are_known_by_their_names(name: str) -> None:
    assert source_kind(Source(path=name)) == "tar"


def test_a_compressed_tar_that_is_missing_is_no_folder(tmp_path: Path) -> None:
    config = Config.model_validate(
        {"data": {"sources": [{"path": str(tmp_path / "a.tar.gz")}], "cache": {"path": str(tmp_path / "cache")}}}
    )
    with pytest.raises(UserError, match=r"1 of 1 cannot be found: .*a\.tar\.gz\. Correct the name"):
        open_pictures(config, SilentProgress())


def test_rules_of_captions_and_sources_have_every_setting(config: Config) -> None:
    plain, around = caption_rules(config)
    of_all = CaptionRules("; ", False, 3, 0.2, 0.3, "prose", "empty_string", ("{tags}. {caption}",), weights=True)
    assert (plain, around) == (of_all, replace(of_all, front=("x", "y"), back=("z",)))
    told = "it is the file with the picture's name and the ending .caption"
    read = SourceRules(separator="; ", kind="prose", weights=True, lines=True, missing="leave_out", captions_are=told)
    assert [source_rules(source, config) for source in config.data.sources] == [read] * 2
    defaults = Config.model_validate({"data": {"sources": SOURCES[:1]}})
    assert caption_rules(defaults) == (CaptionRules(shuffle=True, keep_first=1, caption_dropout=0.1),)
    (source,) = defaults.data.sources
    assert source_rules(source, defaults) == SourceRules(captions_are=told.replace(".caption", ".txt"))


def test_captions_are_looked_for_under_their_ending(config: Config, tmp_path: Path) -> None:
    """The ending goes to the source, which lists the files."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("not this")
    (tmp_path / "0.caption").write_text("this")
    source = config.data.sources[0].model_copy(update={"path": str(tmp_path)})
    opened = open_source(source, config)
    assert opened.look(opened.list_files())["captions"].to_pylist() == [["this"]]


def test_every_rule_of_a_source_arrives() -> None:
    only = {"names": ["a/*"], "except_names": ["b/*"], "any_tag": ["c"], "no_tag": ["d"], "min_side_px": 7}
    sources = [{"path": "a", "repeats": 3, "weight": 2.5, "only": only}]
    config = Config.model_validate({"data": {"sources": sources}})
    rules = source_rules(config.data.sources[0], config)
    assert (rules.repeats, rules.weight) == (3, 2.5)
    assert rules.only == Filter(("a/*",), ("b/*",), ("c",), ("d",), 7)


def test_the_tokenizer_has_every_setting(config: Config, tmp_path: Path) -> None:
    tiny_pipeline(tmp_path)
    sdxl = load_sdxl(str(tmp_path), seed=0, device="cpu")
    pair = sdxl.tokenizer, sdxl.tokenizer_2
    assert build_tokenizer(config, sdxl) == CaptionTokenizer(*pair, 3, "; ", parse_weights)
    default = Config.model_validate({"data": {"sources": SOURCES}})
    assert build_tokenizer(default, sdxl) == CaptionTokenizer(*pair, 1, ",", plain_text)
