"""The index: always what a fresh look would tell, at the price of looking only at what changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdxl_training.data import contents, index_looks
from sdxl_training.data.contents import RECORD, Contents, checks_of, parse_records
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.index_files import INDEX, IndexPaths, generation_of
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.picture_index import load_index, update_index
from sdxl_training.records import UserError

FORK = multiprocessing.get_context("fork")
OLD = 10**18  # a time long ago, in ns


class Silent:
    """A progress that counts."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def track(self, _: str, total: int) -> Iterator[Callable[[int], None]]:
        self.total = total
        yield self.advance

    def advance(self, number: int) -> None:
        self.done += number


@dataclass(frozen=True)
class Spied:
    """A folder that notes which files it was asked to look at; at one of a name in `fatal`, the process dies."""

    root: str
    notes: str
    fatal: str = ""
    pause: float = 0.0

    @property
    def identity(self) -> str:
        return FolderSource(self.root).identity

    def list_files(self) -> pa.Table:
        with Path(self.notes + " of listings").open("a") as file:
            file.write("listed\n")
        return FolderSource(self.root, processes=1).list_files()

    def look(self, files: pa.Table) -> pa.Table:
        names = [os.fsdecode(name) for name in files["file"].to_pylist()]
        time.sleep(self.pause)
        if self.fatal and self.fatal in names:
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.notes).open("a", errors="surrogateescape") as file:
            file.write("".join(f"{name}\n" for name in names))
        return FolderSource(self.root).look(files)

    def take_notes(self) -> list[str]:
        path = Path(self.notes)
        names = path.read_text(errors="surrogateescape").split() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(names)

    def read(self, file: str, start: int, length: int) -> bytes:
        return FolderSource(self.root).read(file, start, length)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


@pytest.fixture
def source(tmp_path: Path) -> Spied:
    (tmp_path / "set").mkdir()
    return Spied(str(tmp_path / "set"), str(tmp_path / "notes"))


def put(source: Spied, name: str, content: str | int, at: int = OLD) -> None:
    """Write a caption, or a picture of this width; with a time of long ago, so that it counts as settled."""
    path = Path(source.root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        Image.new("RGB", (content, 3)).save(path)
    else:
        path.write_text(content)
    os.utime(path, ns=(at, at))


def fill(source: Spied, number: int) -> None:
    for i in range(number):
        put(source, f"{i % 7}/{i:03d}.png", i % 9 + 1)
        put(source, f"{i % 7}/{i:03d}.txt", f"caption {i}")


def update(source: object, folder: Path, processes: int = 1, session: str = "") -> pa.Table:
    progress = Silent()
    table = update_index(folder, source, progress, processes, session)  # type: ignore[arg-type]
    assert progress.done == progress.total
    assert table.schema.equals(INDEX)
    assert all(column.num_chunks <= 1 for column in table.columns)
    assert load_index(folder, source.identity).equals(table)  # type: ignore[attr-defined, union-attr]
    return table


def anew(source: object, tmp_path: Path) -> pa.Table:
    """The oracle: an index that knows nothing."""
    return update(source, tmp_path / f"anew-{time.time_ns()}")


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if not path.name.endswith(".lock")
    }


