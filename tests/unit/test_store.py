"""Reading the store: keys found as in a dict, appends seen, damage of every kind found, named, and never fatal."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.data import store as store_module
from sdxl_training.data import store_format
from sdxl_training.data.store import DamagedEntry, Store
from sdxl_training.data.store_format import ORIGIN, RECORD, Finding, as_keys, name_key
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import UserError

SHAPE = (4, 6, 8)


def key_of(*numbers: int) -> np.ndarray:
    return as_keys(number.to_bytes(16, "big") for number in numbers)


def tensor_of(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).half()


def append(writer: StoreWriter, *numbers: int) -> None:
    origins = np.zeros(len(numbers), ORIGIN)
    origins["sample_id"] = numbers
    writer.append(key_of(*numbers), origins, [tensor_of(number) for number in numbers])


def write(folder: Path, *numbers: int, shard_bytes: int = 2**28) -> Path:
    """Write a batch a number, and return the writer's folder."""
    with StoreWriter(folder, shard_bytes=shard_bytes) as writer:
        for number in numbers:
            append(writer, number)
    return folder / writer.writer


def change(path: Path, place: int, value: int = 1) -> None:
    """Flip bits of a byte; the file's time moves on, as it would on a disk that was damaged a while after."""
    data = bytearray(path.read_bytes())
    data[place] ^= value
    path.write_bytes(data)
    touch(path)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def intact(store: Store, upto: int) -> list[int]:
    """Return which of the numbers below `upto` the store has, all of them read and compared."""
    found = []
    for number, row in enumerate(store.find(key_of(*range(upto)))):
        if row >= 0:
            assert torch.equal(store.read(row), tensor_of(number))
            found.append(number)
    return found


