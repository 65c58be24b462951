"""Pictures of the same bytes, against a dictionary of their bytes; what is read for it, and what processes agree on."""

import json
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data.duplicates import (
    ALONE,
    SAME_LOOK,
    Duplicates,
    Groups,
    agree,
    describe,
    first_equal,
    in_threads,
    same_pictures,
)
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.listing import PICTURES
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.records import ImageRecord


class Shelf:
    """Pictures in memory; None is one that cannot be read. Counts who is read."""

    def __init__(self, files, names=None):
        self.files = list(files)
        self.names = names or [f"{number}.png" for number in range(len(self.files))]
        self.reads = Counter()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        assert isinstance(number, int)
        return ImageRecord(number, self.names[number], (8, 8), ("a",), ("a",), 1)

    def column(self, name):
        assert name == "length"
        return np.array([len(data or b"unread") for data in self.files], np.int64)

    def read(self, number):
        assert isinstance(number, int)
        self.reads[number] += 1
        if self.files[number] is None:
            raise UnreadablePicture(self.names[number], "the disk is gone")
        return self.files[number]


class Memory:
    """What one process knows of the bytes."""

    def __init__(self, pictures):
        self.digests = [None] * pictures
        self.failures = {}
        self.unseen = []  # what others have written into their files since

    def known(self, picture):
        return self.digests[picture]

    def learn(self, picture, content):
        assert len(content) == 16
        self.digests[picture] = content

    def failure(self, picture):
        return self.failures.get(picture)

    def fail(self, picture, reason):
        self.failures[picture] = reason

    def columns(self):
        digests = np.frombuffer(b"".join(each or bytes(16) for each in self.digests), "<u8").reshape(-1, 2)
        known = np.array([each is not None for each in self.digests], bool)
        return digests, known, np.isin(np.arange(len(self.digests)), list(self.failures))

    def refresh(self):
        for picture, content in self.unseen:
            self.learn(picture, content)
        return bool(self.unseen)


@dataclass
class Bar:
    """Progress that remembers what was said."""

    said: list = field(default_factory=list)
    done: dict = field(default_factory=dict)

    @contextmanager
    def track(self, description, total):
        self.done[description] = (0, total)

        def advance(count):
            self.done[description] = (self.done[description][0] + count, total)

        yield advance

    def message(self, text):
        self.said.append(text)

    @property
    def complete(self):
        return all(done == total for done, total in self.done.values())


@dataclass
class Rank:
    """One of several processes, played by threads; what is gathered is pickled as between processes."""

    rank: int
    world_size: int
    meeting: threading.Barrier
    table: dict

    def gather(self, items):
        self.table[self.rank] = pickle.dumps(list(items))
        self.meeting.wait(30)
        everything = [item for rank in range(self.world_size) for item in pickle.loads(self.table[rank])]
        self.meeting.wait(30)
        return everything


def on_ranks(world_size, work):
    """Return what `work(processes)` returned on each rank."""
    meeting, table = threading.Barrier(world_size), {}

    def run(rank):
        try:
            return work(Rank(rank, world_size, meeting, table))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def find(shelf, memory=None, **options):
    return same_pictures(shelf, memory or Memory(len(shelf)), Bar(), threads=2, **options)


def oracle(files):
    """The number of the first file with the same bytes; a picture that cannot be read is alone."""
    first = {}
    return [number if data is None else first.setdefault(data, number) for number, data in enumerate(files)]


some_files = st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=3), st.sampled_from([b"x", b"yy", b"zz"])))


@given(some_files)
@settings(max_examples=60)
def test_each_pictures_leader_is_the_first_with_its_bytes(files):
    shelf = Shelf(files)
    groups = find(shelf)
    assert groups.leader_P.dtype == np.int64
    assert groups.leader_P.tolist() == oracle(files)
    assert groups.kept_mask().tolist() == [leader == number for number, leader in enumerate(oracle(files))]
    assert groups.dropped == len(files) - len(set(oracle(files)))
    members = [[n for n, leader in enumerate(oracle(files)) if leader == first] for first in range(len(files))]
    assert [group.tolist() for group in groups.members] == [each for each in members if len(each) > 1]


