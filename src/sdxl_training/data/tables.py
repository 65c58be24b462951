"""A folder of pictures, on a disk or at an address, whose captions are in a table: JSON lines, CSV, TSV or Parquet.

The table decides which pictures take part. Each of its rows counts like a caption file of its own: when one changes,
only its picture is looked at again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.folders import ABSENT, NO_SIDECAR, FolderSource, Look, pictures_of_looks
from sdxl_training.data.listing import FILES
from sdxl_training.data.remote import is_address, shown, stamps_of
from sdxl_training.data.remote_folders import AddressSource
from sdxl_training.data.sidecars import Sidecar, tags_of
from sdxl_training.data.table_files import Columns, read_table
from sdxl_training.data.walk import PICTURE_ENDINGS
from sdxl_training.records import UserError

OUTSIDE = re.compile(rb"\.\.(?:/|\Z)|/|.*\0", re.DOTALL)  # how such names begin; none inside has a zero byte
ENDINGS = tuple(b"." + ending for ending in PICTURE_ENDINGS)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TableSource:
    """Pictures under a folder that a table names, with the captions it gives them.

    folder: where the pictures are; captions beside them are not looked for. table: .jsonl, .csv, .tsv or .parquet; its
    path, relative to the folder, or its address. picture_column: of the file names, relative to the folder; by default
    file_name, path, image or filename. caption_columns: each holds an alternative, or a list of them; by default text,
    caption, captions or prompt. tags_column: lists, or texts with commas; by default tags, where there is one. A data
    set folder with metadata.jsonl or metadata.csv needs only the table's name.
    """

    folder: FolderSource | AddressSource
    table: str
    picture_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    tags_column: str | None = None

    @property
    def identity(self) -> str:
        """Return the places of folder and table, without credentials, and the columns' names as JSON."""
        columns = [self.picture_column, list(self.caption_columns), self.tags_column]
        return json.dumps({"kind": "table", "path": self._root, "table": shown(self._table), "columns": columns})

    def list_files(self) -> pa.Table:
        """Return the pictures that the table names, schema FILES, also those that are not there.

        The caption's columns hold the length and a digest of what the row says. How many pictures of the folder the
        table does not name is logged. Raises UserError for a folder or table that cannot be read, and for a picture
        that is named twice.
        """
        there = self.folder.list_all()
        rows = self._rows()
        place = pc.index_in(rows.names, value_set=there["file"])
        self._say_what_is_left_out(there["file"], place)
        stamps_N2 = np.stack([_values(there[column].take(place)) for column in ("bytes", "mtime_ns")], axis=1)
        others = {row: rows.names[row].as_py() for row in np.flatnonzero(place.is_null())}
        others = {row: name for row, name in others.items() if not OUTSIDE.match(name)}
        if others:  # of another ending, hidden, or not there
            stamps_N2[list(others)] = self.folder.stamps(list(others.values()))
        digests_N2 = np.array([digest_of(captions) for captions in rows.captions()], np.int64).reshape(-1, 2)
        columns = [*stamps_N2.T, *digests_N2.T]
        return pa.Table.from_arrays([rows.names, *(pa.array(np.ascontiguousarray(c)) for c in columns)], schema=FILES)

    def look(self, files: pa.Table) -> pa.Table:
        """Return what headers and the table say, schema PICTURES; a row a file."""
        names = files["file"].to_pylist()
        inside = pa.array([not OUTSIDE.match(name) for name in names], pa.bool_())
        no_captions = pa.array([ABSENT] * len(names), pa.int64())
        place = files.schema.get_field_index("caption_bytes")
        plain = files.set_column(place, FILES.field("caption_bytes"), no_captions).filter(inside)
        rows = zip(names, self._rows().find(names), strict=True)
        return pictures_of_looks(files, self._with_captions(rows, iter(self.folder.looks(plain))))

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where they cannot be had."""
        return self.folder.read(file, start, length)

    def path(self, name: str) -> str:
        """Return the path or the address of a picture, without credentials."""
        return self.folder.path(name)

    @property
    def _root(self) -> str:
        return shown(self.folder.base).removesuffix("/")

    @property
    def _table(self) -> str:
        if is_address(self.table):
            return self.table
        path = Path(self.table).expanduser()
        return str(path) if path.is_absolute() else f"{self.folder.base}{path}"

    def _rows(self) -> TableRows:
        table = self._table
        try:
            stamp = stamps_of(table)
            if stamp is None:
                raise UserError("this is a folder. Give the table in it.")
            return _read_rows(
                table, stamp, self.picture_column, self.caption_columns, self.tags_column, self.folder.base
            )
        except (FileNotFoundError, NotADirectoryError):
            problem = "there is no such file. Correct the table's path."
        except OSError as error:
            remedy = "Credentials come from the environment." if is_address(table) else "Make it readable."
            problem = f"it cannot be read ({error.strerror or error}). {remedy}"
        except UserError as error:
            problem = str(error)
        raise UserError(f"{shown(table)}: {shown(problem)}")

    def _with_captions(self, rows: Iterable[tuple[bytes, Sidecar]], looks: Iterator[Look]) -> Iterator[Look]:
        """Yield what looks at the pictures told, with the table's captions; those outside were not looked at."""
        for name, sidecar in rows:
            if OUTSIDE.match(name):
                yield None, NO_SIDECAR, f"the table names it, and it is not inside {self._root}"
            else:
                header, _, reason = next(looks)
                yield header, sidecar if reason is None else NO_SIDECAR, reason

    def _say_what_is_left_out(self, there: pa.ChunkedArray, place: pa.Array) -> None:
        left = np.ones(len(there), bool)
        left[_values(place.drop_null())] = False
        names = [name for name in there.filter(pa.array(left)).to_pylist() if name.lower().endswith(ENDINGS)]
        if names:
            table, first = shown(self._table), os.fsdecode(names[0])
            log.warning("%s does not name %d pictures of its folder, such as %s", table, len(names), first)


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
    address: str,
    stamp: tuple[int, int],  # so that a table that has changed is read anew
    picture: str | None,
    captions: tuple[str, ...],
    tags: str | None,
    base: str,
) -> TableRows:
    table, columns = read_table(address, stamp[0], picture, captions, tags)
    names = _inside(pa.concat_arrays(table[columns.picture].chunks), base)
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


def _inside(names: pa.Array, base: str) -> pa.Array:
    """Return file names as bytes, relative to the folder and without detours."""
    odd = pc.match_substring_regex(names, r"(^|/)\.{0,2}(/|$)")
    if pc.any(odd).as_py():
        plain = [_relative(name, base) for name in names.filter(odd).to_pylist()]
        names = pc.replace_with_mask(names, odd, pa.array(plain, names.type))
    return names.cast(pa.large_binary()).cast(pa.binary())


def _relative(name: str, base: str) -> str:
    root = os.path.join("/", base)  # noqa: PTH118 - so that addresses, too, are cut like absolute paths
    whole = os.path.join(root, f"/{name}" if is_address(name) else name)  # noqa: PTH118
    return os.path.relpath(whole, root)


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
