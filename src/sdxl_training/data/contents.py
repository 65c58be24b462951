"""What becomes known of pictures when they are first decoded: the hash of their content, or that they cannot be used.

Both are appended to files beside the index, by any number of processes at once: one write a batch, in append mode. They
are never rewritten. A record holds only while the picture's file has the size and time it had.

Shape legend: N pictures of the index, K records or pictures of a batch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.index_files import HASH_BYTES, IndexPaths, folded_in, generation_of
from sdxl_training.data.store_writer import FULL, say_full, wait_for_room
from sdxl_training.records import UserError

Hashes = NDArray[np.uint8]
Rows = NDArray[np.int64]

# Within one generation of the index a row number says which picture; when the index was rewritten since, its name does.
RECORD = np.dtype(
    [
        ("check", "<u8"),
        ("name", "<u8"),  # digest
        ("bytes", "<i8"),
        ("mtime_ns", "<i8"),
        ("generation", "<u8"),
        ("row", "<i8"),
        ("hash", "u1", HASH_BYTES),
    ]
)
FACTORS = np.array([0x9E3779B97F4A7C15 + 2 * k * 0xD1B54A32D192ED03 & 2**64 - 1 | 1 for k in range(7)], np.uint64)
READ_BYTES = 2**20 * RECORD.itemsize


class Contents:
    """Content hashes of the pictures of an index: 16 bytes of memory a picture, shared with forked processes.

    After a fork or in another process every object learns by itself; what the others learned it sees on `refresh`.
    """

    def __init__(self, folder: str | Path, identity: str, table: pa.Table):
        """table: as `load_index` or `update_index` returned it for the source of this identity."""
        self._paths = IndexPaths.of(folder, identity)
        self._generation = generation_of(table)
        self._columns = table.select(["name", "bytes", "mtime_ns"])
        self._hashes_N16 = hashes_of(table)  # zeros: not known
        self._offset = folded_in(table)
        self.failures: dict[int, str] = {}
        """Why pictures could not be read, decoded or encoded, by row."""
        self._failures_read = 0
        self._read_failures()

    def hash_of(self, rows: Rows) -> tuple[Hashes, NDArray[np.bool_]]:
        """Return the content hashes of rows of the index, uint8 (K, 16), and which of them are known, (K,)."""
        hashes_K16 = self._hashes_N16[rows]
        known_K: NDArray[np.bool_] = np.any(hashes_K16, axis=1)
        return hashes_K16, known_K

    def learn(self, rows: Rows, hashes_K16: Hashes) -> None:
        """Keep the content hashes of rows, for this process and all others. Waits while the disk is full."""
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return
        self._hashes_N16[rows] = hashes_K16
        records = np.zeros(len(rows), RECORD)
        names, sizes, times = self._names_and_stamps(rows)
        records["name"] = [digest_of(name) for name in names]
        records["bytes"], records["mtime_ns"] = sizes, times
        records["generation"], records["row"], records["hash"] = self._generation, rows, hashes_K16
        records["check"] = checks_of(records)
        _append(self._paths.hashes, records.tobytes())

    def fail(self, rows: Sequence[int], reasons: Sequence[str]) -> None:
        """Keep why pictures cannot be read, decoded or encoded, for this process and all others.

        Waits while the disk is full.
        """
        self.failures |= dict(zip(rows, reasons, strict=True))
        lines = [
            json.dumps(
                {"name": name.decode("utf-8", "surrogateescape"), "bytes": size, "mtime_ns": at, "reason": reason}
            )
            for name, size, at, reason in zip(*self._names_and_stamps(np.asarray(rows, np.int64)), reasons, strict=True)
        ]
        if lines:  # the line that comes before may have been cut off
            _append(self._paths.failures, ("\n" + "\n".join(lines) + "\n").encode())

    def refresh(self) -> int:
        """Take in what other processes learned since; return how many records there were."""
        records, self._offset = read_records(self._paths.hashes, self._offset)
        own = records[(records["generation"] == self._generation) & (records["row"] < len(self._hashes_N16))]
        self._hashes_N16[own["row"]] = own["hash"]
        return len(own) + self._read_failures()

    def _read_failures(self) -> int:
        """Take in the failures that are new since the last time; return how many."""
        size = self._paths.failures.stat().st_size if self._paths.failures.exists() else 0
        if size == self._failures_read:
            return 0
        self._failures_read = size
        before = len(self.failures)
        self.failures |= failures_of(self._columns, self._paths.failures)
        return len(self.failures) - before

    def _names_and_stamps(self, rows: Rows) -> tuple[list[bytes], list[int], list[int]]:
        chosen = self._columns.take(pa.array(rows))
        names, sizes, times = (column.to_pylist() for column in chosen.columns)
        return names, sizes, times


def hashes_of(table: pa.Table) -> Hashes:
    """Return the column content_hash as a new array of uint8 (N, 16), zeros where it is null."""
    column = table["content_hash"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    hashes_N16 = np.zeros((len(column), HASH_BYTES), np.uint8)
    known_N = column.is_valid().to_numpy(zero_copy_only=False)
    if known_N.any():
        flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * HASH_BYTES, column.offset * HASH_BYTES)
        hashes_N16[known_N] = flat.reshape(-1, HASH_BYTES)[known_N]
    return hashes_N16


def column_of_hashes(hashes_N16: Hashes) -> pa.Array:
    """Return what `hashes_of` made of a column."""
    unknown_N = ~hashes_N16.any(axis=1)
    validity = pa.py_buffer(np.packbits(~unknown_N, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(hashes_N16))
    return pa.Array.from_buffers(pa.binary(HASH_BYTES), len(hashes_N16), [validity, data], int(unknown_N.sum()))


def with_hashes(table: pa.Table, path: Path) -> tuple[pa.Table, int, int]:
    """Return an index with the hashes its file of hashes adds, up to which byte it was read, how many others wrote.

    Others: processes that had loaded an earlier generation of the index.
    """
    records, offset = read_records(path, folded_in(table))
    if not len(records):
        return table, offset, 0
    hashes_N16 = hashes_of(table)
    own_K = records["generation"] == generation_of(table)
    foreign = int((~own_K).sum())
    if foreign:
        records = _translated(records, own_K, table)
    records = records[(records["row"] >= 0) & (records["row"] < len(hashes_N16))]
    hashes_N16[records["row"]] = records["hash"]
    place = table.schema.get_field_index("content_hash")
    return table.set_column(place, table.schema.field(place), column_of_hashes(hashes_N16)), offset, foreign


def _translated(records: NDArray[np.void], own_K: NDArray[np.bool_], table: pa.Table) -> NDArray[np.void]:
    """Return the records with the rows they have in this index; -1 where the picture is not there as it was."""
    wanted = set(records["name"][~own_K].tolist())
    rows = {digest: row for row, digest in enumerate(map(digest_of, table["name"].to_pylist())) if digest in wanted}
    records = records.copy()
    records["row"][~own_K] = [rows.get(digest, -1) for digest in records["name"][~own_K].tolist()]
    sizes_N, times_N = (table[name].to_numpy() for name in ("bytes", "mtime_ns"))
    row_K = records["row"]
    same_K = (row_K >= 0) & (sizes_N[row_K] == records["bytes"]) & (times_N[row_K] == records["mtime_ns"])
    records["row"][~own_K & ~same_K] = -1
    return records


def failures_of(columns: pa.Table, path: Path) -> dict[int, str]:
    """Return why pictures could not be decoded, by row; columns: name, bytes, mtime_ns of an index."""
    failures = _read_failures(path)
    place_N = pc.index_in(columns["name"], value_set=pa.array(list(failures), pa.binary()))
    rows = np.flatnonzero(place_N.is_valid().to_numpy())
    found = columns.take(pa.array(rows)).to_pylist()
    return {
        row: reason
        for row, picture in zip(rows.tolist(), found, strict=True)
        for size, mtime_ns, reason in [failures[picture["name"]]]
        if (size, mtime_ns) == (picture["bytes"], picture["mtime_ns"])
    }


def _read_failures(path: Path) -> Mapping[bytes, tuple[int, int, str]]:
    """Return size, time and reason by name; what cannot be read was cut off while it was written."""
    failures: dict[bytes, tuple[int, int, str]] = {}
    if not path.exists():
        return failures
    for line in path.read_bytes().split(b"\n"):
        try:
            said = json.loads(line)
            name = said["name"].encode("utf-8", "surrogateescape")
            failures[name] = (int(said["bytes"]), int(said["mtime_ns"]), str(said["reason"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return failures


# Records


def digest_of(name: bytes) -> int:
    """Return the 64 bits that stand for a picture's name in a record."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def checks_of(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return what `check` must be in each record, so that one that was cut off is not believed."""
    words = np.ascontiguousarray(records).view(np.uint64).reshape(-1, RECORD.itemsize // 8)[:, 1:]
    sums: NDArray[np.uint64] = (words * FACTORS + FACTORS[::-1]).sum(axis=1, dtype=np.uint64)
    return sums ^ (sums >> np.uint64(29))


def read_records(path: Path, offset: int) -> tuple[NDArray[np.void], int]:
    """Return the whole records from this byte on, and where the next will begin."""
    if not path.exists():
        return np.empty(0, RECORD), 0
    found = []
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < offset:  # it was deleted, and begun anew
            offset = 0
        while True:
            file.seek(offset)
            data = file.read(READ_BYTES)
            records, length = parse_records(data)
            found.append(records)
            offset += length
            if len(data) < READ_BYTES or not length:
                return np.concatenate(found), offset


def parse_records(data: bytes) -> tuple[NDArray[np.void], int]:
    """Return the whole records among these bytes, and the number of bytes behind which nothing whole is left.

    A process that was killed, or a full disk, may have left a piece of a record; the next begins right behind it.
    """
    found, at = [np.empty(0, RECORD)], 0
    while len(data) - at >= RECORD.itemsize:
        good = _good(data, at)
        number = len(good) if good.all() else int(good.argmin())
        found.append(np.frombuffer(data, RECORD, number, at))
        at += number * RECORD.itemsize
        if number < len(good):
            following = [_first_good(data, at + shift) for shift in range(1, RECORD.itemsize + 1)]
            if min(following) == len(data):
                break
            at = min(following)
    return np.concatenate(found), at


def _first_good(data: bytes, start: int) -> int:
    """Return where the first whole record is of those that stand end to end from `start`; the data's end for none."""
    good = _good(data, start)
    return start + int(good.argmax()) * RECORD.itemsize if good.any() else len(data)


def _good(data: bytes, start: int) -> NDArray[np.bool_]:
    records = np.frombuffer(data, RECORD, max(len(data) - start, 0) // RECORD.itemsize, start)
    good: NDArray[np.bool_] = records["check"] == checks_of(records)
    return good


def _append(path: Path, data: bytes) -> None:
    """Append in one write, so that what several processes append does not mix; wait while the disk is full.

    What a full disk lets through of a record is passed over when it is read.
    """
    said = False
    while True:
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.write(file, data) == len(data):
                    return
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            if error.errno not in FULL:
                raise UserError(f"{path}: cannot be written ({error.strerror}). Make the folder writable.") from error
            if not said:
                say_full(path, error)
                said = True
        wait_for_room()
