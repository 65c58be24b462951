"""Tars as tarfile and hands write them: what our reader finds, and that it finds the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data import remote, tars
from sdxl_training.data.decoding import UnreadablePicture
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.tars import DamagedTar, Member, TarSource, members
from sdxl_training.records import UserError
from tests.pictures import NOISE, RAMP, SHOWN, encoded, header

PNG, JPEG, WEBP = encoded(RAMP), encoded(NOISE, "JPEG"), encoded(NOISE, "WEBP")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
TYPICAL = {"a.jpg": JPEG, "a.txt": b"a caption", "b.png": PNG, "b.txt": b"another"}


def tar_of(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], kind: str = "pax", **options: str) -> bytes:
    """Return a tar of files, written by Python."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=FORMATS[kind], **options) as tar:
        for name, data in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def look(tar: bytes, folder: Path, caption_extension: str = ".txt") -> list[dict[str, object]]:
    """Return what a look at a tar tells; every picture's bytes are compared with those in it on the way."""
    (folder / "x.tar").write_bytes(tar)
    source = TarSource(str(folder), caption_extension)
    pictures = source.look(source.list_files())
    assert pictures.schema.equals(PICTURES)
    rows = pictures.to_pylist()
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        if row["length"] > 0:
            data = source.read(os.fsdecode(row["file"]), row["start"], row["length"])
            assert data == tar[row["start"] : row["start"] + row["length"]]
        if row["reason"] is None:
            known = header(data)
            assert (row["height"], row["width"]) == known.size_hw
            assert (row["orientation"], row["mode"], row["format"]) == (known.orientation, known.mode, known.format)
        else:
            assert (row["height"], row["width"]) == (0, 0)
    return rows


def usable(rows: Sequence[dict[str, object]]) -> list[str]:
    return [os.fsdecode(row["name"]) for row in rows if row["reason"] is None]


# The format, against tarfile


NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60)
PATHS = st.lists(NAME, min_size=1, max_size=6).map("/".join).filter(lambda path: not path.endswith("/"))


@given(st.dictionaries(PATHS, st.binary(max_size=1500), max_size=8), st.sampled_from(["gnu", "pax"]))
def test_members_are_those_that_tarfile_finds(files: dict[str, bytes], kind: str):
    tar = tar_of(files, kind)
    found = list(members(io.BytesIO(tar)))
    with tarfile.open(fileobj=io.BytesIO(tar)) as known:
        expected = [(info.name.encode(), info.offset_data, info.size) for info in known.getmembers()]
    assert [member[:3] for member in found] == expected
    assert {member.name.decode(): tar[member.start :][: member.length] for member in found} == files


def test_prefixes_of_ustar_and_names_in_any_bytes():
    long = "/".join(["folder" * 5] * 6) + "/x.png"
    assert [m.name for m in members(io.BytesIO(tar_of({long: PNG}, "ustar")))] == [long.encode()]
    for kind in FORMATS:
        for name in (b"\xff\xfe.png", b"a\nb \xf0\x9f\xa6\x8a.png", b"\xff" * 98 + b"/" + b"\xfe" * 90 + b".png"):
            tar = tar_of({os.fsdecode(name): PNG}, kind, encoding="utf-8", errors="surrogateescape")
            assert [m.name for m in members(io.BytesIO(tar))] == [name]


