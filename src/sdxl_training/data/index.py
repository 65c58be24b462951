"""The on-disk index of picture headers, so that a second start does not open every picture again.

A Parquet table with one row a file: path, size and modification time identify it; height, width and content hash, or
the reason why it is no picture, are what is known of it. The index is a cache: losing it costs time, never data.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_training.records import SizeHW, UserError

# Paths are bytes: a file name need not be valid UTF-8.
SCHEMA = pa.schema(
    [
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("content_hash", pa.string()),
        ("reason", pa.string()),
    ],
    metadata={"sdxl_training_index": "1"},
)

log = logging.getLogger(__name__)


class FileKey(NamedTuple):
    """What tells that a file is still the one that was looked at."""

    path: str
    size: int
    mtime_ns: int


class Header(NamedTuple):
    """What a look at a file told: its picture size and content hash (hex), or the reason why it is unusable."""

    size_hw: SizeHW
    content_hash: str
    reason: str | None = None


def read_index(path: Path) -> dict[FileKey, Header]:
    """Return the stored headers; none where the index is missing, of another version, or damaged (logged)."""
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        log.warning("%s is damaged (%s): every picture is looked at again", path, error)
        return {}
    if not table.schema.equals(SCHEMA, check_metadata=True):
        log.warning("%s was written by another version: every picture is looked at again", path)
        return {}
    names, sizes, times, heights, widths, hashes, reasons = (column.to_pylist() for column in table.columns)
    return {
        FileKey(os.fsdecode(name), size, mtime_ns): Header((height, width), content_hash, reason)
        for name, size, mtime_ns, height, width, content_hash, reason in zip(
            names, sizes, times, heights, widths, hashes, reasons, strict=True
        )
    }


def write_index(path: Path, headers: Mapping[FileKey, Header]) -> None:
    """Replace the index file; raises UserError when the folder cannot be written."""
    columns = [
        [os.fsencode(key.path) for key in headers],
        [key.size for key in headers],
        [key.mtime_ns for key in headers],
        [header.size_hw[0] for header in headers.values()],
        [header.size_hw[1] for header in headers.values()],
        [header.content_hash for header in headers.values()],
        [header.reason for header in headers.values()],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that it is either there whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "make the folder writable"
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). {remedy.capitalize()}, or set data.cache.path to "
            "another folder; what was cached before is kept."
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