def count_open_files() -> int:
    gc.collect()
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose bytes are checked from here on."""
    checked: list[str] = []
    judge = store_module.judge_by_bytes

    def spy(shard: Path, spans_N: np.ndarray, *, sealing: bool) -> Finding:
        checked.append(shard.name)
        return judge(shard, spans_N, sealing=sealing)

    monkeypatch.setattr(store_module, "judge_by_bytes", spy)
    return checked


small = st.integers(0, 3)


@given(st.lists(st.lists(st.tuples(small, small), max_size=8), max_size=5), st.lists(st.tuples(small, small)))
def test_keys_are_found_as_in_a_dict(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, int]]], queries: list[tuple[int, int]]
) -> None:
    """Also keys that share one half, and keys written twice; by a store that saw every append and by a new one.

    Few entries are merged into the older index early, so that keys are found in either and in both.
    """
    folder = tmp_path_factory.mktemp("store")
    expected: dict[tuple[int, int], float] = {}
    count = 0
    with mock.patch.object(store_module, "MERGE_ABOVE", 3), StoreWriter(folder) as writer:
        watching = Store(folder)
        for batch in batches:
            keys = np.array(batch, np.uint64).reshape(-1, 2)
            writer.append(
                keys, np.zeros(len(batch), ORIGIN), [torch.tensor(float(count + i)) for i in range(len(batch))]
            )
            expected |= {key: float(count + i) for i, key in enumerate(batch)}
            count += len(batch)
            assert watching.refresh() == len(batch)
    for store in (watching, Store(folder)):
        rows = store.find(np.array(queries, np.uint64).reshape(-1, 2))
        found = [None if row < 0 else float(store.read(row)) for row in rows]
        assert found == [expected.get(query) for query in queries]
        assert len(store) == len(expected)
        assert {tuple(key) for key in store.keys().tolist()} == set(expected)


def test_a_newer_entry_wins_over_the_merged_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MERGE_ABOVE", 1)
    with StoreWriter(tmp_path) as writer:
        store = Store(tmp_path)
        append(writer, 0, 1)
        store.refresh()
        assert len(store._index.rows_M) == 2  # merged; what follows is not
        writer.append(key_of(0), np.zeros(1, ORIGIN), [torch.ones(1)])
        store.refresh()
        assert len(store._newest.rows_M) == 1
        assert torch.equal(store.read(store.find(key_of(0))[0]), torch.ones(1))
        assert torch.equal(store.read(store.find(key_of(1))[0]), tensor_of(1))


def test_many_small_refreshes_keep_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MERGE_ABOVE", 5)
    with StoreWriter(tmp_path) as writer:
        store = Store(tmp_path)
        for number in range(60):
            append(writer, number % 50)
            row = store.find(key_of(0))[0]
            assert store.refresh() == 1
            if number:
                assert torch.equal(store.read(row), tensor_of(0))  # rows keep their meaning
            assert intact(store, 50) == list(range(min(number + 1, 50)))


def test_a_million_keys_are_found_in_less_than_a_second(tmp_path: Path) -> None:
    """The journal is written here at once: what is timed is the look-up. Memory: no more than a record an entry."""
    import time
    import tracemalloc

    write(tmp_path, 0)
    journal = next(tmp_path.glob("*/journal"))
    million = 10**6
    records = np.repeat(np.fromfile(journal, RECORD, offset=16), million)
    records["key"] = np.random.default_rng(0).integers(0, 2**64, (million, 2), dtype=np.uint64)
    records["record_crc"] = store_format.record_checksums(records)
    with journal.open("ab") as file:
        records.tofile(file)
    tracemalloc.start()
    store = Store(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 64 * million
    order = np.random.default_rng(1).permutation(million)
    started = time.process_time()
    rows = store.find(records["key"][order])
    assert time.process_time() - started < 1.0
    assert (rows == order + 1).all()
    assert (store.find(records["key"] ^ np.uint64(1)) < 0).all()


def test_a_folder_that_is_not_there_is_an_empty_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert len(store) == 0
    assert store.find(key_of(1, 2)).tolist() == [-1, -1]
    assert store.verify() == ()
    assert [len(part) for part in store.origins()] == [0, 0]
    write(tmp_path / "store", 1)
    assert store.refresh() == 1
    assert store.refresh() == 0


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache\.path: .* is a file"):
        Store(tmp_path / "file")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rank0-0123.safetensors").write_bytes(b"old")
    (tmp_path / "pictures").mkdir()
    write(tmp_path, 0)
    assert intact(Store(tmp_path), 1) == [0]
    assert (tmp_path / "rank0-0123.safetensors").read_bytes() == b"old"


def test_keys_must_be_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(N, 2\) of uint64"):
        Store(tmp_path).find(np.zeros((3, 2), np.int64))
    with pytest.raises(ValueError, match="16 bytes"):
        as_keys([b"short"])
    assert name_key(as_keys([bytes(range(16))])[0]) == bytes(range(16)).hex()


def test_an_absent_row_is_not_the_last_one(tmp_path: Path) -> None:
    write(tmp_path, 0)
    store = Store(tmp_path)
    with pytest.raises(IndexError, match="absent"):
        store.read(-1)
    with pytest.raises(IndexError):
        store.read(1)


def test_a_tensor_owns_its_memory(tmp_path: Path) -> None:
    write(tmp_path, 0)
    store = Store(tmp_path)
    store.read(0).zero_()
    assert torch.equal(store.read(0), tensor_of(0))


def test_origins_tell_what_entries_were_made_from(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, 4)
    write(tmp_path, 5)
    (folder / "0000.blobs").unlink()
    keys, origins = Store(tmp_path).origins()  # also of what is lost: that is the reason why it is made again
    assert dict(zip(map(name_key, keys), origins["sample_id"].tolist(), strict=True)) == {
        name_key(key_of(number)[0]): number for number in (3, 4, 5)
    }


def test_a_torn_journal_gives_what_is_whole_before_it(tmp_path: Path) -> None:
    """Cut at every byte, and with every byte of the last record changed."""
    folder = write(tmp_path, 0, 1, 2)
    journal, data = folder / "journal", (folder / "journal").read_bytes()
    for size in range(len(data), -1, -1):
        journal.write_bytes(data[:size])
        whole = max(0, size - 16) // RECORD.itemsize
        assert intact(Store(tmp_path), 3) == list(range(whole))
    for place in range(len(data) - RECORD.itemsize, len(data)):
        journal.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        assert intact(Store(tmp_path), 3) == [0, 1]
    journal.write_bytes(data[: -RECORD.itemsize] + bytes(5 * RECORD.itemsize))  # as after a power cut
    assert intact(Store(tmp_path), 3) == [0, 1]


def test_a_torn_tail_is_read_once_it_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, 0, 1, 2)
    journal, data = folder / "journal", (folder / "journal").read_bytes()
    journal.write_bytes(data[: 16 + RECORD.itemsize])
    store = Store(tmp_path)
    for size in range(16 + RECORD.itemsize, len(data) + 1):
        journal.write_bytes(data[:size])
        store.refresh()
        assert len(store) == (size - 16) // RECORD.itemsize
    assert intact(store, 3) == [0, 1, 2]


def test_a_tail_that_is_long_enough_but_not_yet_written_is_read_later(tmp_path: Path) -> None:
    """Some file systems show a file's new size before its bytes."""
    folder = write(tmp_path, 0, 1, 2)
    journal, data = folder / "journal", (folder / "journal").read_bytes()
    journal.write_bytes(data[: -2 * RECORD.itemsize] + bytes(2 * RECORD.itemsize))
    store = Store(tmp_path)
    assert store.refresh() == 0
    journal.write_bytes(data)
    assert store.refresh() == 2
    assert intact(store, 3) == [0, 1, 2]


