"""Tables of pictures as pyarrow writes them: the pictures found, the bytes read back, columns guessed or refused."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_training.data import remote, rows
from sdxl_training.data.decoding import UnreadablePicture
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.parquet_source import Columns, ParquetSource, find_columns
from sdxl_training.records import UserError
from tests.pictures import NOISE, RAMP, encoded, header

PNG, JPEG = encoded(RAMP), encoded(NOISE, "JPEG")
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = pa.list_(pa.string())


def pictures(count: int, seed: int = 0) -> list[bytes]:
    """Return so many different pictures of different lengths."""
    generator = np.random.default_rng(seed)
    return [
        encoded(generator.integers(0, 256, (4 + i % 5, 8, 3), np.uint8)) + bytes(generator.integers(0, 99))
        for i in range(count)
    ]


def as_cells(data: list[bytes]) -> pa.Array:
    return pa.array([{"bytes": one, "path": None} for one in data], IMAGE)


def write(path: Path, table: pa.Table, rows_a_group: int = 7, **options: Any) -> None:
    """Write a table in the format of the path's ending."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_a_group, **options)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_group)


def look(source: ParquetSource) -> list[dict[str, Any]]:
    """Return what a look tells; every usable picture is compared with its header, and can be read."""
    table = source.look(source.list_files())
    assert table.schema.equals(PICTURES)
    found = table.to_pylist()
    assert len({row["name"] for row in found}) == len(found)
    for row in found:
        if row["reason"] is not None:
            assert (row["height"], row["width"]) == (0, 0)
            continue
        known = header(source.read(os.fsdecode(row["file"]), row["start"], row["length"]))
        assert (row["height"], row["width"]) == known.size_hw
        assert (row["orientation"], row["mode"], row["format"]) == (known.orientation, known.mode, known.format)
    return found


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "RETRY_SECONDS", ())
    rows.unpacked.forget_all()
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


# Reading


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("cell", [IMAGE, pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_rows_come_back_in_any_order(tmp_path: Path, ending: str, cell: pa.DataType, order: str):
    data = pictures(100)
    column = as_cells(data) if cell == IMAGE else pa.array(data, cell)
    write(tmp_path / f"a{ending}", pa.table({"image": column, "text": ["a"] * 100}), rows_a_group=40)
    source = ParquetSource(str(tmp_path))
    found = look(source)
    assert [row["length"] for row in found] == [len(one) for one in data]
    assert [row["name"] for row in found] == [f"a{ending}/{i}".encode() for i in range(100)]
    chosen = {"forward": range(100), "backward": range(99, -1, -1),
              "random": np.random.default_rng(1).integers(0, 100, 200).tolist()}[order]  # fmt: skip
    rows.unpacked.forget_all()
    for i in chosen:
        assert source.read(f"a{ending}", found[i]["start"], found[i]["length"]) == data[i]


@pytest.mark.parametrize("limit", [0, 1000, 10_000, 1 << 20])
def test_no_more_is_kept_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    """Whatever is kept, the bytes are the same; with room for a block, each block is unpacked once."""
    monkeypatch.setattr(rows, "CACHE_BYTES", limit)
    data = pictures(200)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", pa.table({"image": as_cells(data)}), rows_a_group=50)
    source = ParquetSource(str(tmp_path))
    for i in np.random.default_rng(2).integers(0, 400, 300).tolist():
        file, row = ("a.parquet", "b.parquet")[i // 200], i % 200
        assert source.read(file, row, len(data[row])) == data[row]
        kept = rows.unpacked._pictures.values()
        assert rows.unpacked._bytes == sum(map(len, kept)) <= limit


def test_rows_in_order_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "CACHE_BYTES", 20_000)  # less than the file: what is behind may go, not what comes
    data = pictures(200)
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}), rows_a_group=100)
    unpacked = 0
    batches = rows._ParquetRows.batches

    def counting(self: rows._ParquetRows, *arguments: Any) -> Iterator[pa.RecordBatch]:
        nonlocal unpacked
        for batch in batches(self, *arguments):
            unpacked += batch.num_rows
            yield batch

    monkeypatch.setattr(rows._ParquetRows, "batches", counting)
    source = ParquetSource(str(tmp_path))
    for i, one in enumerate(data):
        assert source.read("a.parquet", i, len(one)) == one
    assert unpacked == 200
    source.read("a.parquet", 150, len(data[150]))
    assert unpacked <= 300


