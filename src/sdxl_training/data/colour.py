"""Colours as a screen shows them: from whatever a file holds to 8-bit sRGB without transparency.

Shape legend: H x W pixel rows and columns, C colour channels.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
# Modes of Pillow's whose values have one meaning. Floats, 32-bit integers and 12 bits in 16 have no agreed range.
GREY_MODES = ("1", "L", "LA")
MODES = (*GREY_MODES, "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr")
SAME_COLOUR = 2  # of 255 levels: what conversions between two writings of one profile round to
PROFILE_ERRORS = (ImageCms.PyCMSError, OSError)

log = logging.getLogger(__name__)


def to_srgb(image: Image.Image, path: str, background: RGB = WHITE) -> Image.Image:
    """Return a decoded picture of one of MODES as 8-bit sRGB, its transparent parts over `background` (0 to 255).

    Palettes, grey, CMYK and YCbCr become RGB; an embedded colour profile is applied. A profile that does not fit its
    picture is ignored, as viewers do, with a warning that names `path`.
    """
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        return _without_profile(image, profile, path)
    rgba = image.convert("RGBA")
    colour = rgba.convert("L" if image.mode in GREY_MODES else "RGB")
    below = Image.new("RGB", image.size, background)
    return Image.composite(_without_profile(colour, profile, path), below, rgba.getchannel("A"))


def to_eight_bits(samples: NDArray[Any]) -> Image.Image:
    """Return 16-bit samples as OpenCV decodes them, (H, W) or (H, W, 3 or 4) in BGR order, as an 8-bit picture.

    65535 becomes 255, to the nearest level. Raises ValueError for samples of another kind.
    """
    if samples.dtype != np.uint16:
        raise ValueError(f"its samples are {samples.dtype}, not 16 bits")
    eight = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 257 = 65535 / 255
    if eight.ndim == 2:
        return Image.fromarray(eight)
    order = cv2.COLOR_BGR2RGB if eight.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    return Image.fromarray(cv2.cvtColor(eight, order))


def is_srgb(profile: bytes | None, mode: str) -> bool:
    """Whether pixels of mode L or RGB are sRGB already: no profile, or one that changes no colour that can be seen.

    False as well for a profile that cannot be used.
    """
    try:
        return not profile or _changes_nothing(profile, mode)
    except PROFILE_ERRORS:
        return False


@lru_cache(maxsize=64)
def _changes_nothing(profile: bytes, mode: str) -> bool:
    """Convert a grid of colours and look; a profile's name is no evidence (sRGB-elle-V2-g10 is linear)."""
    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        before = np.stack([levels] * 3, -1)[None]
        after = _convert(Image.fromarray(levels[None]), profile)
    else:
        grid = np.stack(np.meshgrid(*[levels[::15]] * 3), -1).reshape(1, -1, 3)
        before = np.concatenate([grid, np.stack([levels] * 3, -1)[None]], 1)
        after = _convert(Image.fromarray(before), profile)
    return int(np.abs(before.astype(int) - np.asarray(after)).max()) <= SAME_COLOUR


def _without_profile(image: Image.Image, profile: bytes | None, path: str) -> Image.Image:
    """Convert to RGB, through the embedded profile where there is one that is not sRGB already."""
    if not profile or (image.mode in ("L", "RGB") and is_srgb(profile, image.mode)):
        return image.convert("RGB")
    try:
        return _convert(image, profile)
    except PROFILE_ERRORS as error:
        log.warning("%s: its colour profile cannot be used (%s); read as sRGB", path, error)
        return image.convert("RGB")


def _convert(image: Image.Image, profile: bytes) -> Image.Image:
    # Profiles are made anew on each call: Little CMS reads them lazily, which threads must not share.
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(_as_profile_expects(image, source), source, target, outputMode="RGB")
    assert converted is not None  # only an in-place conversion returns None
    return converted


def _as_profile_expects(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Return the picture in the colour model of the profile; raises PyCMSError where it is of another kind."""
    space = profile.profile.xcolor_space.strip()
    if space == "RGB" and image.mode != "CMYK":
        return image.convert("RGB")
    if space == "GRAY" and image.mode in GREY_MODES:
        return image.convert("L")
    if space == image.mode == "CMYK":
        return image
    raise ImageCms.PyCMSError(f"a {space} profile in a {image.mode} picture")
