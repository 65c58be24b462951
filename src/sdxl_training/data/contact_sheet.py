"""Pictures on one sheet, each whole, with what its crop cuts away dimmed and what is kept outlined.

One picture is decoded at a time, so a sheet of the largest pictures needs the memory of one of them.

Shape legend: H x W rows and columns of a picture as it is shown on the sheet, C = 3 colour channels.
"""

from __future__ import annotations

import contextlib
import math
import os
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.decoding import Pixels, UnreadablePicture, decode_pixels
from sdxl_training.data.lazy import Lazy
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.records import CropPlan, ImageRecord, SizeHW, UserError

SIDE_PX = 256  # of the square in which a picture is shown
GAP_PX, LINE_PX, LINES = 8, 15, 2
FONT_PX = 11
# Pillow's own font has the letters of English alone. Where the machine has one of these, names look as they are.
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
INK, FAINT, PALE = (60, 60, 60), (105, 105, 105), (238, 238, 238)
EDGE, EDGE_AROUND = (230, 30, 30), (255, 255, 255)
GREY_LEVEL, GREY_SHARE = 128, 0.55  # of what is cut away: colourless, and more than half of the way to grey
LONGEST_NAME = 512  # characters that are looked at from the end of a path
ZERO_WIDTH_JOINER = "\u200d"  # holds emoji together
UNSHOWN = frozenset({"Cc", "Cf", "Cn", "Cs", "Zl", "Zp"})  # Unicode's categories of what cannot be seen

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture of the sheet. data: its file's bytes, or None where they cannot be had, for the reason in `problem`.

    path: its name below it. text: what is said of it, such as `describe_crop`.
    """

    data: bytes | None
    path: str
    plan: CropPlan
    text: str
    problem: str = ""


def describe_crop(plan: CropPlan) -> str:
    """Return the crop in a few words; sizes are height x width."""
    height, width = plan.original_hw
    return f"{plan.cropped_fraction:.0%} cut, {plan.scale:.2f}x, {height}x{width} -> {plan.bucket}".replace("%", " %")


def worst_crop_cells(plan: PicturePlan, read: Callable[[int], bytes], count: int = 50) -> Sequence[Cell]:
    """Return the pictures that lose most, worst first; each is read when its cell is asked for.

    read: picture number -> bytes; what it cannot read (UnreadablePicture) is a cell that says so.
    """
    worst = plan.worst_crops(count)

    def make(place: int) -> Cell:
        record, crop = worst[place]
        return read_cell(record, crop, describe_crop(crop), read)

    return Lazy(len(worst), make)


def read_cell(record: ImageRecord, plan: CropPlan, text: str, read: Callable[[int], bytes]) -> Cell:
    """Return a picture's cell with this text below it; where it cannot be read, one that says why."""
    try:
        return Cell(read(record.picture), record.path, plan, text)
    except UnreadablePicture as error:
        return Cell(None, record.path, plan, text, error.reason)


