"""Latents on disk: encoded once, found by what they are made from, encoded again only where something changed.

What is stored is the VAE's posterior (its mean, and its standard deviation where a visit draws from it; scaled, fp16),
not one sample of it. An entry's key is a function of everything that the latent is a function of: the picture's bytes,
how its pixels are prepared, the VAE and its precision, and the version of this code.

Shape legend: C latent channels, H x W latent rows and columns, K moments stored (mean, standard deviation); N records,
M of their variants; a key or digest is two u64, so many of them are (N, 2).
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdxl_training.data.buckets import Integers
from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.crop_columns import CropColumns
from sdxl_training.data.images import RESAMPLING
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.store import DamagedEntry, Store
from sdxl_training.data.store_format import ORIGIN
from sdxl_training.records import CropPlan

CODE_VERSION = 3  # of how pixels are prepared and latents stored: part of every key
LATENT_FACTOR = 8
LATENT_CHANNELS = 4
SIDE_BITS = 21  # of pictures two million pixels high or wide

Posterior = Literal["sample", "mean"]
Latent = tuple[Tensor, Tensor]
"""mean_CHW and std_CHW, scaled"""
Keys = NDArray[np.uint64]
"""128 bits each: (..., 2)."""
Whole = TypeVar("Whole", int, Integers)

log = logging.getLogger(__name__)


@lru_cache(maxsize=2**16)
def plan_digest(plan: CropPlan) -> bytes:
    """Return 16 bytes that are equal exactly where pictures of equal content are prepared alike."""
    return struct.pack("<2Q", *_pack(*_numbers(plan)))


def _numbers(plan: CropPlan) -> tuple[int, int, int, int, int, int, int]:
    """Return what the prepared pixels of a picture depend on; not on its size as such, which its content decides."""
    return (*plan.crop_tl, int(plan.flipped), *plan.resized_hw, *plan.bucket.size_hw)


def _pack(
    top: Whole, left: Whole, flipped: Whole, resized_h: Whole, resized_w: Whole, bucket_h: Whole, bucket_w: Whole
) -> tuple[Whole, Whole]:
    """Return a plan's digest as two numbers: its own seven side by side, each but `flipped` with SIDE_BITS bits.

    Not hashed, since a million have to be made at every start; in a key they are mixed with hashes.
    """
    first = ((top << SIDE_BITS | left) << 1 | flipped) << SIDE_BITS | resized_h
    return first, (resized_w << SIDE_BITS | bucket_h) << SIDE_BITS | bucket_w


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _number(text: str) -> int:
    return int.from_bytes(_digest(text)[:4], "little")


def _plan_number(plan: CropPlan) -> int:
    return int.from_bytes(hashlib.blake2b(plan_digest(plan), digest_size=8).digest(), "little")


def _words(digest: bytes) -> Keys:
    return np.frombuffer(digest, dtype="<u8")


class LatentCache:
    """The latents in a folder that were made by one VAE.

    vae_fingerprint, background, recipe: what decides a latent beside the picture and its crop: the VAE and its
    precision, the colour behind transparent pixels, how pixels are made. posterior: `mean` returns means only (their
    deviation reads as zero); `sample` does not count latents stored without deviation. May be read by several threads;
    `refresh` is for one thread, while the others do not read.
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
        preparation = f"{CODE_VERSION} {background} {recipe}"
        self._settings: dict[Posterior, bytes] = {
            "sample": _digest(f"{vae_fingerprint} {preparation} sample"),
            "mean": _digest(f"{vae_fingerprint} {preparation} mean"),
        }
        self.made_by = MadeBy(_number(vae_fingerprint), _number(preparation))

    @property
    def settings(self) -> bytes:
        """Return the digest under which latents are written."""
        return self._settings[self.posterior]

    def key(self, content: bytes, plan: CropPlan) -> Keys:
        """Return the key, shape (2,), of a picture with this content digest, prepared like this."""
        return _words(content) ^ _words(plan_digest(plan)) ^ _words(self.settings)

    def count(self, contents_N: Keys, known_N: NDArray[np.bool_], plan: PicturePlan) -> tuple[Integers, Integers]:
        """Return how many of its latents are there, and how many missing, of each of the plan's N records.

        contents_N: digests, shape (N, 2). known_N: which of them are known; of the other records all are missing.
        """
        counted = np.empty((2, len(known_N)), np.int64)
        for part in plan.parts():
            crops, known = plan.crops(part), known_N[part]
            record_M = crops.picture_M
            keys_M = contents_N[part][record_M] ^ plan_digests(crops)
            there_M = np.zeros(len(record_M), dtype=bool)
            for settings in self._readable():
                there_M |= self.store.find(keys_M ^ _words(settings)) >= 0
            there_M &= known[record_M]
            counted[0, part] = np.bincount(record_M[there_M], minlength=len(known))
            counted[1, part] = np.bincount(record_M[~there_M], minlength=len(known))
        return counted[0], counted[1]

    def missing(self, contents_N: Keys, known_N: NDArray[np.bool_], plan: PicturePlan) -> Integers:
        """Return how many latents each of the plan's N records lacks; see `count`."""
        return self.count(contents_N, known_N, plan)[1]

    def read(self, content: bytes, plan: CropPlan) -> Latent | None:
        """Return mean_CHW and std_CHW, fp32, scaled; None where the cache has none that can be used."""
        for row in self.store.find(self._readable_keys(content, plan)):
            if row < 0:
                continue
            try:
                moments_KCHW = self.store.read(int(row))
            except DamagedEntry as damage:
                log.warning("%s; its picture is encoded again", damage)
                continue
            return self.served(moments_KCHW)
        return None

    def has(self, content: bytes, plan: CropPlan) -> bool:
        """Return whether there is an entry that `read` would try."""
        return bool((self.store.find(self._readable_keys(content, plan)) >= 0).any())

    def moments(self, mean_CHW: Tensor, std_CHW: Tensor) -> Tensor:
        """Return what is stored of a latent, fp16 (K, C, H, W)."""
        return torch.stack([mean_CHW, std_CHW] if self.posterior == "sample" else [mean_CHW])

    def served(self, moments_KCHW: Tensor) -> Latent:
        """Return what reading gives for these stored moments: fp32, on their device."""
        mean_CHW, *std = moments_KCHW.to(torch.float32)
        return mean_CHW, mean_CHW.new_zeros(()).expand_as(mean_CHW) if self.posterior == "mean" else std[0]

    def origin(self, sample_id: int, content: bytes, plan: CropPlan) -> NDArray[np.void]:
        """Return what an entry is made from, in a few numbers."""
        row = (sample_id, tuple(_words(content)), _plan_number(plan), self.made_by.as_origin())
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


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The VAE, and the preparation of pixels that all pictures share, each as 32 bits of a digest."""

    vae: int
    preparation: int

    def as_origin(self) -> int:
        """Return both in one number, as an entry's origin keeps them."""
        return self.vae << 32 | self.preparation


