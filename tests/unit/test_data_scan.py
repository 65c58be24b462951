"""Scanning: what is found, what is quarantined, what is remembered, and what a new user reads when it fails."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from sdxl_training.data import scan as scan_module
from sdxl_training.data.index import FileKey, Header, read_index, write_index
from sdxl_training.data.scan import EXTENSIONS, CaptionFiles, Source, scan
from sdxl_training.records import UserError

LONG_AGO = (1_600_000_000, 1_600_000_000)


class Silent:
    """Progress nobody sees, but that adds up."""

    def __init__(self):
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def track(self, description, total):
        self.totals[description] = total
        self.done[description] = 0

        def advance(n):
            self.done[description] += n

        yield advance


def picture(path: Path, size_wh=(30, 20), caption: str | None = "red circle, large", kind="PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size_wh, (len(path.name), 2, 3)).save(path, kind)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    for file in (path, path.with_suffix(".txt")):
        if file.exists():
            os.utime(file, LONG_AGO)
    return path


def run(*folders: Path, missing="refuse", index: Path | None = None, repeats=1, progress=None, **options):
    captions = CaptionFiles(missing=missing, **options)
    sources = [Source(str(folder), repeats) for folder in folders]
    return scan(sources, captions, index or folders[0].parent / "cache" / "index.parquet", progress or Silent())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    picture(root / "b.png")
    picture(root / "a" / "x.JPG", (10, 40), "blue square ,, small,", "JPEG")
    picture(root / "a.webp", kind="WEBP")
    picture(root / "really_a_jpeg.png", kind="JPEG")
    return root


def test_records_are_complete_and_in_order(folder):
    progress = Silent()
    result = run(folder, repeats=3, progress=progress)
    assert [Path(record.path).relative_to(folder).as_posix() for record in result.records] == [
        "a.webp", "a/x.JPG", "b.png", "really_a_jpeg.png",
    ]  # fmt: skip
    record = result.records[1]
    assert record.size_hw == (40, 10)
    assert record.captions == ("blue square ,, small,",)
    assert record.tags == ("blue square", "small")
    assert (record.repeats, record.source) == (3, 0)
    assert record.content_hash == hashlib.blake2b(Path(record.path).read_bytes(), digest_size=16).hexdigest()
    assert result.quarantined == ()
    assert result.left_out == ()
    assert progress.done == progress.totals
    assert progress.totals["scanning pictures"] == 4


def test_hidden_and_mac_files_are_ignored_and_links_followed_once(folder, tmp_path):
    (folder / "._b.png").write_bytes(b"resource fork")
    picture(folder / "__MACOSX" / "c.png")
    picture(folder / ".thumbs" / "d.png")
    elsewhere = picture(tmp_path / "elsewhere" / "e.png").parent
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked_again").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    names = [Path(record.path).name for record in run(folder).records]
    assert names == ["a.webp", "x.JPG", "b.png", "e.png", "really_a_jpeg.png"]


def test_sample_ids_follow_the_folder_and_tell_sources_apart(folder, tmp_path):
    first = run(folder)
    folder.rename(tmp_path / "moved")
    moved = run(tmp_path / "moved")
    assert [record.sample_id for record in first.records] == [record.sample_id for record in moved.records]
    twice = run(tmp_path / "moved", tmp_path / "moved")
    assert len({record.sample_id for record in twice.records}) == 8
    assert [record.source for record in twice.records] == [0] * 4 + [1] * 4
    assert all(0 <= record.sample_id < 2**63 for record in twice.records)


def test_a_collision_of_sample_ids_is_refused(folder, monkeypatch):
    monkeypatch.setattr(scan_module.PictureFile, "sample_id", 5)
    with pytest.raises(UserError, match=r"a\.webp and .*x\.JPG: their names hash to one sample id"):
        run(folder)


def test_broken_files_are_quarantined_by_name_and_the_rest_goes_on(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    picture(folder / "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    result = run(folder)
    assert len(result.records) == 4
    assert {Path(bad.path).name: bad.reason for bad in result.quarantined} == {
        "empty.png": "the file is empty",
        "text.png": "the content is not a JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF, HEIF or JPEG XL picture",
        "latin.png": "its caption latin.txt is not UTF-8 text (byte 3)",
    }


def test_a_second_start_opens_no_picture(folder, tmp_path, monkeypatch):
    (folder / "text.png").write_text("not a picture")
    os.utime(folder / "text.png", LONG_AGO)
    first = run(folder)
    monkeypatch.setattr(scan_module, "read_file", lambda path: pytest.fail(f"{path} was opened"))
    assert run(folder) == first


def test_only_what_changed_is_opened_again(folder, monkeypatch):
    before = run(folder)
    picture(folder / "b.png", (50, 60))
    os.utime(folder / "b.png", (1_600_000_001, 1_600_000_001))
    opened = []
    original = scan_module.read_file
    monkeypatch.setattr(scan_module, "read_file", lambda path: opened.append(Path(path).name) or original(path))
    after = run(folder)
    assert opened == ["b.png"]
    assert after.records[2].size_hw == (60, 50)
    assert after.records[2].content_hash != before.records[2].content_hash
    assert after.records[2].sample_id == before.records[2].sample_id
    assert [after.records[i] for i in (0, 1, 3)] == [before.records[i] for i in (0, 1, 3)]


def test_captions_are_read_anew_each_time(folder):
    run(folder)
    (folder / "b.txt").write_text("new")
    assert run(folder).records[2].captions == ("new",)


def test_captions_are_read_as_the_settings_say(folder):
    (folder / "b.txt").write_text("a fox, running\n\n (red, blue:1.2), c \n")

    def read(**options):
        record = run(folder, **options).records[2]
        return record.captions, record.tags

    whole = ("a fox, running\n\n (red, blue:1.2), c",)
    lines = ("a fox, running", "(red, blue:1.2), c")
    assert read(kind="prose") == (whole, ())
    assert read(kind="prose", alternatives="lines") == (lines, ())
    assert read(alternatives="lines") == (lines, ("a fox", "running")), "the tags are those of the first"
    assert read()[1][1:] == ("running\n\n (red", "blue:1.2)", "c")
    assert read(weights=True)[1][1:] == ("running\n\n (red, blue:1.2)", "c")


def test_a_file_just_written_is_not_trusted_next_time(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "fresh.png")
    (folder / "fresh.txt").write_text("a")
    index = tmp_path / "index.parquet"
    run(folder, index=index)
    assert "fresh.png" not in {Path(key.path).name for key in read_index(index)}
    assert len(read_index(index)) == 4


def test_the_index_forgets_what_is_gone_but_not_other_folders(folder, tmp_path):
    index, other = tmp_path / "index.parquet", tmp_path / "other"
    picture(other / "o.png")
    run(other, index=index)
    run(folder, index=index)
    (folder / "b.png").unlink()
    run(folder, index=index)
    assert {Path(key.path).name for key in read_index(index)} == {"o.png", "a.webp", "x.JPG", "really_a_jpeg.png"}


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nonsense PAR1"])
def test_a_damaged_index_is_rebuilt(folder, tmp_path, content, caplog):
    index = tmp_path / "index.parquet"
    expected = run(folder, index=index)
    index.write_bytes(content)
    assert run(folder, index=index) == expected
    assert "index.parquet is damaged" in caplog.text
    assert len(read_index(index)) == 4


def test_the_index_keeps_any_file_name(tmp_path):
    headers = {
        FileKey(os.fsdecode(b"/x/\xff.png"), 1, 2): Header((3, 4), "ab"),
        FileKey("/x/é.png", 2**40, 2**60): Header((0, 0), "cd", "the file is empty"),
    }
    write_index(tmp_path / "deep" / "index.parquet", headers)
    assert read_index(tmp_path / "deep" / "index.parquet") == headers
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["index.parquet"]


def test_a_failed_write_leaves_the_old_index(tmp_path, monkeypatch):
    path = tmp_path / "index.parquet"
    write_index(path, {FileKey("a", 1, 1): Header((1, 1), "a")})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"index\.parquet: cannot be written \(No space left.*Free some space"):
        write_index(path, {})
    monkeypatch.undo()
    assert len(read_index(path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_the_index_appears_by_renaming(tmp_path, monkeypatch):
    path = tmp_path / "index.parquet"
    write_index(path, {FileKey("a", 1, 1): Header((1, 1), "a")})

    def refuse(self, target):
        assert len(read_index(self)) == 2, "the new index was not complete when it was to be renamed"
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(UserError, match="Make the folder writable"):
        write_index(path, {FileKey(name, 1, 1): Header((1, 1), "a") for name in "ab"})
    assert len(read_index(path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


# What a new user reads


def test_all_wrong_folders_are_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.mp4").write_bytes(b"film")
    (tmp_path / "other" / "a.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        run(*(tmp_path / name for name in ("missing", "empty", "other", "file")))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"data.sources.0.path = {tmp_path / 'missing'}: there is no such folder.")
    assert "data.sources.1.path" in lines[1]
    assert f"the folder is empty. Pictures end in {', '.join(sorted(EXTENSIONS))}." in lines[1]
    assert "no picture in it, only 1 x .mp4, 1 x .txt." in lines[2]
    assert "this is a file, not a folder" in lines[3]


def test_missing_captions_are_refused_with_names_count_and_remedy(folder):
    for i in range(7):
        picture(folder / f"c{i}.png", caption=None)
    with pytest.raises(UserError) as caught:
        run(folder)
    text = str(caught.value)
    assert "7 of 11 pictures have no caption" in text
    assert all(f"c{i}.png" in text for i in range(5))
    assert "c5.png" not in text
    assert "and 2 more" in text
    assert "data.captions.missing to empty" in text
    assert [record.captions for record in run(folder, missing="empty").records].count(("",)) == 7
    result = run(folder, missing="leave_out")
    assert len(result.records) == 4
    assert [Path(path).name for path in result.left_out] == [f"c{i}.png" for i in range(7)]


@pytest.mark.parametrize("missing", ["refuse", "leave_out"])
def test_no_captions_at_all(folder, missing):
    with pytest.raises(UserError, match=r"none of the 4 pictures has a caption.*\.tags \(a\.tags for the first\)"):
        run(folder, missing=missing, extension=".tags")


def test_every_picture_unreadable(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(2):
        (tmp_path / "p" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 2 pictures can be read:\n.*0\.png: the file is empty\n.*1\.png"):
        run(tmp_path / "p")
