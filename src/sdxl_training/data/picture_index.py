"""The on-disk index of a source: a start lists the files and looks only at those that are new or changed.

The index is brought up to date by one process; all others wait for it and load what it wrote. A first index that is
interrupted continues where it was.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from sdxl_training.data.contents import RECORD, with_hashes
from sdxl_training.data.index_files import (
    INDEX,
    IndexPaths,
    folded_in,
    generation_of,
    one_at_a_time,
    read_rows,
    write_rows,
)
from sdxl_training.data.index_looks import Progress, look_at_wanted
from sdxl_training.data.index_rows import Comparison, Groups, Piece, differs, is_unchanged, merged
from sdxl_training.data.listing import PictureSource
from sdxl_training.data.processes import available_cores

__all__ = ["INDEX", "Progress", "generation_of", "load_index", "update_index"]

MANY = 2**18  # learned hashes that are worth a rewrite of the index


def update_index(
    folder: str | Path, source: PictureSource, progress: Progress, processes: int | None = None, session: str = ""
) -> pa.Table:
    """Bring the index of a source in this folder up to date and return it, schema INDEX, each column in one piece.

    Rows are in the order of the source's files. A row's stamps are those of its file, except where the file was so
    young that it must be looked at again. Where other processes call this at the same time, one does the work and the
    others return what it wrote; with a session, that also holds for those that come later with the same session, so
    that all see the same pictures. processes: that look at files; by default as many as cores. Raises UserError as the
    source does, and where the folder cannot be written.
    """
    paths = IndexPaths.of(folder, source.identity)
    with one_at_a_time(paths, session) as mine:
        if mine:
            return _update(paths, source, progress, processes or available_cores())
    table = load_index(folder, source.identity)
    if table is None:
        raise ValueError(f"{paths.table} is gone")
    return table


def load_index(folder: str | Path, identity: str) -> pa.Table | None:
    """Return the index as it was left, with all that was learned since; None where there is none. Nothing is listed."""
    paths = IndexPaths.of(folder, identity)
    return _read(paths)[0]


def _read(paths: IndexPaths) -> tuple[pa.Table | None, int, int]:
    """Return the index with what was learned since, and of the latter what `with_hashes` says."""
    stored = read_rows(paths.table)
    return (None, 0, 0) if stored is None else with_hashes(stored, paths.hashes)


def _list_and_read(paths: IndexPaths, source: PictureSource) -> tuple[pa.Table, tuple[pa.Table | None, int, int]]:
    """Return the files there are, and the index, which is read meanwhile."""
    with ThreadPoolExecutor(1) as thread:  # processes that list may be forked beside it: they use nothing of Arrow
        reading = thread.submit(_read, paths)
        return source.list_files(), reading.result()


def _update(paths: IndexPaths, source: PictureSource, progress: Progress, processes: int) -> pa.Table:
    now = time.time_ns()
    files, (stored, read_to, outdated) = _list_and_read(paths, source)
    generation = _bring_up_to_date(paths, source, files, stored, read_to, now, progress, processes)
    if stored is not None and generation is None:
        if not outdated and read_to - folded_in(stored) <= MANY * RECORD.itemsize:
            return stored
        write_rows(paths.table, iter([stored]), generation_of(stored), read_to)
    for part in paths.parts():
        part.unlink()
    del stored, files  # twice the index would be in memory
    pa.default_memory_pool().release_unused()
    table = load_index(paths.folder, source.identity)
    if table is None:
        raise ValueError(f"{paths.table} is gone")
    return table


def _bring_up_to_date(
    paths: IndexPaths,
    source: PictureSource,
    files: pa.Table,
    stored: pa.Table | None,
    read_to: int,
    now: int,
    progress: Progress,
    processes: int,
) -> int | None:
    """Look at what is new and write the index anew; returns its generation, None where nothing had changed."""
    parts = [Piece(path) for path in paths.parts() if read_rows(path, ["file"]) is not None]
    if stored is not None and not parts and is_unchanged(stored, files):
        return None
    compared = Comparison.of(files.combine_chunks(), Groups.of([*parts, *([] if stored is None else [Piece(stored)])]))
    fresh = look_at_wanted(paths, source, compared, now, progress, processes)
    if stored is not None and not parts and not differs(stored, compared, fresh):
        return None
    generation = int.from_bytes(os.urandom(8), "little") >> 1
    write_rows(paths.table, merged(compared, Groups.of(fresh)), generation, read_to)
    return generation
