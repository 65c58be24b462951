"""Prepared pixels become latents: in batches, checked, and kept.

Shape legend: B pictures of one bucket, C latent channels, H x W rows and columns (of pixels or latents).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdxl_training.data.cache import Latent, LatentCache
from sdxl_training.data.fetching import Unencoded
from sdxl_training.data.images import to_model_range
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import Quarantined

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""pixels_BCHW in [-1, 1], fp32 -> scaled mean_BCHW and std_BCHW, fp32, on any device"""

NOT_FINITE = "its latent is not finite in 16 bit; try another VAE or VAE precision"


@dataclass
class Encoder:
    """Encodes pictures and, with a cache and a writer, stores what it made: each batch before the next is encoded.

    batch_size: most pictures that go through the VAE at once. exactly: in fp32, for a picture whose latent is not
    finite otherwise. What is handed out is what the cache would give back, so a visit before the latent is stored and
    one after it see the same.
    """

    encode: Encode
    device: torch.device
    batch_size: int
    cache: LatentCache | None = None
    writer: StoreWriter | None = None
    exactly: Encode | None = None
    bad: list[Quarantined] = field(default_factory=list)

    def __call__(self, pictures: Sequence[Unencoded]) -> list[Latent | None]:
        """Return mean_CHW and std_CHW of pictures of one bucket, fp32, on the device; None: it has no finite latent."""
        batches = (pictures[first : first + self.batch_size] for first in range(0, len(pictures), self.batch_size))
        return [latent for batch in batches for latent in self._encode(batch)]

    def take_bad(self) -> list[Quarantined]:
        """Return the pictures found to be of no use since the last time."""
        bad, self.bad = self.bad, []
        return bad

    def _encode(self, pictures: Sequence[Unencoded]) -> list[Latent | None]:
        pixels_BHWC = torch.stack([picture.pixels_HWC for picture in pictures])
        # A quarter of the bytes travels: whole numbers become floating-point on the device.
        latents = encode_finite(self.encode, to_model_range(pixels_BHWC.to(self.device)), self.exactly)
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