def test_few_files_stay_open(tmp_path: Path):
    for i in range(20):
        write(tmp_path / f"{i:02}.parquet", pa.table({"image": as_cells([PNG])}))
    source = ParquetSource(str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(20):
        assert source.read(f"{i:02}.parquet", 0, len(PNG)) == PNG
    assert len(rows.unpacked._cursors) == rows.OPEN_FILES
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + rows.OPEN_FILES


def test_threads_take_turns(tmp_path: Path):
    data = pictures(120)
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}), rows_a_group=30)
    source = ParquetSource(str(tmp_path))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 120, 60).tolist():
            if source.read("a.parquet", i, len(data[i])) != data[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_source_travels_to_a_forked_process(tmp_path: Path):
    """The child has the parent's files and lock as they were at the fork, the lock held by a thread it has not."""
    data = pictures(60)
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}), rows_a_group=60)
    fsspec.filesystem("memory").pipe("/a/a.parquet", (tmp_path / "a.parquet").read_bytes())
    for source in (ParquetSource(str(tmp_path)), ParquetSource("memory://a", caption_columns=())):
        assert source.read("a.parquet", 0, len(data[0])) == data[0]
        ours, theirs = os.pipe()
        rows.unpacked._lock.acquire()
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # instead of waiting for ever
            try:
                there = pickle.loads(pickle.dumps(source))
                with os.fdopen(theirs, "wb") as pipe:
                    pickle.dump((there == source, there.read("a.parquet", 40, len(data[40]))), pipe)
            finally:
                os._exit(0)
        rows.unpacked._lock.release()
        os.close(theirs)
        assert source.read("a.parquet", 50, len(data[50])) == data[50]
        with os.fdopen(ours, "rb") as pipe:
            assert pickle.load(pipe) == (True, data[40])
        os.waitpid(child, 0)
        assert source.read("a.parquet", 33, len(data[33])) == data[33]


def test_a_file_that_was_replaced_is_read_anew_after_a_look(tmp_path: Path):
    source = ParquetSource(str(tmp_path))
    for seed in range(3):
        data = pictures(10, seed)
        write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}))
        look(source)
        assert [source.read("a.parquet", i, len(data[i])) for i in range(10)] == data


