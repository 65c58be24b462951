"""Rows of Parquet and Arrow files: all in order, or pictures one by one.

Parquet packs many rows into one block (a row group), so a row costs what lies before it in its block. What has been
unpacked is kept, up to CACHE_BYTES a process. Rows in order cost each block once. Rows at random cost up to a block
each, unless their blocks fit together: for those, write the file with small row groups.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_training.data.remote import is_address, open_seekable
from sdxl_training.records import UserError

ROWS_AT_ONCE = 32  # unpacked together: some 100 MB of large pictures
CACHE_BYTES = 256 << 20
OPEN_FILES = 8  # kept open a process
PAGE_BYTES = 1 << 20  # of a column read at a time
REMOTE_CHUNK = 1 << 20  # of a remote file asked for at a time, where less is needed
# What pyarrow raises on damaged content; OSError among it, without errno, from its decompression.
DAMAGE = (pa.ArrowException, OSError, ValueError)

FindImage = Callable[[pa.Schema, str | None], str]


def image_bytes(column: pa.Array) -> pa.Array:
    """Return the bytes in a column of pictures; null where a cell is, too."""
    return column.flatten()[column.type.get_field_index("bytes")] if pa.types.is_struct(column.type) else column


class Rows(Protocol):
    """An open file. starts: the first row of each block of rows, and the number of rows at the end."""

    schema: pa.Schema
    starts: list[int]

    def batches(self, columns: Sequence[str], blocks: Sequence[int]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of some blocks, a few at a time."""

    def close(self) -> None:
        """Close the file."""


class _ParquetRows:
    def __init__(self, address: str):
        self._file = open_seekable(address, REMOTE_CHUNK)
        try:
            # Not pre-buffered, and a buffer: a column is read page by page, where a row group may be all of the file.
            self._parquet = pq.ParquetFile(self._file, buffer_size=PAGE_BYTES, pre_buffer=False)
        except DAMAGE:
            self._file.close()
            raise
        self.schema = self._parquet.schema_arrow
        groups = self._parquet.metadata
        self.starts = list(accumulate((groups.row_group(i).num_rows for i in range(groups.num_row_groups)), initial=0))

    def batches(self, columns: Sequence[str], blocks: Sequence[int]) -> Iterator[pa.RecordBatch]:
        for block in blocks:  # apart, or rows before a damaged block would be lost with it
            yield from self._parquet.iter_batches(ROWS_AT_ONCE, [block], list(columns), use_threads=False)

    def close(self) -> None:
        self._file.close()


class _ArrowRows:
    """A local Arrow file or stream; bytes stay on the disk until they are used. Damage shows behind the last row."""

    def __init__(self, path: str):
        self._file = pa.memory_map(path)
        self._batches: list[pa.RecordBatch] = []
        self._damage: Exception | None = None
        is_file = self._file.read(6) == b"ARROW1"
        self._file.seek(0)
        try:
            reader = pa.ipc.open_file(self._file) if is_file else pa.ipc.open_stream(self._file)
        except DAMAGE:
            self._file.close()
            raise
        self.schema = reader.schema
        try:
            if is_file:
                self._batches += (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                self._batches += reader
        except DAMAGE as error:
            self._damage = error
        self.starts = list(accumulate((batch.num_rows for batch in self._batches), initial=0))

    def batches(self, columns: Sequence[str], blocks: Sequence[int]) -> Iterator[pa.RecordBatch]:
        for block in blocks:
            batch = self._batches[block].select(list(columns))
            yield from (batch.slice(first, ROWS_AT_ONCE) for first in range(0, batch.num_rows, ROWS_AT_ONCE))
        if self._damage is not None and len(blocks) == len(self._batches):
            raise self._damage

    def close(self) -> None:
        self._file.close()


def open_rows(address: str) -> Rows:
    """Open a .parquet or .arrow file. Raises one of DAMAGE, or UserError for what is not supported."""
    if not address.lower().endswith(".arrow"):
        return _ParquetRows(address)
    if is_address(address):
        raise UserError(".arrow files are read from a local disk only. Copy them, or write the dataset as Parquet.")
    return _ArrowRows(address)


@dataclass(slots=True)
class _Cursor:
    """Where reading a file has come to: `batches` goes on with row `at`, in block `block`."""

    rows: Rows
    image: str
    block: int = -1
    at: int = 0
    batches: Iterator[pa.RecordBatch] = field(default_factory=lambda: iter(()))


class UnpackedRows:
    """The pictures unpacked last in this process, and the files they come from, the least recently used first."""

    def __init__(self) -> None:
        self.forget_all()

    def forget_all(self) -> None:
        """Begin anew, as a forked process must: it has the parent's lock and open files."""
        self._lock = threading.Lock()
        self._cursors: OrderedDict[str, _Cursor] = OrderedDict()
        self._pictures: OrderedDict[tuple[str, str, int], bytes | None] = OrderedDict()
        self._bytes = 0

    def forget(self, address: str) -> None:
        """Forget a file, which may have changed."""
        with self._lock:
            self._close(address)
            for key in [key for key in self._pictures if key[0] == address]:
                self._bytes -= len(self._pictures.pop(key) or b"")

    def read(self, address: str, image: str | None, find_image: FindImage, row: int) -> bytes | None:
        """Return the picture of a row; None where there is none. Raises what reading the file raises.

        image: what is known of its column; find_image returns its name from the file's schema and that.
        """
        with self._lock:
            key = (address, image or "", row)
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
            try:
                return self._unpack_to(row, self._cursor(address, image, find_image), key)
            except DAMAGE:
                self._close(address)  # where it stands now is not known
                raise

    def _cursor(self, address: str, image: str | None, find_image: FindImage) -> _Cursor:
        cursor = self._cursors.get(address)
        if cursor is None:
            rows = open_rows(address)
            cursor = self._cursors[address] = _Cursor(rows, find_image(rows.schema, image))
        self._cursors.move_to_end(address)
        while len(self._cursors) > OPEN_FILES:
            self._close(next(iter(self._cursors)))
        return cursor

    def _unpack_to(self, row: int, cursor: _Cursor, key: tuple[str, str, int]) -> bytes | None:
        starts = cursor.rows.starts
        if not 0 <= row < starts[-1]:
            return None
        block = bisect_right(starts, row) - 1
        if block != cursor.block or row < cursor.at:
            cursor.block, cursor.at = block, starts[block]
            cursor.batches = cursor.rows.batches([cursor.image], [block])
        while True:
            batch = next(cursor.batches, None)
            if batch is None:
                return None
            cells = image_bytes(batch.column(0))
            first, cursor.at = cursor.at, cursor.at + len(cells)
            for i, cell in enumerate(cells):
                self._keep((*key[:2], first + i), cell.as_buffer().to_pybytes() if cell.is_valid else None)
            if row < cursor.at:
                cell = cells[row - first]
                return cell.as_buffer().to_pybytes() if cell.is_valid else None

    def _keep(self, key: tuple[str, str, int], data: bytes | None) -> None:
        self._bytes += len(data or b"") - len(self._pictures.pop(key, None) or b"")
        self._pictures[key] = data
        while self._bytes > CACHE_BYTES:
            self._bytes -= len(self._pictures.popitem(last=False)[1] or b"")

    def _close(self, address: str) -> None:
        cursor = self._cursors.pop(address, None)
        if cursor is not None:
            cursor.batches = iter(())
            cursor.rows.close()


unpacked = UnpackedRows()
os.register_at_fork(after_in_child=unpacked.forget_all)