@pytest.mark.parametrize("kind", ["ustar", "v7", "gnu", "oldgnu", "posix"])
def test_members_are_those_of_the_tar_program(tmp_path: Path, kind: str):
    for name in ("a.png", "b/c d.png", "b/🦊\n.png", "x" * 80 + ".png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(PNG + name.encode())
    command = ["tar", "-c", f"--format={kind}", "-f", "out.tar", "-C", "in", "."]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine's tar program does not write this format")
    tar = (tmp_path / "out.tar").read_bytes()
    found = {member.name.decode(): tar[member.start :][: member.length] for member in members(io.BytesIO(tar))}
    assert found == {
        f"./{path.relative_to(tmp_path / 'in')}": path.read_bytes() for path in (tmp_path / "in").rglob("*.png")
    }


def test_sizes_of_more_than_eight_gigabytes():
    """Octal digits end at 8 GiB: GNU tar goes on in binary, pax has its own field. The file itself is not there."""
    size = 9 << 30
    for kind in ("gnu", "pax"):
        info = tarfile.TarInfo("a.png")
        info.size = size
        head = info.tobuf(FORMATS[kind])

        class Large(io.BytesIO):
            def seek(self, at: int, whence: int = 0) -> int:
                return size + (1 << 20) if whence == os.SEEK_END else super().seek(at, whence)

        first = next(members(Large(head)))
        assert first == Member(b"a.png", len(head), size)


def test_links_and_folders():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        kinds = {"a": tarfile.DIRTYPE, "b.png": tarfile.SYMTYPE, "c.png": tarfile.LNKTYPE, "d": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "x" * 200, 7 if name == "c.png" else 0
            tar.addfile(info)
        info = tarfile.TarInfo("e.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    found = list(members(io.BytesIO(sink.getvalue())))
    assert [(m.name, m.problem is None) for m in found] == [(b"b.png", False), (b"c.png", False), (b"e.png", True)]


@pytest.mark.parametrize("order", ["KL", "LK", "L"])
def test_long_names_and_long_targets_in_any_order(order: str):
    tar = b""
    for kind in order:
        info = tarfile.TarInfo("././@LongLink")
        name = (f"long {kind} " * 30).encode() + b".png\0"
        info.type, info.size = kind.encode(), len(name)
        tar += info.tobuf(tarfile.GNU_FORMAT) + name.ljust(512, b"\0")
    tar += tarfile.TarInfo("short.png").tobuf() + tarfile.TarInfo("next.png").tobuf() + bytes(1024)
    assert [m.name for m in members(io.BytesIO(tar))] == [b"long L " * 30 + b".png", b"next.png"]


def test_joined_tars_are_read_to_the_last():
    tar = tar_of({"a.png": PNG}) + tar_of({"b.png": PNG}) + bytes(3 << 20) + tar_of({"c.png": PNG})
    assert [m.name for m in members(io.BytesIO(tar))] == [b"a.png", b"b.png", b"c.png"]


@given(st.data())
def test_any_damage_is_said_and_ends_the_reading(data: st.DataObject):
    """Cut or overwritten: what is found is a prefix of what was there, and a shorter one only with a reason."""
    tar = tar_of(TYPICAL, data.draw(st.sampled_from(list(FORMATS))))
    whole = list(members(io.BytesIO(tar)))
    end = whole[-1].start + whole[-1].length
    if data.draw(st.booleans()):
        damaged = tar[: data.draw(st.integers(0, end - 1))]
    else:
        blocks = [0, *(member.start // 512 - 1 for member in whole)]
        at = data.draw(st.sampled_from(blocks)) * 512 + data.draw(st.integers(0, 99))
        damaged = tar[:at] + bytes([tar[at] ^ data.draw(st.integers(1, 255))]) + tar[at + 1 :]
    found = []
    with pytest.raises(DamagedTar) as caught:
        found += members(io.BytesIO(damaged))
    assert str(caught.value)


def test_a_negative_size_does_not_go_in_circles():
    info = tarfile.TarInfo("a.png")
    head = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    head[124:136] = b"-0000002000\0"
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 256)
    with pytest.raises(DamagedTar):
        list(members(io.BytesIO(bytes(head) + bytes(1024))))


@given(st.binary(max_size=3000))
def test_rubbish_is_no_tar(rubbish: bytes):
    for content in (rubbish, rubbish + tar_of(TYPICAL), tar_of(TYPICAL)[:-1024] + rubbish):
        try:
            for member in members(io.BytesIO(content)):
                assert member.start + member.length <= len(content)
        except DamagedTar:
            pass


# Samples


def test_a_typical_tar(tmp_path: Path):
    rows = look(tar_of(TYPICAL), tmp_path)
    assert [(row["name"], row["captions"], row["format"]) for row in rows] == [
        (b"x.tar/a.jpg", ["a caption"], "JPEG"), (b"x.tar/b.png", ["another"], "PNG"),
    ]  # fmt: skip
    assert all(row["tags"] is None and row["focus"] is None and row["reason"] is None for row in rows)


def test_the_order_of_members_does_not_matter(tmp_path: Path):
    expected = {row["name"]: row["captions"] for row in look(tar_of(TYPICAL), tmp_path)}
    rows = look(tar_of(list(reversed(TYPICAL.items()))), tmp_path)
    assert {row["name"]: row["captions"] for row in rows} == expected


def test_captions_of_text_and_of_json(tmp_path: Path):
    sidecar = json.dumps({"captions": ["one", "two"], "tags": "a, b", "focus": [0, 0, 5, 5], "url": "x"}).encode()
    files = {
        "a.jpg": JPEG, "a.txt": b"text", "a.json": sidecar,
        "b.jpg": JPEG, "b.json": sidecar,
        "c.jpg": JPEG, "c.caption": b"caption",
        "d.jpg": JPEG,
        "e.jpg": JPEG, "e.txt": "\ufeffé\n".encode(),
        "f.jpg": JPEG, "f.txt": b"",
        "g/a.jpg": JPEG, "g/A.txt": b"of another name",
    }  # fmt: skip

    def captions(extension: str) -> dict[str, object]:
        rows = look(tar_of(files), tmp_path, extension)
        return {os.fsdecode(row["name"])[6:-4]: row["captions"] for row in rows if row["captions"] is not None}

    assert captions(".txt") == captions("TXT") == {"a": ["text"], "b": ["one", "two"], "e": ["é"], "f": [""]}
    assert captions(".json") == {"a": ["one", "two"], "b": ["one", "two"]}
    assert captions("caption") == {"a": ["one", "two"], "b": ["one", "two"], "c": ["caption"]}
    row = look(tar_of({"b.jpg": JPEG, "b.json": sidecar}), tmp_path)[0]
    assert (row["tags"], row["focus"]) == (["a", "b"], [0, 0, 5, 5])


def test_a_sample_with_two_pictures(tmp_path: Path):
    rows = look(tar_of({"a.jpg": JPEG, "a.png": PNG, "a.txt": b"both"}), tmp_path)
    assert [(row["name"], row["captions"]) for row in rows] == [(b"x.tar/a.jpg", ["both"]), (b"x.tar/a.png", ["both"])]


def test_other_names_are_not_pictures(tmp_path: Path):
    names = ("._a.jpg", ".a.jpg", "x/._a.jpg", "__MACOSX/a.jpg", "x/__MACOSX/a.jpg", ".hidden/a.jpg", "a.cls", "a.npy")
    rows = look(tar_of([(name, JPEG) for name in names] + [("v1.0/A.JPG", JPEG), ("./b.jpg", JPEG)]), tmp_path)
    assert usable(rows) == ["x.tar/v1.0/A.JPG", "x.tar/b.jpg"]
    assert len(rows) == 2


def test_the_other_fields_of_a_sample_are_not_trained_on(tmp_path: Path):
    rows = look(tar_of({"a.jpg": JPEG, "a.mask.png": PNG, "b.jpg": JPEG, "b.mask.png": PNG, "a.txt": b"a"}), tmp_path)
    assert usable(rows) == ["x.tar/a.jpg", "x.tar/b.jpg"]
    assert "2 pictures such as a.mask.png" in str(rows[-1]["reason"])
    assert rows[-1]["name"] == b"x.tar"


@pytest.mark.parametrize("orientation", SHOWN)
def test_sizes_are_those_of_the_picture_as_shown(tmp_path: Path, orientation: int):
    exif = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes([orientation]) + bytes(6)}
    files = {f"{kind}.{kind}": encoded(NOISE, kind, **exif) for kind in ("JPEG", "PNG", "WEBP")}
    rows = look(tar_of(files), tmp_path)
    known = (104, 72) if orientation > 4 else (72, 104)
    assert {(row["height"], row["width"], row["orientation"]) for row in rows[:1]} == {(*known, orientation)}


def test_names_of_any_bytes(tmp_path: Path):
    names = ("🦊.jpg", "a\nb.jpg", "folder/" + "x" * 200 + ".jpg", os.fsdecode(b"\xff\xfe.jpg"))
    tar = tar_of(dict.fromkeys(names, JPEG), errors="surrogateescape")
    assert usable(look(tar, tmp_path)) == [f"x.tar/{name}" for name in names]


# Damage


def test_pictures_before_the_damage_count(tmp_path: Path):
    files = {f"{i}.jpg": JPEG for i in range(5)}
    tar = tar_of(files)
    third = list(members(io.BytesIO(tar)))[2]
    for damaged, message in (
        (tar[: third.start + 10], "cut off in 2.jpg"),
        (tar[: third.start - 500], "cut off behind 1.jpg"),
        (tar[: third.start - 512], "no end mark: what was behind 1.jpg"),
        (tar[: third.start - 400] + b"!" + tar[third.start - 399 :], "damaged behind 1.jpg"),
    ):
        rows = look(damaged, tmp_path)
        assert usable(rows) == ["x.tar/0.jpg", "x.tar/1.jpg"]
        assert len(rows) == 3
        assert rows[-1]["name"] == b"x.tar"
        assert message in str(rows[-1]["reason"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"hello", "no tar"),
        (JPEG * 3, "no tar"),
        (gzip.compress(tar_of(TYPICAL)), "compressed"),
        (tar_of({}), "no picture in it"),
        (tar_of({"a.txt": b"", "b.txt": b"", "c.npy": b"", "d": b""}), "only 1 x .npy, 1 x no extension"),
    ],
)
def test_files_that_are_no_tars_of_pictures(tmp_path: Path, content: bytes, message: str):
    (row,) = look(content, tmp_path)
    assert row["name"] == b"x.tar"
    assert message in str(row["reason"])


def test_pictures_and_captions_that_cannot_be_used(tmp_path: Path):
    files = [
        ("good.jpg", JPEG), ("empty.jpg", b""), ("text.jpg", b"hello"), ("short.jpg", JPEG[:100]),
        ("twice.jpg", JPEG), ("twice.jpg", PNG), ("./twice.jpg", PNG),
        ("latin.jpg", JPEG), ("latin.txt", b"\xe9t\xe9"),
        ("captions.jpg", JPEG), ("captions.txt", b"a"), ("captions.txt", b"a"),
        ("json.jpg", JPEG), ("json.json", b"{"),
        ("text-wins.jpg", JPEG), ("text-wins.txt", b"a"), ("text-wins.json", b"{"),
        ("long.jpg", JPEG), ("long.txt", b"x" * ((1 << 20) + 1)),
    ]  # fmt: skip
    rows = look(tar_of(files), tmp_path)
    assert usable(rows) == ["x.tar/good.jpg", "x.tar/text-wins.jpg"]
    said = {os.fsdecode(row["name"])[6:-4]: str(row["reason"]) for row in rows}
    assert said["empty"] == "the file is empty"
    assert "not a JPEG" in said["text"]
    assert "damaged" in said["short"]
    assert "more than once" in said["twice"]
    assert "latin.txt is not UTF-8" in said["latin"]
    assert "more than one caption" in said["captions"]
    assert "json.json is not JSON" in said["json"]
    assert "long.txt has 1048577 bytes" in said["long"]


# Places


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_a_remote_tar_is_like_a_local_one_and_read_once(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
):
    tar = tar_of([(f"{i}.{kind}", data) for i in range(200) for kind, data in (("webp", WEBP), ("txt", b"a"))])
    memory.pipe("/set/b/x.tar", tar)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x.tar").write_bytes(tar)
    here, there = TarSource(str(tmp_path)), TarSource("memory://set")
    fetched: list[int] = []
    read_range = remote.read_range

    def counting(address: str, start: int, length: int) -> bytes:
        fetched.append(length)
        return read_range(address, start, length)

    monkeypatch.setattr(remote, "read_range", counting)
    monkeypatch.setattr(remote.open_seekable, "__defaults__", (1 << 16,))
    pictures = there.look(there.list_files())
    assert pictures.equals(here.look(here.list_files()))
    assert pictures.num_rows == 200
    assert sum(fetched) < 1.5 * len(tar)
    assert len(fetched) < 2 * len(tar) / (1 << 16)
    row = pictures.slice(150, 1).to_pylist()[0]
    assert there.read("b/x.tar", row["start"], row["length"]) == WEBP
    assert there.path("b/x.tar/150.webp") == "memory://set/b/x.tar/150.webp"
    assert here.path("b/x.tar") == f"{tmp_path}/b/x.tar"


def test_shards_of_a_pattern(tmp_path: Path):
    for i in range(4):
        (tmp_path / f"s-{i:03}.tar").write_bytes(tar_of({f"{i}.png": PNG}))
    source = TarSource(f"{tmp_path}/s-{{000..002}}.tar")
    files = source.list_files()
    assert files.schema.equals(FILES)
    assert files.column("file").to_pylist() == [b"s-000.tar", b"s-001.tar", b"s-002.tar"]
    assert set(files.column("caption_bytes").to_pylist()) == {-1}
    assert source.look(files).column("name").to_pylist() == [f"s-00{i}.tar/{i}.png".encode() for i in range(3)]
    assert source.look(files.slice(0, 0)).equals(PICTURES.empty_table())
    assert source.look(files.slice(1, 1)).column("name").to_pylist() == [b"s-001.tar/1.png"]


def test_compressed_tars_are_refused_by_name(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(TYPICAL)))
    for address in (tmp_path, tmp_path / "a.tar.gz"):
        with pytest.raises(UserError, match=r"a\.tar\.gz: it is compressed.*unpack"):
            TarSource(str(address)).list_files()
    rows = look(tar_of(TYPICAL), tmp_path)
    assert [row["name"] for row in rows if row["reason"]] == [b"a.tar.gz"]
    assert len(rows) == 3


def test_only_what_can_be_read_is_asked_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"^nothing is there\. Names must end in \.tar\.$"):
        TarSource(str(tmp_path)).list_files()


