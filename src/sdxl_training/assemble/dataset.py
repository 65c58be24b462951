"""From the data section to what the loader reads: pictures found, planned, encoded, put in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sdxl_training.assemble.captions import caption_files, refuse_absent_tags
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.data.bucket_lists import GENERATORS, buckets_at_resolutions, listed_buckets
from sdxl_training.data.buckets import Fitting, PicturePlan, plan_resolutions
from sdxl_training.data.cache import CacheItem, LatentCache, cache_items, fill
from sdxl_training.data.crops import Cut
from sdxl_training.data.sampler import BatchSchedule, batch_sizes
from sdxl_training.data.scan import Quarantined, Source, scan
from sdxl_training.parallel.group import Group
from sdxl_training.records import Bucket, UserError
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
    sources = [Source(source.path, source.repeats) for source in data.sources]
    folder = Path(cache_folder(config))
    found = scan(sources, caption_files(data.captions), folder / INDEX_NAME, progress)
    refuse_absent_tags(config, found.records)
    sizes, crop = data.buckets, data.crop
    fitting = Fitting(sizes.small_pictures, sizes.resolutions, sizes.max_crop)
    cut = Cut(crop.position, crop.variants, crop.flip, crop.seed)
    plan = plan_resolutions(found.records, bucket_lists(config), fitting, cut)
    if found.left_out:
        progress.message(
            f"{len(found.left_out)} pictures without a caption are left out (data.captions.missing = leave_out); "
            f"the first: {found.left_out[0]}"
        )
    if plan.left_out:
        progress.message(
            f"{len(plan.left_out)} pictures do not fit their bucket and are left out (data.buckets.small_pictures, "
            f"max_crop); the first: {plan.left_out[0].record.path}: {plan.left_out[0].reason}"
        )
    _name(found.quarantined, progress)
    return FoundPictures(plan, found.quarantined)


def bucket_lists(config: Config) -> tuple[tuple[Bucket, ...], ...]:
    """Return the buckets of each resolution, the largest first."""
    data, sizes = config.data, config.data.buckets
    if sizes.generator == "list":
        return (listed_buckets(sizes.sizes),)
    resolutions = (data.resolution, *data.lower_resolutions)
    generate = GENERATORS[sizes.generator]
    return buckets_at_resolutions(generate, resolutions, sizes.step_px, sizes.min_side_px, sizes.max_side_px)


def build_schedule(config: Config, plan: PicturePlan, processes: int) -> BatchSchedule:
    """Return the order of the pictures of a plan for so many processes."""
    training = config.training
    parts = training.accumulation * processes
    repeats = [record.repeats for record in plan.records]
    pixels = training.pixels_per_batch
    sizes = parts * training.batch_size if pixels is None else batch_sizes(plan.by_bucket, pixels, parts)
    return BatchSchedule(plan.by_bucket, repeats, config.global_config.seed, sizes)


def arithmetic(config: Config, schedule: BatchSchedule, processes: int) -> str:
    """Say how many images a step has, as the product it is."""
    training = config.training
    parts = f"accumulation {training.accumulation} x processes {processes}"
    if training.pixels_per_batch is None:
        return f"batch_size {training.batch_size} x {parts} = {schedule.global_batch} images a step"
    sizes = schedule.global_batches.values()
    each = f"at most {training.pixels_per_batch} pixels a micro-batch x {parts}"
    return f"{each} = {min(sizes)} to {max(sizes)} images a step, by bucket"


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
    """Pictures that are encoded and in order: what the loader reads and what decides which sample comes when.

    keys: for each record the names of its latents, one a variant.
    """

    plan: PicturePlan
    quarantined: tuple[Quarantined, ...]
    cache: LatentCache
    keys: tuple[tuple[str, ...], ...]
    schedule: BatchSchedule

    @property
    def heaviest_bucket(self) -> Bucket:
        """Return the bucket whose update has the most pixels."""
        sizes = self.schedule.global_batches
        return max(sizes, key=lambda bucket: sizes[bucket] * bucket.size_hw[0] * bucket.size_hw[1])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Return what decides which sample comes when and what it holds: a short value or a digest for each part."""
        records, schedule = self.plan.records, self.schedule
        return {
            "global_config.seed": str(schedule.seed),
            "images a step (batch_size x accumulation x processes)": self._images_a_step(),
            "which pictures there are": _digest(record.sample_id for record in records),
            "the pictures' content, size, crop or VAE": _digest(key for keys in self.keys for key in keys),
            "captions": _digest((record.captions, record.tags) for record in records),
            "repeats": _digest(record.repeats for record in records),
        }

    def _images_a_step(self) -> str:
        sizes = self.schedule.global_batches
        if len(set(sizes.values())) == 1:
            return str(self.schedule.global_batch)
        return _digest((str(bucket), size) for bucket, size in sizes.items())


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
    plan = found.plan
    if one_batch:
        samples = build_schedule(config, plan, group.world_size).global_batches[plan.largest_bucket]
        plan = plan.subset(plan.by_bucket[plan.largest_bucket][:samples])
    cache = LatentCache(Path(cache_folder(config)), config.data.cache.posterior)
    items = cache_items(plan.prepared(), vae_fingerprint)
    share = items[group.rank :: group.world_size]
    report = fill(cache, share, encode, progress, batch_size=ENCODE_BATCH, writer=f"rank{group.rank}")
    progress.message(report.describe())
    _name(report.quarantined, progress)
    group.wait()
    cache.refresh()
    keys = _by_record(items, plan)
    usable = [number for number, names in enumerate(keys) if all(name in cache for name in names)]
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
    schedule = build_schedule(config, plan, group.world_size)
    return Dataset(plan, bad, cache, tuple(keys[number] for number in usable), schedule)


def _by_record(items: Sequence[CacheItem], plan: PicturePlan) -> list[tuple[str, ...]]:
    """Return the latents' names of each record, one a variant."""
    names = iter(items)
    return [tuple(next(names).key for _ in variants) for variants in plan.variants]
