"""Folders as sources: the listing against a plain recursion, what a look tells, and what is said where nothing is."""

from __future__ import annotations

import errno
import os
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data import walk as walking
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.walk import EXTENSIONS, walk
from sdxl_training.records import UserError

Stamp = tuple[int, int]


def plain_walk(root: bytes, ending: bytes) -> list[tuple[bytes, int, int, int, int]]:
    """The oracle: every picture under a folder, each folder once; in sorting, the name of a folder has its slash."""
    found: list[tuple[bytes, int, int, int, int]] = []
    seen: set[tuple[int, int]] = set()

    def stamp(path: bytes) -> Stamp:
        return (os.stat(path).st_size, os.stat(path).st_mtime_ns) if os.path.isfile(path) else (-1, -1)  # noqa: PTH113, PTH116

    def enter(folder: bytes, prefix: bytes) -> None:
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        visible = [name for name in os.listdir(folder) if not name.startswith(b".") and name != b"__MACOSX"]  # noqa: PTH208
        folders = {name + b"/" for name in visible if os.path.isdir(folder + b"/" + name)}  # noqa: PTH112
        for name in sorted(folders | {name for name in visible if os.path.isfile(folder + b"/" + name)}):  # noqa: PTH113
            if name in folders:
                enter(folder + b"/" + name[:-1], prefix + name)
            elif os.fsdecode(os.path.splitext(name)[1]).lower() in EXTENSIONS:  # noqa: PTH122
                path = folder + b"/" + name
                found.append((prefix + name, *stamp(path), *stamp(os.path.splitext(path)[0] + ending)))  # noqa: PTH122

    enter(root, b"")
    return found


def rows_of(table: object) -> list[tuple[bytes, int, int, int, int]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))  # type: ignore[attr-defined]


NAMES = [
    b"a.jpg", b"a.JPG", b"a.txt", b"a.png", b"b.txt", b"a.b.webp", b"a.b.txt", b"z\n.png", "é🦊.jpeg".encode(),
    b"\xff\xfe.jpg", b"\xff\xfe.txt", b".hidden.jpg", b"._a.jpg", b"none", b"a.", b"jpg", b"a.npz", b"a.txt.jpg",
    b"-.jpg", b"0.jxl",
]  # fmt: skip
FOLDERS = [b"a", b"a.b", b"a-", b"__MACOSX", b".git", b"b", b"\xff", b"a.jpg.d"]
ENTRY = st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(NAMES), st.integers(0, 9))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(ENTRY, max_size=25),
    links=st.lists(
        st.tuples(
            st.lists(st.sampled_from(FOLDERS), max_size=2),
            st.sampled_from([b"link", b"0", b"a.jpg", b"~"]),
            st.lists(st.sampled_from(FOLDERS), max_size=2),
        ),
        max_size=4,
    ),
)
def test_the_listing_is_that_of_a_plain_recursion(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[list[bytes], bytes, int]],
    links: list[tuple[list[bytes], bytes, list[bytes]]],
) -> None:
    root = os.fsencode(tmp_path_factory.mktemp("set"))
    for folders, name, size in entries:
        path = b"/".join([root, *folders])
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        with open(path + b"/" + name, "wb") as file:  # noqa: PTH123
            file.write(bytes(size))
    for folders, name, target in links:
        path = b"/".join([root, *folders])
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        if not os.path.lexists(path + b"/" + name):
            os.symlink(b"/".join([root, *target]), path + b"/" + name)  # noqa: PTH211
    files, others = walk(os.fsdecode(root), ".txt", 1)
    assert files.schema == FILES
    assert rows_of(files) == plain_walk(root, b".txt")
    assert b".jpg" not in others


@pytest.mark.parametrize("crowd", [1, 2, 1000])
@pytest.mark.parametrize("processes", [1, 3])
def test_processes_list_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, crowd: int) -> None:
    monkeypatch.setattr(walking, "PATIENCE", 0.0)
    monkeypatch.setattr(walking, "CROWD", crowd)
    monkeypatch.setattr(walking, "SLICE", 7)
    for number in range(40):
        folder = tmp_path / f"{number % 4}" / f"{number}" / "deep"
        folder.mkdir(parents=True)
        for name in ("a.jpg", "b.png", "b.txt", "c.npz"):
            (folder / name).write_text(name * number)
            (folder.parent / name).write_text(name)
    (tmp_path / "0" / "loop").symlink_to(tmp_path)
    files, others = walk(str(tmp_path), "txt", processes)
    assert rows_of(files) == plain_walk(os.fsencode(tmp_path), b".txt")
    assert files.num_rows == 160
    assert others == {b".txt": 80, b".npz": 80}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_single_crowded_folder_is_listed_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(walking, "PATIENCE", 0.0)
    monkeypatch.setattr(walking, "CROWD", 3)
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(bytes(number))
        if number % 3:
            (tmp_path / f"{number}.txt").write_bytes(bytes(100 + number))
    assert rows_of(walk(str(tmp_path), ".txt", processes)[0]) == plain_walk(os.fsencode(tmp_path), b".txt")


