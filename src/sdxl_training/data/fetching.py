"""What a visit to a picture finds: its latent in the cache, or its pixels, to be encoded when the batch arrives.

Shape legend: C latent channels, H x W latent rows and columns; of pixels, H x W rows and columns of the bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sdxl_training.data.cache import LatentCache
from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.images import UnreadablePicture, decode_pixels, digest_content, resize_and_crop
from sdxl_training.records import CropPlan, ImageRecord


@dataclass(frozen=True, slots=True)
class Stored:
    """A latent's distribution as the cache keeps it; fp32, scaled."""

    mean_CHW: Tensor
    std_CHW: Tensor


@dataclass(frozen=True, slots=True)
class Unencoded:
    """Prepared pixels, uint8, of the picture with this number and content, and how they were prepared."""

    pixels_HWC: Tensor
    path: str
    picture: int
    sample_id: int
    content: bytes
    plan: CropPlan


class Contents(Protocol):
    """What is known of the pictures' bytes, by picture number; shared with the other processes through files."""

    def known(self, picture: int) -> bytes | None:
        """Return the digest of the picture's bytes, if somebody has read them."""

    def learn(self, picture: int, content: bytes) -> None:
        """Remember the digest."""

    def failure(self, picture: int) -> str | None:
        """Return why the picture cannot be decoded or encoded, if somebody has tried."""

    def fail(self, picture: int, reason: str) -> None:
        """Remember that the picture cannot be decoded or encoded."""

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return digests (P, 2), which of them are known, and which pictures failed."""

    def refresh(self) -> bool:
        """Read what other processes have learnt since; return whether there was anything."""


class Reader(Protocol):
    """Where the pictures' bytes are."""

    def read(self, number: int) -> bytes:
        """Return the bytes of a picture; raises UnreadablePicture."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Finds what a visit needs. Without a cache every visit decodes. background: laid under transparent pixels."""

    pictures: Reader
    contents: Contents
    cache: LatentCache | None
    background: RGB = WHITE

    def __call__(self, record: ImageRecord, plan: CropPlan) -> Stored | Unencoded:
        """Return the record's latent, or its pixels where nobody has encoded them yet. Raises UnreadablePicture."""
        stored = self._stored(record.picture, plan)
        if stored is not None:
            return stored
        if reason := self.contents.failure(record.picture):
            raise UnreadablePicture(record.path, reason)
        try:
            return self._prepared(record, plan)
        except UnreadablePicture as error:
            self.contents.fail(record.picture, error.reason)
            raise

    def _prepared(self, record: ImageRecord, plan: CropPlan) -> Stored | Unencoded:
        data = self.pictures.read(record.picture)
        content = digest_content(data)
        if content != self.contents.known(record.picture):
            self.contents.learn(record.picture, content)
            if self.cache is not None and (found := self.cache.read(content, plan)) is not None:
                return Stored(*found)
        pixels_HWC = prepare(data, record.path, plan, self.background)
        return Unencoded(pixels_HWC, record.path, record.picture, record.sample_id, content, plan)

    def _stored(self, picture: int, plan: CropPlan) -> Stored | None:
        if self.cache is None:
            return None
        for last_try in (False, True):
            content = self.contents.known(picture)
            found = None if content is None else self.cache.read(content, plan)
            if found is not None:
                return Stored(*found)
            # Another process may have encoded it since.
            if last_try or not (self.contents.refresh() | self.cache.refresh()):
                break
        return None


def prepare(data: bytes, path: str, plan: CropPlan, background: RGB) -> Tensor:
    """Return the picture as planned, uint8 (H, W, C). Raises UnreadablePicture, also where it is not as it was."""
    pixels_HWC = decode_pixels(data, path, background)
    if tuple(pixels_HWC.shape[:2]) != plan.original_hw:
        height, width = plan.original_hw
        raise UnreadablePicture(path, f"it is no longer {height}x{width} as when it was indexed; start again")
    return resize_and_crop(pixels_HWC, plan)
