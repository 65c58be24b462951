"""What may and may not be installed and imported beside this project."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

# torchvision's wheel is linked against CUDA: beside a CPU torch it breaks every package that imports it when present.
# torchaudio likewise; xformers pins its own torch, and torch's attention does the same work.
NOT_INSTALLED = ("torchvision", "torchaudio", "xformers")
# The training loop is ours: short, readable and exactly resumable.
NOT_IMPORTED = {*NOT_INSTALLED, "accelerate", "lightning", "pytorch_lightning"}


def _requirements() -> list[Requirement]:
    """Return [project] dependencies; read by pattern, since Python 3.10 ships no TOML reader."""
    block = re.search(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert block
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', block[1])]


@pytest.mark.parametrize("package", NOT_INSTALLED)
def test_package_is_absent(package: str) -> None:
    remedy = f"pip uninstall {package}; then see which package brought it in: pip show {package}"
    assert importlib.util.find_spec(package) is None, f"{package} is installed. {remedy}"


def _top_level_imports(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}


def test_no_source_file_imports_another_trainer_or_torchvision() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): _top_level_imports(path.read_text("utf-8")) & NOT_IMPORTED for path in files}
    assert files
    assert not {path: names for path, names in found.items() if names}


def test_imports_are_seen_in_every_form() -> None:
    source = "import accelerate.utils as a\ndef f():\n    from lightning.x import y\n"
    assert _top_level_imports(source) == {"accelerate", "lightning"}


def test_none_of_them_is_a_dependency() -> None:
    assert not {requirement.name for requirement in _requirements()} & NOT_IMPORTED


def test_torch_is_pinned_to_the_versions_the_code_is_run_on() -> None:
    torch = next(requirement for requirement in _requirements() if requirement.name == "torch")
    assert torch.specifier == SpecifierSet(">=2.11,<2.14")


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda requirement: requirement.name)
def test_installed_version_is_in_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
