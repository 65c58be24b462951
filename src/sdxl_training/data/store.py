"""The store of tensors on disk, its readable side: a million entries found by key, read at the speed of a memory map.

    <folder>/<writer>/journal        one record of fixed size an entry, appended after the entry's bytes
    <folder>/<writer>/0000.blobs     the entries' bytes, each aligned to 64: at most 256 MiB, then 0001.blobs
    <folder>/<writer>/0000.sealed    size and times of a shard of which it is known which entries are right

Every process that writes has a folder of its own, so nothing is shared but reading. Files only grow: a crash leaves
bytes that no record names, or part of a record, and both are ignored. A shard that changed since it was sealed, or
never was, is checked entry by entry, once. Whatever is damaged or missing is absent, and is simply written again.

Shards are read with `preadv`, not mapped: a file cut short or a failing disk is then an entry that is reported, where a
map ends the process with SIGBUS, and neither resident memory nor page tables grow with the set.

Shape legend: N keys asked for, or records read; M distinct keys; a key is two u64, so keys are (N, 2).
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_training.data.compression import unpack
from sdxl_training.data.store_format import (
    DTYPES,
    HEADER,
    JOURNAL,
    NO_DIMENSION,
    ORIGIN,
    Finding,
    Keys,
    Records,
    created_ns,
    is_being_written,
    judge_by_bytes,
    judge_by_stamp,
    name_key,
    read_journal,
    shard_name,
)
from sdxl_training.data.store_index import DEAD, ENTRY, KeyIndex, Rows, keys_of
from sdxl_training.records import UserError

MERGE_ABOVE = 4096  # newer entries are indexed by themselves until there are as many, and an eighth of the older
OPEN_SHARDS = 128  # the usual limit is 1024 open files a process
CHECKING_THREADS = 4
NAMED = 5  # keys named in a line of the log

How = Literal["size", "seal", "bytes"]  # what a shard is checked by: only its size, its bytes unless sealed, its bytes

log = logging.getLogger(__name__)


class DamagedEntry(Exception):  # noqa: N818 - what happened, not whose fault it is
    """An entry that was there when the store was opened cannot be read any more: write it again."""

    def __init__(self, shard: Path, key: str, reason: str):
        super().__init__(f"{shard}: entry {key} {reason}")
        self.shard, self.key, self.reason = shard, key, reason


@dataclass(frozen=True, slots=True)
class Damage:
    """Entries of a shard that cannot be used and of which there is no other copy."""

    shard: Path
    reason: str
    keys_N2: Keys

    def __str__(self) -> str:
        named = ", ".join(name_key(key) for key in self.keys_N2[:NAMED])
        more = f" and {len(self.keys_N2) - NAMED} more" if len(self.keys_N2) > NAMED else ""
        return f"{self.shard} {self.reason}: {len(self.keys_N2)} entries must be made again ({named}{more})"


class _Layout(NamedTuple):
    """What the bytes of an entry are; the entries of a set share a few of them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    packed: bool


