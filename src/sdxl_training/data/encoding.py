"""Prepared pixels become latents: in batches, checked, and kept.

Shape legend: B pictures of one bucket, C latent channels, H x W rows and columns (of pixels or latents).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdxl_training.data.cache import Latent, LatentCache
from sdxl_training.data.fetching import Unencoded
from sdxl_training.data.images import to_model_range
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import Quarantined, UserError

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""pixels_BCHW in [-1, 1], fp32 -> scaled mean_BCHW and std_BCHW, fp32, on any device"""

NOT_FINITE = "its latent is not finite in 16 bit; try another VAE or VAE precision"

log = logging.getLogger(__name__)


@dataclass
class Encoder:
    """Encodes pictures and, with a cache and a writer, stores what it made: each batch before the next is encoded.

    batch_size: most pictures that go through the VAE at once; lowered where the device has no room for as many.
    exactly: in fp32, for a picture whose latent is not finite otherwise. in_tiles: while it is entered, encode and
    exactly cut a large picture into tiles; for one that does not fit alone. What is handed out is what the cache would
    give back, so a visit before the latent is stored and one after it see the same.
    """

    encode: Encode
    device: torch.device
    batch_size: int
    cache: LatentCache | None = None
    writer: StoreWriter | None = None
    exactly: Encode | None = None
    in_tiles: Callable[[], AbstractContextManager[object]] | None = None
    bad: list[Quarantined] = field(default_factory=list)
    _said_tiles: bool = field(default=False, init=False)

    def __call__(self, pictures: Sequence[Unencoded]) -> list[Latent | None]:
        """Return mean_CHW and std_CHW of pictures of one bucket, fp32, on the device; None: it has no finite latent.

        Raises UserError, naming the picture, where the device has no room for one of them alone.
        """
        latents: list[Latent | None] = []
        asked = self.batch_size
        while rest := pictures[len(latents) : len(latents) + self.batch_size]:
            made = self._make(rest)
            if made is None and len(rest) > 1:
                self.batch_size = len(rest) // 2
                continue
            latents += self._hand_out(rest, self._make_in_tiles(rest[0]) if made is None else made)
        if self.batch_size < asked:
            log.warning(
                "The device has no room to encode %d pictures of %s at once: from now on they are %d.",
                asked,
                _size(pictures[0]),
                self.batch_size,
            )
        return latents

    def take_bad(self) -> list[Quarantined]:
        """Return the pictures found to be of no use since the last time."""
        bad, self.bad = self.bad, []
        return bad

    def _make(self, pictures: Sequence[Unencoded]) -> list[Latent | None] | None:
        """Return what the VAE makes of a batch; None where the device has no room for it."""
        pixels_BHWC = torch.stack([picture.pixels_HWC for picture in pictures])
        try:
            # A quarter of the bytes travels: whole numbers become floating-point on the device.
            return encode_finite(self.encode, to_model_range(pixels_BHWC.to(self.device)), self.exactly)
        except torch.OutOfMemoryError:
            pass  # the error holds on to what was computed: only when it is gone is there room again
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _make_in_tiles(self, picture: Unencoded) -> list[Latent | None]:
        made = None
        if self.in_tiles is not None:
            with self.in_tiles():
                made = self._make([picture])
        if made is None:
            raise UserError(
                f"{picture.path}: the device has no room to encode this picture of {_size(picture)}, even alone"
                + (
                    ". Set model.vae_tiling: true"
                    if self.in_tiles is None
                    else " and in tiles. End other programs there"
                )
                + ", set model.vae_precision: bf16, or lower data.resolution; what was encoded before is kept."
            )
        if not self._said_tiles:
            self._said_tiles = True
            log.warning(
                "%s: the device has no room to encode this picture of %s at once: it goes through the VAE in tiles, as "
                "do all that do not fit, which costs a little exactness where they meet.",
                picture.path,
                _size(picture),
            )
        return made

    def _hand_out(self, pictures: Sequence[Unencoded], latents: Sequence[Latent | None]) -> list[Latent | None]:
        """Keep what was made, note what could not be made, and return what a visit sees."""
        entries = [(one, latent) for one, latent in zip(pictures, latents, strict=True) if latent is not None]
        self._keep(entries)
        self.bad += [
            Quarantined(one.path, NOT_FINITE) for one, latent in zip(pictures, latents, strict=True) if latent is None
        ]
        return [None if latent is None else self._served(latent) for latent in latents]

    def _served(self, latent: Latent) -> Latent:
        mean_CHW, std_CHW = latent if self.cache is None else self.cache.served(self.cache.moments(*latent))
        return self._widen(mean_CHW), self._widen(std_CHW)

    def _widen(self, moment_CHW: Tensor) -> Tensor:
        return moment_CHW.to(self.device, torch.float32, non_blocking=True)

    def _keep(self, entries: Sequence[tuple[Unencoded, Latent]]) -> None:
        if self.cache is None or self.writer is None or not entries:
            return
        entries = [*{(one.content, one.plan): (one, latent) for one, latent in entries}.values()]
        self.writer.append(
            np.stack([self.cache.key(one.content, one.plan) for one, _ in entries]),
            np.stack([self.cache.origin(one.sample_id, one.content, one.plan) for one, _ in entries]),
            [self.cache.moments(*latent) for _, latent in entries],
        )


def _size(picture: Unencoded) -> str:
    height, width, _ = picture.pixels_HWC.shape
    return f"{height}x{width}"


def encode_finite(encode: Encode, pixels_BCHW: Tensor, exactly: Encode | None = None) -> list[Latent | None]:
    """Return fp16 (mean_CHW, std_CHW) of each picture; None where they are not finite even alone and in fp32."""
    latents = _encode_half(encode, pixels_BCHW)
    for i, latent in enumerate(latents):
        if latent is None:
            latents[i] = _encode_half(exactly or encode, pixels_BCHW[i : i + 1])[0]
    return latents


def _encode_half(encode: Encode, pixels_BCHW: Tensor) -> list[Latent | None]:
    # Finite is judged after rounding: a value beyond fp16's range becomes infinite and must not be stored.
    mean_BCHW, std_BCHW = (moment.detach().to("cpu", torch.float16).contiguous() for moment in encode(pixels_BCHW))
    return [
        (mean_CHW, std_CHW) if bool(mean_CHW.isfinite().all() and std_CHW.isfinite().all()) else None
        for mean_CHW, std_CHW in zip(mean_BCHW, std_BCHW, strict=True)
    ]