@pytest.mark.parametrize("seed", range(6))
def test_after_any_change_the_index_is_what_a_fresh_one_would_be_and_only_changes_are_looked_at(
    source: Spied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(index_looks, "CHUNK", 5)
    monkeypatch.setattr(index_looks, "SMALL", 12)
    random = Random(seed)
    clock = OLD
    expected: set[str] = set()
    for _ in range(8):
        names = sorted(str(path.relative_to(source.root)) for path in Path(source.root).rglob("*.png"))
        for _ in range(random.choice((0, 1, 3, 30))):
            clock += 1
            name = f"{random.randrange(3)}/{random.randrange(40):02d}.png"
            what = random.randrange(4)
            path = Path(source.root, name)
            if what == 0 and path.exists() and len(names) > 3:
                path.unlink()
                names.remove(name)
                expected.discard(name)
                continue
            if what == 1 or not path.exists():
                put(source, name, random.randrange(1, 9), clock)
                names = sorted({*names, name})
            elif what == 2:
                path.write_text("damaged")
                os.utime(path, ns=(clock, clock))
            else:
                put(source, name.replace("png", "txt"), f"caption {clock}", clock)
            expected.add(name)
        if not names:
            continue
        before = load_index(tmp_path / "cache", source.identity)
        damaged = (
            set()
            if before is None
            else {os.fsdecode(row["file"]) for row in before.select(["file", "reason"]).to_pylist() if row["reason"]}
        )
        table = update(source, tmp_path / "cache", processes=random.choice((1, 2)))
        assert source.take_notes() == sorted(expected | (damaged & set(names)))
        assert table.equals(anew(source, tmp_path))
        source.take_notes()
        expected.clear()


def test_a_second_start_writes_nothing_and_looks_at_nothing(source: Spied, tmp_path: Path) -> None:
    fill(source, 30)
    first = update(source, tmp_path / "cache")
    assert len(source.take_notes()) == 30
    before = state(tmp_path / "cache")
    assert list(before) == [IndexPaths.of(tmp_path, source.identity).table.name]
    second = update(source, tmp_path / "cache")
    assert second.equals(first)
    assert generation_of(second) == generation_of(first)
    assert source.take_notes() == []
    assert state(tmp_path / "cache") == before
    put(source, "0/000.txt", "new", OLD + 1)
    assert generation_of(update(source, tmp_path / "cache")) != generation_of(first)


def test_what_could_not_be_used_is_looked_at_again_but_not_written_again(source: Spied, tmp_path: Path) -> None:
    fill(source, 5)
    put(source, "bad.png", "nothing")
    update(source, tmp_path / "cache")
    before = state(tmp_path / "cache")
    source.take_notes()
    table = update(source, tmp_path / "cache")
    assert source.take_notes() == ["bad.png"]
    assert state(tmp_path / "cache") == before
    assert table["reason"].null_count == 5


@pytest.mark.parametrize("young", ["png", "txt"])
def test_young_files_are_looked_at_until_their_time_can_tell(source: Spied, tmp_path: Path, young: str) -> None:
    fill(source, 3)
    now = time.time_ns()
    put(source, f"0/000.{young}", 4 if young == "png" else "new", now)
    put(source, "1/001.png", 4, now + 10**17)  # a time that was made up
    update(source, tmp_path / "cache")
    source.take_notes()
    table = update(source, tmp_path / "cache")
    assert source.take_notes() == ["0/000.png"]
    assert (table["bytes"].to_pylist()[0] == -1) == (young == "png")
    time.sleep(max(0, now + index_looks.SETTLED_NS - time.time_ns()) / 1e9 + 0.05)
    update(source, tmp_path / "cache")
    assert source.take_notes() == ["0/000.png"]
    update(source, tmp_path / "cache")
    assert source.take_notes() == []


def in_process(work: Callable[[], object]) -> int | None:
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def test_a_first_index_that_is_killed_continues(source: Spied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_looks, "CHUNK", 10)
    monkeypatch.setattr(index_looks, "SMALL", 0)
    fill(source, 95)
    fatal = Spied(source.root, source.notes, "3/059.png")
    assert in_process(lambda: update(fatal, tmp_path / "cache")) == -signal.SIGKILL
    done = source.take_notes()
    assert 0 < len(done) < 95
    changed = done[0]
    put(source, changed, 9, OLD + 5)
    assert in_process(lambda: update(fatal, tmp_path / "cache")) == -signal.SIGKILL
    then = source.take_notes()
    assert not set(then) & set(done) - {changed}
    table = update(source, tmp_path / "cache")
    names = {os.fsdecode(name) for name in table["file"].to_pylist()}
    # What was found is not looked at again; only what one of them had in hand when it was killed.
    assert set(source.take_notes()) == names - (set(done) - {changed}) - set(then)
    assert table.equals(anew(source, tmp_path))
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".parquet"]


def test_workers_of_a_killed_process_leave_and_free_the_lock(
    source: Spied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_looks, "CHUNK", 10)
    monkeypatch.setattr(index_looks, "SMALL", 0)
    fill(source, 60)
    slow = Spied(source.root, source.notes, pause=1.0)
    process = FORK.Process(target=lambda: update(slow, tmp_path / "cache", processes=2))
    process.start()
    while not Path(source.notes).exists():
        time.sleep(0.02)
    process.kill()
    process.join()
    start = time.monotonic()
    table = update(source, tmp_path / "cache")
    assert time.monotonic() - start < 5
    assert table.num_rows == 60