def test_memory_stays_small_when_one_row_group_is_the_whole_file(tmp_path: Path):
    """What is unpacked at a time is some rows, not the row group."""
    noise = np.random.default_rng(0)
    data = [PNG + noise.bytes(100_000) for _ in range(400)]
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}), rows_a_group=400, write_batch_size=16)
    source = ParquetSource(str(tmp_path))
    files = source.list_files()
    pool = pa.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    tracemalloc.start()
    with closing(rows.open_rows(str(tmp_path / "a.parquet"))) as opened:  # as `look` does
        for _ in opened.batches(["image"], [0]):
            most = max(most, pool.bytes_allocated() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most + peak < 20_000_000
    assert source.look(files).num_rows == 400


# Captions


def test_captions_tags_and_json(tmp_path: Path):
    sidecar = json.dumps({"caption": "from json", "tags": ["j"], "focus": [1, 2, 3, 4]})
    table = pa.table(
        {
            "jpg": as_cells([JPEG] * 6),
            "caption": pa.array(["one ", "", None, None, "🦊\n2", "last"]).dictionary_encode(),
            "tags": pa.array([["a", " b "], [], None, None, ["c", None], []], TEXTS),
            "json": pa.array([None, None, None, sidecar, sidecar, "null"]),
            "label": [0] * 6,
        }
    )
    for ending in (".parquet", ".arrow"):
        write(tmp_path / f"a{ending}", table)
    found = look(ParquetSource(str(tmp_path)))
    expected = [
        (["one"], ["a", "b"], None), ([""], None, None), (None, None, None),
        (["from json"], ["j"], [1, 2, 3, 4]), (["🦊\n2"], ["c"], [1, 2, 3, 4]),
    ]  # fmt: skip
    for file in (found[:6], found[6:]):
        assert [(row["captions"], row["tags"], row["focus"]) for row in file[:5]] == expected
        assert str(file[5]["reason"]).startswith("its column json: neither a text nor an object")


def test_several_caption_columns_are_alternatives(tmp_path: Path):
    table = pa.table(
        {
            "image": as_cells([PNG] * 3),
            "short": ["s1", "s2", None],
            "long": pa.array([["l1", "l2"], None, [None]], TEXTS),
            "tags": ["a, b", None, ""],
        }
    )
    write(tmp_path / "a.parquet", table)
    found = look(ParquetSource(str(tmp_path), caption_columns=("long", "short")))
    assert [row["captions"] for row in found] == [["l1", "l2", "s1"], ["s2"], None]
    assert [row["tags"] for row in found] == [["a", "b"], None, None]
    assert [row["captions"] for row in look(ParquetSource(str(tmp_path)))] == [["a, b"], None, [""]]


def test_text_that_is_not_text_is_a_reason(tmp_path: Path):
    raw = pa.array([b"good", b"\xe9t\xe9"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    write(tmp_path / "a.arrow", pa.table({"image": as_cells([PNG] * 2), "text": text}))
    found = look(ParquetSource(str(tmp_path)))
    assert found[0]["captions"] == ["good"]
    assert str(found[1]["reason"]).startswith("its column text is not UTF-8 text (byte 0)")


def test_a_json_column_of_structs(tmp_path: Path):
    """What Hugging Face makes of a WebDataset's .json members."""
    table = pa.table({"png": as_cells([PNG]), "json": [{"caption": "a", "width": 5}], "__key__": ["000"]})
    write(tmp_path / "a.parquet", table)
    assert look(ParquetSource(str(tmp_path)))[0]["captions"] == ["a"]


# Columns


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


TEXT, NUMBER = pa.string(), pa.int64()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (schema(image=IMAGE, text=TEXT), Columns("image", ("text",))),
        (schema(label=NUMBER, webp=pa.binary(), prompt=TEXT), Columns("webp", ("prompt",))),
        (schema(photo=IMAGE, sound=pa.binary()), Columns("photo")),
        (schema(image=IMAGE, conditioning_image=IMAGE, captions=TEXTS), Columns("image", ("captions",))),
        (schema(image=IMAGE, tags=TEXTS), Columns("image", (), "tags")),
        (schema(image=IMAGE, tags=TEXT), Columns("image", ("tags",))),
        (schema(image=IMAGE, tags=TEXT, caption=pa.large_string()), Columns("image", ("caption",), "tags")),
        (schema(image=IMAGE, tags=TEXT, json=TEXT), Columns("image", (), "tags", "json")),
        (schema(image=NUMBER, jpg=pa.large_binary(), text=NUMBER, json=NUMBER, tags=NUMBER), Columns("jpg")),
        (schema(image=IMAGE, text=pa.dictionary(pa.int32(), TEXT)), Columns("image", ("text",))),
    ],
)
def test_columns_are_found(columns: pa.Schema, expected: Columns):
    assert find_columns(columns) == expected


@pytest.mark.parametrize(
    ("columns", "captions", "expected"),
    [
        (schema(image=IMAGE, text=TEXT, booru=TEXT), None, Columns("image", ("text",), "booru")),
        (schema(image=IMAGE, text=TEXT, booru=TEXTS, tags=TEXT), None, Columns("image", ("text",), "booru")),
        (schema(image=IMAGE, booru=TEXT, tags=TEXT), None, Columns("image", (), "booru")),
        (schema(image=IMAGE, booru=TEXT, text=TEXT), ("booru",), "tags: booru is among .*captions, too"),
        (schema(image=IMAGE, text=TEXT, booru=NUMBER), None, "tags: there is no column booru with texts"),
        (schema(image=IMAGE, text=TEXT), None, "tags: there is no column booru with texts. Columns: image"),
    ],
)
def test_the_column_of_tags_may_be_named(columns: pa.Schema, captions: tuple[str, ...] | None, expected: Columns | str):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"data\.sources\[\]\.columns\.{expected}"):
            find_columns(columns, None, captions, "booru")
    else:
        assert find_columns(columns, None, captions, "booru") == expected
    # A caption's column that is named as that of tags is none of several that may be meant.
    assert find_columns(schema(image=IMAGE, text=TEXT, prompt=TEXT), tags="prompt").captions == ("text",)


def test_tags_of_a_named_column_are_read_and_are_part_of_the_identity(tmp_path: Path):
    table = pa.table({"image": as_cells([PNG] * 2), "text": ["a", "b"], "booru": ["x, y", None], "tags": ["u", "v"]})
    write(tmp_path / "a.parquet", table)
    named, unnamed = ParquetSource(str(tmp_path), tags_column="booru"), ParquetSource(str(tmp_path))
    assert [(row["captions"], row["tags"]) for row in look(named)] == [(["a"], ["x", "y"]), (["b"], None)]
    assert [row["tags"] for row in look(unnamed)] == [["u"], ["v"]]
    assert named.identity != unnamed.identity


