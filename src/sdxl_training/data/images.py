"""Pictures as arrays: strict decoding, resizing, cropping.

Shape legend: H x W pixel rows and columns, C = 3 colour channels. Decoding goes by content, never by file name, and is
strict: a picture that lacks its last rows is unreadable, not grey at the bottom.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from torch import Tensor

from sdxl_training.records import CropPlan, SizeHW

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# What Pillow raises on damaged content: OSError for truncation, SyntaxError for bad chunks, the rest from its parsers.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error, Image.DecompressionBombError)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
RETRY_SECONDS = (0.1, 0.5)

log = logging.getLogger(__name__)


class UnreadablePicture(Exception):  # noqa: N818 - a state of the picture
    """A file that cannot be used as a picture; says which and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_file(path: str) -> bytes:
    """Return the file's bytes; an I/O error is retried twice, since network disks hiccup.

    Raises UnreadablePicture when the file is missing, forbidden, or still fails.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            permanent = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
            if permanent or pause is None:
                raise UnreadablePicture(path, f"the file cannot be read: {error.strerror or error}") from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def hash_content(data: bytes) -> str:
    """Return the BLAKE2b digest (128 bits, hex) that stands for a file's content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_size(data: bytes, path: str) -> SizeHW:
    """Return (height, width) as a viewer shows the picture, from its header alone.

    Raises UnreadablePicture when the content is not a picture.
    """
    with _opened(data, path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def read_pixels(path: str) -> Tensor:
    """Return the picture at `path` as uint8 RGB of shape (H, W, 3); see `decode_pixels`."""
    return decode_pixels(read_file(path), path)


def decode_pixels(data: bytes, path: str) -> Tensor:
    """Decode a whole picture to uint8 sRGB of shape (H, W, 3), upright, transparent parts on white.

    16-bit grey is scaled to 8 bits; palettes, grey and CMYK become RGB; an embedded colour profile is applied. A
    profile that does not fit its picture is ignored, as viewers do, with a warning that names the file. Of an
    animation the first picture counts. Raises UnreadablePicture for damaged or incomplete content.
    """
    with _opened(data, path) as image:
        turn = TURNS.get(_orientation(image))
        image.load()
        rgb = _on_white(image, path)
        upright = rgb if turn is None else rgb.transpose(turn)
        return torch.from_numpy(np.array(upright))


def resize_and_crop(pixels_HWC: Tensor, plan: CropPlan) -> Tensor:
    """Carry out the plan with antialiased bicubic resampling; uint8 (H, W, C) in and out.

    A picture that already has its bucket's size passes untouched. Raises ValueError when the pixels are not of the
    size the plan was made for.
    """
    if tuple(pixels_HWC.shape[:2]) != plan.original_hw:
        raise ValueError(f"pixels of {tuple(pixels_HWC.shape[:2])} do not match the plan for {plan.original_hw}")
    if plan.resized_hw != plan.original_hw:
        pixels_BCHW = pixels_HWC.permute(2, 0, 1).unsqueeze(0)
        resized_BCHW = torch.nn.functional.interpolate(pixels_BCHW, plan.resized_hw, mode="bicubic", antialias=True)
        pixels_HWC = resized_BCHW[0].permute(1, 2, 0)
    (top, left), (height, width) = plan.crop_tl, plan.bucket.size_hw
    return pixels_HWC[top : top + height, left : left + width].contiguous()


def to_model_range(pixels_HWC: Tensor) -> Tensor:
    """Turn uint8 (H, W, C) in 0..255 into fp32 (C, H, W) in [-1, 1]."""
    return pixels_HWC.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0


@contextmanager
def _opened(data: bytes, path: str) -> Iterator[Image.Image]:
    """Open by content and turn every complaint of Pillow's into UnreadablePicture."""
    if not data:
        raise UnreadablePicture(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError:
        raise UnreadablePicture(path, "the content is not a PNG, JPEG, WebP or BMP picture") from None
    except DAMAGE as error:
        raise UnreadablePicture(path, f"the picture is damaged: {error}") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation known before the pixels are decoded.

    The base class's getexif is called on purpose: PNG's own decodes the whole picture to look for a late chunk, and the
    scan and the decoder must see the same orientation.
    """
    return int(Image.Image.getexif(image).get(ExifTag.Orientation, 1))


def _on_white(image: Image.Image, path: str) -> Image.Image:
    """Return the picture as sRGB without transparency."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile, path)
    rgba = image.convert("RGBA")
    colour = rgba.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    white = Image.new("RGB", image.size, "white")
    return Image.composite(_to_srgb(colour, profile, path), white, rgba.getchannel("A"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion has clipped instead of scaled in some versions."""
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, path: str) -> Image.Image:
    """Convert to RGB, through the embedded profile where there is one that is not sRGB already."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image.convert("RGB")
        # Profiles are made anew on each call: Little CMS reads them lazily, which threads must not share.
        converted = ImageCms.profileToProfile(
            _as_profile_expects(image, source), source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError) as error:
        log.warning("%s: its colour profile cannot be used (%s); read as sRGB", path, error)
        return image.convert("RGB")
    assert converted is not None  # only an in-place conversion returns None
    return converted


def _as_profile_expects(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Return the picture in the colour model of the profile; raises PyCMSError where it is of another kind."""
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and image.mode != "CMYK":
        return image.convert("RGB")
    if (space, image.mode) in (("GRAY", "L"), ("CMYK", "CMYK")):
        return image
    raise ImageCms.PyCMSError(f"a {space} profile in a {image.mode} picture")