def test_a_damaged_record_costs_only_its_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, 0, 1, 2)
    change(folder / "journal", 16 + RECORD.itemsize + 5)
    assert intact(Store(tmp_path), 3) == [0, 2]
    assert f"{folder / 'journal'}: 1 records are damaged" in caplog.text


@pytest.mark.parametrize("data", [b"", b"tensors1", b"tensors2" + bytes(200)])
def test_a_journal_of_another_kind_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    folder = write(tmp_path, 0)
    write(tmp_path, 1)
    (folder / "journal").write_bytes(data)
    store = Store(tmp_path)
    store.refresh()
    assert intact(store, 2) == [1]
    assert caplog.text.count("it is no journal, or one of another version") == 1


def test_every_flipped_bit_of_a_blob_is_found_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, 0, 1, 2)
    shard, size = folder / "0000.blobs", 2 * 4 * 6 * 8
    for place in (0, size - 1, size, 2 * size - 1, 2 * size):
        caplog.clear()
        change(shard, place, 0x80)
        store = Store(tmp_path)
        hit = place // size
        assert intact(store, 3) == [number for number in range(3) if number != hit]
        [damage] = store.damaged
        assert (damage.shard, damage.keys_N2.tolist()) == (shard, key_of(hit).tolist())
        assert name_key(key_of(hit)[0]) in caplog.text
        assert str(shard) in caplog.text
        change(shard, place, 0x80)


def test_a_sealed_shard_is_trusted_and_an_unsealed_one_read_once(tmp_path: Path, reads: list[str]) -> None:
    folder = write(tmp_path, 0, 1)
    Store(tmp_path)
    assert reads == []
    (folder / "0000.sealed").unlink()
    Store(tmp_path)
    Store(tmp_path)
    assert reads == ["0000.blobs"]
    (folder / "0000.sealed").write_text("{")
    Store(tmp_path)
    Store(tmp_path)
    assert reads == ["0000.blobs"] * 2
    shutil.copytree(tmp_path, tmp_path.parent / "copy")
    assert intact(Store(tmp_path.parent / "copy"), 2) == [0, 1]
    assert intact(Store(tmp_path.parent / "copy"), 2) == [0, 1]
    assert reads == ["0000.blobs"] * 3


@pytest.mark.parametrize("field", ["size", "mtime_ns", "ctime_ns"])
def test_a_seal_fits_only_its_stamp(tmp_path: Path, reads: list[str], field: str) -> None:
    seal = write(tmp_path, 0) / "0000.sealed"
    content = json.loads(seal.read_text())
    seal.write_text(json.dumps(content | {field: content[field] + 1}))
    Store(tmp_path)
    assert len(reads) == 1


def test_damage_is_remembered_in_the_seal(tmp_path: Path, reads: list[str]) -> None:
    change(write(tmp_path, 0, 1, 2) / "0000.blobs", 400)
    first, second = Store(tmp_path), Store(tmp_path)
    assert reads == ["0000.blobs"]
    assert intact(first, 3) == intact(second, 3) == [0, 2]
    assert [str(damage) for damage in first.damaged] == [str(damage) for damage in second.damaged] != []
    first.verify()
    assert intact(Store(tmp_path), 3) == [0, 2]


def test_what_was_damaged_is_simply_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(write(tmp_path, 0, 1) / "0000.blobs", 400)
    store = Store(tmp_path)
    assert len(store.damaged) == 1
    write(tmp_path, 1)
    assert store.refresh() == 1
    assert intact(store, 2) == [0, 1]
    caplog.clear()
    again = Store(tmp_path)
    assert again.damaged == ()
    assert caplog.text == ""
    assert intact(again, 2) == [0, 1]


def test_a_missing_shard_is_said_once_and_its_entries_are_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (write(tmp_path, *range(12), shard_bytes=3000) / "0000.blobs").unlink()
    store = Store(tmp_path)
    assert intact(store, 12) == list(range(7, 12))
    store.refresh()
    assert caplog.text.count("is missing: 7 entries must be made again") == 1
    assert "and 2 more" in caplog.text


