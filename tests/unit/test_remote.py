"""Files by path and by address: the same names and bytes from a disk, from fsspec's memory and from a slow service."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data import remote
from sdxl_training.data.remote import base_of, is_address, list_files, open_seekable, read_range, shown
from sdxl_training.records import UserError

NAMES = ("x-00.tar", "x-01.tar", "b/x-02.TAR", "b/c/x-03.tar", "[odd] {name}/x 04.tar", "new\nline/🦊.tar", "notes.txt",
         ".hidden.tar", ".folder/x.tar", "b/._x-02.tar", "__MACOSX/x.tar")  # fmt: skip
VISIBLE = NAMES[:6]


class Slow(AsyncFileSystem):
    """A service with one file, its connections in a thread as those of S3 and GCS are; fails as often as it is told."""

    protocol = "slow"
    cachable = True
    content = bytes(range(256)) * 100
    failures: ClassVar[list[Exception]] = []
    refusals: ClassVar[list[Exception]] = []
    calls: ClassVar[list[tuple[int, int]]] = []

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        if self.refusals:
            raise self.refusals.pop(0)
        return {"name": path, "size": len(self.content), "type": "file", "ETag": "one"}

    async def _cat_file(self, path: str, start: int, end: int, **_: object) -> bytes:
        if self.failures:
            raise self.failures.pop(0)
        self.calls.append((start, end))
        return self.content[start:end]


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    fsspec.register_implementation("slow", Slow, clobber=True)
    monkeypatch.setattr(Slow, "failures", [])
    monkeypatch.setattr(Slow, "refusals", [])
    monkeypatch.setattr(Slow, "calls", [])
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    return Slow


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture(params=["path", "file://", "memory://"])
def fill(request: pytest.FixtureRequest, tmp_path: Path, memory: MemoryFileSystem) -> Callable[[str], str]:
    """Put files at a place, each with its name as its content; returns the place."""

    def fill(*names: str) -> str:
        for name in names:
            if request.param == "memory://":
                memory.pipe(f"/place/{name}", name.encode())
            else:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(name.encode())
        return {"path": f"{tmp_path}", "file://": f"file://{tmp_path}", "memory://": "memory://place"}[request.param]

    return fill


def names_at(root: str) -> list[str]:
    return [file.name.decode() for file in list_files(root, (".tar",))]


def test_an_address_has_a_scheme():
    assert all(map(is_address, ("s3://a/b", "memory://", "file:///a", "hf://datasets/a/b")))
    assert not any(map(is_address, ("/a/b", "a", "c:/a", "a://"[:2], "~/s3:/x", "x y://z")))


# Listing


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("", VISIBLE),
        ("/", VISIBLE),
        ("/x-00.tar", ("x-00.tar",)),
        ("/x-{00..01}.tar", ("x-00.tar", "x-01.tar")),
        ("/{b/c/x-03,x-01}.tar", ("x-01.tar", "b/c/x-03.tar")),
        ("/*.tar", ("x-00.tar", "x-01.tar")),
        ("/x-?1.tar", ("x-01.tar",)),
        ("/?/*", ("b/x-02.TAR",)),
        ("/**", VISIBLE),
        ("/**/x-0?.tar", ("x-00.tar", "x-01.tar", "b/c/x-03.tar")),
        ("/b/**", ("x-02.TAR", "c/x-03.tar")),
        ("/{b,new\nline}", ("b/x-02.TAR", "b/c/x-03.tar", "new\nline/🦊.tar")),
        ("/[odd] {name}", ("x 04.tar",)),
        ("/[odd] {name}/x*", ("x 04.tar",)),
    ],
)
def test_files_are_listed(fill: Callable[..., str], tail: str, expected: tuple[str, ...]):
    root = fill(*NAMES) + tail
    listed = list_files(root, (".tar",))
    assert [file.name for file in listed] == sorted(name.encode() for name in expected)
    base = base_of(root, (".tar",))
    assert base.endswith("/")
    for name, size, _ in listed:
        content = read_range(base + name.decode(), 0, size)
        assert content.decode().endswith(name.decode())


def test_a_folder_that_is_named_like_a_file_is_listed(fill: Callable[..., str]):
    place = fill("a.tar/x.tar", "a.tar/y.tar")
    assert names_at(f"{place}/a.tar") == ["a.tar/x.tar", "a.tar/y.tar"]
    assert names_at(f"{place}/a.tar/") == ["x.tar", "y.tar"]


def test_a_change_is_seen(fill: Callable[..., str], memory: MemoryFileSystem):
    place = fill("x.tar")
    first = list_files(place, (".tar",))
    assert first == list_files(place, (".tar",)) == list_files(f"{place}/x.tar", (".tar",))
    fill("x.tar")
    if "memory" not in place:
        path = Path(place.removeprefix("file://")) / "x.tar"
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert first != list_files(place, (".tar",))


def test_names_on_a_disk_may_be_any_bytes(tmp_path: Path):
    name = b"\xff\xfe \n.tar"
    (tmp_path / os.fsdecode(name)).write_bytes(b"1")
    (file,) = list_files(str(tmp_path), (".tar",))
    assert file.name == name
    assert read_range(base_of(str(tmp_path)) + os.fsdecode(file.name), 0, 1) == b"1"


def test_linked_folders_are_followed_once(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.tar").write_bytes(b"")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "broken.tar").symlink_to(tmp_path / "nothing")
    assert names_at(str(tmp_path)) == ["a/x.tar"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to(tmp_path / "a")
    assert names_at(str(tmp_path / "b")) == ["link/x.tar"]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("/nothing", "1 of 1 cannot be found: .*/nothing. Correct"),
        ("/nothing/*.tar", "nothing"),
        ("/x-{0..2}.tar", "2 of 3 cannot be found: .*/x-0.tar, .*/x-2.tar. Correct"),
        ("/*.zip", "nothing is there. Names must end in .tar"),
        ("/b", "nothing that serves is there, only 2 x .txt, 1 x .zip. Names must end in .tar"),
        ("/b/a.zip", "only 1 x .zip"),
        ("/p", r"only 1 x .arrow. Names must end in .tar. For the pictures inside them set .*type: parquet\.$"),
        ("/x-{3..1}.tar", "Correct it"),
        ("/{1..100000}-{1..2}.tar", "stand for 200000 files"),
        ("/{1..999999999999}.tar", "at most 100000"),
    ],
)
def test_what_is_not_there_is_said(fill: Callable[..., str], tail: str, message: str):
    place = fill("x-1.tar", "b/a.txt", "b/b.txt", "b/a.zip", "p/a.arrow")
    with pytest.raises(UserError, match=message):
        list_files(place + tail, (".tar",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_folder_is_named(tmp_path: Path):
    (tmp_path / "b").mkdir(mode=0)
    with pytest.raises(UserError, match="b cannot be listed"):
        list_files(str(tmp_path), (".tar",))
    (tmp_path / "b").chmod(stat.S_IRWXU)


@given(st.integers(0, 200), st.integers(0, 30), st.integers(1, 5))
def test_numbers_in_braces_keep_their_zeros(first: int, more: int, width: int):
    root = f"/a/x-{{{first:0{width}}..{first + more}}}.tar"
    assert remote._alternatives(root) == [f"/a/x-{n:0{width}}.tar" for n in range(first, first + more + 1)]


@given(st.integers(0, 10**6 - 1))
def test_times_are_told_in_many_ways(microsecond: int):
    date = datetime(2024, 5, 6, 7, 8, 9, microsecond)
    aware = date.replace(tzinfo=timezone.utc)
    expected = (1714979289 * 10**6 + microsecond) * 1000
    for info in ({"LastModified": aware}, {"mtime": aware.timestamp()}, {"updated": date}):
        assert remote._changed({**info, "ETag": "x", "created": 5.0}) == expected


def test_times_without_a_zone_do_not_depend_on_this_machines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert remote._changed({"mtime": datetime(1970, 1, 2)}) == 86_400 * 10**9
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_listing_is_never_remembered(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch):
    """Services' packages keep listings; a second one must see what came in between."""
    asked = []
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: asked.append(path))
    memory.pipe("/place/x.tar", b"")
    asked.clear()
    assert names_at("memory://place") == ["x.tar"]
    assert asked == [None]