class Reasons:
    """Why latents have to be made, from what the cache knew of the same samples when this was built."""

    def __init__(self, cache: LatentCache) -> None:
        origins_N = cache.store.origins()[1]
        self._origins_N = origins_N[np.argsort(origins_N["sample_id"], kind="stable")]
        self._sample_ids_N = np.ascontiguousarray(self._origins_N["sample_id"])
        self._made_by = cache.made_by

    def of(self, sample_id: int, content: bytes, plan: CropPlan) -> str:
        """Return the reason in a few words."""
        wanted = np.uint64(sample_id)
        first, end = (int(np.searchsorted(self._sample_ids_N, wanted, side)) for side in ("left", "right"))
        known_K = self._origins_N[first:end]
        if not len(known_K):
            return "new"
        known_K = known_K[(known_K["content"] == _words(content)).all(axis=1)]
        if not len(known_K):
            return "picture changed"
        known_K = known_K[known_K["plan"] == _plan_number(plan)]
        if not len(known_K):
            return "size or crop changed"
        known_K = known_K[known_K["settings"] >> np.uint64(32) == self._made_by.vae]
        if not len(known_K):
            return "VAE changed"
        if not (known_K["settings"] == self._made_by.as_origin()).any():
            return "preparation changed"
        return "stored copy unusable"


def plan_digests(crops: CropColumns) -> Keys:
    """Return the digests (M, 2) of the plans of these crops."""
    (top_M, left_M), flipped_M = crops.crop_tl_M2.T, crops.flipped_M.astype(np.int64)
    (resized_h_M, resized_w_M), (bucket_h_M, bucket_w_M) = crops.resized_M2.T, crops.bucket_M2.T
    halves = _pack(top_M, left_M, flipped_M, resized_h_M, resized_w_M, bucket_h_M, bucket_w_M)
    return np.stack(halves, axis=1).astype(np.uint64)


def projected_bytes(plan: PicturePlan, posterior: Posterior) -> int:
    """Return the size on disk of these pictures' latents without compression, so that it can be said before."""
    pixels = sum(len(numbers) * bucket.size_hw[0] * bucket.size_hw[1] for bucket, numbers in plan.by_bucket.items())
    moments = 2 if posterior == "sample" else 1
    variants = plan.latents() / len(plan.picture_N)
    return round(pixels * variants) // LATENT_FACTOR**2 * LATENT_CHANNELS * 2 * moments
