"""docs/objectives.md: its YAML works, what it points to exists, and no choice is missing from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from sdxl_training.assemble.objective import build_coupling, build_noise, build_objective
from sdxl_training.config import load_config, notes
from sdxl_training.config.levels import LevelDensity, LevelShift
from sdxl_training.config.objective import Coupling, LossShape, LossWeight, Objective, Terminal
from sdxl_training.config.presets import PRESETS
from sdxl_training.config.schema import Grid, Sampler, Training

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "objectives.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
SOURCES = "data: {sources: [{path: pictures}]}\n"
MAX_IMAGE_BYTES = 150_000


def headings() -> set[str]:
    return {line.lstrip("#").strip() for line in TEXT.splitlines() if line.startswith("#")}


def anchor(heading: str) -> str:
    """The fragment GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def types_of(family: object) -> list[str]:
    return [option.model_fields["type"].default for option in get_args(family)]


def row_names(section: str) -> set[str]:
    """The names in code style in the first cells of the tables below a heading, heads of tables apart."""
    body = TEXT.split(f"\n### {section}\n")[1].split("\n### ")[0].split("\n## ")[0]
    lines = body.splitlines()
    rows = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    first_cells = [line.split("|")[1] for line in rows if line.startswith("| `")]
    return {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}


def test_there_are_blocks() -> None:
    """An empty list would pass whatever the page says."""
    assert len(BLOCKS) >= 12
    assert TEXT.count("```yaml") == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[" ".join(block.split())[:60] for block in BLOCKS])
def test_a_block_loads_and_is_built(tmp_path: Path, block: str) -> None:
    """Laid over a configuration of nothing but its pictures. A block the trainer has doubts about teaches nothing."""
    (tmp_path / "base.yaml").write_text(SOURCES, encoding="utf-8")
    path = tmp_path / "block.yaml"
    path.write_text(f"base: base.yaml\n{block}", encoding="utf-8")
    config = load_config(path).config
    assert notes(config) == []
    objective = build_objective(config, torch.device("cpu"))
    build_noise(config)
    build_coupling(config)
    levels = objective.path.at(objective.density.log_sigma(torch.tensor([0.5], dtype=torch.float64), objective.path))
    assert objective.loss_weight.weight(objective.head, levels.a_B, levels.b_B).isfinite().all()


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("objective", types_of(Objective)),
        ("level_density", types_of(LevelDensity)),
        ("level_shift", types_of(LevelShift)),
        ("loss_weight", [*types_of(LossWeight), *get_args(Terminal)]),
        ("loss_shape", types_of(LossShape)),
        ("noise", Training.model_fields["noise"].get_default().model_dump()),
        ("coupling", types_of(Coupling)),
        ("drawing", [*get_args(Sampler), *(set(get_args(Grid)) - {"auto"})]),
    ],
)
def test_every_choice_has_a_row_and_every_row_is_a_choice(section: str, names: list[str]) -> None:
    variants = {"mode: preconditioned", "mode: raw", "label: timestep", "label: c_noise"}
    assert row_names(section) - variants == set(names)


def test_every_preset_has_a_row() -> None:
    body = TEXT.split("\n## 4. Presets\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", body, flags=re.MULTILINE)) == set(PRESETS)


def test_what_the_page_points_to_exists() -> None:
    """Files, tests by name, pictures, and places on the page."""
    files = set(re.findall(r"`((?:tests|benchmarks|src|docs)/[\w/.]+)", TEXT))
    commands = set(re.findall(r"python ((?:benchmarks|docs)/[\w/.]+)", TEXT))
    assert len(files) > 15
    assert [name for name in sorted(files | commands) if not (ROOT / name).exists()] == []
    for file, test in re.findall(r"`(tests/[\w/.]+)::(\w+)`", TEXT):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"
    places = {anchor(heading) for heading in headings()}
    assert [link for link in re.findall(r"\]\(#([^)]+)\)", TEXT) if link not in places] == []
    images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)
    assert len(images) == 5
    for image in images:
        assert 0 < (PAGE.parent / image).stat().st_size < MAX_IMAGE_BYTES, image


def test_rows_have_the_cells_of_their_table() -> None:
    """A bar inside a formula would cut a cell in two."""
    width = 0
    for line in TEXT.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_no_result_is_still_to_come():
    assert "<!--" not in TEXT