@pytest.mark.parametrize("crowd", [1, 1000])
def test_what_vanishes_while_it_is_listed_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crowd: int
) -> None:
    for name in ("a.jpg", "a.txt", "b.jpg", "b.txt", "d/c.jpg", "d/c.txt", "e.jpg"):
        picture(tmp_path / name) if name.endswith("jpg") else (tmp_path / name).write_text(name)
    names_in = walking._names_in

    def delete_then(path: bytes, *arguments: object) -> object:
        found = names_in(path, *arguments)  # type: ignore[arg-type]
        for name in ("a.jpg", "b.txt", "d/c.jpg"):
            (tmp_path / name).unlink(missing_ok=True)
        return found

    (tmp_path / "d/z.jpg").touch()
    expected = [row for row in plain_walk(os.fsencode(tmp_path), b".txt") if row[0] not in (b"a.jpg", b"d/c.jpg")]
    monkeypatch.setattr(walking, "CROWD", crowd)
    monkeypatch.setattr(walking, "_names_in", delete_then)
    found = rows_of(walk(str(tmp_path), ".txt", 1)[0])
    assert [row[0] for row in found] == [b"b.jpg", b"d/z.jpg", b"e.jpg"]
    assert found == [(*row[:3], -1, -1) if row[0] == b"b.jpg" else row for row in expected]


def test_a_linked_folder_counts_once_under_its_first_name(tmp_path: Path) -> None:
    (tmp_path / "set/m").mkdir(parents=True)
    (tmp_path / "set/m/a.jpg").touch()
    for name in ("a", "z"):
        (tmp_path / "set" / name).symlink_to("m")
    assert walk(str(tmp_path / "set"), None, 1)[0]["file"].to_pylist() == [b"a/a.jpg"]


def picture(path: Path, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_a_look_tells_header_and_caption(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c/d.webp", "e.png"):
        picture(tmp_path / name)
    picture(tmp_path / "no.png", (1, 1))
    Image.new("CMYK", (3, 5)).save(tmp_path / "e.jpg")
    (tmp_path / "a.txt").write_text("one, two \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" + "é".encode("utf-16-le"))
    (tmp_path / "c/d.txt").touch()
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    (tmp_path / "no.json").write_text('"not asked for"')
    (tmp_path / "no.png").write_bytes(b"nothing")
    source = pickle.loads(pickle.dumps(FolderSource(str(tmp_path))))
    files = source.list_files()
    found = source.look(files)
    assert found.schema == PICTURES
    rows = {row.pop("name"): row for row in found.to_pylist()}
    size = (tmp_path / "a.png").stat().st_size
    assert rows[b"a.png"] == {
        "file": b"a.png", "start": 0, "length": size, "height": 4, "width": 6, "orientation": 1, "mode": "RGB",
        "format": "PNG", "captions": ["one, two"], "tags": None, "focus": None, "reason": None,
    }  # fmt: skip
    assert rows[b"b.jpg"]["captions"] == ["é"]
    assert rows[b"c/d.webp"]["captions"] == [""]
    for name in (b"e.jpg", b"e.png"):
        assert rows[name]["reason"] == "its caption e.txt is not UTF-8 text (byte 3); save it as UTF-8"
        assert (rows[name]["height"], rows[name]["width"], rows[name]["captions"]) == (0, 0, None)
    assert "not a JPEG" in rows[b"no.png"]["reason"]
    assert source.look(files.slice(0, 0)).schema == PICTURES


def test_the_extension_decides_which_captions_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"captions": ["x", "y"], "tags": "t, u", "focus": [0, 0, 1, 0.5]}')
    (tmp_path / "a.caption").write_text("z")
    (row,) = FolderSource(str(tmp_path), "json").look(FolderSource(str(tmp_path), "json").list_files()).to_pylist()
    assert (row["captions"], row["tags"], row["focus"]) == (["x", "y"], ["t", "u"], [0.0, 0.0, 1.0, 0.5])
    (row,) = (
        FolderSource(str(tmp_path), ".caption").look(FolderSource(str(tmp_path), ".caption").list_files()).to_pylist()
    )
    assert row["captions"] == ["z"]
    files = FolderSource(str(tmp_path)).list_files()
    assert files["caption_bytes"].to_pylist() == [-1]
    assert FolderSource(str(tmp_path)).look(files)["captions"].to_pylist() == [None]


def test_what_vanished_after_the_listing_is_a_reason(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").touch()
    source = FolderSource(str(tmp_path))
    files = source.list_files()
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.txt").unlink()
    assert source.look(files)["reason"].to_pylist() == [
        "the file cannot be read: No such file or directory",
        "its caption b.txt cannot be read: No such file or directory",
    ]


def test_a_caption_that_changed_after_the_listing_is_read_whole(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("short")
    source = FolderSource(str(tmp_path))
    files = source.list_files()
    for text in ("much longer than before", "x"):
        (tmp_path / "a.txt").write_text(text)
        assert source.look(files)["captions"].to_pylist() == [[text]]


def test_bytes_come_whole_or_not_at_all(tmp_path: Path) -> None:
    picture(tmp_path / "sub/a.png")
    source = FolderSource(str(tmp_path))
    (row,) = source.look(source.list_files()).to_pylist()
    data = (tmp_path / "sub/a.png").read_bytes()
    assert source.read(os.fsdecode(row["file"]), row["start"], row["length"]) == data
    assert source.path("sub/a.png") == str(tmp_path / "sub/a.png")
    (tmp_path / "sub/a.png").write_bytes(data + b"x")
    with pytest.raises(UnreadablePicture, match="bytes now and had"):
        source.read("sub/a.png", 0, len(data))
    (tmp_path / "sub/a.png").unlink()
    with pytest.raises(UnreadablePicture, match="No such file"):
        source.read("sub/a.png", 0, len(data))


def test_folders_that_cannot_serve_say_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no such folder\. Give the folder that holds the pictures\.$"):
        FolderSource(str(tmp_path / "none")).list_files()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="this is a file, not a folder"):
        FolderSource(str(tmp_path / "file")).list_files()
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"^the folder is empty\. Pictures end in \.avif, "):
        FolderSource(str(tmp_path / "set")).list_files()
    for name in ("a.txt", "b.TXT", "c.npz", "d"):
        (tmp_path / "set" / name).touch()
    with pytest.raises(UserError, match=r"^no picture in it, only 2 x \.txt, 1 x (\.npz|no extension)") as caught:
        FolderSource(str(tmp_path / "set")).list_files()
    assert "type:" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("a.parquet", "parquet"), ("b.ARROW", "parquet"), ("c.tar", "tar")])
