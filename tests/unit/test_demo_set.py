"""The demo picture set: what it must contain, and that a seed fixes every byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data.demo_set import (
    COMBINATIONS,
    EXTRA_SHARES,
    PALETTE,
    RADIUS_OF_SIZE,
    SHAPES,
    PictureSpec,
    draw_picture,
    draw_specs,
    write_demo_set,
)
from sdxl_training.records import UserError

PICTURES = 60


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    summary = write_demo_set(folder, seed=1, pictures=PICTURES)
    assert (summary.pictures, summary.broken, summary.already_there) == (PICTURES, 3, False)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def readable(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".png", ".jpg", ".webp") and not path.name.startswith("broken-")
    ]


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(demo: Path, tmp_path: Path) -> None:
    write_demo_set(tmp_path / "same", seed=1, pictures=PICTURES)
    write_demo_set(tmp_path / "other", seed=2, pictures=PICTURES)
    assert contents(tmp_path / "same") == contents(demo)
    assert contents(tmp_path / "other") != contents(demo)


def test_every_picture_has_a_caption_with_object_and_background_first(demo: Path) -> None:
    pictures = readable(demo)
    assert len(pictures) == PICTURES
    for path in pictures:
        thing, ground, size, *extras = path.with_suffix(".txt").read_text(encoding="utf-8").strip().split(", ")
        colour, shape = thing.split(" ")
        background, word = ground.split(" ")
        assert colour != background
        assert {colour, background} <= set(PALETTE)
        assert (shape in SHAPES, word, size in RADIUS_OF_SIZE) == (True, "background", True)
        assert set(extras) <= set(EXTRA_SHARES)


def test_formats_and_aspect_ratios_are_mixed(demo: Path) -> None:
    formats, aspects = set(), set()
    for path in readable(demo):
        with Image.open(path) as picture:
            picture.load()
            formats.add(picture.format)
            aspects.add(picture.width / picture.height)
    assert formats == {"PNG", "JPEG", "WEBP"}
    assert len(aspects) >= 5


def test_each_broken_file_is_broken_in_its_own_way_and_has_a_caption(demo: Path) -> None:
    truncated, empty, text = (demo / f"broken-{name}" for name in ("truncated.jpg", "empty.png", "text.png"))
    assert empty.read_bytes() == b""
    assert text.read_text(encoding="utf-8").startswith("This is a sentence")
    with Image.open(truncated) as picture:  # its header is sound: only decoding finds the fault
        assert picture.size == (128, 128)
        with pytest.raises(OSError, match="truncated"):
            picture.load()
    assert all(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in (truncated, empty, text))


def test_all_combinations_occur_several_times_and_frequencies_are_long_tailed() -> None:
    specs = draw_specs(seed=1, pictures=720)
    combinations = Counter((spec.colour, spec.shape, spec.background) for spec in specs)
    assert set(combinations) == set(COMBINATIONS)
    assert len(COMBINATIONS) == 6 * 5 * 3
    assert min(combinations.values()) >= 4
    tags = [count for _, count in Counter(tag for spec in specs for tag in spec.tags).most_common()]
    assert tags[0] > 20 * tags[-1]


def test_a_second_call_leaves_the_set_alone(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.iterdir()}
    assert write_demo_set(demo, seed=1, pictures=PICTURES).already_there
    assert {path: path.stat().st_mtime_ns for path in demo.iterdir()} == before


def test_a_set_with_missing_pictures_is_not_taken_for_complete(tmp_path: Path) -> None:
    write_demo_set(tmp_path / "set", seed=1, pictures=4)
    readable(tmp_path / "set")[0].unlink()
    with pytest.raises(UserError, match="remove"):
        write_demo_set(tmp_path / "set", seed=1, pictures=4)


@pytest.mark.parametrize("seed", [1, 2])
def test_other_files_are_never_touched(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "holiday.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="mine"):
        write_demo_set(folder, seed=seed)
    assert contents(folder) == {"holiday.png": b"precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_another_seed_is_refused(tmp_path: Path) -> None:
    write_demo_set(tmp_path / "set", seed=1, pictures=4)
    with pytest.raises(UserError, match="seed 2"):
        write_demo_set(tmp_path / "set", seed=2, pictures=4)


def test_a_parent_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_demo_set(tmp_path / "file" / "set", seed=1, pictures=4)


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def disk_full(path: Path, content: bytes) -> int:
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_demo_set(tmp_path / "set", seed=1, pictures=4)
    assert written
    assert list(tmp_path.iterdir()) == []


@given(
    combination=st.sampled_from(COMBINATIONS),
    size_hw=st.tuples(st.integers(32, 160), st.integers(32, 160)),
    extras=st.sets(st.sampled_from(sorted(EXTRA_SHARES))),
)
@settings(max_examples=25, deadline=None)
def test_middle_and_border_have_the_named_colours(
    combination: tuple[str, str, str], size_hw: tuple[int, int], extras: set[str]
) -> None:
    colour, shape, background = combination
    pixels = draw_picture(PictureSpec(colour, shape, background, extras=tuple(extras)), size_hw).astype(float)
    assert pixels.shape == (*size_hw, 3)

    def nearest(pixel: np.ndarray) -> str:
        return min(PALETTE, key=lambda name: float(np.linalg.norm(pixel - np.array(PALETTE[name]))))

    assert nearest(pixels[size_hw[0] // 2, size_hw[1] // 2]) == colour
    assert {nearest(pixels[0, 0]), nearest(pixels[-1, -1]), nearest(pixels[0, -1])} == {background}


@pytest.mark.parametrize(("shape", "share_of_box"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_shapes_fill_their_bounding_box_as_geometry_says(shape: str, share_of_box: float) -> None:
    spec = PictureSpec("red", shape, "blue")
    inside = draw_picture(spec, (256, 256))[..., 0] > 128
    box = np.prod([np.count_nonzero(inside.any(axis=axis)) for axis in (0, 1)])
    assert inside.sum() / box == pytest.approx(share_of_box, abs=0.02)


def test_the_offset_moves_the_object() -> None:
    spec = PictureSpec("red", "square", "blue")
    down_right = draw_picture(replace(spec, offset_yx=(0.125, 0.0625)), (128, 128))
    np.testing.assert_array_equal(down_right, np.roll(draw_picture(spec, (128, 128)), (16, 8), axis=(0, 1)))
