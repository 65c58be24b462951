"""No caption setting is lost on its way from the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sdxl_training.data.scan import CaptionFiles

from sdxl_training.assemble.captions import build_tokenizer, caption_files, caption_rules
from sdxl_training.config.data import Captions
from sdxl_training.config.schema import Config
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import CaptionRules
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.text import CaptionTokenizer, plain_text
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


def test_rules_and_files_have_every_setting(config: Config) -> None:
    plain, around = caption_rules(config)
    of_all = CaptionRules("; ", False, 3, 0.2, 0.3, "prose", "empty_string", ("{tags}. {caption}",), weights=True)
    assert (plain, around) == (of_all, replace(of_all, front=("x", "y"), back=("z",)))
    files = caption_files(config.data.captions)
    assert files == CaptionFiles(".caption", "; ", "leave_out", "prose", "lines", True)
    assert CaptionFiles() == caption_files(Captions())
    defaults = Config.model_validate({"data": {"sources": SOURCES[:1]}})
    assert caption_rules(defaults) == (CaptionRules(shuffle=True, keep_first=1, caption_dropout=0.1),)


def test_the_tokenizer_has_every_setting(config: Config, tmp_path: Path) -> None:
    tiny_pipeline(tmp_path)
    sdxl = load_sdxl(str(tmp_path), seed=0, device="cpu")
    pair = sdxl.tokenizer, sdxl.tokenizer_2
    assert build_tokenizer(config, sdxl) == CaptionTokenizer(*pair, 3, "; ", parse_weights)
    default = Config.model_validate({"data": {"sources": SOURCES}})
    assert build_tokenizer(default, sdxl) == CaptionTokenizer(*pair, 1, ",", plain_text)
