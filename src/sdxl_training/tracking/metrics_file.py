"""metrics.jsonl: one JSON object a line, one line an optimizer step.

JSON has no NaN and no infinity, so these are written as the strings "nan", "inf" and "-inf" and read back as numbers.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sdxl_training.records import UserError

FILE_NAME = "metrics.jsonl"
STEP_KEYS = (
    "step",
    "images",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "images_per_second",
    "data_wait_fraction",
    "peak_memory_gib",
)
"""The keys of every line, in this order; a step whose update was void has `skipped: 1` as well."""

Row: TypeAlias = dict[str, float]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """Tracker that appends to <run>/metrics.jsonl; a line has reached the operating system when `scalars` returns."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open the file of a run that stands at `step`; lines of later steps, left by a run that died, are dropped."""
        path = run_dir / FILE_NAME
        keep_through(path, step)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; `skipped` is written only where it is not 0."""
        said = {key: _writable(value) for key, value in values.items() if key != "skipped" or value}
        self._file.write(json.dumps({"step": step, **said}, allow_nan=False) + "\n")
        self._file.flush()

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: a line is a step."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Do nothing: the picture already lies in the run's folder."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def keep_through(path: Path, step: int) -> int:
    """Drop the lines after `step`, and a last line torn by a kill; return how many went. Atomic.

    Raises UserError where another line than the last is not a metrics line.
    """
    if not path.exists():
        return 0
    dropped = 0
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for number, line in enumerate(old, start=1):
            row = _parse(path, number, line)
            if row is None or row["step"] > step:
                dropped += 1
            else:
                new.write(line.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)
    return dropped


def read_metrics(path: Path) -> list[Row]:
    """Return every line as a mapping of numbers. A last line still being written is left out.

    Raises UserError where another line than the last is not a metrics line.
    """
    return list(_rows(path))


def metric_columns(path: Path, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return one array a key, NaN where a line lacks it; a million lines fit in 8 MB a key. No file: empty arrays."""
    columns = {key: array("d") for key in keys}
    for row in _rows(path) if path.exists() else ():
        for key, column in columns.items():
            column.append(row.get(key, math.nan))
    return {key: np.array(column, dtype=np.float64) for key, column in columns.items()}


def _rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(path, number, line)
            if row is not None:
                yield row


def _parse(path: Path, number: int, line: bytes) -> Row | None:
    """Return the numbers of a line, or None for the torn end of the file: no prefix of an object is an object."""
    try:
        row = {key: _readable(value) for key, value in json.loads(line).items()}
        row["step"]  # a line without it belongs to no step
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        if not line.endswith(b"\n"):
            return None
        raise UserError(
            f"{path} line {number}: {line[:80]!r} is not a metrics line (a JSON object of numbers with a step). "
            "Remove the line, or move the file away to begin a new one."
        ) from error
    return row


def _writable(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _readable(value: float | str) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else +value  # no number: TypeError