def test_what_a_disk_does_not_give_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.tar").write_bytes(tar_of(TYPICAL))
    source = TarSource(str(tmp_path))
    files = source.list_files()
    monkeypatch.setattr(remote, "RETRY_SECONDS", ())

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 600:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(tars, "open_seekable", lambda address: Failing((tmp_path / "a.tar").read_bytes()))
    (row,) = source.look(files).to_pylist()
    assert (row["name"], row["length"]) == (b"a.tar", -1)
    assert row["reason"] == "the file cannot be read: Input/output error"
    monkeypatch.undo()
    (tmp_path / "a.tar").unlink()
    (row,) = source.look(files).to_pylist()
    assert row["length"] == -1
    with pytest.raises(UnreadablePicture, match=r"a\.tar: the file cannot be read: No such file") as caught:
        source.read("a.tar", 0, 5)
    assert caught.value.path == f"{tmp_path}/a.tar"


def test_a_tar_that_became_shorter_is_noticed(tmp_path: Path):
    row = look(tar_of(TYPICAL), tmp_path)[0]
    (tmp_path / "x.tar").write_bytes(tar_of(TYPICAL)[:800])
    with pytest.raises(UnreadablePicture, match="has changed"):
        TarSource(str(tmp_path)).read("x.tar", int(str(row["start"])), int(str(row["length"])))


