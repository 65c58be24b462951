"""The store of tensors on disk, its writing side: batches appended so that a crash loses at most the one in flight.

A batch's bytes reach the disk before its records do, and a record carries its own checksum: whatever moment a process
is killed at, what the journal names is there. store.py shows how it lies on disk.

Shape legend: N entries of a batch; a key is two u64, so keys are (N, 2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdxl_training.data.compression import pack
from sdxl_training.data.store_format import (
    ALIGNMENT,
    DTYPE_CODES,
    HEADER,
    JOURNAL,
    MAGIC,
    MAX_DIMENSIONS,
    NO_DIMENSION,
    RECORD,
    Keys,
    Records,
    Seal,
    record_checksums,
    shard_name,
)
from sdxl_training.records import UserError

SHARD_BYTES = 256 * 2**20
MAX_ENTRY_BYTES = 2**30  # one read of the system's takes no more than 2 GiB
FULL = (errno.ENOSPC, errno.EDQUOT)
RETRY_SECONDS = 5.0
Compression = Literal["none", "lossless"]
_T = TypeVar("_T")

log = logging.getLogger(__name__)
_to_disk = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


def say_full(path: Path, error: OSError) -> None:
    """Log that writing waits for room on the disk."""
    log.warning("%s: %s. Waiting; free some space and it goes on, what was stored is kept.", path, error.strerror)


def wait_for_room() -> None:
    """Sleep until it is time to try again."""
    time.sleep(RETRY_SECONDS)


class StoreWriter:
    """Appends batches of tensors to a store; leaving it seals what was written. One thread of one process.

    Nothing appears on disk before the first batch. `name` (such as rank0) is for people, writers never share a folder.
    While the disk is full, `append` calls `on_full` once and then `wait` before each new attempt, which may raise to
    give up: the store then stays as it was before the batch.
    """

    def __init__(
        self,
        folder: Path,
        compression: Compression = "none",
        on_full: Callable[[Path, OSError], object] = say_full,
        wait: Callable[[], object] = wait_for_room,
        *,
        name: str = "rank0",
        shard_bytes: int = SHARD_BYTES,
    ):
        self._folder = Path(folder)
        self._compression = compression
        self._on_full = on_full
        self._wait = wait
        self._shard_bytes = shard_bytes
        self.writer = f"{name}-{secrets.token_hex(8)}"
        self._journal: _Appended | None = None
        self._shard: _Appended | None = None
        self._shard_number = -1
        self._closed = False

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, keys_N2: Keys, origins_N: Records, tensors: Sequence[Tensor]) -> None:
        """Write a batch: on return it is on disk and any Store finds it after a refresh.

        tensors: on the CPU, fp16, bf16 or fp32, up to four dimensions. origins_N: store_format.ORIGIN.
        Raises UserError when the folder cannot be written for another reason than a full disk, ValueError for tensors
        that cannot be stored.
        """
        if not len(keys_N2) == len(origins_N) == len(tensors):
            raise ValueError(f"{len(keys_N2)} keys, {len(origins_N)} origins and {len(tensors)} tensors")
        if self._closed:
            raise ValueError("this writer is closed")
        if not tensors:
            return
        records_N = np.zeros(len(tensors), RECORD)
        records_N["key"], records_N["origin"] = keys_N2, origins_N
        blobs = [self._encode(tensor, record) for tensor, record in zip(tensors, records_N, strict=True)]
        ends = np.cumsum([-(-len(blob) // ALIGNMENT) * ALIGNMENT for blob in blobs])
        if self._shard is not None and self._shard.size + ends[-1] > self._shard_bytes:
            self._close_shard()
        journal, shard = self._insist(self._open_journal), self._insist(self._open_shard)
        records_N["offset"] = shard.size + np.append(0, ends[:-1])
        records_N["shard"] = self._shard_number
        records_N["record_crc"] = record_checksums(records_N)
        padded = b"".join(part for blob in blobs for part in (blob, bytes(-len(blob) % ALIGNMENT)))
        self._insist(lambda: shard.append(padded))
        self._insist(lambda: journal.append(records_N.tobytes()))

    def _encode(self, tensor: Tensor, record: np.void) -> bytes:
        """Return the bytes to store, and fill in what the record says of them."""
        if tensor.dtype not in DTYPE_CODES or tensor.dim() > MAX_DIMENSIONS or tensor.device.type != "cpu":
            raise ValueError(f"a {tensor.dim()}-dimensional {tensor.dtype} on {tensor.device} cannot be stored")
        if tensor.nbytes > MAX_ENTRY_BYTES:
            raise ValueError(f"an entry of {tensor.nbytes} bytes is over {MAX_ENTRY_BYTES}")
        payload = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        packed = pack(payload, tensor.element_size()) if self._compression == "lossless" else None
        blob = payload.tobytes() if packed is None else packed
        record["dtype"], record["packed"] = DTYPE_CODES[tensor.dtype], packed is not None
        record["shape"] = (*tensor.shape, *[NO_DIMENSION] * (MAX_DIMENSIONS - tensor.dim()))
        record["stored"], record["crc"] = len(blob), zlib.crc32(blob)
        return blob

    def _open_journal(self) -> _Appended:
        if self._journal is None:
            path = self._folder / self.writer / JOURNAL
            path.parent.mkdir(parents=True, exist_ok=True)
            # Locked before it has its name: whoever sees a journal without lock knows that its writer is gone.
            temporary = path.with_suffix(".tmp")
            journal = _Appended(temporary)
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(journal.file, fcntl.LOCK_EX)
                journal.append(np.array([(MAGIC, time.time_ns())], HEADER).tobytes())
                temporary.replace(path)
                _sync_folder(path.parent)
                _sync_folder(self._folder)
            except OSError:
                journal.close()
                raise
            self._journal = journal
        return self._journal

    def _open_shard(self) -> _Appended:
        if self._shard is None:
            path = self._folder / shard_name(self.writer, self._shard_number + 1)
            self._shard = _Appended(path)
            self._shard_number += 1
            _sync_folder(path.parent)
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            path = self._folder / shard_name(self.writer, self._shard_number)
            self._shard.close()
            self._shard = None
            with contextlib.suppress(OSError):  # somebody has removed it: the next Store says so
                Seal.of(path).write(path)

    def close(self) -> None:
        """Seal what was written. A writer that is not closed leaves a shard that is checked when next opened."""
        self._closed = True
        self._close_shard()
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _insist(self, action: Callable[[], _T]) -> _T:
        """Return what the action returns, as often as it takes while the disk is full."""
        said = False
        while True:
            try:
                return action()
            except OSError as error:
                if error.errno not in FULL:
                    raise UserError(
                        f"data.cache.path: {self._folder} cannot be written ({error.strerror or error}). Make the "
                        "folder writable, or set another one; what was cached before is kept."
                    ) from error
                if not said:
                    self._on_full(self._folder, error)
                    said = True
            self._wait()


class _Appended:
    """A file that grows by whole pieces, each on disk when `append` returns; a piece that fails is cut off again."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.size = 0

    def append(self, piece: bytes) -> None:
        """Write a piece and bring it to disk; raises OSError."""
        done = False
        try:
            view, end = memoryview(piece), self.size
            while view:
                written = os.pwrite(self.file, view, end)
                view, end = view[written:], end + written
            _to_disk(self.file)
            done = True
        finally:  # also on an interrupt
            if done:
                self.size += len(piece)
            else:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.file, self.size)

    def close(self) -> None:
        """Close the file; it stays as long as its whole pieces."""
        os.close(self.file)


def _sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
