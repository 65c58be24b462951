"""From the data section to what the loader reads: pictures found, planned, encoded, put in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.data.buckets import PicturePlan, make_buckets, plan_pictures
from sdxl_training.data.cache import LatentCache, cache_items, fill
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.data.scan import CaptionFiles, Quarantined, Source, scan
from sdxl_training.parallel.group import Group
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import Progress

ENCODE_BATCH = 8
NAMED = 10
INDEX_NAME = "picture_index.parquet"  # not index.parquet: a data set may have one of its own


@dataclass(frozen=True)
class FoundPictures:
    """What the source folders hold, planned into buckets."""

    plan: PicturePlan
    quarantined: tuple[Quarantined, ...]


def find_pictures(config: Config, progress: Progress) -> FoundPictures:
    """Scan the sources and plan every picture; nothing is decoded."""
    data = config.data
    captions = CaptionFiles(data.captions.extension, data.captions.separator, data.captions.missing)
    sources = [Source(source.path, source.repeats) for source in data.sources]
    folder = Path(cache_folder(config))
    found = scan(sources, captions, folder / INDEX_NAME, progress)
    sizes = data.buckets
    buckets = make_buckets(data.resolution, sizes.step_px, sizes.min_side_px, sizes.max_side_px)
    plan = plan_pictures(found.records, buckets, sizes.small_pictures)
    if found.left_out:
        progress.message(
            f"{len(found.left_out)} pictures without a caption are left out (data.captions.missing = leave_out); "
            f"the first: {found.left_out[0]}"
        )
    if plan.left_out:
        progress.message(
            f"{len(plan.left_out)} pictures smaller than their bucket are left out (data.buckets.small_pictures = "
            f"leave_out); the first: {plan.left_out[0].record.path}: {plan.left_out[0].reason}"
        )
    _name(found.quarantined, progress)
    return FoundPictures(plan, found.quarantined)


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def _name(quarantined: Sequence[Quarantined], progress: Progress) -> None:
    for entry in quarantined[:NAMED]:
        progress.message(f"quarantined: {entry.path}: {entry.reason}")
    if len(quarantined) > NAMED:
        progress.message(f"and {len(quarantined) - NAMED} more: see quarantine.jsonl in the run's folder")


@dataclass(frozen=True)
class Dataset:
    """Pictures that are encoded and in order: what the loader reads and what decides which sample comes when."""

    plan: PicturePlan
    quarantined: tuple[Quarantined, ...]
    cache: LatentCache
    keys: tuple[str, ...]
    schedule: BatchSchedule

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Return what decides which sample comes when and what it holds: a short value or a digest for each part."""
        records, schedule = self.plan.records, self.schedule
        return {
            "global_config.seed": str(schedule.seed),
            "images a step (batch_size x accumulation x processes)": str(schedule.global_batch),
            "which pictures there are": _digest(record.sample_id for record in records),
            "the pictures' content, size, crop or VAE": _digest(self.keys),
            "captions": _digest(record.tags for record in records),
            "repeats": _digest(record.repeats for record in records),
        }


def prepare_dataset(
    config: Config,
    group: Group,
    progress: Progress,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    vae_fingerprint: str,
    one_batch: bool = False,
) -> Dataset:
    """Find, plan and encode the pictures; every rank encodes its share of what the cache lacks.

    With `one_batch` only as many pictures of the largest bucket as an update has are prepared. Unreadable pictures are
    left out and named.
    """
    found = find_pictures(config, progress)
    training = config.training
    global_batch = training.batch_size * training.accumulation * group.world_size
    plan = found.plan
    if one_batch:
        plan = plan.subset(plan.by_bucket[plan.largest_bucket][:global_batch])
    cache = LatentCache(Path(cache_folder(config)), config.data.cache.posterior)
    items = cache_items(plan.records, plan.plans, vae_fingerprint)
    share = items[group.rank :: group.world_size]
    report = fill(cache, share, encode, progress, batch_size=ENCODE_BATCH, writer=f"rank{group.rank}")
    progress.message(report.describe())
    _name(report.quarantined, progress)
    group.wait()
    cache.refresh()
    usable = [number for number, item in enumerate(items) if item.key in cache]
    bad = tuple({entry.path: entry for entry in (*found.quarantined, *group.gather(report.quarantined))}.values())
    named = {entry.path for entry in bad}
    lost = [item.record.path for item in items if item.key not in cache and item.record.path not in named]
    if lost:
        raise UserError(
            f"data.cache: the latents of {len(lost)} pictures vanished while the cache was being filled (the first: "
            f"{lost[0]}). Another process may be clearing {cache.folder}. Start the same command again."
        )
    if not usable:
        raise UserError(
            f"data.sources: none of the {len(items)} pictures could be encoded; the first: {bad[0].path}: "
            f"{bad[0].reason}. Replace the pictures, or give other folders."
        )
    plan = plan.subset(usable)
    repeats = [record.repeats for record in plan.records]
    schedule = BatchSchedule(plan.by_bucket, repeats, config.global_config.seed, global_batch)
    return Dataset(plan, bad, cache, tuple(items[number].key for number in usable), schedule)
