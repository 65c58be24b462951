"""docs/tag_weighting.md: its YAML loads, and every setting of the section is told of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from sdxl_training.config import load_config
from sdxl_training.config.section import Section
from sdxl_training.config.tags import TagWeighting

TEXT = (Path(__file__).parents[2] / "docs" / "tag_weighting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
HEADINGS = {  # which parts of the page tell of a section: begin of their headings
    "categories": "Tags and categories",
    "static": "Static",
    "dynamic": "Dynamic",
    "trust": "Trust",
    "statistics": ("During training", "Dynamic"),
}


def code_of(heading: str | tuple[str, ...]) -> str:
    """Return what stands between backticks and in blocks below headings that begin so."""
    parts = re.split(r"^#+ ", TEXT, flags=re.MULTILINE)
    text = "\n".join(part for part in parts if part.startswith(heading))
    blocks = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def settings(section: type[Section], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every setting below a section: that of each variant where there are several."""
    for name, field in section.model_fields.items():
        variants = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in variants if issubclass(kind, Section)]
        for kind in inner:
            yield from settings(kind, (*place, name))
        if not inner:
            yield (*place, name)


PLACES = sorted({".".join(place) for place in settings(TagWeighting)})


def test_there_are_settings_and_blocks() -> None:
    """Empty lists would pass whatever the page says."""
    assert {"categories.tags", "static.max_factor", "dynamic.parameters", "trust.width", "refresh_steps"} <= {*PLACES}
    assert len(BLOCKS) >= 2
    assert TEXT.count("```yaml") == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[" ".join(block.split())[:60] for block in BLOCKS])
def test_a_block_loads_and_changes_weights(tmp_path: Path, block: str) -> None:
    (tmp_path / "base.yaml").write_text("data: {sources: [{path: pictures}]}\n", encoding="utf-8")
    (tmp_path / "block.yaml").write_text(f"base: base.yaml\n{block}", encoding="utf-8")
    assert load_config(tmp_path / "block.yaml").config.tag_weighting.changes_weights


@pytest.mark.parametrize("place", PLACES)
def test_every_setting_is_told_of_where_its_section_is(place: str) -> None:
    code = code_of(HEADINGS.get(place.split(".")[0], ""))
    assert re.search(rf"\b{place.rpartition('.')[2]}\b", code), place
