"""Latents on disk: encoded once, read by memory map, re-encoded only where something changed.

What is stored is the VAE's posterior (mean and standard deviation, scaled, fp16), not one sample of it, so every visit
draws afresh. A shard that does not match its manifest is named, removed, and its pictures are encoded again.

Shape legend: B pictures, C latent channels, H x W latent rows and columns; pixels_BCHW are 3 x 8H x 8W in [-1, 1].
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_training.data.images import (
    RESAMPLING,
    UnreadablePicture,
    decode_pixels,
    hash_content,
    read_file,
    resize_and_crop,
    to_model_range,
)
from sdxl_training.data.scan import Progress, Quarantined
from sdxl_training.data.shards import Manifest, Origin, Posterior, ShardWriter, list_manifests
from sdxl_training.records import CropPlan, ImageRecord, UserError

FORMAT = f"2-{RESAMPLING}"  # of shard and manifest, and of how pixels are prepared: part of every key
LATENT_FACTOR = 8

# pixels_BCHW in [-1, 1], fp32 -> scaled mean_BCHW and std_BCHW, fp32, on any device
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheItem:
    """A picture whose latent is wanted under `key`."""

    key: str
    record: ImageRecord
    plan: CropPlan


def describe_plan(plan: CropPlan) -> str:
    """Return the preparation of the pixels as text, equal exactly where the prepared pixels are."""
    (height, width), (top, left) = plan.resized_hw, plan.crop_tl
    return f"{height}x{width}+{top}+{left}>{plan.bucket}" + (" mirrored" if plan.flipped else "")


def latent_key(record: ImageRecord, plan: CropPlan, vae_fingerprint: str) -> str:
    """Return the name (hex) of a picture's latent: a digest of everything that the latent is a function of."""
    parts = (FORMAT, record.content_hash, describe_plan(plan), vae_fingerprint)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def cache_items(prepared: Iterable[tuple[ImageRecord, CropPlan]], vae_fingerprint: str) -> list[CacheItem]:
    """Return what the cache must hold for these pictures, each with a way in which it is prepared."""
    return [CacheItem(latent_key(record, plan, vae_fingerprint), record, plan) for record, plan in prepared]


def projected_bytes(plans: Iterable[CropPlan], posterior: Posterior, channels: int = 4) -> int:
    """Return the size on disk of these pictures' latents, so that it can be said before it is used."""
    pixels = sum(plan.bucket.size_hw[0] * plan.bucket.size_hw[1] for plan in plans)
    return pixels // LATENT_FACTOR**2 * channels * 2 * (2 if posterior == "sample" else 1)


