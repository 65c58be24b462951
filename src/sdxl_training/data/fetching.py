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
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.preparing import Job, prepare
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
    """What is known of the pictures' bytes, by picture number; shared with the other processes through files.

    Used by one thread of a process. What is learnt belongs to the file as it was listed: of a file that has changed
    since, the next listing knows nothing.
    """

    def known(self, picture: int) -> bytes | None:
        """Return the digest of the picture's bytes, if somebody has read them."""

    def learn(self, picture: int, content: bytes) -> None:
        """Remember the digest, in place of another one."""

    def failure(self, picture: int) -> str | None:
        """Return why the picture cannot be read, decoded or encoded, if somebody has tried."""

    def fail(self, picture: int, reason: str) -> None:
        """Remember that the picture cannot be read, decoded or encoded."""

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return digests (P, 2), which of them are known, and which pictures failed."""

    def refresh(self) -> bool:
        """Read what other processes have learnt since; return whether there was anything."""


class Reader(Protocol):
    """Where the pictures' bytes are."""

    def read(self, number: int) -> bytes:
        """Return the bytes of a picture. Used by several threads.

        Raises UnreadablePicture where it is this one that cannot be had, UserError where it is all of them.
        """


@dataclass(frozen=True, slots=True)
class Fetch:
    """Finds what a visit needs. Without a cache every visit decodes. background: laid under transparent pixels."""

    pictures: Reader
    contents: Contents
    cache: LatentCache | None
    background: RGB = WHITE

    def __call__(self, record: ImageRecord, plan: CropPlan) -> Stored | Unencoded:
        """Return the record's latent, or its pixels where nobody has encoded them yet. Raises UnreadablePicture."""
        # First of all: of a picture that failed in one variant, another one may have been stored before.
        self._refuse_failed(record)
        found = self._find(record.picture, plan)
        if found is None and self._learn_news(record.picture):
            self._refuse_failed(record)
            found = self._find(record.picture, plan)
        return self._open(record, plan) if found is None else found

    def _refuse_failed(self, record: ImageRecord) -> None:
        if reason := self.contents.failure(record.picture):
            raise UnreadablePicture(record.path, reason)

    def _find(self, picture: int, plan: CropPlan) -> Stored | None:
        content = self.contents.known(picture)
        return None if content is None else self._stored(content, plan)

    def _stored(self, content: bytes, plan: CropPlan) -> Stored | None:
        latent = None if self.cache is None else self.cache.read(content, plan)
        return None if latent is None else Stored(*latent)

    def _learn_news(self, picture: int) -> bool:
        """Return whether other processes have learnt anything since that may concern the picture."""
        news = self.contents.refresh()
        # A latent that somebody has made is of a picture that somebody has read: else the cache need not be asked.
        if self.cache is not None and self.contents.known(picture) is not None:
            news |= self.cache.refresh()
        return news

    def _open(self, record: ImageRecord, plan: CropPlan) -> Stored | Unencoded:
        try:
            data = self.pictures.read(record.picture)
        except UnreadablePicture as error:
            self.contents.fail(record.picture, error.reason)
            raise
        content = digest_content(data)
        if content != self.contents.known(record.picture):
            self.contents.learn(record.picture, content)
            if (found := self._stored(content, plan)) is not None:
                return found
        prepared = prepare(Job(data, record.path, (plan,)), self.background)
        if isinstance(prepared, UnreadablePicture):
            self.contents.fail(record.picture, prepared.reason)
            raise prepared
        return Unencoded(prepared[0], record.path, record.picture, record.sample_id, content, plan)