@pytest.mark.parametrize("sealed", [True, False])
def test_a_truncated_shard_keeps_what_is_whole(tmp_path: Path, sealed: bool) -> None:
    folder = write(tmp_path, 0, 1, 2)
    if not sealed:
        (folder / "0000.sealed").unlink()
    for size, kept in ((1151, [0, 1]), (768, [0, 1]), (767, [0]), (1, []), (0, [])):
        os.truncate(folder / "0000.blobs", size)
        store = Store(tmp_path)
        assert intact(store, 3) == kept
        assert sum(len(damage.keys_N2) for damage in store.damaged) == 3 - len(kept)


def test_damage_after_opening_is_an_entry_that_cannot_be_read(tmp_path: Path) -> None:
    """Where a memory map would end the process."""
    folder = write(tmp_path, 0, 1)
    store = Store(tmp_path)
    assert torch.equal(store.read(0), tensor_of(0))
    os.truncate(folder / "0000.blobs", 400)
    with pytest.raises(DamagedEntry, match=f"entry {name_key(key_of(1)[0])} is cut short: 16 of 384 bytes") as caught:
        store.read(1)
    assert caught.value.shard == folder / "0000.blobs"
    unread = Store(tmp_path)
    shutil.rmtree(folder)
    assert unread.refresh() == 0
    with pytest.raises(DamagedEntry, match=r"cannot be read \(No such file"):
        unread.read(0)


def test_a_damaged_packed_entry_is_reported_not_returned(tmp_path: Path) -> None:
    smooth = torch.linspace(0, 1, 4096).to(torch.bfloat16)
    with StoreWriter(tmp_path, "lossless") as writer:
        writer.append(key_of(0), np.zeros(1, ORIGIN), [smooth])
    store = Store(tmp_path)
    assert torch.equal(store.read(0), smooth)
    shard = tmp_path / writer.writer / "0000.blobs"
    assert shard.stat().st_size < smooth.nbytes
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedEntry, match="is damaged: a plane cannot be decompressed"):
        store.read(0)


def test_verify_reads_everything_whatever_the_seal_says(tmp_path: Path, reads: list[str]) -> None:
    folder = write(tmp_path, *range(12), shard_bytes=3000)
    shard = folder / "0001.blobs"
    change(shard, 5)
    seal = json.loads((folder / "0001.sealed").read_text())
    stat = shard.stat()
    seal |= {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}  # a flipped bit on the disk leaves the times
    (folder / "0001.sealed").write_text(json.dumps(seal))
    store = Store(tmp_path)
    assert reads == []
    assert store.damaged == ()
    counts: list[int] = []
    [damage] = store.verify(counts.append)
    assert reads == ["0000.blobs", "0001.blobs"]
    assert counts == [7, 5]
    assert (damage.shard, damage.keys_N2.tolist()) == (shard, key_of(7).tolist())
    assert intact(store, 12) == [*range(7), *range(8, 12)]
    assert intact(Store(tmp_path), 12) == [*range(7), *range(8, 12)]


def test_verify_counts_what_it_reads_to_the_end(tmp_path: Path) -> None:
    """Also where entries are damaged already, or were written again."""
    folder = write(tmp_path, *range(12), shard_bytes=3000)
    change(folder / "0001.blobs", 5)
    write(tmp_path, 3, 7)
    store, counts = Store(tmp_path), []
    assert len(store) == 12
    store.verify(counts.append)
    assert sum(counts) == store.recorded == 14


def test_verify_finds_a_shard_that_is_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 0, 1)
    (folder / "0000.blobs").rename(tmp_path / "away")
    store = Store(tmp_path)
    assert len(store) == 0
    (tmp_path / "away").rename(folder / "0000.blobs")
    assert store.verify() == ()
    assert intact(store, 2) == [0, 1]


def test_a_shard_in_use_is_neither_read_nor_sealed(tmp_path: Path, reads: list[str]) -> None:
    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        store = Store(tmp_path)
        assert intact(store, 1) == [0]
        append(writer, 1)
        assert store.refresh() == 1
        assert intact(store, 2) == [0, 1]
        assert reads == []
        store.verify()
        assert reads == ["0000.blobs"]
        assert not (tmp_path / writer.writer / "0000.sealed").exists()
        os.truncate(tmp_path / writer.writer / "0000.blobs", 500)
        assert intact(Store(tmp_path), 2) == [0]  # sizes are looked at