def test_pictures_inside_of_files_are_advised_on(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).touch()
    told = f"only 1 x {Path(name).suffix.lower()}. For the pictures inside them set data.sources[].type: {kind}. Pict"
    with pytest.raises(UserError, match=re.escape(told)):
        FolderSource(str(tmp_path)).list_files()


@pytest.mark.parametrize("processes", [1, 3])
def test_links_that_lead_nowhere_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, processes: int
) -> None:
    monkeypatch.setattr(walking, "PATIENCE", 0.0)
    picture(tmp_path / "a.png")
    picture(tmp_path / "far/b.png")
    (tmp_path / "good.png").symlink_to("a.png")
    assert walk(str(tmp_path), None, processes)[0].num_rows == 3
    assert not caplog.records
    for name in ("c.png", "far/d.png"):
        (tmp_path / name).symlink_to(tmp_path / "moved away")
    assert walk(str(tmp_path), None, processes)[0].num_rows == 3
    told = f"2 symbolic links lead nowhere and are passed over; the first: {tmp_path}/c.png"
    assert [record.getMessage() for record in caplog.records] == [told]
    caplog.clear()
    (tmp_path / "far/e.png").symlink_to("e.png")
    assert walk(str(tmp_path), None, processes)[0].num_rows == 3
    assert [record.getMessage() for record in caplog.records] == [told.replace("2 symbolic", "3 symbolic")]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.endswith(b"/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walking, "PATIENCE", 0.0)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path / 'b'} cannot be listed .Permission denied.. Make it readable."):
        FolderSource(str(tmp_path), processes=processes).list_files()


def test_a_file_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").touch()
    stat = os.stat

    def refuse(path: bytes, **options: int) -> os.stat_result:
        if path == b"a.jpg":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(
        UserError, match=f"^{tmp_path / 'a.jpg'} cannot be listed .Permission denied.. Make it readable."
    ):
        walk(str(tmp_path), ".txt", 1)


def test_identity_is_place_and_caption_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = FolderSource("set")
    assert source.identity == FolderSource(str(tmp_path / "set"), "txt", processes=7).identity
    assert len({source.identity, FolderSource("set", ".json").identity, FolderSource("sets").identity}) == 3
