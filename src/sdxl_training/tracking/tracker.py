"""Where the numbers and pictures of a run go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdxl_training.records import UserError
from sdxl_training.tracking.metrics_file import MetricsFile
from sdxl_training.tracking.tensorboard import TensorBoard


class Tracker(Protocol):
    """A place that keeps a run's numbers and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the named numbers of one step."""

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers that are there now and then, beside those of every step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Keep the picture file at `path` under `name`."""

    def close(self) -> None:
        """Write what is still in memory; nothing may be kept afterwards."""


@dataclass(frozen=True, slots=True)
class Trackers:
    """Several trackers as one. Without members it is the do-nothing tracker of every rank but 0."""

    members: tuple[Tracker, ...] = ()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the named numbers of one step in every member."""
        for member in self.members:
            member.scalars(step, values)

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the named numbers in every member that has a place for them."""
        for member in self.members:
            member.beside(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Keep the picture file in every member."""
        for member in self.members:
            member.picture(step, name, path)

    def close(self) -> None:
        """Close every member."""
        for member in self.members:
            member.close()


BACK_ENDS: dict[str, Callable[[Path, int], Tracker]] = {
    "jsonl": MetricsFile,
    "tensorboard": TensorBoard,
}
"""Every back end by name: called with the run's folder and the step it stands at (0 for a new run)."""


def open_trackers(names: Sequence[str], run_dir: Path, step: int) -> Trackers:
    """Open the named back ends for a run that stands at `step`; "jsonl" is always among them.

    Raises UserError for a name that is not in BACK_ENDS.
    """
    unknown = [name for name in names if name not in BACK_ENDS]
    if unknown:
        raise UserError(f"tracking: there is no back end {unknown[0]!r}; choose among {', '.join(BACK_ENDS)}.")
    wanted = dict.fromkeys(("jsonl", *names))
    return Trackers(tuple(BACK_ENDS[name](run_dir, step) for name in wanted))