def draw_sheet(cells: Sequence[Cell], columns: int = 5, background: RGB = WHITE) -> Image.Image:
    """Lay pictures out in rows, name and text below each. background: RGB behind transparent parts.

    A picture that cannot be decoded, or is not of the size it was planned for, has the reason in its place. Raises
    ValueError without cells or columns.
    """
    if not len(cells) or columns < 1:
        raise ValueError(f"a sheet of {len(cells)} pictures in {columns} columns")
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    step_down = SIDE_PX + LINES * LINE_PX + 2 * GAP_PX
    size = (columns * (SIDE_PX + GAP_PX) + GAP_PX, rows * step_down + GAP_PX)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), load_font()
    for i, cell in enumerate(cells):
        left, top = GAP_PX + (i % columns) * (SIDE_PX + GAP_PX), GAP_PX + (i // columns) * step_down
        sheet.paste(_draw_cell(cell, background, font), (left, top))
        for line, (text, ink) in enumerate(_lines_below(i + 1, cell, font)):
            pen.text((left, top + SIDE_PX + line * LINE_PX + 3), text, fill=ink, font=font)
    return sheet


def _lines_below(number: int, cell: Cell, font: Font) -> list[tuple[str, RGB]]:
    """Return number and name, of which the end tells most, and what is said of the picture, with their colours."""
    said = f"{number}. "
    name = printable(cell.path[-LONGEST_NAME:], font)
    said += shorten(name, SIDE_PX - math.ceil(font.getlength(said)), font, keep_end=True)
    return [(said, INK), (shorten(printable(cell.text, font), SIDE_PX, font), FAINT)]


def write_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a sheet as PNG by temporary name and rename. Raises UserError where that cannot be done."""
    if not path.name:
        raise UserError(f"{path}: names no file, so the contact sheet cannot be written. Give one, such as sheet.png.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            sheet.save(file, "PNG")
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: the contact sheet cannot be written ({error.strerror or error}). Give a file in a folder that is "
            "there and can be written, on a disk with space."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def show_crop(pixels_HWC: Pixels, plan: CropPlan, side_px: int = SIDE_PX) -> Image.Image:
    """Return the whole picture within a square, what `plan` cuts away dimmed, what it keeps outlined.

    pixels_HWC: the upright picture, uint8, of the size in the plan or else ValueError.
    """
    if pixels_HWC.shape[:2] != plan.original_hw:
        raise ValueError(f"a picture of {pixels_HWC.shape[:2]} pixels with a plan for {plan.original_hw}")
    small = _scaled(Image.fromarray(pixels_HWC), side_px)
    height, width = small.height, small.width
    top, left, bottom, right = kept_box(plan, (height, width))
    shown_HWC = np.array(small)
    grey_HW = np.asarray(small.convert("L"), dtype=np.float64)
    dimmed_HW = ((1 - GREY_SHARE) * grey_HW + GREY_SHARE * GREY_LEVEL).astype(np.uint8)
    result_HWC = np.repeat(dimmed_HW[:, :, None], 3, axis=2)
    result_HWC[top:bottom, left:right] = shown_HWC[top:bottom, left:right]
    picture = Image.fromarray(result_HWC)
    pen = ImageDraw.Draw(picture)
    # Two lines, so that one of them is seen on any picture.
    for inset, colour in ((0, EDGE), (1, EDGE_AROUND)):
        if min(bottom - top, right - left) > 4 * inset:
            pen.rectangle((left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour)
    return picture


def kept_box(plan: CropPlan, shown_hw: SizeHW) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of what is kept, on the whole picture shown with this size; never empty."""
    starts, ends = [], []
    for start, kept, resized, shown in zip(plan.crop_tl, plan.bucket.size_hw, plan.resized_hw, shown_hw, strict=True):
        first = min(round(start * shown / resized), shown - 1)
        starts.append(first)
        ends.append(max(round((start + kept) * shown / resized), first + 1))
    return starts[0], starts[1], ends[0], ends[1]


def _draw_cell(cell: Cell, background: RGB, font: Font) -> Image.Image:
    """Return the square of a cell: its picture in the middle, or why there is none."""
    square = Image.new("RGB", (SIDE_PX, SIDE_PX), PALE)
    problem = cell.problem
    if cell.data is not None:
        try:
            pixels_HWC = decode_pixels(cell.data, cell.path, background).numpy()
        except UnreadablePicture as error:
            problem = error.reason
        else:
            if pixels_HWC.shape[:2] == cell.plan.original_hw:
                picture = show_crop(pixels_HWC, cell.plan)
                square.paste(picture, ((SIDE_PX - picture.width) // 2, (SIDE_PX - picture.height) // 2))
                return square
            height, width = pixels_HWC.shape[:2]
            problem = f"it is {height}x{width} now; it has changed since it was planned"
    lines = wrap(printable(problem, font), SIDE_PX - 2 * GAP_PX, font)[: SIDE_PX // LINE_PX - 1]
    ImageDraw.Draw(square).multiline_text((GAP_PX, GAP_PX), "\n".join(lines), fill=INK, font=font, spacing=3)
    return square


def _scaled(picture: Image.Image, side_px: int) -> Image.Image:
    """Return the picture as large as fits; a small one is enlarged by a whole number, so that its pixels are seen."""
    factor = side_px / max(picture.size)
    if factor >= 1:
        whole = math.floor(factor)
        return picture.resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


# Names


def printable(text: str, font: Font | None = None) -> str:
    """Return a name as one line that shows every character: what cannot be seen is written as an escape (\\n, \\udce4).

    With a font, so is every character that it lacks.
    """
    return "".join(one if _is_visible(one) and (font is None or has_glyph(font, one)) else escape(one) for one in text)


def escape(character: str) -> str:
    """Return a character as Python writes it by its number."""
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _is_visible(character: str) -> bool:
    return character == ZERO_WIDTH_JOINER or unicodedata.category(character) not in UNSHOWN


@lru_cache(maxsize=1)
def load_font() -> Font:
    """Return the first of FONTS that the machine has, or Pillow's own."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, FONT_PX)
        except OSError:
            continue
    return ImageFont.load_default(FONT_PX)


@lru_cache(maxsize=4096)
def has_glyph(font: Font, character: str) -> bool:
    """Return whether the font can draw the character: what it cannot, it draws as it draws a character nobody has."""
    if " " <= character <= "~":
        return True
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def shorten(text: str, width_px: int, font: Font, *, keep_end: bool = False) -> str:
    """Return as much of a line as fits, from its start or its end, with dots for the rest."""
    if font.getlength(text) <= width_px:
        return text

    def cut(length: int) -> str:
        return "…" + text[len(text) - length :] if keep_end else text[:length] + "…"

    too_long = bisect_left(range(len(text)), True, key=lambda length: font.getlength(cut(length)) > width_px)
    return cut(max(too_long - 1, 0))


def wrap(text: str, width_px: int, font: Font) -> list[str]:
    """Return a text in lines that fit; a word that is longer than a line is cut."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(shorten(word, width_px, font))
    return [line for line in lines if line]