def test_a_digest_stands_for_a_time_that_is_not_told():
    values = {remote._changed({"ETag": str(i)}) for i in range(100)}
    assert len(values) == 100
    assert all(0 <= value < datetime(2007, 1, 1).timestamp() * 1e9 for value in values)
    assert remote._changed({"etag": "a", "created": datetime.now()}) == remote._changed({"etag": "a"})
    assert remote._changed({"ETag": None}) == 0
    now = datetime.now(timezone.utc)
    assert remote._changed({"created": now}) < remote._changed({"created": now + timedelta(microseconds=1)})


# Reading


@pytest.mark.parametrize("place", ["slow://x", "memory://x"])
@given(data=st.data())
def test_a_remote_file_reads_like_any_file(place: str, data: st.DataObject):
    fsspec.filesystem("memory").pipe("/x", Slow.content)
    ours = open_seekable(place, chunk=data.draw(st.sampled_from([16, 1000, 1 << 20])))
    with ours:
        for _ in range(data.draw(st.integers(1, 5))):
            start, length = data.draw(st.integers(0, 30_000)), data.draw(st.integers(0, 30_000))
            assert ours.seek(start) == start
            assert ours.read(length) == Slow.content[start : start + length]
            assert ours.tell() == start + len(Slow.content[start : start + length])
        assert ours.seek(-10, os.SEEK_END) == len(Slow.content) - 10
        assert ours.read() == Slow.content[-10:]


