"""Writing to the store: round trips, crashes at every system call, kills, full disks, writers side by side."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.data import store_writer
from sdxl_training.data.store import Store
from sdxl_training.data.store_format import HEADER, NO_DIMENSION, ORIGIN, RECORD, as_keys, read_journal
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import UserError

BATCH = 3
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def keys_of(batch: int) -> np.ndarray:
    return as_keys((batch * BATCH + i).to_bytes(16, "big") for i in range(BATCH))


def tensors_of(batch: int) -> list[Tensor]:
    """Tensors that tell which they are, of several sizes."""
    return [torch.full((2, 5 + 40 * i), batch * BATCH + i + 0.5) for i in range(BATCH)]


def append(writer: StoreWriter, batch: int) -> None:
    writer.append(keys_of(batch), np.zeros(BATCH, ORIGIN), tensors_of(batch))


def count_entries(folder: Path) -> int:
    """Return how many entries a new store finds; they must be the first ones, each whole and right."""
    store = Store(folder)
    assert store.damaged == ()
    for batch in range(-(-len(store) // BATCH)):
        for row, tensor in zip(
            store.find(keys_of(batch))[: len(store) - BATCH * batch], tensors_of(batch), strict=False
        ):
            assert torch.equal(store.read(row), tensor)
    return len(store)


def count_whole_batches(folder: Path) -> int:
    """Return how many batches a new store finds, none of them in part."""
    batches, rest = divmod(count_entries(folder), BATCH)
    assert rest == 0
    return batches


def in_child(work: Callable[[], None]) -> int:
    """Run work in a forked process and return its exit status, 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, also those of NaN, in any stored type and shape; sometimes not contiguous."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensor = torch.empty(shape, dtype=dtype)
    high = draw(st.sampled_from([256, 2]))
    if tensor.numel():
        values = random.integers(0, high, tensor.nbytes).astype(np.uint8)
        tensor = torch.from_numpy(values).view(dtype).view(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


@given(
    batches=st.lists(st.lists(tensors(), max_size=4), max_size=4),
    compression=st.sampled_from(["none", "lossless"]),
    shard_bytes=st.sampled_from([1, 200, 2**20]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Tensor]], compression: str, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    written, number = [], 0
    with StoreWriter(folder, compression, shard_bytes=shard_bytes) as writer:
        for batch in batches:
            digests = [(number + i).to_bytes(16, "little") for i in range(len(batch))]
            origins = np.zeros(len(batch), ORIGIN)
            origins["sample_id"] = range(number, number + len(batch))
            writer.append(as_keys(digests), origins, batch)
            written += batch
            number += len(batch)
    store = Store(folder)
    assert len(store) == number
    rows = store.find(as_keys(i.to_bytes(16, "little") for i in range(number)))
    for row, tensor in zip(rows, written, strict=True):
        back = store.read(row)
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert (
            back.contiguous().numpy(force=False).tobytes() == tensor.contiguous().numpy().tobytes()
            if (tensor.dtype != torch.bfloat16)
            else back.reshape(-1).view(torch.uint8).equal(tensor.contiguous().reshape(-1).view(torch.uint8))
        )
    keys, origins = store.origins()
    assert (store.find(keys) == rows).all()
    assert origins["sample_id"].tolist() == list(range(number))
    for journal in folder.glob("*/journal"):
        assert (read_journal(journal).records_N["offset"] % 64 == 0).all()


def test_shards_stay_below_their_limit(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, shard_bytes=4096) as writer:
        for batch in range(20):
            append(writer, batch)
    shards = list(tmp_path.glob("*/*.blobs"))
    assert len(shards) > 3
    assert all(2048 < shard.stat().st_size <= 4096 for shard in sorted(shards)[:-1])
    assert len(list(tmp_path.glob("*/*.sealed"))) == len(shards)
    assert count_whole_batches(tmp_path) == 20


def test_a_record_says_what_the_documentation_says(tmp_path: Path) -> None:
    """An oracle by struct, so that the format does not change unnoticed."""
    import struct
    import zlib

    origins = np.zeros(1, ORIGIN)
    origins["sample_id"], origins["content"], origins["plan"], origins["settings"] = 7, [[1, 2]], 3, 4
    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        writer.append(as_keys([bytes(range(16))]), origins, [torch.ones((4, 2), dtype=torch.bfloat16)])
    journal = (tmp_path / writer.writer / "journal").read_bytes()
    assert journal[:8] == b"tensors1"
    assert len(journal) == 16 + 4 * RECORD.itemsize == 16 + 4 * 96
    record = journal[-96:]
    blob = struct.pack("<8H", *[0x3F80] * 8)
    offset = 64 + 384 + 704
    assert record[:16] == bytes(range(16))
    assert struct.unpack("<5Q", record[16:56]) == (7, 1, 2, 3, 4)
    assert struct.unpack("<Q4III", record[56:88]) == (offset, 4, 2, NO_DIMENSION, NO_DIMENSION, 16, zlib.crc32(blob))
    assert struct.unpack("<HBBI", record[88:]) == (0, 2, 0, zlib.crc32(record[:92]))
    assert (tmp_path / writer.writer / "0000.blobs").read_bytes()[offset : offset + 16] == blob


def test_nothing_is_made_before_the_first_batch(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store") as writer:
        writer.append(as_keys([]), np.zeros(0, ORIGIN), [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "1-dimensional torch.int64"),
        (torch.zeros((1,) * 5), "5-dimensional"),
        (torch.zeros(3, device="meta"), "on meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_no_trace(tmp_path: Path, tensor: Tensor, message: str) -> None:
    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        with pytest.raises(ValueError, match=message):
            writer.append(keys_of(1)[:2], np.zeros(2, ORIGIN), [torch.zeros(3), tensor])
        append(writer, 1)
    assert count_whole_batches(tmp_path) == 2


def test_counts_must_agree_and_a_closed_writer_is_closed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="3 keys, 2 origins and 3 tensors"):
            writer.append(keys_of(0), np.zeros(2, ORIGIN), tensors_of(0))
        append(writer, 0)
    with pytest.raises(ValueError, match="closed"):
        append(writer, 1)


CALLS = ("pwrite", "fsync", "fdatasync", "replace", "open", "mkdir", "close")


@contextlib.contextmanager
def at_call(number: int, do: Callable[..., object]) -> Iterator[list[int]]:
    """Call `do(name, *arguments)` before the system call with this number, of those that change files."""
    count, originals = [0], {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            count[0] += 1
            if count[0] == number:
                do(name, *arguments)
            return originals[name](*arguments, **options)

        return call

    try:
        for name in CALLS:
            setattr(os, name, wrap(name))
        store_writer._to_disk = os.fdatasync
        yield count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        store_writer._to_disk = originals["fdatasync"]


def test_a_crash_at_any_system_call_loses_at_most_the_batch_in_flight(tmp_path: Path) -> None:
    """Half of a write reaches the file before the process ends."""

    def end(name: str, *arguments: object) -> None:
        if name == "pwrite":
            number, data, offset = arguments
            os.lseek(number, offset, os.SEEK_SET)
            os.write(number, bytes(data)[: len(data) // 2])
        os._exit(9)

    status, call = 9, 0
    while status == 9:
        call += 1
        folder, reached = tmp_path / str(call), tmp_path / f"{call}.reached"
        reached.touch()

        def work(folder: Path = folder, reached: Path = reached, call: int = call) -> None:
            log = os.open(reached, os.O_WRONLY)
            with at_call(call, end), StoreWriter(folder, shard_bytes=2048) as writer:
                for batch in range(4):
                    append(writer, batch)
                    os.write(log, b".")

        status = in_child(work)
        acknowledged = reached.stat().st_size
        assert BATCH * acknowledged <= count_entries(folder) <= BATCH * (acknowledged + 1)
        assert all(journal.stat().st_size >= HEADER.itemsize for journal in folder.glob("*/journal"))
    assert status == 0
    assert call > 30
    assert count_whole_batches(folder) == 4


def test_a_killed_process_loses_at_most_the_batch_in_flight(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                writer = StoreWriter(folder, "lossless", shard_bytes=2**14)
                for batch in range(10**6):
                    append(writer, batch)
                    os.write(sink, b".")
            finally:
                os._exit(70)
        os.close(sink)
        os.read(source, 1)
        time.sleep(random.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        acknowledged = 1
        while data := os.read(source, 2**16):
            acknowledged += len(data)
        os.close(source)
        assert BATCH * acknowledged <= count_entries(folder) <= BATCH * (acknowledged + 1)
        with StoreWriter(folder) as writer:  # whoever goes on is not hindered
            append(writer, acknowledged + 1)
        assert len(Store(folder)) >= (acknowledged + 1) * BATCH


def test_a_full_disk_is_waited_for_at_any_system_call(tmp_path: Path) -> None:
    """Each call in turn fails for lack of room, writes half way, and again when tried anew."""
    call = count = 0
    while call <= count:
        call += 1
        folder = tmp_path / str(call)
        said: list[tuple[Path, int]] = []
        waits: list[int] = []

        def fail(name: str, *arguments: object) -> None:
            if name in ("close", "fsync"):
                return  # closing does not fail this way; the folder's fsync is tried through replace
            if name == "pwrite":
                number, data, offset = arguments
                os.lseek(number, offset, os.SEEK_SET)
                os.write(number, bytes(data)[: len(data) // 2])
            raise OSError(errno.EDQUOT if call % 2 else errno.ENOSPC, "No space left on device")  # noqa: B023

        def on_full(path: Path, error: OSError, said: list[tuple[Path, int]] = said) -> None:
            said.append((path, error.errno or 0))

        with at_call(call, fail) as counted:
            writer = StoreWriter(folder, on_full=on_full, wait=partial(waits.append, 1), shard_bytes=2048)
            with writer:
                for batch in range(4):
                    append(writer, batch)
                at_end = counted[0]
        count = at_end
        assert len(said) == len(waits) <= 1
        assert all(path == folder for path, _ in said)
        assert count_whole_batches(folder) == 4
    assert call > 30


def test_a_full_disk_is_said_once_and_waited_for_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [0]
    write = os.pwrite

    def pwrite(number: int, data: bytes, offset: int) -> int:
        if free[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(number, bytes(data)[: free[0]], offset)  # a short write comes before the error
        free[0] -= written
        return written

    said, waits, sizes = [], [], []
    with StoreWriter(tmp_path, on_full=lambda *what: said.append(what), wait=lambda: None) as writer:
        append(writer, 0)
        shard = tmp_path / writer.writer / "0000.blobs"
        size = shard.stat().st_size

        def wait() -> None:
            sizes.append(shard.stat().st_size)
            waits.append(1)
            free[0] = 100 if len(waits) < 5 else 10**6

        writer._wait = wait
        monkeypatch.setattr(os, "pwrite", pwrite)
        append(writer, 1)
        assert len(said) == 1
        assert sizes == [size] * 5  # what was begun is cut off at once: it would fill the disk for others
        free[0] = 0
        append(writer, 2)
        assert len(said) == 2  # full a second time is said again
    assert count_whole_batches(tmp_path) == 3


def test_waiting_may_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(number: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def wait() -> None:
        raise KeyboardInterrupt

    with StoreWriter(tmp_path, on_full=lambda *what: None, wait=wait) as writer:
        append(writer, 0)
        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", pwrite)
            with pytest.raises(KeyboardInterrupt):
                append(writer, 1)
        assert count_whole_batches(tmp_path) == 1
        append(writer, 1)
    assert count_whole_batches(tmp_path) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(150_000))
        said: list[int] = []
        with StoreWriter(
            tmp_path / "s", on_full=lambda path, error: said.append(error.errno), wait=ballast.unlink
        ) as writer:
            for batch in range(100):
                append(writer, batch)
        assert said == [errno.ENOSPC]
        assert count_whole_batches(tmp_path / "s") == 100
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES])
def test_other_errors_name_the_folder_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def pwrite(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", pwrite)
            with pytest.raises(UserError, match=r"data\.cache\.path: .* cannot be written \(.*another one"):
                append(writer, 1)
    assert count_whole_batches(tmp_path) == 1


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache\.path"), StoreWriter(tmp_path / "file") as writer:
        append(writer, 0)


def test_an_interrupt_leaves_no_half_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        size = (tmp_path / writer.writer / "0000.blobs").stat().st_size
        with monkeypatch.context() as interrupted:
            interrupted.setattr(store_writer, "_to_disk", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                append(writer, 1)
        assert (tmp_path / writer.writer / "0000.blobs").stat().st_size == size
    assert count_whole_batches(tmp_path) == 1


def test_processes_write_side_by_side(tmp_path: Path) -> None:
    children = []
    for first in range(0, 40, 10):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                with StoreWriter(tmp_path, name=f"rank{first}", shard_bytes=4096) as writer:
                    for batch in range(first, first + 10):
                        append(writer, batch)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert count_whole_batches(tmp_path) == 40
    assert all(stat.S_ISDIR(folder.stat().st_mode) for folder in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4