def test_of_several_processes_one_looks_and_all_see_the_same(source: Spied, tmp_path: Path) -> None:
    fill(source, 40)
    slow = Spied(source.root, source.notes, pause=1.0)
    results, together = FORK.Queue(), FORK.Barrier(4)

    def work() -> None:
        together.wait()
        results.put(generation_of(update_index(tmp_path / "cache", slow, Silent())))

    processes = [FORK.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len(source.take_notes()) == 40
    assert Path(source.notes + " of listings").read_text().split() == ["listed"]


def test_with_a_session_later_processes_see_what_the_first_saw(source: Spied, tmp_path: Path) -> None:
    fill(source, 10)
    first = update(source, tmp_path / "cache", session="a")
    put(source, "new.png", 5)
    assert update(source, tmp_path / "cache", session="a").equals(first)
    assert update(source, tmp_path / "cache", session="b").num_rows == 11
    put(source, "newer.png", 5)
    assert update(source, tmp_path / "cache").num_rows == 12


def test_a_damaged_index_or_one_of_another_version_is_made_anew(
    source: Spied, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(source, 8)
    first = update(source, tmp_path / "cache")
    path = IndexPaths.of(tmp_path / "cache", source.identity).table
    path.write_bytes(path.read_bytes()[:-50])
    source.take_notes()
    assert update(source, tmp_path / "cache").equals(first)
    assert len(source.take_notes()) == 8
    assert "damaged" in caplog.text
    monkeypatch.setattr("sdxl_training.data.index_files.VERSION", b"2")
    assert update(source, tmp_path / "cache").equals(first)
    assert "another version" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(source: Spied, tmp_path: Path) -> None:
    fill(source, 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache\.path"):
        update_index(tmp_path / "file" / "cache", source, Silent())


def test_errors_of_the_source_pass_and_leave_the_index_as_it_was(source: Spied, tmp_path: Path) -> None:
    fill(source, 2)
    update(source, tmp_path / "cache")
    before = state(tmp_path / "cache")
    Path(source.root).rename(tmp_path / "away")
    with pytest.raises(UserError, match="no such folder"):
        update_index(tmp_path / "cache", source, Silent())
    assert state(tmp_path / "cache") == before


@dataclass(frozen=True)
class Boxes:
    """Files that hold several pictures: <width> <width> ... in a text file; a word is a picture nobody can read."""

    root: str
    identity: str = "boxes"

    def list_files(self) -> pa.Table:
        paths = sorted(Path(self.root).iterdir())
        rows = [(os.fsencode(p.name), p.stat().st_size, p.stat().st_mtime_ns, -1, -1) for p in paths]
        return pa.Table.from_pylist([dict(zip(FILES.names, row, strict=True)) for row in rows], schema=FILES)

    def look(self, files: pa.Table) -> pa.Table:
        rows = []
        for name in files["file"].to_pylist():
            for i, word in enumerate(Path(self.root, os.fsdecode(name)).read_text().split()):
                row = {"file": name, "name": name + b"/%d" % i, "start": i, "length": 1, "height": 0, "width": 0}
                rows.append(row | ({"height": 1, "width": int(word)} if word.isdigit() else {"reason": word}))
        return pa.Table.from_pylist(rows, schema=PICTURES)


@pytest.mark.parametrize("seed", range(4))
def test_files_of_several_pictures_keep_them_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(index_looks, "CHUNK", 3)
    monkeypatch.setattr(index_looks, "SMALL", 4)
    monkeypatch.setattr("sdxl_training.data.index_rows.SLICE", 7)
    random = Random(seed)
    (tmp_path / "set").mkdir()
    for clock in range(6):
        for _ in range(random.randrange(1, 12)):
            path = tmp_path / "set" / f"{random.randrange(20)}"
            if path.exists() and random.random() < 0.3:
                path.unlink()
            else:
                words = [random.choice(("7", "12", "31", "word")) for _ in range(random.choice((0, 1, 2, 9)))]
                path.write_text(" ".join(words))
                os.utime(path, ns=(OLD + clock, OLD + clock))
        boxes = Boxes(str(tmp_path / "set"))
        assert update(boxes, tmp_path / "cache").equals(anew(boxes, tmp_path))


# What is learned later


def digests(random: Random, number: int) -> np.ndarray:
    return np.frombuffer(random.randbytes(16 * number), np.uint8).reshape(number, 16)


def hashes_in(table: pa.Table) -> dict[str, bytes | None]:
    return {os.fsdecode(row["name"]): row["content_hash"] for row in table.select(["name", "content_hash"]).to_pylist()}


def test_hashes_are_known_to_others_and_next_time_while_the_picture_is_the_same(source: Spied, tmp_path: Path) -> None:
    fill(source, 20)
    cache = tmp_path / "cache"
    table = update(source, cache)
    one, other = (Contents(cache, source.identity, table) for _ in range(2))
    assert not one.hash_of(np.arange(20))[1].any()
    rows, found = np.array([3, 0, 17, 8]), digests(Random(0), 4)
    one.learn(rows, found)
    assert not other.hash_of(rows)[1].any()
    assert other.refresh() == 4
    assert other.refresh() == 0
    for each in (one, other, Contents(cache, source.identity, update(source, cache))):
        hashes, known = each.hash_of(np.arange(20))
        assert known.tolist() == [row in rows for row in range(20)]
        assert (hashes[rows] == found).all()
    names = [os.fsdecode(table["name"][row].as_py()) for row in rows.tolist()]
    put(source, names[0], 9, OLD + 1)  # the picture is another
    put(source, names[1].replace("png", "txt"), "new", OLD + 1)  # only its caption is
    os.utime(Path(source.root, names[3]), ns=(OLD + 1, OLD + 1))  # it may be another of the same length
    put(source, "new.png", 2)
    for _ in range(2):
        after = hashes_in(update(source, cache))
        assert {name for name in after if after[name]} == {names[1], names[2]}
        assert (after[names[1]], after[names[2]]) == (bytes(found[1]), bytes(found[2]))


def test_what_a_process_learns_that_loaded_an_earlier_index_is_kept(source: Spied, tmp_path: Path) -> None:
    fill(source, 12)
    cache = tmp_path / "cache"
    earlier = update(source, cache)
    put(source, "0/000.png", 9, OLD + 1)
    os.utime(Path(source.root, "1/001.png"), ns=(OLD + 1, OLD + 1))
    put(source, "0/0001.png", 9)  # all others move by a row
    update(source, cache)
    contents_of_earlier = Contents(cache, source.identity, earlier)
    found = digests(Random(1), 12)
    contents_of_earlier.learn(np.arange(12), found)
    expected = {
        os.fsdecode(name): bytes(digest) for name, digest in zip(earlier["name"].to_pylist(), found, strict=True)
    }
    expected |= {"0/000.png": None, "0/0001.png": None, "1/001.png": None}
    assert hashes_in(update(source, cache)) == expected
    IndexPaths.of(cache, source.identity).hashes.unlink()
    before = state(cache)
    assert hashes_in(update(source, cache)) == expected  # it was taken into the index
    assert state(cache) == before


def test_many_hashes_are_taken_into_the_index(source: Spied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_training.data.picture_index.MANY", 5)
    fill(source, 12)
    cache = tmp_path / "cache"
    table = update(source, cache)
    Contents(cache, source.identity, table).learn(np.arange(6), digests(Random(1), 6))
    folded = update(source, cache)
    assert generation_of(folded) == generation_of(table)
    IndexPaths.of(cache, source.identity).hashes.unlink()
    assert sum(digest is not None for digest in hashes_in(update(source, cache)).values()) == 6


def test_hashes_of_a_young_file_are_not_kept(source: Spied, tmp_path: Path) -> None:
    put(source, "a.png", 3, time.time_ns())
    table = update(source, tmp_path / "cache")
    learned = Contents(tmp_path / "cache", source.identity, table)
    learned.learn(np.array([0]), digests(Random(0), 1))
    assert learned.hash_of(np.array([0]))[1].all()
    put(source, "a.png", 3, time.time_ns())
    assert hashes_in(update(source, tmp_path / "cache")) == {"a.png": None}


def test_many_processes_append_without_loss(source: Spied, tmp_path: Path) -> None:
    fill(source, 60)
    cache = tmp_path / "cache"
    table = update(source, cache)
    shared = Contents(cache, source.identity, table)
    found = digests(Random(2), 60)

    def work(start: int) -> None:
        for row in range(start, 60, 6):
            shared.learn(np.array([row]), found[[row]])
            shared.fail([row], [f"damaged {row}"])
            shared.refresh()

    processes = [FORK.Process(target=work, args=(start,)) for start in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert shared.refresh() == 120
    assert (shared.hash_of(np.arange(60))[0] == found).all()
    assert shared.failures == {row: f"damaged {row}" for row in range(60)}
    assert shared.refresh() == 0


def failures_in(cache: Path, source: Spied) -> dict[int, str]:
    """Return what another start knows of pictures that could not be decoded."""
    return Contents(cache, source.identity, update(source, cache)).failures


def test_failures_hold_while_the_picture_is_the_same_and_never_change_the_index(source: Spied, tmp_path: Path) -> None:
    fill(source, 6)
    Path(source.root, os.fsdecode(b"\xff.png")).write_bytes(Path(source.root, "0/000.png").read_bytes())
    os.utime(Path(source.root, os.fsdecode(b"\xff.png")), ns=(OLD, OLD))
    cache = tmp_path / "cache"
    table = update(source, cache)
    Contents(cache, source.identity, table).fail([1, 6], ["its pixels\nend early", "é"])
    for _ in range(2):
        assert update(source, cache).equals(table)
        assert failures_in(cache, source) == {1: "its pixels\nend early", 6: "é"}
    put(source, "1/001.png", 5, OLD + 1)
    assert failures_in(cache, source) == {6: "é"}
    assert source.take_notes().count("1/001.png") == 2


@pytest.mark.parametrize("seed", range(20))
def test_whole_records_are_found_among_pieces(seed: int) -> None:
    random = Random(seed)
    records = np.zeros(12, RECORD)
    records["row"], records["hash"] = np.arange(12), digests(random, 12)
    records["check"] = checks_of(records)
    data, whole = b"", []
    for record in records:
        piece = record.tobytes()
        if random.random() < 0.4:
            piece = (
                piece[: random.randrange(RECORD.itemsize)] if random.random() < 0.7 else bytes(random.randrange(300))
            )
        else:
            whole.append(int(record["row"]))
        data += piece
    found, length = parse_records(data)
    assert found["row"].tolist() == whole
    assert length <= len(data)
    more, _ = parse_records(data[length:] + records[3].tobytes())
    assert more["row"].tolist() == [3]


def test_a_line_or_record_that_was_cut_off_costs_only_itself(source: Spied, tmp_path: Path) -> None:
    fill(source, 4)
    cache = tmp_path / "cache"
    table = update(source, cache)
    learned = Contents(cache, source.identity, table)
    paths = IndexPaths.of(cache, source.identity)
    for row in range(4):
        learned.learn(np.array([row]), digests(Random(row), 1))
        learned.fail([row], [f"reason {row}"])
        if row == 1:
            for path, size in ((paths.hashes, 7), (paths.failures, 3)):
                path.write_bytes(path.read_bytes()[:-size])
    after = update(source, cache)
    assert failures_in(cache, source) == {0: "reason 0", 2: "reason 2", 3: "reason 3"}
    assert [digest is None for digest in after["content_hash"].to_pylist()] == [False, True, False, False]
    assert json.loads(paths.failures.read_text().splitlines()[-1])["name"].endswith("003.png")


def test_a_full_disk_is_waited_for(source: Spied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(source, 2)
    table = update(source, tmp_path / "cache")
    learned = Contents(tmp_path / "cache", source.identity, table)
    write, waited = os.write, []
    monkeypatch.setattr(contents.os, "write", lambda file, data: write(file, data[: len(data) if waited else 5]))
    monkeypatch.setattr(contents, "wait_for_room", lambda: waited.append(1))
    learned.learn(np.array([0]), digests(Random(0), 1))
    assert waited == [1]
    again = Contents(tmp_path / "cache", source.identity, update(source, tmp_path / "cache"))
    assert again.hash_of(np.array([0, 1]))[1].tolist() == [True, False], "the piece before it costs nothing"