@pytest.mark.parametrize(
    ("columns", "image", "captions", "message"),
    [
        (
            schema(image=IMAGE, jpg=IMAGE),
            None,
            None,
            "columns image, jpg may hold the pictures. Name it in data.sources...columns.image",
        ),
        (schema(a=IMAGE, b=IMAGE), None, None, "columns a, b may hold the pictures"),
        (
            schema(data=pa.binary(), text=TEXT),
            None,
            None,
            "no column is known to hold pictures.*data .binary., text .str",
        ),
        (schema(image=TEXT), None, None, "no column is known"),
        (schema(image=pa.list_(IMAGE)), None, None, "no column is known"),
        (schema(image=IMAGE), "photo", None, "there is no column photo with the bytes of pictures"),
        (schema(image=IMAGE, photo=TEXT), "photo", None, "there is no column photo with the bytes"),
        (schema(image=IMAGE, text=TEXT, prompt=TEXT), None, None, "text, prompt may hold.*sources...columns.captions"),
        (schema(image=IMAGE, text=TEXT), None, ("story",), "there is no column story with texts. Columns: image"),
        (schema(image=IMAGE, text=NUMBER), None, ("text",), "there is no column text with texts"),
    ],
)
def test_columns_that_are_not_plain_are_refused(
    tmp_path: Path, columns: pa.Schema, image: str | None, captions: tuple[str, ...] | None, message: str
):
    with pytest.raises(UserError, match=message):
        find_columns(columns, image, captions)
    write(tmp_path / "a.parquet", columns.empty_table())
    with pytest.raises(UserError, match=message):
        ParquetSource(str(tmp_path), image, captions).list_files()


def test_columns_that_are_named_are_taken(tmp_path: Path):
    table = pa.table({"image": as_cells([PNG]), "a.b": pa.array([JPEG]), "text": ["no"], "x": ["yes"]})
    write(tmp_path / "a.parquet", table)
    (row,) = look(ParquetSource(str(tmp_path), "a.b", ("x",)))
    assert (row["format"], row["captions"]) == ("JPEG", ["yes"])


def test_a_later_file_of_other_columns_is_a_row_with_a_reason(tmp_path: Path):
    write(tmp_path / "a.parquet", pa.table({"image": as_cells([PNG])}))
    write(tmp_path / "b.parquet", pa.table({"sound": [b"x"]}))
    first, second = look(ParquetSource(str(tmp_path)))
    assert first["reason"] is None
    assert second["name"] == b"b.parquet"
    assert "no column is known to hold pictures" in second["reason"]


# Damage


def test_rows_without_a_picture(tmp_path: Path):
    cells = [{"bytes": PNG, "path": "a"}, {"bytes": None, "path": "x/b.png"}, None, {"bytes": b"", "path": None},
             {"bytes": b"text", "path": None}, {"bytes": JPEG[:200], "path": None}]  # fmt: skip
    for ending in (".parquet", ".arrow"):
        write(tmp_path / f"a{ending}", pa.table({"image": pa.array(cells, IMAGE)}))
    found = look(ParquetSource(str(tmp_path)))
    for file in (found[:6], found[6:]):
        said = [row["reason"] for row in file]
        assert said[0] is None
        assert "only the path x/b.png" in said[1]
        assert said[2:4] == ["the row has no picture", "the file is empty"]
        assert "not a JPEG" in said[4]
        assert "damaged" in said[5]
    source = ParquetSource(str(tmp_path))
    for row in (1, 2, 6, 99, -1):
        with pytest.raises(UnreadablePicture, match=rf"a.parquet/{row}: its row has other contents"):
            source.read("a.parquet", row, 5)
    with pytest.raises(UnreadablePicture, match="other contents"):
        source.read("a.parquet", 0, len(PNG) + 1)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello" * 100, PNG])
@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_rubbish_is_a_row_with_a_reason(tmp_path: Path, content: bytes, ending: str):
    (tmp_path / f"a{ending}").write_bytes(content)
    (row,) = look(ParquetSource(str(tmp_path)))
    assert row["name"] == f"a{ending}".encode()
    assert row["length"] == 0
    assert "damaged" in row["reason"]
    with pytest.raises(UnreadablePicture):
        ParquetSource(str(tmp_path)).read(f"a{ending}", 0, 5)


def test_every_way_of_cutting_a_file_is_survived(tmp_path: Path):
    data = pictures(30)
    for ending in (".parquet", ".arrow"):
        path = tmp_path / f"a{ending}"
        write(path, pa.table({"image": as_cells(data)}), rows_a_group=10)
        whole = path.read_bytes()
        for end in np.random.default_rng(0).integers(0, len(whole) - 9, 25).tolist():
            path.write_bytes(whole[:end])
            found = look(ParquetSource(str(path)))
            assert "damaged" in str(found[-1]["reason"])
            assert [row["length"] for row in found[:-1]] == [len(one) for one in data[: len(found) - 1]]
            if ending == ".arrow" and end > len(whole) * 0.8:
                assert len(found) == 21
        path.write_bytes(whole)
        assert len(look(ParquetSource(str(path)))) == 30


