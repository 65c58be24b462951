"""From a YAML file, its bases and `--set` to a checked Config that knows where each value was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_training.config.checks import findings
from sdxl_training.config.emit import yaml_inline
from sdxl_training.config.explain import explain
from sdxl_training.config.objective import MinSnrLossWeight, min_snr_terminal
from sdxl_training.config.presets import PRESETS
from sdxl_training.config.problems import ConfigError, Finding, Problem, shown
from sdxl_training.config.schema import Config, cache_folder, default_values
from sdxl_training.config.tree import (
    COMMAND_LINE,
    DEFAULT,
    Node,
    Origin,
    TreeError,
    merge,
    parse_yaml,
    put,
    tree_of,
    without,
)
from sdxl_training.config.tree import Path as TreePath
from sdxl_training.records import UserError

ANY_SOURCES = [{"path": "anywhere"}]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration. `origins` maps each dotted place to "my.yaml:41", "--set" or "default"."""

    config: Config
    origins: dict[str, str]
    path: Path


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a configuration file, lay it over its bases and the defaults, and `--set` overrides over it.

    Settings that null leaves open (terminal policy, cache folder) are filled in. Raises ConfigError with all problems.
    """
    problems: list[Problem] = []
    written, defaults = _read_chain(path, path, (), problems), tree_of(default_values(), DEFAULT)
    complete = not problems
    asked = _preset(_with_overrides(Node({}, COMMAND_LINE), overrides, []))
    tree = _with_overrides(merge(merge(defaults, written), asked), overrides, problems)
    config, rejected = _validated(tree, complete=complete)
    problems += rejected
    if config is None or problems:
        raise ConfigError(path, problems)
    filled = _filled(config)
    return LoadedConfig(filled, dict(_origins(filled.model_dump(), tree)), path)


def write_resolved(loaded: LoadedConfig, path: Path) -> None:
    """Write every value with its origin as YAML that load_config reads back to the same Config."""
    lines = [f"# Every value of the run and where it came from. Made from {loaded.path.name}."]
    lines += _yaml_lines(loaded.config.model_dump(), (), loaded.origins)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_chain(path: Path, root: Path, above: tuple[Path, ...], problems: list[Problem]) -> Node:
    """Return the file laid over the files it extends."""
    name = path.name if path == root else os.path.relpath(path, root.parent)
    try:
        tree = parse_yaml(_text(path), name)
    except TreeError as error:
        problems.append(Problem(Origin(name, error.line), "", str(error)))
        return Node({}, Origin(name))
    if not isinstance(tree.value, dict):
        problems.append(Problem(tree.origin, "", "must hold sections like `training:`, not a single value or list"))
        return Node({}, tree.origin)
    base = tree.value.get("base")
    own = without(tree, [("base",)])
    own = merge(_preset(own), own)
    if base is None:
        return own
    problem = _base_problem(base, path, (*above, path.resolve()))
    if problem:
        problems.append(Problem(base.origin, "base", problem, shown(base)))
        return own
    return merge(_read_chain(path.parent / base.value, root, (*above, path.resolve()), problems), own)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TreeError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give --config the path of a YAML file") from error


def _base_problem(base: Node, path: Path, above: tuple[Path, ...]) -> str | None:
    if not isinstance(base.value, str):
        return "must be the path of one YAML file, seen from this file's folder"
    file = path.parent / base.value
    if not file.is_file():
        return "no such file; the path is seen from this file's folder"
    if file.resolve() in above:
        return "goes round in a circle: that file extends this one; delete one of the two"
    return None


def _with_overrides(tree: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    """Lay `--set` values on the tree: whole sections before their settings, `type` before its siblings."""
    assignments: list[tuple[TreePath, Node]] = []
    for override in overrides:
        place, equals, text = override.partition("=")
        if not equals or not all(place.split(".")):
            problems.append(Problem(COMMAND_LINE, override, "must read section.key=value"))
            continue
        try:
            value = parse_yaml(text, str(COMMAND_LINE), line=False) if text.strip() else Node(None, COMMAND_LINE)
        except TreeError as error:
            problems.append(Problem(COMMAND_LINE, place, f"{error}; put text in quotes", text))
            continue
        assignments.append((tuple(place.split(".")), value))
    for path, value in sorted(assignments, key=lambda item: (len(item[0]), item[0][-1] != "type")):
        try:
            tree = put(tree, path, value)
        except TreeError as error:
            problems.append(Problem(COMMAND_LINE, ".".join(path), str(error)))
    return tree


def _preset(tree: Node) -> Node:
    """Return the settings of the preset that `tree` names; none for a name that is no preset, which is found later.

    A preset lies over the bases of the file that names it, and under what that file says itself.
    """
    node = tree.get(("training", "preset"))
    settings = PRESETS.get(str(node.value), {}) if node else {}
    return tree_of({"training": settings} if settings else {}, Origin(f"preset {node.value}" if node else ""))


# --- checking ---------------------------------------------------------------------------------------------------------


def _validated(tree: Node, *, complete: bool) -> tuple[Config | None, list[Problem]]:
    """Return the Config, or None, and every problem: of single values, and of rules between them."""
    try:
        config = Config.model_validate(tree.plain())
    except ValidationError as error:
        rejected = explain(error, tree, complete=complete)
        return None, [*rejected.values(), *_findings_despite(rejected, tree)]
    return config, [_problem(finding, tree) for finding in findings(config)]


def _findings_despite(rejected: dict[TreePath, Problem], tree: Node) -> Iterator[Problem]:
    """Check the rules on what is left without the rejected values; skip rules that judge by one of those."""
    kept = merge(tree_of(default_values(), DEFAULT), without(tree, [_removable(path) for path in rejected]))
    if kept.get(("data", "sources", "0")) is None:
        kept = put(kept, ("data",), tree_of({"sources": ANY_SOURCES}, DEFAULT))
    try:
        config = Config.model_validate(kept.plain())
    except ValidationError:
        return  # what is left makes no sense of its own: the problems found so far must do
    places = {problem.place for problem in rejected.values()} | {".".join(path) for path in rejected}
    for finding in findings(config):
        judged = (finding.place, *finding.others)
        if not any(place == bad or place.startswith(f"{bad}.") for place in judged for bad in places):
            yield _problem(finding, tree)


def _removable(path: TreePath) -> TreePath:
    """Return what has to go with a rejected value: its whole list, or the family whose type it is."""
    lists = [depth for depth, key in enumerate(path) if key.isdecimal()]
    path = path[: lists[0]] if lists else path
    return path[:-1] if path[-1] == "type" else path


def _problem(finding: Finding, tree: Node) -> Problem:
    path = finding.place.split(".")
    node = tree.get(path)
    involved = [tree.nearest(place.split(".")).origin for place in (finding.place, *finding.others)]
    origin = next((origin for origin in involved if origin != DEFAULT), DEFAULT)
    return Problem(origin, finding.place, finding.text, shown(node) if node else None)


def _filled(config: Config) -> Config:
    """Return the Config with the choices written out that null leaves to us."""
    data, training = config.data, config.training
    data = data.model_copy(update={"cache": data.cache.model_copy(update={"path": cache_folder(config)})})
    if isinstance(training.loss_weight, MinSnrLossWeight):
        terminal = min_snr_terminal(training.objective, training.loss_weight)
        weight = training.loss_weight.model_copy(update={"terminal": terminal})
        training = training.model_copy(update={"loss_weight": weight})
    return config.model_copy(update={"data": data, "training": training})


# --- origins and writing ----------------------------------------------------------------------------------------------


def _origins(value: Any, tree: Node, path: TreePath = ()) -> Iterator[tuple[str, str]]:
    """Yield the dotted place and origin of each setting; a list of scalars is one setting."""
    for key, child in _children(value):
        place = (*path, key)
        if any(_children(child)):
            yield from _origins(child, tree, place)
        else:
            node = tree.get(place)
            yield ".".join(place), str(node.origin if node else DEFAULT)


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return sorted(value.items(), key=lambda item: item[0] != "type")
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        return [(str(position), child) for position, child in enumerate(value)]
    return []


def _yaml_lines(value: Any, path: TreePath, origins: dict[str, str], indent: str = "") -> Iterator[str]:
    for key, child in _children(value):
        place = (*path, key)
        if isinstance(value, (list, tuple)):
            first, *rest = _yaml_lines(child, place, origins, f"{indent}  ")
            yield f"{indent}- {first.lstrip()}"
            yield from rest
        elif _children(child):
            yield f"{indent}{yaml_inline(key)}:"
            yield from _yaml_lines(child, place, origins, f"{indent}  ")
        else:
            yield f"{indent}{yaml_inline(key)}: {yaml_inline(child)}  # {origins['.'.join(place)]}"
