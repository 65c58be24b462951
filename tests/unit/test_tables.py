"""Tables that name pictures: what they say arrives, whatever the format; what is wrong is named with its row.

Most of it is the same where the pictures are on a disk and where they are at an address.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.assemble.sources import open_pictures
from sdxl_training.config import load_config
from sdxl_training.data import remote, table_files
from sdxl_training.data.folders import FolderSource
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.picture_index import update_index
from sdxl_training.data.remote_folders import AddressSource
from sdxl_training.data.tables import TableSource
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress

Row = dict[str, object]
Open = Callable[..., TableSource]
LONG_AGO = 1_600_000_000


def pictures(folder: Path, *names: str, size: tuple[int, int] = (6, 4)) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
        os.utime(folder / name, (LONG_AGO, LONG_AGO))


def address_of(path: Path) -> str:
    return f"memory:/{path}"


def upload(folder: Path) -> None:
    """Put what is in a folder, and nothing else, at its address, as old as it is."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(address_of(path), path.read_bytes())
            memory.store[str(path)].created = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)


def open_on_disk(folder: Path, table: str, **settings: object) -> TableSource:
    return TableSource(FolderSource(str(folder), processes=1), table, **settings)  # type: ignore[arg-type]


@pytest.fixture(params=["disk", "address"])
def open_table(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a folder that is inside of tmp_path and has a table, or the address that has the same."""
    if request.param == "disk":
        return open_on_disk

    def open_at_address(folder: Path, table: str, **settings: object) -> TableSource:
        upload(tmp_path)
        return TableSource(AddressSource(address_of(folder)), table, **settings)  # type: ignore[arg-type]

    return open_at_address


@pytest.fixture
def source_of(open_table: Open) -> Open:
    """Writes rows into a table of a folder, and opens it."""

    def source_of(folder: Path, rows: list[Row], name: str = "metadata.jsonl", **settings: object) -> TableSource:
        return open_table(folder, write(folder / name, rows), **settings)

    return source_of


def write(path: Path, rows: list[Row]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path.name


def seen(source: TableSource) -> dict[str, tuple[object, object, object]]:
    """Captions, tags and reason by name."""
    files = source.list_files()
    assert files.schema == FILES
    assert files["file"].to_pylist() == sorted(files["file"].to_pylist())
    found = source.look(files)
    assert found.schema == PICTURES
    assert found["file"].equals(files["file"])
    return {os.fsdecode(row["name"]): (row["captions"], row["tags"], row["reason"]) for row in found.to_pylist()}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.tsv", "a.parquet", "a.PARQUET"])
def test_each_format_says_the_same(tmp_path: Path, open_table: Open, name: str) -> None:
    pictures(tmp_path, "b.png", "sub/a.jpg")
    rows: list[Row] = [
        {"file_name": "sub/a.jpg", "text": 'a "car",\nred', "tags": "red, car"},
        {"file_name": "b.png", "text": " é ", "tags": ""},
    ]
    if name.endswith("PARQUET"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, rows)
    source = open_table(tmp_path, name)
    assert seen(source) == {"b.png": (["é"], None, None), "sub/a.jpg": (['a "car",\nred'], ["red", "car"], None)}
    assert source.look(source.list_files())["height"].to_pylist() == [4, 4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_are_alternatives_and_columns_too(tmp_path: Path, source_of: Open, name: str) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    rows: list[Row] = [
        {"image": "a.png", "short": ["one", "two"], "long": "three", "tags": ["x", " y ", ""]},
        {"image": "b.png", "short": [], "long": "four", "tags": None},
        {"image": "c.png", "short": None, "long": None, "tags": None},
    ]
    source = source_of(tmp_path, rows, name, caption_columns=("short", "long"))
    assert seen(source) == {
        "a.png": (["one", "two", "three"], ["x", "y"], None),
        "b.png": (["four"], None, None),
        "c.png": (None, None, None),
    }
    assert source.list_files()["caption_bytes"].to_pylist()[2] == -1


def test_rows_of_both_kinds_are_read_line_by_line_to_the_same_digests(tmp_path: Path, source_of: Open) -> None:
    pictures(tmp_path, "a.png", "b.png")
    plain = source_of(tmp_path, [{"path": "a.png", "caption": "one"}, {"path": "b.png", "caption": "two"}])
    before = plain.list_files()
    mixed = source_of(tmp_path, [{"path": "a.png", "caption": "one"}, {"path": "b.png", "caption": ["two", "three"]}])
    after = mixed.list_files()
    assert seen(mixed)["b.png"][0] == ["two", "three"]
    assert after.slice(0, 1).equals(before.slice(0, 1))
    assert after["caption_mtime_ns"][1] != before["caption_mtime_ns"][1]


def test_one_row_changes_one_stamp_and_no_stamp_is_a_time_of_these_days(tmp_path: Path, source_of: Open) -> None:
    names = [f"{i}.png" for i in range(9)]
    pictures(tmp_path, *names)
    rows: list[Row] = [{"file_name": name, "text": f"caption {name}"} for name in names]
    before = source_of(tmp_path, rows).list_files()
    rows[4]["text"] = "caption 5.png"  # as long
    rows.reverse()  # the order of the rows is nothing
    after = source_of(tmp_path, rows).list_files()
    assert [i for i in range(9) if not before.slice(i, 1).equals(after.slice(i, 1))] == [4]
    assert max(after["caption_mtime_ns"].to_pylist()) < -2


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(CELL | st.none() | st.lists(CELL, max_size=3), min_size=1, max_size=5))
def test_json_lines_arrive_whichever_way_they_are_read(tmp_path: Path, captions: list[object]) -> None:
    """Texts alone are read by Arrow, others line by line; the oracle is the rows themselves."""
    rows: list[Row] = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    source = open_on_disk(tmp_path, write(tmp_path / "metadata.jsonl", rows))
    found = seen(source)
    for i, caption in enumerate(captions):
        texts = [caption] if isinstance(caption, str) else caption or []
        # Without a picture there is a reason and no caption: the stamps and reasons are what is compared then.
        assert found[f"{i}.png"][2] is not None
        assert source._rows().find([f"{i}.png".encode()])[0].captions == tuple(text.strip() for text in texts)


def test_pictures_that_are_not_there_or_outside_have_reasons(tmp_path: Path, source_of: Open) -> None:
    pictures(tmp_path, "set/a.png", "set/.hidden.png", "outside.png")
    (tmp_path / "set/odd").write_bytes((tmp_path / "outside.png").read_bytes())
    (tmp_path / "set/bad.jpg").write_bytes(b"nothing")
    rows: list[Row] = [
        {"file_name": name}
        for name in ("./a.png", "gone.png", ".hidden.png", "odd", "bad.jpg", "../outside.png", "x/../b.png")
    ]
    rows.append({"file_name": str(tmp_path / "outside2.png")})
    found = seen(source_of(tmp_path / "set", rows))
    assert {name for name, (_, _, reason) in found.items() if reason is None} == {"a.png", ".hidden.png", "odd"}
    assert "No such file" in str(found["gone.png"][2])
    assert "not a JPEG" in str(found["bad.jpg"][2])
    assert "not inside" in str(found["../outside.png"][2])
    assert "not inside" in str(next(found[name] for name in found if name.endswith("outside2.png"))[2])
    assert "b.png" in found


def test_pictures_that_the_table_does_not_name_are_counted(
    tmp_path: Path, source_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    with caplog.at_level(logging.WARNING):
        assert list(seen(source_of(tmp_path, [{"file_name": "b.png", "text": "x"}]))) == ["b.png"]
    assert "does not name 2 pictures of its folder, such as a.png" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"file_name": "a.png"}\n\n{"file_name": \n', "line 3 is not JSON"),
        ("a.jsonl", b'{"file_name": "a.png"}\n' * 1001 + b'{"file_name"\n', "line 1002 is not JSON"),
        ("a.jsonl", b'{"file_name": "a.png", "text": "\xe9"}\n', r"line 1 is not UTF-8 text \(byte"),
        (
            "a.jsonl",
            b"".join(b'{"file_name": "%d.png", "text": "a"}\n' % i for i in range(1001))
            + b'{"file_name": "b.png", "text": "\xe9"}\n',
            "line 1002 is not UTF-8 text",
        ),
        ("a.jsonl", b'{"file_name": "a.png", "text": 5}\n', "line 1: text must be a text or a list of texts"),
        ("a.jsonl", b'{"file_name": 5}\n', "line 1: file_name must be a text"),
        ("a.jsonl", b'["a.png"]\n', "line 1 is not an object but list"),
        ("a.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}\n', "half a character"),
        ("a.jsonl", b'{"file_name": "a.png"}\n{"text": "b"}\n', "row 2 names no picture"),
        ("a.jsonl", b"", "no column file_name"),
        ("a.csv", b"file_name,text\na.png,x\nb.png\n", "#3: Expected 2 columns, got 1"),
        ("a.csv", b"file_name,text\na.png,\xe9\n", "UTF-?8"),
        ("a.csv", "file_name,text\na.png,x\n".encode("utf-16"), "not UTF-8 text"),
        ("a.csv", b"file_name,text\n", "has no rows"),
        ("a.csv", b"name,text\na.png,x\n", "no column file_name or path or image or filename, only name, text"),
        ("a.csv", b"path,image,text\na,b,c\n", "path, image, each of which may hold .*sources...columns.image"),
        ("a.csv", b"file_name,path,text,caption\na,b,c,d\n", "text, caption, each .*sources...columns.captions"),
        ("a.csv", b"file_name,text\na.png,x\nb.png,y\n./a.png,z\n", "rows 1 and 3 both name a.png"),
        ("a.parquet", b"PAR1 not", "cannot be read"),
        ("a.xlsx", b"", "ends in .xlsx; tables end in .jsonl, .csv, .tsv, .parquet"),
        ("gone.csv", None, "no such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_row(
    tmp_path: Path, open_table: Open, name: str, content: bytes | None, message: str
) -> None:
    pictures(tmp_path, "a.png")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = open_table(tmp_path, name)
    with pytest.raises(UserError, match=f"^{re.escape(source.path(name))}: .*{message}"):
        source.list_files()


def test_columns_of_other_types_and_names_are_refused(tmp_path: Path, source_of: Open) -> None:
    pictures(tmp_path, "a.png")
    source = source_of(tmp_path, [{"image": {"bytes": b"x"}, "text": "a"}], "a.parquet")
    with pytest.raises(UserError, match="image holds no texts but struct"):
        source.list_files()
    source = source_of(tmp_path, [{"image": "a.png", "text": 5}], "a.parquet")
    with pytest.raises(UserError, match="text holds no texts or lists of texts but int64"):
        source.list_files()
    source = source_of(tmp_path, [{"image": "a.png"}], "a.csv", caption_columns=("long",))
    with pytest.raises(UserError, match="no column long, only image"):
        source.list_files()


def test_folders_that_are_not_there_are_named(tmp_path: Path, open_table: Open) -> None:
    with pytest.raises(UserError, match=r"no such folder|cannot be found: memory://.*/none"):
        open_table(tmp_path / "none", "a.csv").list_files()
    pictures(tmp_path, "a.csv/a.png")
    with pytest.raises(UserError, match=r"a\.csv: this is a folder"):
        open_table(tmp_path, "a.csv").list_files()


def test_csv_cells_without_quotes_are_none_and_quoted_ones_empty_captions(tmp_path: Path, open_table: Open) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbffile_name,text\na.png,\nb.png,""\n')
    assert seen(open_table(tmp_path, "a.csv")) == {"a.png": (None, None, None), "b.png": ([""], None, None)}


def test_identity_tells_folder_table_and_columns_apart(tmp_path: Path) -> None:
    here, there = FolderSource(str(tmp_path)), AddressSource("s3://bucket/set")
    sources = [
        TableSource(here, "a.csv"),
        TableSource(here, "b.csv"),
        TableSource(FolderSource(str(tmp_path / "x")), "a.csv"),
        TableSource(here, "a.csv", "path"),
        TableSource(here, "a.csv", None, ("text",)),
        TableSource(here, "a.csv", None, (), "text"),
        TableSource(there, "a.csv"),
        TableSource(there, str(tmp_path / "a.csv")),
        TableSource(there, "s3://other/a.csv"),
        TableSource(here, "s3://bucket/set/a.csv"),
    ]
    assert len({source.identity for source in sources}) == len(sources)
    assert TableSource(FolderSource(f"{tmp_path}/", ".json", processes=3), "./a.csv").identity == sources[0].identity
    assert TableSource(AddressSource("s3://bucket/set/", ".json"), "./a.csv").identity == sources[6].identity


def test_credentials_stay_out_of_what_is_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    source = TableSource(AddressSource("s3://user:secret@bucket/set"), "s3://key:secret@other/a.csv")
    assert "secret" not in source.identity + source.path("a.png")
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pipe({"/user:secret@set/a.png": b"", "/key:secret@other/a.csv": b"no table"})
    with pytest.raises(UserError, match=r"^memory://other/a\.csv: it has no column") as caught:
        TableSource(AddressSource("memory://user:secret@set"), "memory://key:secret@other/a.csv").list_files()
    assert "secret" not in f"{caught.value}{caught.value.__cause__}{caught.value.__context__}"
    fsspec.filesystem("memory").pipe("/key:secret@other/a.csv", b"path\n../b.png\n")
    found = seen(TableSource(AddressSource("memory://user:secret@set"), "memory://key:secret@other/a.csv"))
    assert "not inside memory://set" in str(found["../b.png"][2])
    assert "memory://other/a.csv does not name 1 pictures of its folder, such as a.png" in caplog.text
    assert "secret" not in f"{found}{caplog.text}"


def test_bytes_and_paths(tmp_path: Path, source_of: Open) -> None:
    pictures(tmp_path, "a.png")
    source = source_of(tmp_path, [{"file_name": "a.png"}])
    data = (tmp_path / "a.png").read_bytes()
    assert source.read("a.png", 0, len(data)) == data
    assert source.path("a.png") in (str(tmp_path / "a.png"), address_of(tmp_path / "a.png"))


def test_only_pictures_whose_rows_change_are_looked_at_again(
    tmp_path: Path, source_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.png" for i in range(5)]
    pictures(tmp_path / "set", *names)
    rows: list[Row] = [{"file_name": name, "text": "old"} for name in names]
    looked: list[list[bytes]] = []
    look = TableSource.look
    monkeypatch.setattr(
        TableSource, "look", lambda self, files: looked.append(files["file"].to_pylist()) or look(self, files)
    )

    def captions() -> list[object]:
        index = update_index(tmp_path / "index", source_of(tmp_path / "set", rows), SilentProgress(), processes=1)
        found: list[object] = index["captions"].to_pylist()
        return found

    assert captions() == captions() == [["old"]] * 5
    rows[3]["text"] = "new"
    assert captions() == [["old"]] * 3 + [["new"], ["old"]]
    assert looked == [[name.encode() for name in names], [b"3.png"]]


# At addresses only


def test_a_table_is_fetched_once_a_start_and_again_where_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[Row]] = []
    fetched: list[str] = []

    def fetch(address: str, start: int, length: int) -> bytes:
        fetched.append(address)
        assert len(fetched) <= len(written)  # in a forked process, too
        return remote.read_range(address, start, length)

    monkeypatch.setattr(table_files, "read_range", fetch)
    pictures(tmp_path, "a.png")
    for text in (["one", "two"], "three"):
        written.append([{"path": "a.png", "text": text}])
        write(tmp_path / "a.jsonl", written[-1])
        upload(tmp_path)
        source = TableSource(AddressSource(address_of(tmp_path)), "a.jsonl")
        files = source.list_files()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            there = pool.apply_async(source.look, (files,)).get(timeout=60)
        assert there.equals(source.look(files))
        assert there["reason"].to_pylist() == [None]
    assert fetched == [address_of(tmp_path / "a.jsonl")] * 2


def test_table_and_pictures_may_lie_apart(tmp_path: Path) -> None:
    pictures(tmp_path / "set", "a.png")
    rows: list[Row] = [{"file_name": "a.png", "text": "x"}]
    write(tmp_path / "a.csv", rows)
    upload(tmp_path)
    for folder in (FolderSource(str(tmp_path / "set"), processes=1), AddressSource(address_of(tmp_path / "set"))):
        for table in (f"{tmp_path}/a.csv", address_of(tmp_path / "a.csv"), f"file://{tmp_path}/a.csv"):
            assert seen(TableSource(folder, table)) == {"a.png": (["x"], None, None)}


def test_names_may_be_addresses_inside_of_the_folder_alone(tmp_path: Path) -> None:
    pictures(tmp_path, "set/a.png", "set/b/c.png", "outside.png")
    address = address_of(tmp_path)
    names = [f"{address}/set/a.png", "./b//c.png", f"{address}/outside.png", f"x::file://{tmp_path}/outside.png"]
    names += [str(tmp_path / "set/a.png"), "s3://bucket/a.png", "z\0.png", "..", "."]
    write(tmp_path / "set/a.jsonl", [{"file_name": name} for name in names])
    upload(tmp_path)
    found = seen(TableSource(AddressSource(f"{address}/set"), "a.jsonl"))
    assert len(found) == len(names)
    assert {name for name, (_, _, reason) in found.items() if reason is None} == {"a.png", "b/c.png"}
    refused = {name for name, (_, _, reason) in found.items() if "not inside" in str(reason)}
    assert {"../outside.png", "..", "z\0.png"} < refused
    assert len(refused) == 5
    assert 'names with "::" are not read' in str(next(found[name] for name in found if "::" in name)[2])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("https://host/a.csv?token=secret", r"^https://host/a\.csv: a web address with a query"),
        ("zip://a::s3://b/c.csv", "chained"),
        ("nowhere://a/b.csv", r"^nowhere://a/b\.csv: the address cannot be read: Protocol not known"),
    ],
)
def test_addresses_of_tables_that_are_not_read(tmp_path: Path, table: str, message: str) -> None:
    pictures(tmp_path, "a.png")
    with pytest.raises(UserError, match=message) as caught:
        open_on_disk(tmp_path, table).list_files()
    assert "secret" not in str(caught.value)


def test_a_table_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "403 Forbidden")

    monkeypatch.setattr(table_files, "read_range", refuse)
    pictures(tmp_path, "a.png")
    write(tmp_path / "a.csv", [{"path": "a.png"}])
    upload(tmp_path)
    with pytest.raises(UserError, match=r"a\.csv: it cannot be read \(403 Forbidden\)\. Credentials come from the env"):
        TableSource(AddressSource(address_of(tmp_path)), "a.csv").list_files()


def test_from_a_configuration_to_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "set", "a.png", "sub/b.png", size=(1024, 1024))
    (tmp_path / "set/a.txt").write_text("not this")
    rows: list[Row] = [{"name": "sub/b.png", "long": "b, c", "words": "x"}, {"name": "a.png", "long": "a", "words": ""}]
    write(tmp_path / "set/metadata.jsonl", rows)
    upload(tmp_path)
    columns = "{image: name, captions: [long], tags: words}"
    source = f"{{path: '{address_of(tmp_path / 'set')}', table: metadata.jsonl, columns: {columns}}}"
    (tmp_path / "my.yaml").write_text(f"data: {{sources: [{source}], cache: {{path: '{tmp_path}/cache'}}}}\n")
    found, _ = open_pictures(load_config(tmp_path / "my.yaml").config, SilentProgress())
    assert [(record.captions, record.path) for record in found] == [
        (("a",), address_of(tmp_path / "set/a.png")),
        (("b, c",), address_of(tmp_path / "set/sub/b.png")),
    ]
    assert found.read(1) == (tmp_path / "set/sub/b.png").read_bytes()
