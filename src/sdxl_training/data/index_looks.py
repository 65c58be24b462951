"""Looking at the files of a source that are new or changed, by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sdxl_training.data.index_files import INDEX, IndexPaths, number_of, write_rows
from sdxl_training.data.index_rows import Comparison, Numbers, Piece
from sdxl_training.data.listing import FILES, PICTURES, PictureSource
from sdxl_training.data.processes import open_pool

CHUNK = 4096  # files that a process looks at between two times that it is heard of
SMALL = 256  # files that are not worth processes
# A file changed twice within a clock tick keeps its time stamp; younger files are looked at again next time.
SETTLED_NS = 2_000_000_000
AHEAD_NS = 3600 * 10**9  # a file server's clock may be ahead by this; later times were made up


class Progress(Protocol):
    """Shows how far something is."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar of `total` items; the value yielded is called with the number of items just done."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some files to look at. part: where the rows go; None: to who asked. now: when the files were listed, in ns."""

    source: PictureSource
    files: pa.Table
    part: Path | None
    now: int


def look_at_wanted(
    paths: IndexPaths, source: PictureSource, compared: Comparison, now: int, progress: Progress, processes: int
) -> list[Piece]:
    """Look at the files that are new or changed, and again at those that could not be used.

    What is new goes to parts, which outlive this process; unless it is little. now: when the files were listed, in ns.
    """
    again, new = np.flatnonzero(compared.unusable()), np.flatnonzero(~compared.same_F)
    number = len(again) + len(new)
    if not number:
        return []
    chunks: list[tuple[Numbers, Path | None]] = [(chunk_F, None) for chunk_F in _chunks(again)]
    next_part = max((number_of(path) for path in paths.parts()), default=-1) + 1
    for place, chunk_F in enumerate(_chunks(new)):
        chunks.append((chunk_F, None if number <= SMALL else paths.part(next_part + place)))
    tasks = (Task(source, compared.files.take(pa.array(chunk_F)), part, now) for chunk_F, part in chunks)
    with progress.track("looking at pictures", number) as advance:
        if number > SMALL and processes > 1:
            with open_pool(processes) as pool:
                return _in_pool(pool, 2 * processes, tasks, advance)
        pieces = []
        for task in tasks:
            pieces.append(look(task))
            advance(task.files.num_rows)
        return pieces


def look(task: Task) -> Piece:
    """Look at the files of a task; rows of INDEX."""
    pictures = task.source.look(task.files)
    of_file_N = pc.index_in(pictures["file"], value_set=task.files["file"])
    if of_file_N.null_count:
        raise ValueError("a source returned pictures of files that it was not asked for")
    stamps = task.files.take(of_file_N)
    for name, never in (("mtime_ns", ("bytes", -1)), ("caption_mtime_ns", ("caption_mtime_ns", -2))):
        stamps = _spoiled(stamps, name, *never, task.now)
    columns = {name: stamps[name] for name in FILES.names} | {name: pictures[name] for name in PICTURES.names}
    columns["content_hash"] = pa.nulls(pictures.num_rows, INDEX.field("content_hash").type)
    rows = pa.table([columns[name] for name in INDEX.names], schema=INDEX)
    if task.part is None:
        return Piece(rows)
    write_rows(task.part, iter([rows]))
    return Piece(task.part)


def _spoiled(stamps: pa.Table, time_name: str, name: str, never: int, now: int) -> pa.Table:
    """Put a value that no file has into the stamps of files that are too young for their time to tell."""
    times = stamps[time_name]
    young = pc.and_(pc.greater(times, now - SETTLED_NS), pc.less(times, now + AHEAD_NS))
    place = stamps.schema.get_field_index(name)
    values = pc.if_else(young, pa.scalar(never, pa.int64()), stamps[name])
    return stamps.set_column(place, stamps.schema.field(place), values)


def _in_pool(
    pool: ProcessPoolExecutor, ahead: int, tasks: Iterator[Task], advance: Callable[[int], None]
) -> list[Piece]:
    """Have the tasks done, so many at a time handed out; returns what came of them in their order."""
    pieces: dict[int, Piece] = {}
    running: dict[Future[Piece], tuple[int, int]] = {}
    numbered = enumerate(tasks)
    while True:
        for place, task in islice(numbered, ahead - len(running)):
            running[pool.submit(look, task)] = (place, task.files.num_rows)
        if not running:
            return [pieces[place] for place in sorted(pieces)]
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            place, number = running.pop(future)
            pieces[place] = future.result()
            advance(number)


def _chunks(rows_F: Numbers) -> list[Numbers]:
    return [rows_F[start : start + CHUNK] for start in range(0, len(rows_F), CHUNK)]
