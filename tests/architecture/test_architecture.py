"""The shape of the code, checked: which way imports point, how long files and functions are, what may be caught.

Each rule is a function from a parsed module to the sentences it objects with. The second half of this file shows every
rule a small source that breaks it, so a rule that has gone blind fails here too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "sdxl_training"

# Imports point from a higher number to a lower one, never between equals (a part may import itself).
# records and rng are the floor that even config stands on.
_ORDER = (
    ("records", "rng"),
    ("config",),
    ("objectives", "model", "data", "memory", "optim", "parallel", "tracking", "weighting"),
    ("training",),
    ("assemble", "doctor"),
    ("cli",),
    ("main",),
)
LAYER = {part: height for height, parts in enumerate(_ORDER) for part in parts}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TRACKED_MIB = 4
FORBIDDEN_MODULES = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
FORBIDDEN_SUFFIXES = ("Manager", "Handler", "Helper")
BROAD = {"Exception", "BaseException"}

# Packages a user may lack: imported where they are used, so that nobody else needs them.
OPTIONAL_PACKAGES = {"bitsandbytes", "torchao", "peft", "wandb", "mlflow", "matplotlib", "triton"}
# The configuration is checked before torch is imported, and rng is imported by code that never needs torch.
LAZY_IMPORTS = {
    "rng": {"torch", "numpy"},
    "cli": {f"{PACKAGE}.assemble", f"{PACKAGE}.doctor"},
    "main": {f"{PACKAGE}.assemble", f"{PACKAGE}.doctor"},
}
MAY_READ_CONFIG = {"config", "cli", "assemble"}
MAY_READ_WHOLE_CONFIG = {"config", "assemble"}


@dataclass(frozen=True)
class Module:
    """One parsed file; `name` is dotted and lacks the package: "data.scan", "cli", "" for the package itself."""

    name: str
    source: str
    is_package: bool = False

    @property
    def part(self) -> str:
        return self.name.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the dotted name that a possibly relative `from` import reads from."""
        if node.level == 0:
            return node.module or ""
        parts = [PACKAGE, *filter(None, self.name.split("."))]
        parents = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*parents, *filter(None, [node.module])])

    def imported(self, node: ast.AST) -> Iterator[str]:
        """Yield every dotted name an import statement may bind: for `from a import b` that is "a.b"."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{self.absolute(node)}.{alias.name}" for alias in node.names)


Rule = Callable[[Module], Iterator[str]]


def _part_of(dotted: str) -> str | None:
    """Return the part of our package that a dotted name lies in; None for other packages and for __version__."""
    parts = dotted.split(".")
    if parts[0] != PACKAGE or parts[1:] in ([], ["__version__"]):
        return None
    return parts[1]


def imports_point_down(module: Module) -> Iterator[str]:
    if module.name and module.part not in LAYER:
        yield f"{module.part} has no place in the order of layers; give it one in this test"
        return
    height = LAYER.get(module.part, -1)  # the package's own __init__ stands below everything
    for node in ast.walk(module.tree):
        for name in module.imported(node):
            part = _part_of(name)
            if part and part != module.part and LAYER.get(part, len(_ORDER)) >= height:
                way = "sideways" if LAYER.get(part) == height else "upward"
                yield f"line {node.lineno}: {way} import of {name}"


def _lies_within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def imports_are_not_hidden(module: Module) -> Iterator[str]:
    allowed = OPTIONAL_PACKAGES | LAZY_IMPORTS.get(module.name, set())
    functions = (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))
    hidden = {node: None for function in functions for node in ast.walk(function)}  # ordered, each node once
    for node in hidden:
        for name in module.imported(node):
            if not _lies_within(name, allowed):
                yield f"line {node.lineno}: import of {name} hidden in a function"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            argument = node.args[0] if node.args else None
            name = argument.value if isinstance(argument, ast.Constant) else "a computed name"
            if not _lies_within(str(name), allowed):
                yield f"line {node.lineno}: dynamic import of {name}"


def _called(node: ast.Call) -> str:
    return _last_name(node.func)


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def files_are_short(module: Module) -> Iterator[str]:
    lines = len(module.source.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{lines} lines; the limit is {MAX_FILE_LINES}"


def functions_are_short(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines; the limit is {MAX_FUNCTION_LINES}"


def excepts_are_narrow(module: Module) -> Iterator[str]:
    if module.name == "main":
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if node.type is None or any(_last_name(one) in BROAD for one in caught if one):
                yield f"line {node.lineno}: broad except"
        if isinstance(node, ast.Call) and _called(node) == "suppress" and BROAD & set(map(_last_name, node.args)):
            yield f"line {node.lineno}: broad suppress"


def names_say_something(module: Module) -> Iterator[str]:
    for part in module.name.split("."):
        if part.strip("_") in FORBIDDEN_MODULES:
            yield f"module name {part} says nothing about what is inside"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith(FORBIDDEN_SUFFIXES):
            yield f"line {node.lineno}: class name {node.name} says nothing about what it is"


def only_assemble_sees_the_config(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        for name in module.imported(node):
            if _part_of(name) != "config":
                continue
            if module.part not in MAY_READ_CONFIG:
                yield f"line {node.lineno}: {name} is read outside config, cli and assemble; pass in the values needed"
            schema = f"{PACKAGE}.config.schema"
            whole = {schema, f"{schema}.Config", f"{schema}.*", f"{PACKAGE}.config.Config", f"{PACKAGE}.config.*"}
            if name in whole and module.part not in MAY_READ_WHOLE_CONFIG:
                yield f"line {node.lineno}: the whole Config is seen outside assemble"


RULES: tuple[Rule, ...] = (
    imports_point_down,
    imports_are_not_hidden,
    files_are_short,
    functions_are_short,
    excepts_are_narrow,
    names_say_something,
    only_assemble_sees_the_config,
)


def _read(path: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    if path == ROOT / "src" / "main.py":
        return Module("main", source)
    parts = path.relative_to(ROOT / "src" / PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__":
        return Module(".".join(parts[:-1]), source, is_package=True)
    return Module(".".join(parts), source)


def _sources() -> list[Path]:
    return sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_source_file_keeps_the_rule(rule: Rule) -> None:
    found = [f"{path.relative_to(ROOT)}: {text}" for path in _sources() for text in rule(_read(path))]
    assert not found, "\n" + "\n".join(found)


def test_the_sources_are_found() -> None:
    """An empty list of files would keep every rule."""
    names = {_read(path).name for path in _sources()}
    assert {"", "records", "rng"} <= names


# Files that are shipped and read: no machine's own paths in them, nothing huge among them.

_SHIPPED_FOLDERS = ("src", "tests", "benchmarks", "docs", "examples", ".ci", ".github")
_MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|opt)/")


def _shipped() -> list[Path]:
    inside = (path for folder in _SHIPPED_FOLDERS for path in (ROOT / folder).rglob("*"))
    files = (path for path in [*ROOT.iterdir(), *inside] if path.is_file() and path.name != ".git")
    return sorted(path for path in files if "__pycache__" not in path.parts and ".egg-info" not in str(path))


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in _shipped():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
            if _MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n" + "\n".join(found)


def test_no_shipped_file_is_huge() -> None:
    found = [f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes" for path in _shipped()]
    limit = MAX_TRACKED_MIB * 2**20
    assert not [text for text, path in zip(found, _shipped(), strict=True) if path.stat().st_size > limit]


@pytest.mark.parametrize("text", ["/" + "work/x", "path=/" + "root/.cache", '"/' + 'opt/wheels"'])
def test_machine_paths_are_recognised(text: str) -> None:
    assert _MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["src/work/x", "~/" + "work/x", "https://host.org/optics", "network/opt", "../opt/x"])
def test_other_paths_are_not_taken_for_machine_paths(text: str) -> None:
    assert not _MACHINE_PATH.search(text)


# Self-tests: what each rule must object to, and what it must let pass.

_LONG_BODY = "\n".join(["    pass"] * MAX_FUNCTION_LINES)
_HIDE_TORCH = "def f():\n    import torch\n"

BROKEN: list[tuple[Rule, str, str]] = [
    # upward
    (imports_point_down, "data.scan", "from sdxl_training.training.step import train_step"),
    (imports_point_down, "data.scan", "import sdxl_training.assemble"),
    (imports_point_down, "training.step", "from sdxl_training import cli"),
    (imports_point_down, "data.scan", "from ..training import step"),
    (imports_point_down, "data.scan", "from .. import training"),
    (imports_point_down, "records", "from sdxl_training.config.schema import Config"),
    (imports_point_down, "", "from sdxl_training.records import Batch"),
    (imports_point_down, "cli", "from sdxl_training.main import main"),
    # sideways
    (imports_point_down, "data.cache", "from sdxl_training.model.vae import encode"),
    (imports_point_down, "assemble", "from sdxl_training.doctor import main"),
    (imports_point_down, "rng", "from sdxl_training.records import Batch"),
    # a type needed for checking only is a dependency all the same
    (
        imports_point_down,
        "model.sdxl",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sdxl_training.training.step import Run\n",
    ),
    # hidden in a function it counts for direction too
    (imports_point_down, "data.cache", "def f():\n    from sdxl_training import training\n"),
    # unknown parts
    (imports_point_down, "plugins.x", ""),
    (imports_point_down, "cli", "from sdxl_training.plugins import x"),
    (imports_are_not_hidden, "data.scan", _HIDE_TORCH),
    (imports_are_not_hidden, "data.scan", "class A:\n    async def f(self):\n        from numpy import array\n"),
    (imports_are_not_hidden, "rng", "def f():\n    import scipy\n"),
    (imports_are_not_hidden, "cli", "def f():\n    import torch\n"),
    (imports_are_not_hidden, "training.step", "def f():\n    from sdxl_training import assemble\n"),
    (imports_are_not_hidden, "cli", "def f():\n    from sdxl_training import records\n"),
    (imports_are_not_hidden, "data.scan", "def f():\n    import torchao_like\n"),
    (imports_are_not_hidden, "data.scan", "import importlib\nx = importlib.import_module('torch')\n"),
    (imports_are_not_hidden, "data.scan", "def f(name):\n    return __import__(name)\n"),
    (files_are_short, "data.scan", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (functions_are_short, "data.scan", f"def f():\n{_LONG_BODY}\n"),
    (functions_are_short, "data.scan", f"class A:\n  async def f():\n{_LONG_BODY}\n"),
    (excepts_are_narrow, "data.scan", "try:\n    x\nexcept:\n    pass\n"),
    (excepts_are_narrow, "data.scan", "try:\n    x\nexcept Exception:\n    pass\n"),
    (excepts_are_narrow, "data.scan", "try:\n    x\nexcept BaseException as e:\n    raise\n"),
    (excepts_are_narrow, "data.scan", "try:\n    x\nexcept (OSError, Exception):\n    pass\n"),
    (excepts_are_narrow, "data.scan", "import builtins\ntry:\n    x\nexcept builtins.Exception:\n    pass\n"),
    (excepts_are_narrow, "data.scan", "from contextlib import suppress\nwith suppress(Exception):\n    x\n"),
    (names_say_something, "data.utils", ""),
    (names_say_something, "model._helpers", ""),
    (names_say_something, "common", ""),
    (names_say_something, "optim.base", ""),
    (names_say_something, "data.scan", "class CacheManager:\n    pass\n"),
    (only_assemble_sees_the_config, "training.trainer", "from sdxl_training.config.schema import TrainingConfig"),
    (only_assemble_sees_the_config, "data.scan", "from ..config import load"),
    (only_assemble_sees_the_config, "doctor", "import sdxl_training.config.load"),
    (only_assemble_sees_the_config, "cli", "from sdxl_training.config.schema import Config"),
    (only_assemble_sees_the_config, "cli", "from sdxl_training.config import schema"),
    (only_assemble_sees_the_config, "cli", "from sdxl_training.config import Config"),
    (only_assemble_sees_the_config, "cli", "from sdxl_training.config.schema import *"),
]

KEPT: list[tuple[Rule, str, str]] = [
    (imports_point_down, "training.step", "from sdxl_training.model.sdxl import SDXL\nimport torch\n"),
    (imports_point_down, "data.scan", "from sdxl_training.records import Batch\nfrom .index import Index\n"),
    (imports_point_down, "config.load", "from sdxl_training.records import UserError"),
    (imports_point_down, "main", "from sdxl_training.cli import main"),
    (imports_point_down, "data.scan", "from sdxl_training import __version__"),
    (imports_are_not_hidden, "rng", _HIDE_TORCH),
    (imports_are_not_hidden, "optim.table", "def f():\n    import bitsandbytes.optim\n"),
    (imports_are_not_hidden, "cli", "def f():\n    from sdxl_training.assemble import build\n"),
    (imports_are_not_hidden, "cli", "def f():\n    from sdxl_training import doctor\n"),
    (imports_are_not_hidden, "data.scan", "try:\n    import torch\nexcept ImportError:\n    torch = None\n"),
    (files_are_short, "data.scan", "x = 1\n" * MAX_FILE_LINES),
    (functions_are_short, "data.scan", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)),
    (excepts_are_narrow, "main", "try:\n    x\nexcept Exception:\n    pass\n"),
    (excepts_are_narrow, "data.scan", "try:\n    x\nexcept (OSError, ValueError):\n    pass\n"),
    (names_say_something, "data.buckets", "class BaseModel:\n    pass\n"),
    (only_assemble_sees_the_config, "assemble", "from sdxl_training.config.schema import Config"),
    (only_assemble_sees_the_config, "cli", "from sdxl_training.config.load import load_config"),
    (only_assemble_sees_the_config, "config.load", "from .schema import Config"),
]


def _id(case: object) -> str | None:
    return getattr(case, "__name__", None) or (case[:40] if isinstance(case, str) else None)


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN, ids=_id)
def test_the_rule_catches_a_violation(rule: Rule, name: str, source: str) -> None:
    assert list(rule(Module(name, source)))


@pytest.mark.parametrize(("rule", "name", "source"), KEPT, ids=_id)
def test_the_rule_lets_good_code_pass(rule: Rule, name: str, source: str) -> None:
    assert not list(rule(Module(name, source)))


def test_every_rule_is_shown_a_violation_and_a_good_source() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES) == {rule for rule, _, _ in KEPT}


def test_relative_imports_of_a_package_start_at_the_package_itself() -> None:
    package = Module("data", "from .scan import scan\nfrom ..training import step\n", is_package=True)
    assert [text for text in imports_point_down(package) if "training" in text]
    assert not [text for text in imports_point_down(package) if "scan" in text]
