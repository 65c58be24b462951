"""Tables that name pictures: what they say arrives, whatever the format; what is wrong is named with its row."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.tables import TableSource
from sdxl_training.records import UserError

Row = dict[str, object]


def pictures(folder: Path, *names: str, size: tuple[int, int] = (6, 4)) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


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


def source_of(folder: Path, rows: list[Row], name: str = "metadata.jsonl", **settings: object) -> TableSource:
    return TableSource(str(folder), write(folder / name, rows), processes=1, **settings)  # type: ignore[arg-type]


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
def test_each_format_says_the_same(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "b.png", "sub/a.jpg")
    rows: list[Row] = [
        {"file_name": "sub/a.jpg", "text": 'a "car",\nred', "tags": "red, car"},
        {"file_name": "b.png", "text": " é ", "tags": ""},
    ]
    if name.endswith("PARQUET"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
        source = TableSource(str(tmp_path), name)
    else:
        source = source_of(tmp_path, rows, name)
    assert seen(source) == {"b.png": (["é"], None, None), "sub/a.jpg": (['a "car",\nred'], ["red", "car"], None)}
    assert source.look(source.list_files())["height"].to_pylist() == [4, 4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_are_alternatives_and_columns_too(tmp_path: Path, name: str) -> None:
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


def test_rows_of_both_kinds_are_read_line_by_line_to_the_same_digests(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    plain = source_of(tmp_path, [{"path": "a.png", "caption": "one"}, {"path": "b.png", "caption": "two"}])
    before = plain.list_files()
    mixed = source_of(tmp_path, [{"path": "a.png", "caption": "one"}, {"path": "b.png", "caption": ["two", "three"]}])
    after = mixed.list_files()
    assert seen(mixed)["b.png"][0] == ["two", "three"]
    assert after.slice(0, 1).equals(before.slice(0, 1))
    assert after["caption_mtime_ns"][1] != before["caption_mtime_ns"][1]


def test_one_row_changes_one_stamp_and_no_stamp_is_a_time_of_these_days(tmp_path: Path) -> None:
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
    found = seen(source_of(tmp_path, rows))
    for i, caption in enumerate(captions):
        texts = [caption] if isinstance(caption, str) else caption or []
        # Without a picture there is a reason and no caption: the stamps and reasons are what is compared then.
        assert found[f"{i}.png"][2] is not None
        assert source_of(tmp_path, rows)._rows().find([f"{i}.png".encode()])[0].captions == tuple(
            text.strip() for text in texts
        )


def test_pictures_that_are_not_there_or_outside_have_reasons(tmp_path: Path) -> None:
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
    assert "not inside" in str(found["../outside2.png"][2])
    assert "b.png" in found


def test_pictures_that_the_table_does_not_name_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    pictures(tmp_path, "a.png")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / name}: .*{message}"):
        TableSource(str(tmp_path), name, processes=1).list_files()


def test_columns_of_other_types_and_names_are_refused(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="no such folder"):
        TableSource(str(tmp_path / "none"), "a.csv").list_files()


def test_csv_cells_without_quotes_are_none_and_quoted_ones_empty_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbffile_name,text\na.png,\nb.png,""\n')
    assert seen(TableSource(str(tmp_path), "a.csv")) == {"a.png": (None, None, None), "b.png": ([""], None, None)}


def test_identity_tells_folder_table_and_columns_apart(tmp_path: Path) -> None:
    sources = [
        TableSource(str(tmp_path), "a.csv"),
        TableSource(str(tmp_path), "b.csv"),
        TableSource(str(tmp_path / "x"), "a.csv"),
        TableSource(str(tmp_path), "a.csv", "path"),
        TableSource(str(tmp_path), "a.csv", None, ("text",)),
        TableSource(str(tmp_path), "a.csv", None, (), "text"),
    ]
    assert len({source.identity for source in sources}) == len(sources)
    assert TableSource(str(tmp_path), "a.csv", processes=3).identity == sources[0].identity


def test_bytes_and_paths(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    source = source_of(tmp_path, [{"file_name": "a.png"}])
    data = (tmp_path / "a.png").read_bytes()
    assert source.read("a.png", 0, len(data)) == data
    assert source.path("a.png") == str(tmp_path / "a.png")