def test_identities_differ_where_a_look_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = [TarSource("/a"), TarSource("/b"), TarSource("/a", ".json"), TarSource("/a/*.tar"), TarSource("s3://a"),
               TarSource("s3://b"), TarSource("c")]  # fmt: skip
    identities = {source.identity for source in sources}
    monkeypatch.chdir(tmp_path)
    assert len({*identities, TarSource("c").identity}) == len(sources) + 1
    assert TarSource("/a", "txt").identity == TarSource("/a", ".txt").identity
    assert "secret" not in TarSource("s3://me:secret@bucket/a").identity
    assert "secret" not in TarSource("s3://me:secret@bucket/a").path("x.tar")


def test_a_source_travels(tmp_path: Path, memory: fsspec.AbstractFileSystem):
    memory.pipe("/set/x.tar", tar_of(TYPICAL))
    source = TarSource("memory://set")
    expected: pa.Table = source.look(source.list_files())
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            there = pickle.loads(pickle.dumps(source))
            found = there.look(there.list_files())
            row = found.to_pylist()[0]
            with os.fdopen(theirs, "wb") as pipe:
                pickle.dump((there == source, found, there.read("x.tar", row["start"], row["length"])), pipe)
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        same, found, data = pickle.load(pipe)
    os.waitpid(child, 0)
    assert same
    assert found.equals(expected)
    assert data == JPEG
