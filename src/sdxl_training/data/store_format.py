"""What lies on disk in a store, byte by byte: records, journals, seals; written by store_writer, read by store.

Shape legend: N records or keys; a key is two u64, so keys are (N, 2).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sdxl_training.data.atomic import write_atomically
from sdxl_training.records import UserError

JOURNAL = "journal"
MAGIC = b"tensors1"  # the last letter is the version of everything in this module
HEADER = np.dtype([("magic", "S8"), ("created_ns", "<u8")])
ALIGNMENT = 64
MAX_DIMENSIONS = 4
NO_DIMENSION = 2**32 - 1

# What an entry was made from: tells why another one is needed now. Digests as the caller likes them, zero for none.
ORIGIN = np.dtype([("sample_id", "<u8"), ("content", "<u8", 2), ("plan", "<u8"), ("settings", "<u8")])
RECORD = np.dtype(
    [
        ("key", "<u8", 2),
        ("origin", ORIGIN),
        ("offset", "<u8"),
        ("shape", "<u4", MAX_DIMENSIONS),  # trailing NO_DIMENSION: fewer dimensions
        ("stored", "<u4"),  # bytes in the shard
        ("crc", "<u4"),  # CRC-32 of these bytes
        ("shard", "<u2"),
        ("dtype", "u1"),
        ("packed", "u1"),  # 1: compression.pack
        ("record_crc", "<u4"),  # CRC-32 of the record up to here
    ]
)
CHECKED_BYTES = RECORD.itemsize - 4
DTYPES = {1: torch.float16, 2: torch.bfloat16, 3: torch.float32}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

Keys = NDArray[np.uint64]
Records = NDArray[np.void]


def as_keys(digests: Iterable[bytes]) -> Keys:
    """Return 16-byte digests as keys_N2, the form in which the store takes them."""
    joined = b"".join(digests)
    if len(joined) % 16:
        raise ValueError("a key is a digest of 16 bytes")
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def name_key(key: NDArray[np.uint64]) -> str:
    """Return a key (2,) as the hex of its digest."""
    return key.astype("<u8").tobytes().hex()


def shard_name(writer: str, number: int) -> str:
    """Return the path of a writer's shard, relative to the store's folder."""
    return f"{writer}/{number:04d}.blobs"


def record_checksums(records_N: Records) -> NDArray[np.uint32]:
    """Return what `record_crc` must be (N,); a quarter of a second a million."""
    view, size = np.ascontiguousarray(records_N).view(np.uint8).data, RECORD.itemsize
    starts = range(0, len(view), size)
    return np.fromiter((zlib.crc32(view[i : i + CHECKED_BYTES]) for i in starts), np.uint32, len(records_N))


class Tail(NamedTuple):
    """New records of a journal, up to which byte they reach, and how many before that byte are unreadable."""

    records_N: Records
    end: int
    unreadable: int


def created_ns(journal: Path) -> int:
    """Return when a journal was begun; raises ValueError where the file is no journal, OSError."""
    with journal.open("rb") as file:
        head = file.read(HEADER.itemsize)
    if len(head) < HEADER.itemsize or not head.startswith(MAGIC):
        raise ValueError("it is no journal, or one of another version")
    return int(np.frombuffer(head, HEADER)["created_ns"][0])


def read_journal(journal: Path, start: int = HEADER.itemsize) -> Tail:
    """Read the whole records from byte `start` on; raises OSError.

    What follows the last readable record is left for the next time: a record that is being written, or what a crash
    left of one.
    """
    if journal.stat().st_size < start + RECORD.itemsize:
        return Tail(np.empty(0, RECORD), start, 0)
    records_N = np.fromfile(journal, RECORD, offset=start)
    readable_N = records_N["record_crc"] == record_checksums(records_N)
    last = len(records_N) - int(np.argmax(readable_N[::-1])) if readable_N.any() else 0
    return Tail(
        records_N[:last][readable_N[:last]],
        start + last * RECORD.itemsize,
        last - int(readable_N[:last].sum()),
    )


def is_being_written(journal: Path) -> bool:
    """Say whether a living process holds the journal. On a file system without locks nobody does."""
    try:
        with journal.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@dataclass(frozen=True, slots=True)
class Seal:
    """A shard's size and times when every entry in it was last known to be right, but for those at `damaged` offsets.

    A seal that comes too early is not wrong, only useless: what is appended later changes the stamp.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    damaged: tuple[int, ...] = ()

    @classmethod
    def of(cls, shard: Path) -> Seal:
        """Return the seal of a shard without damage as it is now; raises OSError."""
        stat = shard.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @classmethod
    def read(cls, shard: Path) -> Seal | None:
        """Return the shard's seal, or None where there is none or it cannot be read."""
        try:
            content: dict[str, Any] = json.loads(shard.with_suffix(".sealed").read_text(encoding="utf-8"))
            return cls(content["size"], content["mtime_ns"], content["ctime_ns"], tuple(content["damaged"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def fits(self, other: Seal) -> bool:
        """Say whether both were made of the same state of the file."""
        return (self.size, self.mtime_ns, self.ctime_ns) == (other.size, other.mtime_ns, other.ctime_ns)

    def write(self, shard: Path) -> None:
        """Put the seal beside the shard, where that is possible: without one the shard is checked when next opened."""
        content = {name: getattr(self, name) for name in self.__slots__}
        with contextlib.suppress(UserError):  # a full disk, or a store that is only readable
            write_atomically(shard.with_suffix(".sealed"), json.dumps(content).encode())


class Finding(NamedTuple):
    """Which entries of a shard are of no use, and what is the matter with it."""

    reason: str
    damaged_N: NDArray[np.bool_]


def judge_by_stamp(shard: Path, spans_N: Records, *, trusted: bool) -> Finding | None:
    """Judge a shard without reading it, by its size if it is trusted, else by its seal; None: it must be read.

    spans_N: fields offset, stored, crc of the entries.
    """
    try:
        stamp = Seal.of(shard)
    except FileNotFoundError:
        return Finding("is missing", np.ones(len(spans_N), np.bool_))
    except OSError as error:
        return Finding(f"cannot be read ({error.strerror})", np.ones(len(spans_N), np.bool_))
    if trusted:
        return Finding("is cut short", spans_N["offset"] + spans_N["stored"] > stamp.size)
    seal = Seal.read(shard)
    if seal is None or not seal.fits(stamp):
        return None
    return Finding("is damaged", np.isin(spans_N["offset"], np.array(seal.damaged, np.uint64)))


def judge_by_bytes(shard: Path, spans_N: Records, *, sealing: bool) -> Finding:
    """Read every entry of a shard and compare it with its checksum; then seal the shard. Memory: one entry at a time.

    spans_N: fields offset, stored, crc of all of the shard's entries.
    """
    try:
        stamp = Seal.of(shard)
        damaged_N = _find_damaged(shard, spans_N)
    except FileNotFoundError:
        return Finding("is missing", np.ones(len(spans_N), np.bool_))
    except OSError as error:
        return Finding(f"cannot be read ({error.strerror})", np.ones(len(spans_N), np.bool_))
    if sealing:
        replace(stamp, damaged=tuple(spans_N["offset"][damaged_N].tolist())).write(shard)
    return Finding("is damaged", damaged_N)


def _find_damaged(shard: Path, spans_N: Records) -> NDArray[np.bool_]:
    damaged_N = np.zeros(len(spans_N), np.bool_)
    file = os.open(shard, os.O_RDONLY)
    try:
        for i in np.argsort(spans_N["offset"]).tolist():
            offset, stored, crc = (int(spans_N[name][i]) for name in ("offset", "stored", "crc"))
            try:
                damaged_N[i] = zlib.crc32(os.pread(file, stored, offset)) != crc
            except OSError:  # a sector that cannot be read
                damaged_N[i] = True
    finally:
        os.close(file)
    return damaged_N
