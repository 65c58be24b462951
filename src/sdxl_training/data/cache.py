"""Latents on disk: encoded once, read by memory map, encoded again only where something changed.

What is stored is the VAE's posterior (mean and standard deviation, scaled, fp16), not one sample of it, so every visit
draws afresh. An entry's key is a function of everything that the latent is a function of: the picture's bytes, how its
pixels are prepared, the VAE and its precision, and the version of this code.

Shape legend: C latent channels, H x W latent rows and columns; N records, M of their variants.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.images import RESAMPLING
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.store import DamagedEntry, Store
from sdxl_training.data.store_format import ORIGIN
from sdxl_training.records import CropPlan

CODE_VERSION = 3  # of how pixels are prepared and latents stored: part of every key
LATENT_FACTOR = 8
LATENT_CHANNELS = 4

Posterior = Literal["sample", "mean"]
Keys = NDArray[np.uint64]
"""128 bits each: (..., 2)."""


log = logging.getLogger(__name__)


@lru_cache(maxsize=2**16)
def plan_digest(plan: CropPlan) -> bytes:
    """Return 16 bytes that are equal exactly where the prepared pixels are."""
    return _digest(describe_plan(plan))


def describe_plan(plan: CropPlan) -> str:
    """Return the preparation of the pixels as text, equal exactly where the prepared pixels are."""
    (height, width), (top, left) = plan.resized_hw, plan.crop_tl
    return f"{height}x{width}+{top}+{left}>{plan.bucket}" + (" mirrored" if plan.flipped else "")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _words(digest: bytes) -> Keys:
    return np.frombuffer(digest, dtype="<u8")


class LatentCache:
    """The latents in a folder that were made by one VAE.

    vae_fingerprint, background, recipe: what decides a latent beside the picture and its crop: the VAE and its
    precision, the colour behind transparent pixels, how pixels are made. posterior: `mean` returns means only (their
    deviation reads as zero); `sample` does not count latents stored without deviation.
    """

    def __init__(
        self,
        folder: Path,
        vae_fingerprint: str,
        posterior: Posterior = "sample",
        background: RGB = WHITE,
        recipe: str = RESAMPLING,
    ) -> None:
        self.store = Store(folder)
        self.posterior: Posterior = posterior
        self._settings = {
            kind: _digest(f"{CODE_VERSION} {vae_fingerprint} {background} {recipe} {kind}")
            for kind in ("sample", "mean")
        }

    @property
    def settings(self) -> bytes:
        """Return the digest under which latents are written."""
        return self._settings[self.posterior]

    def key(self, content: bytes, plan: CropPlan) -> Keys:
        """Return the key, shape (2,), of a picture with this content digest, prepared like this."""
        return _words(content) ^ _words(plan_digest(plan)) ^ _words(self.settings)

    def missing(self, contents_N: Keys, known_N: NDArray[np.bool_], plan: PicturePlan) -> NDArray[np.bool_]:
        """Return which records lack the latent of at least one variant. contents_N: shape (N, 2)."""
        record_M, digests_M = plan_digests(plan)
        there_M = np.zeros(len(record_M), dtype=bool)
        for settings in self._readable():
            there_M |= self.store.find(contents_N[record_M] ^ digests_M ^ _words(settings)) >= 0
        missing_N: NDArray[np.bool_] = ~known_N
        missing_N[record_M[~there_M]] = True
        return missing_N

    def read(self, content: bytes, plan: CropPlan) -> tuple[Tensor, Tensor] | None:
        """Return mean_CHW and std_CHW, fp32, scaled; None where the cache has none that can be used."""
        for row in self.store.find(self._readable_keys(content, plan)):
            if row < 0:
                continue
            try:
                moments = self.store.read(int(row)).to(torch.float32)
            except DamagedEntry as damage:
                log.warning("%s; its picture is encoded again", damage)
                continue
            return moments[0], torch.zeros_like(moments[0]) if self.posterior == "mean" else moments[1]
        return None

    def has(self, content: bytes, plan: CropPlan) -> bool:
        """Return whether `read` would find something."""
        return bool((self.store.find(self._readable_keys(content, plan)) >= 0).any())

    def moments(self, mean_CHW: Tensor, std_CHW: Tensor) -> Tensor:
        """Return what is stored of a latent."""
        return torch.stack([mean_CHW, std_CHW] if self.posterior == "sample" else [mean_CHW])

    def origin(self, sample_id: int, content: bytes, plan: CropPlan) -> NDArray[np.void]:
        """Return what an entry is made from, in a few numbers."""
        row = (sample_id, tuple(_words(content)), _words(plan_digest(plan))[0], _words(self.settings)[0])
        return np.array(row, dtype=ORIGIN)

    def refresh(self) -> bool:
        """Find what other processes have written since; return whether there was anything."""
        return self.store.refresh() > 0

    def _readable_keys(self, content: bytes, plan: CropPlan) -> Keys:
        mixed = _words(content) ^ _words(plan_digest(plan))
        return np.stack([mixed ^ _words(settings) for settings in self._readable()])

    def _readable(self) -> Sequence[bytes]:
        """Return the settings whose latents serve: those with a deviation serve for a mean, too."""
        if self.posterior == "mean":
            return (self._settings["mean"], self._settings["sample"])
        return (self._settings["sample"],)


class Reasons:
    """Why latents have to be made, from what the cache knew of the same samples when this was built."""

    def __init__(self, cache: LatentCache) -> None:
        origins_N = cache.store.origins()[1]
        order_N = np.argsort(origins_N["sample_id"], kind="stable")
        self._origins_N = origins_N[order_N]
        self._sample_ids_N = self._origins_N["sample_id"]
        self._settings = _words(cache.settings)[0]

    def of(self, sample_id: int, content: bytes, plan: CropPlan) -> str:
        """Return the reason in a few words."""
        wanted = np.uint64(sample_id)
        first, end = (int(np.searchsorted(self._sample_ids_N, wanted, side)) for side in ("left", "right"))
        known_K = self._origins_N[first:end]
        if not len(known_K):
            return "new"
        same_K = (known_K["content"] == _words(content)).all(axis=1)
        if not same_K.any():
            return "picture changed"
        same_K &= known_K["plan"] == _words(plan_digest(plan))[0]
        if not same_K.any():
            return "size or crop changed"
        if (same_K & (known_K["settings"] == self._settings)).any():
            return "stored copy unusable"
        return "VAE changed"


def plan_digests(plan: PicturePlan) -> tuple[NDArray[np.int64], Keys]:
    """Return the record of each of M variants and their plan digests, shape (M, 2).

    Where nothing but its size decides a picture's crop, a million pictures have few different ones.
    """
    if plan.cut.position == "centre":
        sizes_N3 = np.stack(
            [plan.columns.heights_P[plan.picture_N], plan.columns.widths_P[plan.picture_N], plan.bucket_N], axis=1
        )
        _, first_U, which_N = np.unique(sizes_N3, axis=0, return_index=True, return_inverse=True)
        digests_UV = [[_words(plan_digest(one)) for one in plan.variants[int(first)]] for first in first_U]
        digests_NV = np.array(digests_UV)[which_N.reshape(-1)]
        record_M = np.repeat(np.arange(len(digests_NV)), digests_NV.shape[1])
        return record_M, digests_NV.reshape(-1, 2)
    pairs = [(number, plan_digest(one)) for number, variants in enumerate(plan.variants) for one in variants]
    return np.array([number for number, _ in pairs]), np.stack([_words(digest) for _, digest in pairs])


def projected_bytes(plan: PicturePlan, posterior: Posterior) -> int:
    """Return the size on disk of these pictures' latents without compression, so that it can be said before."""
    pixels = sum(len(numbers) * bucket.size_hw[0] * bucket.size_hw[1] for bucket, numbers in plan.by_bucket.items())
    moments = 2 if posterior == "sample" else 1
    variants = plan.latents() / len(plan.picture_N)
    return round(pixels * variants) // LATENT_FACTOR**2 * LATENT_CHANNELS * 2 * moments
