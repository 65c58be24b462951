"""A folder at an address: pictures and captions as in a folder on the disk, byte for byte."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from sdxl_training.data.folders import FolderSource
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.data.remote_folders import AddressSource
from sdxl_training.records import UserError

ROOT = "memory://pictures/set"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several formats, captions, and files that are of no use; the same at the address."""
    generator = np.random.default_rng(0)
    for number, ending in enumerate(("png", "jpg", "JPG", "webp", "tiff", "gif")):
        below = tmp_path / ("deep/er" if number % 2 else ".")
        below.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(below / f"{number} é\n.{ending}")
        if number != 3:
            (below / f"{number} é\n.txt").write_text(f"picture {number}")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "latin.png").write_bytes((tmp_path / "0 é\n.png").read_bytes())
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "._0.png").write_bytes(b"mac")
    (tmp_path / "notes.txt").write_text("nothing to do with it")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            memory.pipe(f"{ROOT}/{path.relative_to(tmp_path)}", path.read_bytes())
    return tmp_path


def test_an_address_holds_what_the_folder_holds(folder: Path) -> None:
    here, there = FolderSource(str(folder)), AddressSource(ROOT)
    files, listed = here.list_files(), there.list_files()
    assert listed.schema == FILES
    for column in ("file", "bytes", "caption_bytes"):
        assert listed[column].to_pylist() == files[column].to_pylist()
    assert (np.array(listed["caption_mtime_ns"]) > 0).tolist() == (np.array(listed["caption_bytes"]) >= 0).tolist()
    seen, expected = there.look(listed), here.look(files)
    assert seen.schema == PICTURES
    assert seen.to_pylist() == expected.to_pylist()
    assert sum(reason is not None for reason in seen["reason"].to_pylist()) == 2
    for row in seen.to_pylist():
        name = row["file"].decode()
        assert there.read(name, row["start"], row["length"]) == (folder / name).read_bytes()
        assert there.path(name) == f"{ROOT}/{name}"


def test_what_is_gone_is_an_unreadable_picture_and_a_row_with_a_reason(folder: Path) -> None:
    source = AddressSource(ROOT + "/")
    files = source.list_files()
    fsspec.filesystem("memory").rm(f"{ROOT}/latin.png")
    row = next(row for row in source.look(files).to_pylist() if row["file"] == b"latin.png")
    assert "cannot be read" in row["reason"]
    with pytest.raises(UnreadablePicture, match=r"latin.png: the file cannot be read"):
        source.read("latin.png", 0, 10)


def test_a_name_that_fsspec_would_cut_is_not_read_as_another(folder: Path) -> None:
    fsspec.filesystem("memory").pipe("/pictures/set/x::file:y.png", (folder / "latin.png").read_bytes())
    source = AddressSource(ROOT)
    row = next(row for row in source.look(source.list_files()).to_pylist() if b"::" in row["file"])
    assert row["reason"] == 'it cannot be read: names with "::" are not read'


def test_places_without_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(UserError):
        AddressSource("memory://nowhere").list_files()
    fsspec.filesystem("memory").pipe("memory://texts/a.txt", b"a")
    with pytest.raises(UserError, match=r"no picture|there is no"):
        AddressSource("memory://texts").list_files()


def test_credentials_stay_out_of_what_is_said_and_kept() -> None:
    source = AddressSource("s3://user:secret@bucket/set")
    assert "secret" not in source.identity + source.path("a.png")
    assert AddressSource("s3://bucket/set/").identity == AddressSource("s3://bucket/set").identity
    assert AddressSource("s3://bucket/set", ".caption").identity != AddressSource("s3://bucket/set").identity


def _look(pickled: bytes) -> list[dict[str, object]]:
    source = pickle.loads(pickled)
    found: list[dict[str, object]] = source.look(source.list_files()).to_pylist()
    return found


def test_another_process_sees_the_same(folder: Path) -> None:
    source = AddressSource(ROOT)
    source.list_files()  # fsspec has been used before the fork
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply_async(_look, (pickle.dumps(source),)).get(timeout=60)
    assert there == source.look(source.list_files()).to_pylist()