def test_a_remote_file_is_streamed_in_large_parts(slow: type[Slow]):
    with open_seekable("slow://x", chunk=10_000) as file:
        while file.read(100):
            pass
    assert slow.calls == [(0, 10_000), (10_000, 20_000), (20_000, 25_600)]


def test_a_range_is_all_that_is_fetched(slow: type[Slow]):
    assert read_range("slow://x", 300, 5) == slow.content[300:305]
    assert slow.calls == [(300, 305)]
    assert read_range("slow://x", 300, 0) == b""


def test_a_range_of_a_service_with_file_objects_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch):
    options: list[object] = []

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int, **others: object) -> bytes:
        options.append(others)
        return b"x" * (end - start)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    assert read_range("memory://x", 2, 3) == b"xxx"
    assert options == [{"cache_type": "none"}]


def test_a_file_that_ends_before_is_an_error(fill: Callable[..., str]):
    place = fill("x.tar")
    with pytest.raises(OSError, match="3 bytes came where 4 were asked for") as caught:
        read_range(f"{place}/x.tar", 2, 4)
    assert caught.value.errno == errno.EIO
    with pytest.raises(FileNotFoundError):
        read_range(f"{place}/y.tar", 2, 4)


class ServiceError(Exception):
    """As aiohttp's and botocore's: not an OSError."""


def test_failures_are_retried(slow: type[Slow], monkeypatch: pytest.MonkeyPatch):
    service = types.ModuleType("aiohttp")
    service.ClientError = ServiceError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiohttp", service)
    slow.failures = [OSError("reset"), ServiceError("slow down")]
    assert read_range("slow://x", 0, 3) == slow.content[:3]
    slow.failures = [ServiceError("https://me:secret@host/x?sig=secret is busy")] * 3
    with pytest.raises(OSError, match="ServiceError: https://host/x is busy") as caught:
        read_range("slow://x", 0, 3)
    assert "secret" not in f"{caught.value}{caught.value.__cause__}"
    assert caught.value.__suppress_context__
    assert caught.value.errno is not None
    assert slow.failures == []


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError])
def test_what_will_not_pass_is_not_retried(slow: type[Slow], kind: type[OSError]):
    slow.failures = [kind("no"), OSError("not reached")]
    with pytest.raises(kind, match="no"):
        read_range("slow://x", 0, 3)
    assert len(slow.failures) == 1


def test_a_programming_error_is_not_hidden(slow: type[Slow]):
    slow.failures = [KeyError("ours")]
    with pytest.raises(KeyError):
        read_range("slow://x", 0, 3)


# Addresses


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("s3://KEY:SE/CR+ET@bucket/a", "s3://bucket/a"),
        ("sftp://me@host/a", "sftp://host/a"),
        ("reading https://me:pw@host:80/a?sig=pw failed", "reading https://host:80/a failed"),
        ("https://host:8080/a@b/c", "https://host:8080/a@b/c"),
        ("hf://datasets/me/pictures@main/a.tar", "hf://datasets/me/pictures@main/a.tar"),
        ("/home/me@work/a?b", "/home/me@work/a?b"),
    ],
)
def test_credentials_are_not_shown(text: str, clean: str):
    assert shown(text) == clean


def test_a_listing_that_fails_shows_no_credentials(slow: type[Slow]):
    slow.refusals = [PermissionError("https://me:secret@host/a: 403")]
    with pytest.raises(UserError, match=r"slow://bucket/a cannot be listed .*environment") as caught:
        list_files("slow://me:secret@bucket/a", (".tar",))
    assert "secret" not in str(caught.value)


def test_a_missing_package_is_named():
    fsspec.register_implementation("cloud", "no_such_package.System", clobber=True, errtxt="install it")
    for call in (lambda: list_files("cloud://a", (".tar",)), lambda: read_range("cloud://a", 0, 1)):
        with pytest.raises(UserError, match=r"cloud://.*pip install no_such_package"):
            call()


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("nowhere://a/b", "Protocol not known"),
        ("simplecache::s3://a/b", "cannot be found"),
        ("zip://a::s3://b/c", "chained"),
        ("https://host/folder", "no list of its files"),
        ("https://host/*.tar", "no list of its files"),
        ("https://host/a.tar?token=secret", "query"),
    ],
)
def test_addresses_that_are_not_read(root: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        list_files(root, (".tar",))
    assert "secret" not in str(caught.value)


def test_a_forked_process_has_its_own_connections(slow: type[Slow]):
    """The thread that waits for a service is not there after a fork: what was made before it would wait for ever."""
    assert read_range("slow://x", 1, 2) == slow.content[1:3]
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(theirs, pickle.dumps((read_range("slow://x", 5, 3), len(list_files("slow://x.tar", (".tar",))))))
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        assert pickle.load(pipe) == (slow.content[5:8], 1)
    os.waitpid(child, 0)
    assert read_range("slow://x", 1, 2) == slow.content[1:3]
