"""docs/data.md: its YAML loads and is read, and no caption setting is missing from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdxl_training.assemble.captions import caption_rules
from sdxl_training.assemble.sources import source_rules
from sdxl_training.config import load_config
from sdxl_training.config.data import AddTags, Captions

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_there_are_blocks() -> None:
    """An empty list would pass whatever the page says."""
    assert len(BLOCKS) >= 4
    assert TEXT.count("```yaml") == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[" ".join(block.split())[:60] for block in BLOCKS])
def test_a_block_loads_and_is_read(tmp_path: Path, block: str) -> None:
    """Laid over a configuration of nothing but its pictures."""
    (tmp_path / "base.yaml").write_text("data: {sources: [{path: pictures}]}\n", encoding="utf-8")
    path = tmp_path / "block.yaml"
    path.write_text(f"base: base.yaml\n{block}", encoding="utf-8")
    config = load_config(path).config
    assert len(caption_rules(config)) == len(config.data.sources)
    assert all(source_rules(source, config).kind == config.data.captions.kind for source in config.data.sources)


@pytest.mark.parametrize("name", sorted(set(Captions.model_fields) - {"extension", "missing"} | {"add_tags"}))
def test_every_caption_setting_is_told_of(name: str) -> None:
    section = TEXT.split("\n## Captions\n")[1].split("\n## ")[0]
    assert f"`{name}" in section
    assert all(f"{side}:" in section for side in AddTags.model_fields)
