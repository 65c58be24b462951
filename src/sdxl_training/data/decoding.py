"""What a file's bytes say: its format, size and orientation, and its pixels. The content decides, never the name.

Pillow reads the headers, and the pixels of uncommon pictures; OpenCV, which is faster, decodes plain JPEG and PNG
pictures, to the same bytes. Decoding is strict: a picture that lacks its last rows is unreadable, not grey at the
bottom. No setting of Pillow's is changed or relied on, since those hold for the whole process.

Shape legend: H x W pixel rows and columns, C = 3 colour channels.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile
from torch import Tensor

from sdxl_training.data.colour import MODES, RGB, WHITE, is_srgb, to_eight_bits, to_srgb
from sdxl_training.data.webp import read_webp_header
from sdxl_training.records import SizeHW

try:
    from pillow_heif import HeifImageFile  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    HeifImageFile = None
try:
    from pillow_jxl.JpegXLImagePlugin import JXLImageFile  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    JXLImageFile = None

Pixels = NDArray[np.uint8]

# OpenCV's threads would compete with the loader's own, and they do not survive a fork.
cv2.setNumThreads(0)

MAX_PIXELS = 178_956_970  # where Pillow, too, speaks of a decompression bomb: half a gigabyte of RGB
LONGEST_START = 64  # bytes that tell a format
# What decoders raise on damaged content: OSError for truncation, SyntaxError for bad chunks, RuntimeError for AVIF, the
# rest from parsers; warnings where the process has made them errors.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
    cv2.error,
    Image.DecompressionBombError,
)
# 16-bit samples as Pillow names them; it cuts colours to 8 bits without saying so in the mode.
DEEP = re.compile(r"(I|LA|RGB|RGBA);16[BLN]?")
# EXIF orientation -> what shows the stored picture upright (EXIF 2.32, 4.6.4 A)
TURNS: dict[int, Callable[[Pixels], Any]] = {
    2: lambda pixels_HWC: cv2.flip(pixels_HWC, 1),
    3: lambda pixels_HWC: cv2.rotate(pixels_HWC, cv2.ROTATE_180),
    4: lambda pixels_HWC: cv2.flip(pixels_HWC, 0),
    5: cv2.transpose,
    6: lambda pixels_HWC: cv2.rotate(pixels_HWC, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels_HWC: cv2.rotate(cv2.transpose(pixels_HWC), cv2.ROTATE_180),
    8: lambda pixels_HWC: cv2.rotate(pixels_HWC, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class UnreadablePicture(Exception):  # noqa: N818 - a state of the picture
    """A file that cannot be used as a picture; says which and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """What a file says of its picture before the pixels. size_hw is that of the picture as shown.

    mode: Pillow's name of the colour model (RGB, RGBA, L, P, CMYK, I;16 ...). orientation: the EXIF orientation in
    which the pixels are stored; 1 where the format's decoder turns them itself.
    """

    size_hw: SizeHW
    format: str
    mode: str
    orientation: int


@dataclass(frozen=True, slots=True)
class Format:
    """A picture format: how its files start, the Pillow class that reads it, and where that class is to be had."""

    name: str
    start: bytes
    reader: Callable[[BinaryIO], ImageFile] | None
    package: str = "Pillow"


