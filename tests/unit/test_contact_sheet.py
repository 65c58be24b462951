"""The contact sheet: what is kept stays as it is and where it is, the rest is dimmed; any name, any file."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from sdxl_training.data.buckets import Fitting, make_buckets, plan_crop
from sdxl_training.data.contact_sheet import (
    EDGE,
    GAP_PX,
    PALE,
    SIDE_PX,
    Cell,
    describe_crop,
    draw_sheet,
    has_glyph,
    kept_box,
    load_font,
    printable,
    shorten,
    show_crop,
    worst_crop_cells,
    wrap,
    write_sheet,
)
from sdxl_training.data.crops import Cut
from sdxl_training.data.decoding import UnreadablePicture
from sdxl_training.data.picture_plan import plan_resolutions
from sdxl_training.records import Bucket, CropPlan, ImageRecord, UserError

SDXL = make_buckets(1024, 64, 512, 2048)
FONT = ImageFont.load_default(11)  # the same on every machine
sides = st.integers(1, 5000)


def png(pixels_HWC: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels_HWC).save(sink, "PNG")
    return sink.getvalue()


def flat(size_hw, colour=(200, 40, 10)) -> np.ndarray:
    return np.full((*size_hw, 3), colour, np.uint8)


def cell(size_hw=(300, 200), path="a.png", data=None, **more) -> Cell:
    plan = plan_crop(size_hw, SDXL)
    return Cell(png(flat(size_hw)) if data is None else data, path, plan, describe_crop(plan), **more)


def squares(sheet: Image.Image, count: int, columns: int) -> list[np.ndarray]:
    """Return the squares in which the pictures are."""
    step_down = (sheet.height - GAP_PX) // -(-count // columns)
    corners = [(GAP_PX + i // columns * step_down, GAP_PX + i % columns * (SIDE_PX + GAP_PX)) for i in range(count)]
    return [np.asarray(sheet)[top : top + SIDE_PX, left : left + SIDE_PX] for top, left in corners]


def test_the_text_states_share_scale_and_sizes_as_height_x_width():
    plan = CropPlan((1000, 3000), (704, 2112), (0, 320), Bucket((704, 1472)))
    assert describe_crop(plan) == "30 % cut, 0.70x, 1000x3000 -> 704x1472"


@given(height=sides, width=sides, side=st.integers(16, 300), seed=st.integers(0, 9))
def test_the_outline_is_the_crop_in_proportion(height, width, side, seed):
    plan = Cut("random", 1, seed=seed).plans((height, width), plan_crop((height, width), SDXL).bucket)[0]
    shown_hw = [max(1, round(length * side / max(height, width))) for length in (height, width)]
    top, left, bottom, right = kept_box(plan, shown_hw)
    assert 0 <= top < bottom <= shown_hw[0]
    assert 0 <= left < right <= shown_hw[1]
    for start, end, first, kept, resized, shown in zip(
        (top, left), (bottom, right), plan.crop_tl, plan.bucket.size_hw, plan.resized_hw, shown_hw, strict=True
    ):
        assert abs(start - first / resized * shown) <= 1.5  # half by rounding, one by never being empty
        assert abs(end - (first + kept) / resized * shown) <= 1.5


def test_what_is_kept_keeps_its_colours_and_the_rest_is_dimmed():
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (256, 512, 3), np.uint8)
    plan = CropPlan((256, 512), (128, 256), (0, 32), Bucket((128, 160)))
    shown_HWC = np.asarray(show_crop(pixels_HWC, plan, side_px=512)).astype(int)
    kept, cut = np.s_[2:-2, 66:382], (np.s_[:, :64], np.s_[:, 384:])
    assert (shown_HWC[kept] == pixels_HWC[kept]).all()
    for part in cut:
        assert (np.ptp(shown_HWC[part], axis=2) == 0).all()  # without colour
        assert np.ptp(shown_HWC[part]) < 0.5 * 255
    for edge in (shown_HWC[0, 64:384], shown_HWC[-1, 64:384], shown_HWC[:, 64], shown_HWC[:, 383]):
        assert (edge == EDGE).all()


@pytest.mark.parametrize(
    ("size_hw", "shown_hw"),
    [((2000, 1000), (256, 128)), ((100, 60), (200, 120)), ((1, 9000), (1, 256)), ((256, 256), (256, 256))],
)
def test_a_picture_is_shown_whole_and_in_its_shape(size_hw, shown_hw):
    shown = show_crop(flat(size_hw), plan_crop(size_hw, SDXL))
    assert (shown.height, shown.width) == shown_hw


def test_a_mirrored_variant_is_shown_as_it_is_stored():
    plain, mirrored = Cut(flip=True).plans((100, 300), Bucket((64, 64)))
    assert kept_box(mirrored, (100, 300)) == kept_box(plain, (100, 300))


def test_a_plan_for_another_size_is_a_programming_error():
    with pytest.raises(ValueError, match="plan for"):
        show_crop(flat((10, 10)), plan_crop((10, 11), SDXL))


def test_cells_stand_in_rows_in_order():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    cells = [cell((64, 64), data=png(flat((64, 64), colour))) for colour in colours]
    sheet = draw_sheet(cells, columns=3)
    assert sheet.width == 3 * SIDE_PX + 4 * GAP_PX
    centres = [tuple(square[SIDE_PX // 2, SIDE_PX // 2]) for square in squares(sheet, 4, 3)]
    assert centres == colours
    assert draw_sheet(cells[:2], columns=3).width == 2 * SIDE_PX + 3 * GAP_PX


def test_nothing_to_draw_is_a_programming_error():
    for cells, columns in (([], 3), ([cell()], 0)):
        with pytest.raises(ValueError, match="a sheet of"):
            draw_sheet(cells, columns)


def reason_drawn(one: Cell) -> bool:
    """Whether the cell shows writing instead of a picture."""
    (square,) = squares(draw_sheet([one]), 1, 1)
    assert (square[-GAP_PX:] == PALE).all()
    assert not (square == (200, 40, 10)).all(axis=2).any()
    return bool((square != PALE).any())


def test_a_picture_that_cannot_be_decoded_says_so():
    whole = png(flat((300, 200)))
    assert reason_drawn(cell(data=whole[: len(whole) // 2]))
    assert reason_drawn(cell(data=b""))
    assert reason_drawn(cell(data=png(flat((200, 300)))))  # it has changed since it was planned
    gone = Cell(None, "a.png", plan_crop((300, 200), SDXL), "", "No such file or directory")
    assert reason_drawn(gone)


@pytest.mark.parametrize(
    "path",
    ["/a/line\nbreak.png", "/a/😀 猫 кот.png", "x" * 5000 + ".png", "/a/bad\udce4.png", "\x1b[31m", "", "\u202egnp"],
)
def test_any_name_is_drawn_on_its_own_line(path):
    """Beside and below its strip a name changes nothing."""
    plain, named = (np.asarray(draw_sheet([cell(path=one), cell(path="b.png")])) for one in ("", path))
    changed = np.argwhere((plain != named).any(axis=2))
    assert len(changed) or not path
    assert changed.size == 0 or changed[:, 0].min() >= GAP_PX + SIDE_PX
    assert changed.size == 0 or changed[:, 0].max() < GAP_PX + SIDE_PX + 20
    assert changed.size == 0 or changed[:, 1].max() <= GAP_PX + SIDE_PX


def test_printable_shows_every_character_on_one_line():
    assert printable("a\nb\x1b\u202e\udce4ä猫😀") == "a\\nb\\x1b\\u202e\\udce4ä猫😀"
    assert printable("👩\u200d🚀") == "👩\u200d🚀"
    assert printable("ä.png", FONT) == "\\xe4.png"  # Pillow's own font lacks it
    assert has_glyph(load_font(), "a")


@given(st.text(st.characters(codec=None), max_size=30))
def test_printable_can_always_be_printed(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


@given(text=st.text("abcdefgh ", max_size=80), width=st.integers(20, 200), keep_end=st.booleans())
def test_a_shortened_line_fits_and_is_as_long_as_it_can_be(text, width, keep_end):
    short = shorten(text, width, FONT, keep_end=keep_end)
    assert FONT.getlength(short) <= width
    if short != text:
        kept = short.strip("…") if not keep_end else short.lstrip("…")
        assert (text.endswith if keep_end else text.startswith)(kept)
        longer = "…" + text[len(text) - len(kept) - 1 :] if keep_end else text[: len(kept) + 1] + "…"
        assert FONT.getlength(longer) > width or longer.strip("…") == text


@given(st.text("abcd ", max_size=200))
def test_wrapped_lines_fit_and_hold_the_words_in_order(text):
    lines = wrap(text, 100, FONT)
    assert all(FONT.getlength(line) <= 100 for line in lines)
    if all(FONT.getlength(word) <= 100 for word in text.split(" ")):
        assert " ".join(lines).split() == text.split()


def test_the_worst_crops_come_first_and_are_read_when_they_are_drawn():
    sizes = [(1024, 1024), (600, 4000), (1100, 1300), (4500, 1000)]
    records = [ImageRecord(i, f"{i}.png", size, ("",), (), picture=10 + i) for i, size in enumerate(sizes)]
    plan = plan_resolutions(records, [SDXL], Fitting())
    asked = []

    def read(picture: int) -> bytes:
        asked.append(picture)
        if picture == 11:
            raise UnreadablePicture("1.png", "Permission denied")
        return b"picture"

    cells = worst_crop_cells(plan, read, count=2)
    assert len(cells) == 2
    assert not asked
    shares = {record.path: crop.cropped_fraction for record, crop in zip(records, plan.plans, strict=True)}
    assert [one.path for one in cells] == sorted(shares, key=lambda path: -shares[path])[:2]
    unread = next(one for one in cells if one.path == "1.png")
    assert (unread.data, unread.problem) == (None, "Permission denied")
    assert len(worst_crop_cells(plan, read)) == sum(share > 0 for share in shares.values()) == 3


def test_a_sheet_is_written_whole_or_refused(tmp_path):
    sheet = draw_sheet([cell()])
    path = write_sheet(sheet, tmp_path / "worst.png")
    assert [file.name for file in tmp_path.iterdir()] == ["worst.png"]
    with Image.open(path) as read:
        assert (np.asarray(read) == np.asarray(sheet)).all()
    with pytest.raises(UserError, match=r"absent.worst\.png: the contact sheet cannot be written \(No such file"):
        write_sheet(sheet, tmp_path / "absent" / "worst.png")
