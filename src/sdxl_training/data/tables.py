"""A folder of pictures whose captions are in a table, as a source: JSON lines, CSV, TSV or Parquet.

The table decides which pictures take part. Each of its rows counts like a caption file of its own: when one changes,
only its picture is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.folders import Look, absolute, list_folder, pictures_of_looks, read_whole
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.listing import FILES
from sdxl_training.data.quick_headers import look_quickly
from sdxl_training.data.sidecars import Sidecar, tags_of
from sdxl_training.data.table_files import Columns, read_table
from sdxl_training.records import UserError

ABSENT = -1  # size and time of a file that is not there
OUTSIDE = "../"
NO_SIDECAR = Sidecar()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TableSource:
    """Pictures under a folder that a table names, with the captions it gives them.

    table: .jsonl, .csv, .tsv or .parquet; its path, relative to the folder. picture_column: of the file names, relative
    to the folder; by default file_name, path, image or filename. caption_columns: each holds an alternative, or a list
    of them; by default text, caption, captions or prompt. tags_column: lists, or texts with commas; by default tags,
    where there is one. A data set folder with metadata.jsonl or metadata.csv needs only the table's name.
    """

    root: str
    table: str
    picture_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    tags_column: str | None = None
    processes: int | None = None

    @property
    def identity(self) -> str:
        """Return the paths of folder and table and the columns' names as JSON."""
        columns = [self.picture_column, list(self.caption_columns), self.tags_column]
        return json.dumps({"kind": "table", "path": absolute(self.root), "table": self._table, "columns": columns})

    def list_files(self) -> pa.Table:
        """Return the pictures that the table names, schema FILES, also those that are not there.

        The caption's columns hold the length and a digest of what the row says. How many pictures of the folder the
        table does not name is logged. Raises UserError for a folder or table that cannot be read, and for a picture
        that is named twice.
        """
        there, _ = list_folder(self.root, None, self.processes)
        rows = self._rows()
        place = pc.index_in(rows.names, value_set=there["file"])
        self._say_what_is_left_out(there["file"], place)
        stamps_N2 = np.stack([_values(there[column].take(place)) for column in ("bytes", "mtime_ns")], axis=1)
        for row in np.flatnonzero(place.is_null()):  # of another ending, hidden, or not there
            stamps_N2[row] = _stamps_of(self.path(os.fsdecode(rows.names[row].as_py())))
        digests_N2 = np.array([digest_of(captions) for captions in rows.captions()], np.int64).reshape(-1, 2)
        columns = [*stamps_N2.T, *digests_N2.T]
        return pa.Table.from_arrays([rows.names, *(pa.array(np.ascontiguousarray(c)) for c in columns)], schema=FILES)

    def look(self, files: pa.Table) -> pa.Table:
        """Return what headers and the table say, schema PICTURES; a row a file."""
        names = files["file"].to_pylist()
        sidecars = self._rows().find(names)
        return pictures_of_looks(
            files, (self._look(os.fsdecode(name), sidecar) for name, sidecar in zip(names, sidecars, strict=True))
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where the file is gone or no longer has its length."""
        return read_whole(self.path(file), length)

    def path(self, name: str) -> str:
        """Return the path of a picture."""
        return f"{absolute(self.root)}/{name}"

    @property
    def _table(self) -> str:
        return str(Path(absolute(self.root)) / Path(self.table).expanduser())

    def _rows(self) -> TableRows:
        try:
            status = Path(self._table).stat()
            stamp = (status.st_size, status.st_mtime_ns)
        except OSError:
            stamp = (ABSENT, ABSENT)
        try:
            return _read_rows(
                self._table, stamp, self.picture_column, self.caption_columns, self.tags_column, absolute(self.root)
            )
        except UserError as error:
            raise UserError(f"{self._table}: {error}") from error

    def _look(self, name: str, sidecar: Sidecar) -> Look:
        if name.startswith((OUTSIDE, "/")) or "\0" in name:
            return None, NO_SIDECAR, f"the table names it, and it is not inside {absolute(self.root)}"
        try:
            return look_quickly(self.path(name)), sidecar, None
        except UnreadablePicture as error:
            return None, NO_SIDECAR, error.reason

    def _say_what_is_left_out(self, there: pa.ChunkedArray, place: pa.Array) -> None:
        left = np.ones(len(there), bool)
        left[_values(place.drop_null())] = False
        if left.any():
            first = os.fsdecode(there[int(left.argmax())].as_py())
            log.warning("%s does not name %d pictures of its folder, such as %s", self._table, left.sum(), first)


@dataclass(frozen=True, slots=True)
class TableRows:
    """What a table says. names: of the pictures, sorted; values: the other columns, in the same order."""

    names: pa.Array
    values: pa.Table
    columns: Columns

    def captions(self, start: int = 0, stop: int | None = None) -> Iterator[Sidecar]:
        """Yield what the table says of each picture."""
        part = self.values.slice(start, None if stop is None else stop - start)
        nothing = [None] * part.num_rows
        texts = zip(*(part[name].to_pylist() for name in self.columns.captions), strict=True)
        tags = nothing if self.columns.tags is None else part[self.columns.tags].to_pylist()
        for row, tag in zip(texts if self.columns.captions else ((),) * part.num_rows, tags, strict=True):
            captions = tuple(text.strip() for cell in row for text in _texts_in(cell))
            yield Sidecar(captions, tags_of(tag if isinstance(tag, str) else list(_texts_in(tag))))

    def find(self, names: Sequence[bytes]) -> list[Sidecar]:
        """Return what the table says of these pictures, sorted by name; nothing of one that it does not name."""
        if not names:
            return []
        start = bisect_left(range(len(self.names)), names[0], key=lambda row: self.names[row].as_py())
        stop = bisect_right(range(len(self.names)), names[-1], key=lambda row: self.names[row].as_py())
        said = dict(zip(self.names.slice(start, stop - start).to_pylist(), self.captions(start, stop), strict=True))
        return [said.get(name, NO_SIDECAR) for name in names]


@lru_cache(maxsize=2)  # processes that look at files inherit it
def _read_rows(
    path: str,
    stamp: tuple[int, int],  # so that a table that has changed is read anew
    picture: str | None,
    captions: tuple[str, ...],
    tags: str | None,
    root: str,
) -> TableRows:
    table, columns = read_table(Path(path), picture, captions, tags)
    names = _inside(pa.concat_arrays(table[columns.picture].chunks), root)
    order = pc.sort_indices(names)
    names = names.take(order)
    same = pc.equal(names.slice(1), names.slice(0, len(names) - 1))
    if pc.any(same).as_py():
        at = pc.index(same, True).as_py()
        first, second = sorted((order[at].as_py() + 1, order[at + 1].as_py() + 1))
        raise UserError(
            f"rows {first} and {second} both name {os.fsdecode(names[at].as_py())}. Put its captions into one row, as "
            "a list, or remove one of the rows."
        )
    return TableRows(names, table.take(order).combine_chunks(), columns)


def _inside(names: pa.Array, root: str) -> pa.Array:
    """Return file names as bytes, relative to the folder and without detours."""
    odd = pc.match_substring_regex(names, r"(^|/)\.{0,2}(/|$)")
    if pc.any(odd).as_py():
        plain = [os.path.relpath(os.path.join(root, name), root) for name in names.filter(odd).to_pylist()]  # noqa: PTH118
        names = pc.replace_with_mask(names, odd, pa.array(plain, names.type))
    return names.cast(pa.large_binary()).cast(pa.binary())


def digest_of(sidecar: Sidecar) -> tuple[int, int]:
    """Return the length of what a row says and a digest of it, in place of a caption file's size and time.

    The digest is below all times, so that none is taken for one of these days. Both are -1 where the row says nothing.
    """
    if not sidecar.captions and not sidecar.tags:
        return ABSENT, ABSENT
    said = repr((sidecar.captions, sidecar.tags)).encode()
    return len(said), -3 - (int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little") >> 2)


def _texts_in(cell: str | Sequence[str | None] | None) -> Iterable[str]:
    """Return the texts of a cell that holds one, several or none."""
    if isinstance(cell, str):
        return (cell,)
    return () if cell is None else (text for text in cell if text is not None)


def _values(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    values: NDArray[np.int64] = column.fill_null(ABSENT).to_numpy().astype(np.int64)
    return values


def _stamps_of(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return ABSENT, ABSENT
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (ABSENT, ABSENT)