FORMATS = (
    Format("JPEG", rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    Format("PNG", rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    Format("WebP", rb"RIFF.{4}WEBP", WebPImagePlugin.WebPImageFile),
    Format("TIFF", rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
    Format("GIF", rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    Format("BMP", rb"BM", BmpImagePlugin.BmpImageFile),
    Format(
        "AVIF",
        rb".{4}ftyp(.{4})*?avi[fs]",
        AvifImagePlugin.AvifImageFile if AvifImagePlugin.SUPPORTED else None,
        "a Pillow that is built with AVIF",
    ),
    Format("HEIF", rb".{4}ftyp(.{4})*?(hei[cxms]|hev[cx]|mif1|msf1)", HeifImageFile, "pillow-heif"),
    Format("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", JXLImageFile, "pillow-jxl-plugin"),
)


def read_header(file: BinaryIO, path: str) -> PictureHeader:
    """Read the header of an open file; of JPEG, PNG, WebP, TIFF, GIF and BMP no more than its header is read.

    Raises UnreadablePicture (`path` is its name there) for what is no picture, OSError where the file cannot be read.
    """
    kind = _recognise(file, path)
    with _named(path):
        if kind.name == "WebP":
            width, height, mode, info = read_webp_header(file)
            _check_size(width, height, path)
            image = Image.Image()
            image.info.update(info)
            return _header(kind, (width, height), mode, _orientation(image))
    with _opened(file, kind, path) as image:
        return _header(kind, image.size, image.mode, _orientation(image))


def decode_pixels(data: bytes, path: str, background: RGB = WHITE) -> Tensor:
    """Decode a whole picture to uint8 sRGB of shape (H, W, 3), upright, transparent parts over `background`.

    16-bit samples are scaled to 8; palettes, grey and CMYK become RGB; an embedded colour profile is applied, or
    ignored with a warning that names the file where it does not fit. Of an animation the first picture counts. Raises
    UnreadablePicture for damaged or incomplete content.
    """
    file = io.BytesIO(data)
    with _opened(file, _recognise(file, path), path) as image:
        turn = TURNS.get(_orientation(image))
        pixels_HWC = _decode(image, data, path, background)
        return torch.from_numpy(pixels_HWC if turn is None else turn(pixels_HWC))


def _decode(image: ImageFile, data: bytes, path: str, background: RGB) -> Pixels:
    """Return the pixels as stored; whether they are upright is not looked at."""
    profile = image.info.get("icc_profile")
    if _is_deep(image):
        eight_bits = to_eight_bits(_by_opencv(data, image.size, cv2.IMREAD_UNCHANGED))
        eight_bits.info["icc_profile"] = profile
        return np.array(to_srgb(eight_bits, path, background))
    plain = image.format in ("JPEG", "PNG") and image.mode in ("L", "RGB") and not image.has_transparency_data
    if plain and not getattr(image, "is_animated", False) and is_srgb(profile, image.mode):
        try:
            return _by_opencv(data, image.size, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        except ValueError:
            pass  # Pillow has the last word, and says what is wrong
    if image.mode not in MODES:
        raise UnreadablePicture(
            path, f"its samples (mode {image.mode}) have no agreed range; save it with 8 or 16 bits"
        )
    image.load()
    return np.array(to_srgb(image, path, background))


def _by_opencv(data: bytes, size: tuple[int, int], flags: int) -> Pixels:
    """Decode a file whose size is known to be `size` (width, height); raises ValueError where that cannot be done."""
    if data.startswith(b"\x89PNG") and not _chunks_fit(data):
        raise ValueError("it is not complete")
    pixels: Pixels | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None or pixels.shape[1::-1] != size:
        raise ValueError("its pixels cannot be decoded")
    return pixels


def _chunks_fit(png: bytes) -> bool:
    """Whether all chunks are there: OpenCV believes the lengths they claim, and makes room for up to 4 GB."""
    start = 8
    while start + 12 <= len(png):
        last = png[start + 4 : start + 8] == b"IEND"
        start += 12 + int.from_bytes(png[start : start + 4], "big")
        if last:
            return start <= len(png)
    return False


def _is_deep(image: ImageFile) -> bool:
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return False
    arguments = image.tile[0][3]
    return DEEP.fullmatch(str(arguments[0] if isinstance(arguments, tuple) else arguments)) is not None


# Opening


def _recognise(file: BinaryIO, path: str) -> Format:
    start = file.read(LONGEST_START)
    file.seek(0)
    if not start:
        raise UnreadablePicture(path, "the file is empty")
    for kind in FORMATS:
        if re.match(kind.start, start, re.DOTALL):
            return kind
    *names, last = (kind.name for kind in FORMATS)
    raise UnreadablePicture(path, f"the content is not a {', '.join(names)} or {last} picture")


@contextmanager
def _opened(file: BinaryIO, kind: Format, path: str) -> Iterator[ImageFile]:
    if kind.reader is None:
        raise UnreadablePicture(path, f"this is a {kind.name} picture; to read it, install {kind.package}")
    with _named(path):
        metadata: dict[str, bytes] = {}
        if kind.name == "WebP":  # its reader makes room for the pixels at once
            width, height, _, metadata = read_webp_header(file)
            _check_size(width, height, path)
            file.seek(0)
        # Not Image.open: its limit on the size is the process's, and below it a warning.
        with kind.reader(file) as image:
            _check_size(*image.size, path)
            if kind.name == "WebP":  # by the same reading for the header and for the pixels
                image.info = {"icc_profile": image.info.get("icc_profile")}
                image.info.update(metadata)
            yield image


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn what decoders raise on bad content into UnreadablePicture; errors of the file system pass."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadablePicture(path, f"the picture is damaged: {error}") from error


def _check_size(width: int, height: int, path: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadablePicture(
            path, f"its header claims {width} x {height} pixels; over {MAX_PIXELS / 1e6:.0f} million are not decoded"
        )
    if width * height == 0:
        raise UnreadablePicture(path, f"it has no pixels ({width} x {height})")


def _header(kind: Format, size: tuple[int, int], mode: str, orientation: int) -> PictureHeader:
    width, height = size
    return PictureHeader((width, height) if orientation in SIDEWAYS else (height, width), kind.name, mode, orientation)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation known before the pixels are decoded; 1 where there is none to be undone.

    The base class's getexif is called on purpose: PNG's own decodes the whole picture to look for a late chunk, and the
    scan and the decoder must see the same orientation.
    """
    # Pillow turns TIFF itself, libjxl turns what it does not hand out as the JPEG it was made of.
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    value = Image.Image.getexif(image).get(ExifTag.Orientation)
    return value if isinstance(value, int) and value in TURNS else 1
