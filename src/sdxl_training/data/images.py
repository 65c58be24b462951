"""Pictures from file to network input: reading, resizing, cropping. Decoding is in `decoding`.

Shape legend: H x W pixel rows and columns, C = 3 colour channels.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.decoding import PictureHeader, UnreadablePicture, decode_pixels, read_header
from sdxl_training.records import CropPlan

__all__ = [
    "RESAMPLING",
    "PictureHeader",
    "UnreadablePicture",
    "decode_pixels",
    "digest_content",
    "look_at",
    "read_file",
    "read_pixels",
    "resize_and_crop",
    "to_model_range",
]

# Lanczos came with torch 2.12. What pixels become depends on it, so whatever keeps their latents must know it.
RESAMPLING = "lanczos" if torch.__version__ >= "2.12" else "bicubic"
RETRY_SECONDS = (0.1, 0.5)

Result = TypeVar("Result")


def read_file(path: str) -> bytes:
    """Return the file's bytes; an I/O error is retried twice, since network disks hiccup.

    Raises UnreadablePicture when the file is missing, forbidden, or still fails.
    """
    return _patiently(lambda: Path(path).read_bytes(), path)


def look_at(path: str) -> PictureHeader:
    """Return what the header of the picture at `path` says; I/O errors are retried as in `read_file`.

    Of JPEG, PNG, WebP, TIFF, GIF and BMP only the header is read. Raises UnreadablePicture.
    """

    def look() -> PictureHeader:
        with Path(path).open("rb") as file:
            return read_header(file, path)

    return _patiently(look, path)


def digest_content(data: bytes) -> bytes:
    """Return the BLAKE2b digest (16 bytes) that stands for a file's content."""
    return hashlib.blake2b(data, digest_size=16).digest()


def read_pixels(path: str, background: RGB = WHITE) -> Tensor:
    """Return the picture at `path` as uint8 RGB of shape (H, W, 3); see `decode_pixels`."""
    return decode_pixels(read_file(path), path, background)


def resize_and_crop(pixels_HWC: Tensor, plan: CropPlan) -> Tensor:
    """Carry out the plan with antialiased resampling (see RESAMPLING); uint8 (H, W, C) in and out.

    A picture that already has its bucket's size passes untouched. Raises ValueError when the pixels are not of the
    size the plan was made for.
    """
    if tuple(pixels_HWC.shape[:2]) != plan.original_hw:
        raise ValueError(f"pixels of {tuple(pixels_HWC.shape[:2])} do not match the plan for {plan.original_hw}")
    if plan.resized_hw != plan.original_hw:
        # In this order torch knows the pixels as channels-last: it resizes them in place of a planar copy.
        pixels_1CHW = pixels_HWC.unsqueeze(0).permute(0, 3, 1, 2)
        pixels_HWC = interpolate(pixels_1CHW, plan.resized_hw, mode=RESAMPLING, antialias=True)[0].permute(1, 2, 0)
    (top, left), (height, width) = plan.crop_tl, plan.bucket.size_hw
    cut_HWC = pixels_HWC[top : top + height, left : left + width]
    return (cut_HWC.flip(1) if plan.flipped else cut_HWC).contiguous()


def to_model_range(pixels_HWC: Tensor) -> Tensor:
    """Turn uint8 (..., H, W, C) in 0..255 into fp32 (..., C, H, W) in [-1, 1].

    A quarter of the bytes travels if whole batches are moved to the device first and turned there.
    """
    return pixels_HWC.movedim(-1, -3).to(torch.float32) / 127.5 - 1.0


def _patiently(read: Callable[[], Result], path: str) -> Result:
    """Return what `read` returns, after a pause where the disk fails; say why where it fails for good."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return read()
        except OSError as error:
            permanent = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
            if permanent or pause is None:
                raise UnreadablePicture(path, f"the file cannot be read: {error.strerror or error}") from error
        time.sleep(pause)
    raise AssertionError("unreachable")
