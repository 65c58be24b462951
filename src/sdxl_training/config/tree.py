"""YAML as a tree whose every value knows where it was written, and how trees are laid over each other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from: a file and a line, `--set`, or `default`."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


DEFAULT = Origin("default")
COMMAND_LINE = Origin("--set")
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list of nodes or a mapping to nodes, and its origin."""

    value: Any
    origin: Origin

    @property
    def items(self) -> dict[str, Node]:
        """Children by key; a list's keys are its positions, a scalar has none."""
        if isinstance(self.value, dict):
            return self.value
        if isinstance(self.value, list):
            return {str(position): child for position, child in enumerate(self.value)}
        return {}

    def plain(self) -> Any:
        """Return the value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def nearest(self, path: Sequence[str]) -> Node:
        """Return the node at `path`, or the last one on the way to it that exists."""
        node = self
        for key in path:
            if key not in node.items:
                return node
            node = node.items[key]
        return node

    def get(self, path: Sequence[str]) -> Node | None:
        """Return the node at `path`, or None where there is none."""
        node: Node | None = self
        for key in path:
            node = node.items.get(key) if node else None
        return node


class TreeError(Exception):
    """A text that is not a tree, or a path that does not lead into one; `line` counts from 1."""

    def __init__(self, text: str, line: int | None = None):
        super().__init__(text)
        self.line = line


def tree_of(value: Any, origin: Origin) -> Node:
    """Return plain values as a tree of one origin."""
    if isinstance(value, dict):
        return Node({key: tree_of(child, origin) for key, child in value.items()}, origin)
    if isinstance(value, (list, tuple)):
        return Node([tree_of(child, origin) for child in value], origin)
    return Node(value, origin)


def merge(base: Node, over: Node) -> Node:
    """Lay `over` on `base` key by key; lists, and families of another `type`, replace what was there."""
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    if "type" in base.value and "type" in over.value and base.value["type"].value != over.value["type"].value:
        return over
    merged = {key: merge(base.value[key], child) if key in base.value else child for key, child in over.value.items()}
    return Node({**base.value, **merged}, over.origin)


def put(node: Node | None, path: Sequence[str], value: Node) -> Node:
    """Lay `value` on what is at `path`; numbers reach list items, and the number after the last one appends.

    Raises TreeError for a list position that would leave a gap.
    """
    if not path:
        return merge(node, value) if node else value
    key, *rest = path
    if key.isdecimal() and (node is None or isinstance(node.value, list)):
        items = list(node.value) if node else []
        if int(key) > len(items):
            raise TreeError(f"there is no item {key}: the list has {len(items)}, counted from 0")
        items[int(key) : int(key) + 1] = [put(node.items.get(key) if node else None, rest, value)]
        return Node(items, value.origin)
    child = put(node.items.get(key) if node and isinstance(node.value, dict) else None, rest, value)
    over = Node({key: child}, value.origin)
    return merge(node, over) if node else over


def without(node: Node, paths: Sequence[Path]) -> Node:
    """Return the tree without the nodes at `paths`."""
    if not node.items or not any(paths):
        return node
    kept = {
        key: without(child, [path[1:] for path in paths if path[:1] == (key,)])
        for key, child in node.items.items()
        if (key,) not in paths
    }
    return Node(list(kept.values()) if isinstance(node.value, list) else kept, node.origin)


def parse_yaml(text: str, file: str, *, line: bool = True) -> Node:
    """Read YAML 1.2, where 1e-5 is a number and `yes` is text; an empty text is an empty mapping.

    With `line` False the origins carry only `file`. Raises TreeError for broken syntax and for repeated keys.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise TreeError(f"is not valid YAML: {error.problem}{hint}", mark.line + 1 if mark else None) from error
    except YAMLError as error:
        raise TreeError(f"is not valid YAML: {str(error).splitlines()[0]}") from error
    if root is None:
        return Node({}, Origin(file, 1 if line else None))
    return _Reader(yaml, file, line).node(root, ())


@dataclass(frozen=True, slots=True)
class _Reader:
    yaml: YAML
    file: str
    with_lines: bool

    def origin(self, node: Any) -> Origin:
        return Origin(self.file, node.start_mark.line + 1 if self.with_lines else None)

    def node(self, node: Any, above: tuple[int, ...], origin: Origin | None = None) -> Node:
        origin = origin or self.origin(node)
        if id(node) in above:
            raise TreeError("is not valid YAML: an alias contains itself", node.start_mark.line + 1)
        above = (*above, id(node))
        if isinstance(node, MappingNode):
            return Node(self.mapping(node, above), origin)
        if isinstance(node, SequenceNode):
            return Node([self.node(child, above) for child in node.value], origin)
        return Node(self.scalar(node), origin)

    def mapping(self, node: MappingNode, above: tuple[int, ...]) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, child in node.value:
            key, origin = str(key_node.value), self.origin(key_node)
            if key in children:
                first = children[key].origin.line
                raise TreeError(f"{key} is given twice, first on line {first}; keep one", key_node.start_mark.line + 1)
            children[key] = self.node(child, above, origin)
        return children

    def scalar(self, node: ScalarNode) -> Any:
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("null", "bool", "int", "float"):
            return node.value
        try:
            return self.yaml.constructor.construct_object(node)
        except ValueError as error:
            raise TreeError(f"is not valid YAML: {node.value} is not a number", node.start_mark.line + 1) from error