def test_a_file_system_without_locks_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with StoreWriter(tmp_path) as writer:
        append(writer, 0)
        assert intact(Store(tmp_path), 1) == [0]
        append(writer, 1)
        assert intact(Store(tmp_path), 2) == [0, 1]  # sealed too early above, so read again
    assert len(reads) == 2
    assert intact(Store(tmp_path), 2) == [0, 1]
    assert len(reads) == 2


def test_a_store_that_is_only_readable_is_checked_but_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    folder = write(tmp_path, 0, 1)
    change(folder / "0000.blobs", 0)

    def refuse(path: Path, payload: bytes) -> None:
        raise UserError("cannot be written")

    monkeypatch.setattr(store_format, "write_atomically", refuse)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    store = Store(tmp_path)
    assert intact(store, 2) == [1]
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert reads == ["0000.blobs"]
    there = pickle.loads(pickle.dumps(store))  # is told instead of reading it again
    assert intact(there, 2) == [1]
    assert reads == ["0000.blobs"]


def test_it_travels_by_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(write(tmp_path, 0, 1, 2) / "0000.blobs", 400)
    store = Store(tmp_path)
    caplog.clear()
    there = pickle.loads(pickle.dumps(store))
    assert intact(there, 3) == [0, 2]
    assert caplog.text == ""  # said by the first process, not again by each worker
    write(tmp_path, 1)
    there.refresh()
    assert intact(there, 3) == [0, 1, 2]


def _read_all(store: Store, rows: np.ndarray, out: multiprocessing.SimpleQueue) -> None:
    out.put([float(store.read(row).float().sum()) for row in rows])


def test_it_may_be_used_after_a_fork(tmp_path: Path) -> None:
    """Parent and children read at once through what was open before, and a child sees what is appended later."""
    write(tmp_path, *range(40), shard_bytes=3000)
    store = Store(tmp_path)
    rows = store.find(key_of(*range(40)))
    expected = [float(store.read(row).float().sum()) for row in rows]
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    children = [context.Process(target=_read_all, args=(store, rows, out)) for _ in range(3)]
    for child in children:
        child.start()
    for _ in range(20):
        assert [float(store.read(row).float().sum()) for row in rows] == expected
    assert [out.get() for _ in children] == [expected] * 3
    for child in children:
        child.join()
    assert [float(store.read(row).float().sum()) for row in rows] == expected


def test_threads_read_through_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that one thread lets go while another reads it must not turn into another file."""
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    write(tmp_path, *range(30), shard_bytes=400)
    assert len(list(tmp_path.glob("*/*.blobs"))) == 30
    store = Store(tmp_path)
    before = count_open_files()
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for number in np.random.default_rng(seed).integers(0, 30, 400).tolist():
                assert torch.equal(store.read(number), expected[number])
        except (AssertionError, DamagedEntry) as error:
            failures.append(error)

    expected = [tensor_of(number) for number in range(30)]
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert count_open_files() <= before + 2


APPENDING = """
import sys, numpy as np, torch
from pathlib import Path
from sdxl_training.data.store_format import ORIGIN, as_keys
from sdxl_training.data.store_writer import StoreWriter
with StoreWriter(Path(sys.argv[1]), shard_bytes=4000) as writer:
    for number in range(60):
        tensor = torch.randn((4, 6, 8), generator=torch.Generator().manual_seed(number)).half()
        writer.append(as_keys([number.to_bytes(16, "big")]), np.zeros(1, ORIGIN), [tensor])
        print(number, flush=True)
"""


def test_what_another_process_appends_is_seen_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    with subprocess.Popen([sys.executable, "-c", APPENDING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        for line in other.stdout:
            store.refresh()
            row = store.find(key_of(int(line)))[0]
            assert torch.equal(store.read(row), tensor_of(int(line)))
    assert other.returncode == 0
    assert intact(store, 60) == list(range(60))
    with caplog.at_level(logging.INFO):
        assert intact(Store(tmp_path), 60) == list(range(60))
    assert caplog.text == ""


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    """Resident memory after 64 MiB have been read: a memory map would hold them all."""
    with StoreWriter(tmp_path) as writer:
        for number in range(16):
            writer.append(key_of(*range(4 * number, 4 * number + 4)), np.zeros(4, ORIGIN), [torch.ones(2**18)] * 4)
    store = Store(tmp_path)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")
    store.read(0)
    before = int(statm.read_text().split()[1])
    for row in range(64):
        store.read(row)
    assert (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 16 * 2**20