def test_rows_before_a_damaged_page_count(tmp_path: Path):
    data = pictures(100)
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(data)}), rows_a_group=50, compression="zstd")
    broken = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    broken[start : start + 200] = b"\xff" * 200
    (tmp_path / "a.parquet").write_bytes(broken)
    found = look(ParquetSource(str(tmp_path)))
    assert len(found) == 51
    assert found[-1]["name"] == b"a.parquet"
    assert "rows from 50 on are missing" in found[-1]["reason"]
    source = ParquetSource(str(tmp_path))
    for _ in range(2):
        with pytest.raises(UnreadablePicture, match=r"a.parquet/60: its row cannot be read"):
            source.read("a.parquet", 60, len(data[60]))
    assert source.read("a.parquet", 49, len(data[49])) == data[49]


def test_what_a_disk_does_not_give_is_no_damage(tmp_path: Path):
    write(tmp_path / "a.parquet", pa.table({"image": as_cells([PNG])}))
    source = ParquetSource(str(tmp_path))
    files = source.list_files()
    (tmp_path / "a.parquet").unlink()
    (row,) = source.look(files).to_pylist()
    assert (row["name"], row["length"]) == (b"a.parquet", -1)
    assert row["reason"] == "the file cannot be read: No such file or directory"


def test_what_the_network_does_not_give_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the failure comes through pyarrow, in the middle of a file."""
    write(tmp_path / "a.parquet", pa.table({"image": as_cells(pictures(3000))}), rows_a_group=1000)
    fsspec.filesystem("memory").pipe("/a.parquet", (tmp_path / "a.parquet").read_bytes())
    monkeypatch.setattr(rows, "REMOTE_CHUNK", 1000)
    source = ParquetSource("memory://a.parquet")
    files = source.list_files()
    system = type(fsspec.filesystem("memory"))
    cat_file, calls, most = system.cat_file, 0, 10**9

    def failing(self: Any, *arguments: Any, **options: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls > most:
            raise OSError("https://me:secret@host is down")
        return bytes(cat_file(self, *arguments, **options))

    monkeypatch.setattr(system, "cat_file", failing)
    assert source.look(files).num_rows == 3000
    assert calls > 3
    calls, most = 0, calls - 1
    (row,) = source.look(files).to_pylist()
    assert (row["name"], row["length"]) == (b"a.parquet", -1)
    assert row["reason"] == "the file cannot be read: https://host is down"


# Places


def test_files_of_a_pattern_and_of_an_address(tmp_path: Path):
    system = fsspec.filesystem("memory")
    data = pictures(30)
    for i in range(3):
        write(tmp_path / f"train-{i}.parquet", pa.table({"image": as_cells(data[i * 10 :][:10])}))
        system.pipe(f"/set/data/train-{i}.parquet", (tmp_path / f"train-{i}.parquet").read_bytes())
    write(tmp_path / "test-0.parquet", pa.table({"image": as_cells([PNG])}))
    here, there = ParquetSource(f"{tmp_path}/train-*.parquet"), ParquetSource("memory://set/data")
    files = here.list_files()
    assert files.schema.equals(FILES)
    assert files.column("file").to_pylist() == [f"train-{i}.parquet".encode() for i in range(3)]
    assert set(files.column("caption_mtime_ns").to_pylist()) == {-1}
    assert look(here) == look(there)
    assert here.look(files.slice(2)).column("name").to_pylist()[0] == b"train-2.parquet/0"
    assert here.look(files.slice(0, 0)).num_rows == 0
    assert there.path("train-0.parquet/3") == "memory://set/data/train-0.parquet/3"


def test_remote_arrow_files_are_refused():
    fsspec.filesystem("memory").pipe("/set/a.arrow", b"x")
    with pytest.raises(UserError, match="local disk only"):
        ParquetSource("memory://set").list_files()


def test_identities_differ_where_a_look_would():
    sources = [ParquetSource("/a"), ParquetSource("/a", "x"), ParquetSource("/a", None, ("x",)), ParquetSource("/b"),
               ParquetSource("/a", None, ()), ParquetSource("/a", None, ("x", "y")), ParquetSource("/a/*")]  # fmt: skip
    assert len({source.identity for source in sources}) == len(sources)
    assert "secret" not in ParquetSource("s3://me:secret@bucket/a").identity