@given(some_files)
@settings(max_examples=40)
def test_only_what_could_be_equal_is_read_and_once(files):
    shelf, memory = Shelf(files), Memory(len(files))
    find(shelf, memory)
    lengths = Counter(shelf.column("length").tolist())
    assert shelf.reads == Counter(n for n, length in enumerate(shelf.column("length").tolist()) if lengths[length] > 1)
    for number, data in enumerate(files):
        if shelf.reads[number]:
            assert memory.known(number) == (None if data is None else digest_content(data))
            assert memory.failure(number) == ("the disk is gone" if data is None else None)
    shelf.reads.clear()
    assert find(shelf, memory).leader_P.tolist() == oracle(files)
    assert all(files[number] is None for number in shelf.reads)  # which may be there by now


def test_groups_do_not_change_when_pictures_are_found_to_be_damaged():
    shelf, memory = Shelf([b"same", b"same", b"same"]), Memory(3)
    memory.learn(0, digest_content(b"same"))
    memory.fail(0, "damaged")
    memory.fail(1, "damaged")
    assert find(shelf, memory).leader_P.tolist() == [0, 0, 0]
    assert set(shelf.reads) == {1, 2}


def test_what_is_known_is_believed_and_not_altered():
    shelf, memory = Shelf([b"aa", b"bb", b"cc"]), Memory(3)
    memory.unseen = [(0, bytes(16)), (2, bytes(16))]  # found only by a refresh
    columns = memory.columns()
    memory.columns = lambda: columns if not memory.known(0) else Memory.columns(memory)
    before = [column.copy() for column in columns]
    assert find(shelf, memory).leader_P.tolist() == [0, 1, 0]
    assert set(shelf.reads) == {1}
    assert all(np.array_equal(old, new) for old, new in zip(before, columns, strict=True))


def test_progress_counts_what_is_read():
    bar = Bar()
    same_pictures(Shelf([b"aa", b"bb", b"c", None, None]), Memory(5), bar)
    assert bar.done == {"reading pictures of equal length": (4, 4)}
    bar = Bar()
    same_pictures(Shelf([b"aa", b"b"]), Memory(2), bar)
    assert not bar.done


def test_all_processes_agree_and_share_the_reading():
    files = [bytes([value]) * 4 for value in np.random.default_rng(0).integers(0, 40, 100)] + [None] * 3
    shelf = Shelf(files)
    memories = [Memory(len(files)) for _ in range(3)]
    for number in range(0, 100, 2):  # what one process knows the first one may not know, and the other way about
        memories[number % 3].learn(number, digest_content(files[number]))
    results = on_ranks(3, lambda rank: find(shelf, memories[rank.rank], processes=rank))
    assert [result.leader_P.tolist() for result in results] == [oracle(files)] * 3
    assert set(shelf.reads.values()) == {1}
    assert len(shelf.reads) == sum(memories[0].known(number) is None or number % 6 != 0 for number in range(103))
    learnt = [sum(each is not None for each in memory.digests) for memory in memories]
    assert max(learnt) < 70  # nobody read it all


def test_the_first_process_decides():
    assert on_ranks(3, lambda rank: agree(rank.rank + 10, rank)) == [10, 10, 10]
    assert agree([1, 2], ALONE) == [1, 2]


def test_equal_digests_are_equal_in_both_halves():
    rng = np.random.default_rng(1)
    digests = rng.integers(0, 4, (300, 2)).astype(np.uint64) * np.uint64(2**62)
    first = {}
    expected = [first.setdefault(tuple(row), number) for number, row in enumerate(digests.tolist())]
    assert first_equal(digests).tolist() == expected
    assert first_equal(digests[:0]).tolist() == []


def test_threads_keep_the_order_and_do_not_run_ahead_without_limit():
    numbers, started = np.arange(5000), []
    results = in_threads(lambda number: started.append(number) or number * 2, numbers, threads=4)
    assert next(results) == 0
    assert len(started) < 2000
    assert [0, *results] == (numbers * 2).tolist()


