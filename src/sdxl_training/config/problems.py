"""What is wrong with a configuration, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdxl_training.config.emit import yaml_inline
from sdxl_training.config.tree import DEFAULT, Node, Origin
from sdxl_training.records import UserError

WIDEST_VALUE = 40
WIDEST_PLACE = 60


class Finding(NamedTuple):
    """A broken rule between settings: the place to mend, the sentence, and the other places it was judged by."""

    place: str
    text: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: where it was written, the dotted place, and the rule with its remedy.

    `value` is the value as YAML, or None where there is none to show.
    """

    origin: Origin
    place: str
    text: str
    value: str | None = None

    @property
    def place_and_value(self) -> str:
        """The middle column of the message."""
        return self.place if self.value is None else f"{self.place} = {self.value}"


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every problem found."""

    def __init__(self, path: Path, problems: Sequence[Problem]):
        def order(problem: Problem) -> tuple[bool, str, int]:
            return problem.origin.file != path.name, problem.origin.file, problem.origin.line or 0

        self.problems = tuple(sorted(problems, key=order))
        super().__init__(_report(path, self.problems))


def shown(node: Node) -> str:
    """Return a value as one short line of YAML."""
    text = yaml_inline(node.plain())
    return text if len(text) <= WIDEST_VALUE else text[: WIDEST_VALUE - 3] + "..."


def _report(path: Path, problems: Sequence[Problem]) -> str:
    wheres = [_where(problem.origin, path.name) for problem in problems]
    places = [problem.place_and_value for problem in problems]
    where_width = max(map(len, wheres))
    place_width = min(max(map(len, places)), WIDEST_PLACE)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    rows = [
        f"  {where:<{where_width}}  {place:<{place_width}}   {problem.text}"
        for where, place, problem in zip(wheres, places, problems, strict=True)
    ]
    return "\n".join([f"{path}: {count}", *rows])


def _where(origin: Origin, own_name: str) -> str:
    if origin == DEFAULT:
        return ""
    if origin.file == own_name and origin.line is not None:
        return f"line {origin.line}"
    return str(origin)