class LatentCache:
    """The latents stored in a folder, by key.

    posterior: `mean` stores and returns means only (their deviation reads as zero); `sample` does not count latents
    stored without deviation as present. Travels to worker processes by folder name.
    """

    def __init__(self, folder: Path, posterior: Posterior = "sample"):
        self.folder = Path(folder)
        self.posterior: Posterior = posterior
        self.refresh()

    def __reduce__(self) -> tuple[type[LatentCache], tuple[Path, Posterior]]:
        return LatentCache, (self.folder, self.posterior)

    def refresh(self) -> None:
        """List the folder anew, for example after other ranks have written; damaged shards are logged and not listed.

        Raises UserError when the folder is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"data.cache.path: {self.folder} is a file. Give a folder, or move the file away.")
        self._shard_of: dict[str, Path] = {}
        self._damaged: list[Path] = []
        self._open: dict[Path, Any] = {}
        for path in list_manifests(self.folder):
            self._list(path)

    def _list(self, path: Path) -> None:
        try:
            manifest = Manifest.read(path)
        except FileNotFoundError:  # another rank has just discarded it
            return
        except (KeyError, TypeError, ValueError) as error:
            self._distrust(path, f"its manifest cannot be read ({error})")
            return
        if damage := manifest.damage():
            self._distrust(path, damage)
        elif manifest.posterior == "sample" or self.posterior == "mean":
            self._shard_of |= dict.fromkeys(manifest.entries, manifest.shard)

    def _distrust(self, manifest: Path, damage: str) -> None:
        log.warning("cache shard %s: %s; its pictures are encoded again", manifest.with_suffix(".safetensors"), damage)
        self._damaged.append(manifest)

    @property
    def damaged(self) -> tuple[Path, ...]:
        """Return the manifests of shards that cannot be used."""
        return tuple(self._damaged)

    def __contains__(self, key: object) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def read(self, key: str) -> tuple[Tensor, Tensor]:
        """Return mean_CHW and std_CHW, fp32, scaled.

        Raises UserError when the shard has vanished since it was listed, KeyError for a key that was never there.
        """
        shard = self._shard_of[key]
        if shard not in self._open:
            if not shard.exists():
                raise UserError(f"cache shard {shard} has vanished. Start again: its pictures are then encoded again.")
            self._open[shard] = safe_open(shard, framework="pt")
        try:
            mean_CHW: Tensor = self._open[shard].get_tensor(f"{key}.mean").to(torch.float32)
            if self.posterior == "mean":
                return mean_CHW, torch.zeros_like(mean_CHW)
            return mean_CHW, self._open[shard].get_tensor(f"{key}.std").to(torch.float32)
        except SafetensorError as error:
            raise UserError(
                f"cache shard {shard} is damaged ({error}). Start again: it is then encoded again."
            ) from error

    def origins(self) -> Iterator[tuple[str, Origin]]:
        """Yield key and origin of every latent that some manifest names, readable or not."""
        for path in list_manifests(self.folder):
            with contextlib.suppress(FileNotFoundError, KeyError, TypeError, ValueError):  # reported by refresh
                yield from Manifest.read(path).entries.items()

    def discard_damaged(self) -> None:
        """Remove the files of damaged shards; what they held is encoded again."""
        for path in self._damaged:
            path.with_suffix(".safetensors").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        self._damaged = []


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling the cache came to. encoded: pictures encoded, by reason why they had to be."""

    reused: int
    encoded: Mapping[str, int]
    quarantined: tuple[Quarantined, ...]

    def describe(self) -> str:
        """Return one sentence, such as "598 latents reused, 2 encoded: 1 new, 1 picture changed"."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.encoded.items()))
        sentence = f"{self.reused} latents reused, {sum(self.encoded.values())} encoded"
        sentence += f": {reasons}" if reasons else ""
        return sentence + (f"; {len(self.quarantined)} pictures quarantined" if self.quarantined else "")


def fill(
    cache: LatentCache,
    todo: Sequence[CacheItem],
    encode: Encode,
    progress: Progress,
    *,
    batch_size: int,
    writer: str = "rank0",
    decode_threads: int | None = None,
) -> FillReport:
    """Encode what the cache lacks, batched by bucket, while threads decode ahead; pictures of equal content share.

    A picture that cannot be decoded, or whose latent is not finite in fp16 even when encoded a second time by itself,
    is quarantined by name. Ranks may fill one folder at once, each its share of `todo` under its own `writer` name;
    afterwards each calls `cache.refresh()`. Raises UserError when the folder cannot be written.
    """
    missing = {item.key: item for item in todo if item.key not in cache}
    why = _reasons(cache, missing.values())
    cache.discard_damaged()
    encoded: Counter[str] = Counter()
    failed: dict[str, str] = {}
    in_order = sorted(missing.values(), key=lambda item: item.plan.bucket)
    with (
        ShardWriter(cache.folder, cache.posterior, writer) as shards,
        progress.track("encoding pictures", len(in_order)) as advance,
    ):
        for items, pixels_BCHW in _batches(in_order, batch_size, decode_threads, failed, advance):
            for item, latent in zip(items, _encode_finite(encode, pixels_BCHW), strict=True):
                if latent is None:
                    failed[item.key] = "its latent is not finite in 16 bit; try another VAE or VAE precision"
                    continue
                shards.add(item.key, _origin(item), *latent)
                encoded[why[item.key]] += 1
            advance(len(items))
    cache.refresh()
    quarantined = tuple(Quarantined(item.record.path, failed[item.key]) for item in todo if item.key in failed)
    return FillReport(len(todo) - encoded.total() - len(quarantined), encoded, quarantined)


def _origin(item: CacheItem) -> Origin:
    return Origin(item.record.sample_id, item.record.content_hash, describe_plan(item.plan))


def _reasons(cache: LatentCache, missing: Iterable[CacheItem]) -> dict[str, str]:
    """Return for each missing key why it must be encoded, from what the cache knows of the same sample."""
    missing = list(missing)
    wanted = {item.record.sample_id for item in missing}
    known: dict[int, list[tuple[str, Origin]]] = {}
    for key, origin in cache.origins() if wanted else ():
        if origin.sample_id in wanted:
            known.setdefault(origin.sample_id, []).append((key, origin))
    return {item.key: _reason(item, known.get(item.record.sample_id, [])) for item in missing}


def _reason(item: CacheItem, known: Sequence[tuple[str, Origin]]) -> str:
    if not known:
        return "new"
    if any(key == item.key for key, _ in known):
        return "stored copy unusable"
    same_content = [origin for _, origin in known if origin.content_hash == item.record.content_hash]
    if not same_content:
        return "picture changed"
    if not any(origin.plan == describe_plan(item.plan) for origin in same_content):
        return "size or crop changed"
    return "VAE changed"


def _batches(
    items: Sequence[CacheItem],
    batch_size: int,
    threads: int | None,
    failed: dict[str, str],
    advance: Callable[[int], object],
) -> Iterator[tuple[list[CacheItem], Tensor]]:
    """Yield (items, pixels_BCHW) of one bucket each; undecodable pictures go to `failed` instead."""
    batch: list[CacheItem] = []
    pixels: list[Tensor] = []
    with ThreadPoolExecutor(threads) as pool:
        for item, future in _ahead(items, pool, 2 * batch_size):
            if batch and (len(batch) == batch_size or item.plan.bucket != batch[0].plan.bucket):
                yield batch, torch.stack(pixels)
                batch, pixels = [], []
            try:
                pixels.append(future.result())
            except UnreadablePicture as error:
                failed[item.key] = error.reason
                advance(1)
            else:
                batch.append(item)
    if batch:
        yield batch, torch.stack(pixels)


def _ahead(
    items: Sequence[CacheItem], pool: ThreadPoolExecutor, lookahead: int
) -> Iterator[tuple[CacheItem, Future[Tensor]]]:
    """Yield the items in order with `lookahead` of them being decoded: memory stays bounded, threads stay busy."""
    waiting: deque[tuple[CacheItem, Future[Tensor]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(_prepare, item)))
        if len(waiting) > lookahead:
            yield waiting.popleft()
    yield from waiting


def _prepare(item: CacheItem) -> Tensor:
    """Return the picture's pixels_CHW as planned; raises UnreadablePicture."""
    path = item.record.path
    data = read_file(path)
    if hash_content(data) != item.record.content_hash:
        raise UnreadablePicture(path, "the file changed after it was scanned; start again")
    return to_model_range(resize_and_crop(decode_pixels(data, path), item.plan))


def _encode_finite(encode: Encode, pixels_BCHW: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    """Return fp16 (mean_CHW, std_CHW) of each picture; None where they are not finite even when encoded alone."""
    latents = _encode_half(encode, pixels_BCHW)
    for i, latent in enumerate(latents):
        if latent is None:
            latents[i] = _encode_half(encode, pixels_BCHW[i : i + 1])[0]
    return latents


def _encode_half(encode: Encode, pixels_BCHW: Tensor) -> list[tuple[Tensor, Tensor] | None]:
    # Finite is judged after rounding: a value beyond fp16's range becomes infinite and must not be stored.
    mean_BCHW, std_BCHW = (moment.detach().to("cpu", torch.float16).contiguous() for moment in encode(pixels_BCHW))
    return [
        (mean_CHW, std_CHW) if bool(mean_CHW.isfinite().all() and std_CHW.isfinite().all()) else None
        for mean_CHW, std_CHW in zip(mean_BCHW, std_BCHW, strict=True)
    ]