def test_a_million_known_pictures_take_about_a_second():
    count = 1_000_000
    digests = np.random.default_rng(0).integers(0, 2**62, (count, 2)).astype(np.uint64)
    digests[count // 2 :: 7] = digests[: count // 2 : 7][: len(digests[count // 2 :: 7])]

    class Columns:
        def refresh(self):
            return False

        def columns(self):
            return digests, np.ones(count, bool), np.zeros(count, bool)

    class Equal:
        def __len__(self):
            return count

        def column(self, name):
            return np.full(count, 7)

    start = time.process_time()
    groups = same_pictures(Equal(), Columns(), Bar())
    assert (groups.dropped, len(groups.members)) == (len(digests[count // 2 :: 7]),) * 2
    assert time.process_time() - start < 4  # 0.7 s of a core, however busy the machine is


# For people


def test_the_groups_in_words():
    groups = Groups(np.array([0, 0, 2, 3, 0, 3, 6, 6]))
    shelf = Shelf([b""] * 8, list("abcdefgh"))
    assert describe(groups, shelf, 2) == (
        "7 pictures in 3 groups have the same bytes:\n  a = b = e\n  d = f\n  and 1 more group: a run lists all in "
        "duplicates.jsonl, plan with --duplicates"
    )
    all_of_them = ": a run lists all in duplicates.jsonl, plan with --duplicates"
    assert describe(groups, shelf, 1).endswith(f"\n  and 2 more groups{all_of_them}")
    assert describe(Groups(np.array([0, 0])), shelf, 1).startswith("2 pictures in 1 group have")
    assert describe(groups, shelf, 3, SAME_LOOK).endswith("look nearly the same:\n  a ~ b ~ e\n  d ~ f\n  g ~ h")
    grouped = [["a", "b", "e"], ["d", "f"], ["g", "h"]]
    assert [json.loads(line) for line in Duplicates(groups, shelf, drop=True).lines()] == [
        {"kind": "same bytes", "kept": [first], "left_out": others} for first, *others in grouped
    ]
    assert [json.loads(line) for line in Duplicates(groups, shelf, SAME_LOOK).lines()] == [
        {"kind": "same look", "kept": group, "left_out": []} for group in grouped
    ]
    assert describe(Groups(np.arange(3)), shelf, 2) == "no two of 3 pictures have the same bytes"


def test_a_large_group_is_named_in_part():
    shelf = Shelf([b""] * 9, list("abcdefghi"))
    assert describe(Groups(np.zeros(9, np.int64)), shelf, 2).endswith("\n  a = b = c = d = e and 4 more")
    assert json.loads(*Duplicates(Groups(np.zeros(9, np.int64)), shelf).lines())["kept"] == list("abcdefghi")


# Real pictures of real sources


@dataclass(frozen=True)
class Folder:
    """A source as the index sees it, with its pictures looked at by hand."""

    root: object
    identity = "a folder"
    captions_are = "beside the pictures"

    def read(self, file, start, length):
        try:
            return (self.root / file).read_bytes()
        except OSError as error:
            raise UnreadablePicture(file, str(error)) from error

    def path(self, name):
        return str(self.root / name)

    def indexed(self):
        files = sorted(self.root.iterdir())
        rows = [
            {
                "file": file.name.encode(), "name": file.name.encode(), "start": 0, "length": file.stat().st_size,
                "height": 8, "width": 8, "captions": ["a"],
            }
            for file in files
        ]  # fmt: skip
        return IndexedSource(self, SourceRules(), pa.Table.from_pylist(rows, PICTURES).combine_chunks())


@pytest.fixture
def two_sources(tmp_path):
    for folder, files in {
        "one": {"b.png": b"cat", "c.png": b"dog", "d.png": b"a very long one"},
        "two": {"a.png": b"cow", "e.png": b"dog", "f.png": b"cat", "g.png": b"cat"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / name).write_bytes(data)
    return Pictures([Folder(tmp_path / folder).indexed() for folder in ("one", "two")])


def test_two_sources_with_the_same_picture(two_sources, tmp_path):
    groups = same_pictures(two_sources, Memory(7), Bar())
    listed = [json.loads(line)["kept"] for line in Duplicates(groups, two_sources).lines()]
    relative = [[path.removeprefix(f"{tmp_path}/") for path in group] for group in listed]
    assert relative == [["one/b.png", "two/f.png", "two/g.png"], ["one/c.png", "two/e.png"]]


def test_a_file_that_vanished_is_no_duplicate(two_sources, tmp_path):
    (tmp_path / "one" / "b.png").unlink()
    memory = Memory(7)
    groups = same_pictures(two_sources, memory, Bar())
    assert groups.leader_P.tolist() == [0, 1, 2, 3, 1, 5, 5]
    assert list(memory.failures) == [0]
    assert "No such file" in memory.failures[0]