class Store:
    """The entries of a folder, by key; a snapshot until `refresh`.

    `check`: read the shards that are not sealed, or have changed since. Rows number the entries of this object, in the
    order in which they were found; they keep their meaning after a refresh, but not in another process. May be used
    by several threads, after a fork, and travels to other processes by its folder's name. Raises UserError when the
    folder is a file or a journal may not be read.
    """

    def __init__(self, folder: Path, *, check: bool = True):
        self._prepare(Path(folder))
        self._take_news("seal" if check else "size")

    def _prepare(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: tuple[Damage, ...] = ()
        self._ends: dict[str, int] = {}  # how far each journal has been read, by writer
        self._shards: list[Path] = []
        self._shard_numbers: dict[str, int] = {}
        self._layouts: list[_Layout] = []
        self._layout_numbers: dict[bytes, int] = {}
        self._entries_N = np.empty(0, ENTRY)
        self._index = KeyIndex.of(self._entries_N, 0)  # of all entries but the newest, so that few new ones cost little
        self._newest = self._index
        self._open: dict[int, _Descriptor] = {}

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Path, dict[str, NDArray[np.uint64]]]]:
        dead_N = self._entries_N[self._entries_N["layout"] >= DEAD]
        dead = {name: dead_N["offset"][dead_N["shard"] == number] for name, number in self._shard_numbers.items()}
        return _reopen, (self.folder, {name: offsets for name, offsets in dead.items() if len(offsets)})

    def __len__(self) -> int:
        """Return the number of distinct keys."""
        return len(self.keys())

    @property
    def recorded(self) -> int:
        """Return the number of all entries, also of those that are damaged or that a later one has replaced."""
        return len(self._entries_N)

    def keys(self) -> Keys:
        """Return the distinct keys (M, 2), in no particular order."""
        newest = self._newest.keys(self._entries_N)
        unknown = self._index.find(self._entries_N, newest) < 0
        return np.concatenate((self._index.keys(self._entries_N), newest[unknown]))

    def find(self, keys_N2: Keys) -> Rows:
        """Return the row of each key, -1 for those that are absent. Of several entries of a key the last one counts."""
        if keys_N2.ndim != 2 or keys_N2.shape[1] != 2 or keys_N2.dtype != np.uint64:
            raise ValueError(f"keys are (N, 2) of uint64, not {keys_N2.shape} of {keys_N2.dtype}")
        rows_N = self._index.find(self._entries_N, keys_N2)
        if len(self._newest.rows_M):
            newest_N = self._newest.find(self._entries_N, keys_N2)
            rows_N = np.where(newest_N < 0, rows_N, newest_N)
        return rows_N

    def read(self, row: int) -> Tensor:
        """Return the tensor of a row, in memory of its own. Its checksum is not looked at.

        Raises DamagedEntry when its bytes are no longer there, IndexError for a row that is none (such as -1).
        """
        if row < 0:
            raise IndexError(f"{row} is no row: the entry is absent")
        high, low, offset, stored, _, shard, number = self._entries_N[row].item()
        key = (high, low)
        if number >= DEAD:
            raise self._damaged_entry(shard, key, "is damaged")
        layout = self._layouts[number]
        payload = torch.empty(stored, dtype=torch.uint8)
        try:
            descriptor = self._open.get(shard) or self._open_shard(shard)
            got = os.preadv(descriptor.number, [payload.numpy().data], offset)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise self._damaged_entry(shard, key, f"cannot be read ({error.strerror})") from error
        if got != stored:
            raise self._damaged_entry(shard, key, f"is cut short: {got} of {stored} bytes")
        if layout.packed:
            size = layout.dtype.itemsize
            try:
                payload = torch.from_numpy(unpack(payload.numpy(), size * math.prod(layout.shape), size))
            except ValueError as error:
                raise self._damaged_entry(shard, key, f"is damaged: {error}") from error
        return payload.view(layout.dtype).view(layout.shape)

    def refresh(self) -> int:
        """Take in what has been appended since, by anybody; return how many entries. Nothing new: a stat a journal."""
        return self._take_news("size")

    def verify(self, advance: Callable[[int], object] = lambda entries: None) -> tuple[Damage, ...]:
        """Read every entry, sealed or not, and leave out those that are damaged; return what must be made again.

        advance: called with the number of entries of each shard that has been read; in all `recorded`.
        """
        self.damaged = ()
        self._entries_N["layout"] &= DEAD - 1  # perhaps a missing shard is back
        self._check(np.arange(len(self._entries_N)), "bytes", advance)
        return self.damaged

    def origins(self) -> tuple[Keys, Records]:
        """Return keys_N2 and origins_N (store_format.ORIGIN) of all entries ever recorded, intact or not.

        Read from disk each time: 56 bytes an entry.
        """
        journals = [self.folder / writer / JOURNAL for writer, end in self._ends.items() if end >= 0]
        records = [read_journal(journal).records_N for journal in journals if journal.exists()]
        keys = [np.empty((0, 2), np.uint64), *(records_N["key"] for records_N in records)]
        return np.concatenate(keys), np.concatenate([np.empty(0, ORIGIN), *(some["origin"] for some in records)])

    def _open_shard(self, shard: int) -> _Descriptor:
        if len(self._open) >= OPEN_SHARDS:
            self._open = {}  # another thread that still reads one of them keeps it open
        self._open[shard] = descriptor = _Descriptor(self._shards[shard])
        return descriptor

    def _damaged_entry(self, shard: int, key: tuple[int, int], reason: str) -> DamagedEntry:
        return DamagedEntry(self._shards[shard], name_key(np.array(key, np.uint64)), reason)

    def _take_news(self, how: How, dead: Mapping[str, NDArray[np.uint64]] | None = None) -> int:
        """Read what is new in the journals; dead: offsets, by shard, of entries already known to be of no use."""
        parts = [self._read_tail(writer, how) for writer in self._writers()]
        fresh_N = np.concatenate([np.empty(0, ENTRY), *parts])
        if not len(fresh_N):
            return 0
        first = len(self._entries_N)
        self._entries_N = np.concatenate((self._entries_N, fresh_N))
        rows = np.arange(first, len(self._entries_N))
        for name, offsets in (dead or {}).items():
            lost = (fresh_N["shard"] == self._shard_numbers.get(name, -1)) & np.isin(fresh_N["offset"], offsets)
            self._entries_N["layout"][rows[lost]] |= DEAD
        self._check(rows, how)
        return len(rows)

    def _writers(self) -> list[str]:
        """Return the writers: known ones, then new ones by age: of two entries of a key the later one counts."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"data.cache.path: {self.folder} is a file. Give a folder, or move the file away.")
        new = []
        try:
            with os.scandir(self.folder) as found:
                names = [entry.name for entry in found if entry.name not in self._ends and entry.is_dir()]
        except FileNotFoundError:
            return []
        for name in names:
            journal = self.folder / name / JOURNAL
            try:
                new.append((created_ns(journal), name))
            except FileNotFoundError:  # somebody else's folder, or a writer about to begin
                continue
            except PermissionError as error:
                raise UserError(
                    f"data.cache.path: {journal} may not be read. Make it readable, or set another folder."
                ) from error
            except (OSError, ValueError) as error:
                self._ends[name] = -1
                log.warning("%s: %s; what it names must be made again", journal, error)
        self._ends |= {name: HEADER.itemsize for _, name in sorted(new)}
        return [name for name, end in self._ends.items() if end >= 0]

    def _read_tail(self, writer: str, how: How) -> NDArray[np.void]:
        journal = self.folder / writer / JOURNAL
        try:
            tail = read_journal(journal, self._ends[writer])
        except FileNotFoundError:  # removed since: whoever reads one of its entries learns it
            return np.empty(0, ENTRY)
        except OSError as error:
            log.warning("%s cannot be read (%s)", journal, error.strerror)
            return np.empty(0, ENTRY)
        if tail.unreadable:
            log.warning("%s: %d records are damaged; what they name must be made again", journal, tail.unreadable)
        self._ends[writer] = tail.end
        return self._as_entries(writer, tail.records_N)

    def _as_entries(self, writer: str, records_N: Records) -> NDArray[np.void]:
        entries_N = np.empty(len(records_N), ENTRY)
        entries_N["high"], entries_N["low"] = records_N["key"].T
        for name in ("offset", "stored", "crc"):
            entries_N[name] = records_N[name]
        numbers, which_N = np.unique(records_N["shard"], return_inverse=True)
        entries_N["shard"] = np.array([self._shard_number(shard_name(writer, int(n))) for n in numbers], "<u4")[which_N]
        entries_N["layout"] = self._layouts_of(records_N)
        return entries_N

    def _layouts_of(self, records_N: Records) -> NDArray[np.uint32]:
        kinds_N = records_N[["shape", "dtype", "packed"]]
        # Sorting structures is slow, and entries of a kind come in runs: only the first of each run is looked up.
        starts = np.ones(len(kinds_N), np.bool_)
        starts[1:] = (kinds_N["shape"][1:] != kinds_N["shape"][:-1]).any(axis=1)
        for name in ("dtype", "packed"):
            starts[1:] |= kinds_N[name][1:] != kinds_N[name][:-1]
        kinds, which = np.unique(kinds_N[starts], return_inverse=True)
        numbers = np.array([self._layout_number(kind) for kind in kinds], np.uint32)
        layouts_N: NDArray[np.uint32] = numbers[which][np.cumsum(starts) - 1]
        return layouts_N

    def _shard_number(self, name: str) -> int:
        if name not in self._shard_numbers:
            self._shard_numbers[name] = len(self._shards)
            self._shards.append(self.folder / name)
        return self._shard_numbers[name]

    def _layout_number(self, kind: np.void) -> int:
        name = kind.tobytes()
        if name not in self._layout_numbers:
            shape = tuple(int(length) for length in kind["shape"] if length != NO_DIMENSION)
            self._layout_numbers[name] = len(self._layouts)
            self._layouts.append(_Layout(DTYPES[int(kind["dtype"])], shape, bool(kind["packed"])))
        return self._layout_numbers[name]

    def _check(self, rows: Rows, how: How, advance: Callable[[int], object] = lambda entries: None) -> None:
        """Judge the shards of these rows, mark what is of no use, index the rest, and say what is lost."""
        rows = rows[self._entries_N["layout"][rows] < DEAD]
        by_shard = _group(rows, self._entries_N["shard"][rows])
        findings: dict[int, Finding | None] = dict.fromkeys(by_shard)
        writing = {folder: is_being_written(folder / JOURNAL) for folder in {self._shards[n].parent for n in by_shard}}
        if how != "bytes":
            for shard, some in by_shard.items():
                path = self._shards[shard]
                trusted = how == "size" or writing[path.parent]
                findings[shard] = judge_by_stamp(path, self._entries_N[some], trusted=trusted)
        unread = [shard for shard, finding in findings.items() if finding is None]
        if unread:
            size = sum(int(self._entries_N["stored"][by_shard[shard]].sum()) for shard in unread)
            log.info("%s: checking %d shards (%.1f GB)", self.folder, len(unread), size / 1e9)

        def read(shard: int) -> Finding:
            path = self._shards[shard]
            return judge_by_bytes(path, self._entries_N[by_shard[shard]], sealing=not writing[path.parent])

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            for shard, finding in zip(unread, pool.map(read, unread), strict=True):
                findings[shard] = finding
                advance(len(by_shard[shard]))
        lost = {shard: (f.reason, by_shard[shard][f.damaged_N]) for shard, f in findings.items() if f}
        for _, some in lost.values():
            self._entries_N["layout"][some] |= DEAD
        self._reindex(all_of_it=how != "size")
        self._report(lost)

    def _reindex(self, *, all_of_it: bool) -> None:
        total, indexed = len(self._entries_N), self._index.reach
        if all_of_it or total > indexed + max(MERGE_ABOVE, indexed // 8):
            self._index = KeyIndex.of(self._entries_N, 0)
        self._newest = KeyIndex.of(self._entries_N, self._index.reach)

    def _report(self, lost: Mapping[int, tuple[str, Rows]]) -> None:
        for shard, (reason, rows) in lost.items():
            keys_N2 = keys_of(self._entries_N[rows])
            keys_N2 = np.unique(keys_N2[self.find(keys_N2) < 0], axis=0)  # others have been written again since
            if len(keys_N2):
                damage = Damage(self._shards[shard], reason, keys_N2)
                log.warning("%s", damage)
                self.damaged += (damage,)


def _reopen(folder: Path, dead: Mapping[str, NDArray[np.uint64]]) -> Store:
    """Open a store in another process, which is told what is of no use instead of reading the shards again."""
    store = Store.__new__(Store)
    store._prepare(folder)
    store._take_news("size", dead)
    return store


class _Descriptor:
    """An open file, closed when the last thread that reads it lets go."""

    __slots__ = ("number",)

    def __init__(self, path: Path):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _group(rows: Rows, shards: NDArray[np.uint32]) -> dict[int, Rows]:
    """Return the rows by shard, in order."""
    order = np.argsort(shards, kind="stable")
    numbers, starts = np.unique(shards[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(rows[order], starts[1:]), strict=False)) if len(rows) else {}
