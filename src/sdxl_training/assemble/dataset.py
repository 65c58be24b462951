"""From the data section to what the loader reads: pictures found, planned, in order; and the cache filled with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sdxl_training.assemble.captions import refuse_absent_tags
from sdxl_training.assemble.sources import INDEX_FOLDER, open_pictures
from sdxl_training.config.data import side_limits_px
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.data.bucket_lists import GENERATORS, buckets_at_resolutions, listed_buckets
from sdxl_training.data.buckets import Fitting
from sdxl_training.data.cache import CODE_VERSION, LatentCache
from sdxl_training.data.claims import Claims
from sdxl_training.data.crops import Cut
from sdxl_training.data.dali import DaliPreparer, choose_backend
from sdxl_training.data.duplicates import ALONE, SAME_LOOK, Duplicates, Processes, describe, same_pictures
from sdxl_training.data.encoding import Encoder
from sdxl_training.data.fetching import Fetch
from sdxl_training.data.filling import PIECE, Fill
from sdxl_training.data.images import RESAMPLING
from sdxl_training.data.known_contents import KnownContents
from sdxl_training.data.perceptual import near_pictures
from sdxl_training.data.picture_plan import PicturePlan, plan_resolutions
from sdxl_training.data.pictures import Pictures
from sdxl_training.data.preparing import Preparer
from sdxl_training.data.sampler import BatchSchedule, batch_sizes
from sdxl_training.parallel.group import Group
from sdxl_training.records import Bucket, CropPlan, Quarantined, UserError
from sdxl_training.tracking.progress import Progress

NAMED = 10


@dataclass(frozen=True)
class FoundPictures:
    """What the sources hold, planned into buckets.

    contents: what is known of the pictures' bytes. duplicates: what the searches for them found, where there were any.
    """

    pictures: Pictures
    contents: KnownContents
    plan: PicturePlan
    duplicates: tuple[Duplicates, ...] = ()

    def quarantined(self) -> list[Quarantined]:
        """Return the pictures that are known to be of no use: by their headers, or since somebody decoded them."""
        return self.pictures.quarantined() + self.contents.failures()

    def duplicate_lines(self) -> Iterator[str]:
        """Yield a line of JSON for each group of pictures that are there several times."""
        return (line for found in self.duplicates for line in found.lines())


def find_pictures(config: Config, progress: Progress, processes: Processes = ALONE) -> FoundPictures:
    """List the sources, look at what is new, and plan every picture; decoded only where near duplicates are sought.

    processes: that share the reading where duplicates are sought. Raises UserError where more pictures are unusable
    than data.max_bad_fraction allows.
    """
    data = config.data
    pictures, contents = open_pictures(config, progress)
    pictures, contents, duplicates = without_duplicates(config, pictures, contents, progress, processes)
    refuse_absent_tags(config, pictures)
    sizes, crop = data.buckets, data.crop
    if crop.position == "focus" and not pictures.boxed():
        progress.message(
            "data.crop.position = focus: no picture has a box, so all are cut at the centre. A box is called focus in "
            "a JSON caption; without any, position: centre says the same."
        )
    fitting = Fitting(sizes.small_pictures, sizes.resolutions, sizes.max_crop)
    cut = Cut(crop.position, crop.variants, crop.flip, crop.seed)
    plan = plan_resolutions(pictures, bucket_lists(config), fitting, cut, pictures.columns())
    found = FoundPictures(pictures, contents, plan, duplicates)
    left_out = pictures.left_out
    if left_out:
        progress.message(
            f"{len(left_out)} pictures without a caption are left out (data.captions.missing = leave_out); "
            f"the first: {left_out[0]}"
        )
    unused = pictures.with_unused_tags
    if len(unused):
        progress.message(
            f"{len(unused)} pictures have other tags beside their captions, which are not used: with "
            "data.captions.kind = tags a caption is the tags; kind: prose keeps both apart; the first: "
            f"{pictures[int(unused[0])].path}"
        )
    if plan.left_out:
        progress.message(
            f"{len(plan.left_out)} pictures do not fit their bucket and are left out (data.buckets.small_pictures, "
            f"max_crop); the first: {plan.left_out[0].record.path}: {plan.left_out[0].reason}"
        )
    refuse_too_many_bad(config, found.quarantined(), pictures.found)
    return found


def without_duplicates(
    config: Config, pictures: Pictures, contents: KnownContents, progress: Progress, processes: Processes
) -> tuple[Pictures, KnownContents, tuple[Duplicates, ...]]:
    """Name pictures that are there several times, and leave out all but the first of each where that is wanted."""
    data, folder = config.data, Path(cache_folder(config)) / INDEX_FOLDER
    background = data.preprocessing.background
    kept_P = np.ones(len(pictures), bool)
    found: list[Duplicates] = []
    if data.duplicates != "keep":
        groups = same_pictures(pictures, contents, progress, processes)
        progress.message(describe(groups, pictures, NAMED))
        found.append(Duplicates(groups, pictures, drop=data.duplicates == "drop"))
        kept_P &= groups.kept_mask() | (data.duplicates == "warn")
    if data.near_duplicates != "keep":
        groups = near_pictures(pictures, contents, folder, progress, processes, kept_P, background)
        progress.message(describe(groups, pictures, NAMED, SAME_LOOK))
        found.append(Duplicates(groups, pictures, SAME_LOOK, drop=data.near_duplicates == "drop"))
        kept_P &= groups.kept_mask() | (data.near_duplicates == "warn")
    if kept_P.all():
        return pictures, contents, tuple(found)
    remaining = pictures.subset(kept_P)
    return remaining, contents.of(remaining), tuple(found)


def refuse_too_many_bad(config: Config, quarantined: Sequence[Quarantined], found: int) -> None:
    """Raise UserError where a larger share of the pictures is unusable than data.max_bad_fraction allows."""
    if len(quarantined) > config.data.max_bad_fraction * found:
        shown = "".join(f"\n  {bad.path}: {bad.reason}" for bad in quarantined[:NAMED])
        raise UserError(
            f"data.max_bad_fraction = {config.data.max_bad_fraction:g}: {len(quarantined)} of {found} pictures cannot "
            f"be used:{shown}\nReplace them or take them out, or raise data.max_bad_fraction."
        )


def name_quarantined(quarantined: Sequence[Quarantined], progress: Progress) -> None:
    """Name the first few pictures that cannot be used."""
    for entry in quarantined[:NAMED]:
        progress.message(f"quarantined: {entry.path}: {entry.reason}")
    if len(quarantined) > NAMED:
        progress.message(f"and {len(quarantined) - NAMED} more: see quarantine.jsonl in the run's folder")


def bucket_lists(config: Config) -> tuple[tuple[Bucket, ...], ...]:
    """Return the buckets of each resolution, the largest first."""
    data, sizes = config.data, config.data.buckets
    if sizes.generator == "list":
        return (listed_buckets(sizes.sizes),)
    resolutions = (data.resolution, *data.lower_resolutions)
    generate = GENERATORS[sizes.generator]
    return buckets_at_resolutions(generate, resolutions, sizes.step_px, *side_limits_px(data))


def build_schedule(config: Config, plan: PicturePlan, processes: int) -> BatchSchedule:
    """Return the order of the pictures of a plan for so many processes."""
    training = config.training
    parts = training.accumulation * processes
    pixels = training.pixels_per_batch
    sizes = parts * training.batch_size if pixels is None else batch_sizes(plan.by_bucket, pixels, parts)
    return BatchSchedule(plan.by_bucket, plan.repeats, config.global_config.seed, sizes)


def arithmetic(config: Config, schedule: BatchSchedule, processes: int) -> str:
    """Say how many images a step has, as the product it is."""
    training = config.training
    parts = f"accumulation {training.accumulation} x processes {processes}"
    if training.pixels_per_batch is None:
        return f"batch_size {training.batch_size} x {parts} = {schedule.global_batch} images a step"
    least, most = min(schedule.global_batches.values()), max(schedule.global_batches.values())
    each = f"micro-batches of {training.pixels_per_batch} pixels, or one larger picture, x {parts}"
    return f"{each} = " + (f"{most} images a step" if least == most else f"{least} to {most} images a step, by bucket")


@dataclass(frozen=True)
class Dataset:
    """Pictures in order: what the loader reads and what decides which sample comes when.

    cache: where latents are kept, and preparer: what decodes for them in bulk; None where nothing is kept.
    latents_are: what decides a latent beside the picture and its crop, as text.
    """

    found: FoundPictures
    schedule: BatchSchedule
    fetch: Fetch
    cache: LatentCache | None
    preparer: Preparer | None
    latents_are: str

    @property
    def plan(self) -> PicturePlan:
        """Return what becomes of every picture."""
        return self.found.plan

    @property
    def crops_anew(self) -> bool:
        """Whether each visit is cut at a place of its own, which nobody could keep."""
        cut = self.plan.cut
        return self.cache is None and cut.position == "random" and cut.variants == 1

    @property
    def variants(self) -> Sequence[Sequence[CropPlan]]:
        """Return the ways in which each record is shown, of which a visit sees one."""
        return self.plan.crops_without_end if self.crops_anew else self.plan.variants

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Return what decides which sample comes when and what it holds: a short value or a digest for each part.

        Of the pictures' content their sizes in bytes stand for it: nobody has read them all when a run begins.
        """
        plan, pictures = self.plan, self.found.pictures
        sizes = [pictures.column(name) for name in ("length", "height", "width")]
        boxes = pictures.boxes() if plan.cut.position == "focus" else []
        crops = f"{plan.cut}{' anew' if self.crops_anew else ''}"
        return {
            "global_config.seed": str(self.schedule.seed),
            "images a step (batch_size x accumulation x processes)": self._images_a_step(),
            "which pictures there are": self._which(),
            "the pictures' content, size, crop or VAE": _digest(
                [*sizes, *boxes, _as_bytes(f"{[*plan.by_bucket]} {crops} {self.latents_are}")]
            ),
            "captions": _digest([*pictures.captions(), *map(_as_bytes, pictures.readings())]),
            "repeats": _digest([plan.repeats]),
        }

    @property
    def claims_name(self) -> str:
        """Return the name of the file by which processes that fill the cache with the same pieces know each other."""
        if self.cache is None:
            raise ValueError("there is no cache to fill")
        pieces = _digest([_as_bytes(f"{self._which()} {self.plan.cut}"), np.frombuffer(self.cache.settings, np.uint8)])
        return f"claims-{pieces[:16]}"

    @property
    def captions_name(self) -> str:
        """Return a digest of which records there are and what their captions say, so of all captions but for rules."""
        return _digest_text([self._which(), str(self.plan.buckets), self.fingerprint["captions"]])

    def _which(self) -> str:
        return _digest([*self.found.pictures.names(), self.plan.picture_N, self.plan.bucket_N])

    def _images_a_step(self) -> str:
        sizes = self.schedule.global_batches
        if len(set(sizes.values())) == 1:
            return str(self.schedule.global_batch)
        return _digest_text((str(bucket), size) for bucket, size in sizes.items())


def _digest(columns: Iterable[NDArray[np.generic]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        digest.update(f"{column.dtype}{column.shape}".encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _as_bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _digest_text(items: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def prepare_dataset(
    config: Config, group: Group, progress: Progress, vae_fingerprint: str, processes: Processes = ALONE
) -> Dataset:
    """Find and plan the pictures, and open the cache; nothing is encoded. processes: see `find_pictures`."""
    found = find_pictures(config, progress, processes)
    background = config.data.preprocessing.background
    preparer = open_preparer(config, group.device)
    recipe = RESAMPLING if preparer is None else preparer.recipe
    cache = None if preparer is None else open_latents(config, vae_fingerprint, recipe)
    fetch = Fetch(found.pictures, found.contents, cache, background)
    schedule = build_schedule(config, found.plan, group.world_size)
    latents_are = f"{vae_fingerprint} {CODE_VERSION} {recipe} {background} {config.data.cache.posterior}"
    return Dataset(found, schedule, fetch, cache, preparer, latents_are)


def latent_folder(config: Config) -> Path:
    """Return where latents are kept."""
    return Path(cache_folder(config)) / "latents"


def open_latents(config: Config, vae_fingerprint: str, recipe: str) -> LatentCache:
    """Return the latents that this VAE makes of pixels prepared like this; recipe: see `Preparer`."""
    cache, background = config.data.cache, config.data.preprocessing.background
    return LatentCache(latent_folder(config), vae_fingerprint, cache.posterior, background, recipe)


def open_preparer(config: Config, device: torch.device) -> Preparer | None:
    """Return what makes the pixels of this configuration's latents in bulk on this device; None where none are kept.

    Its recipe is that of the latents. Where training itself prepares what is not there yet, it does so on the CPU: then
    the pixels of bulk are made there, too, or training would not find what they became.
    """
    mode, preprocessing = config.data.cache.mode, config.data.preprocessing
    if mode == "none":
        return None
    backend = preprocessing.backend if mode == "first" else "cpu"
    cuda_device = (device.index or 0) if device.type == "cuda" else None
    return choose_backend(backend, cuda_device, batch_size=PIECE, background=preprocessing.background)


def fill_cache(config: Config, dataset: Dataset, encoder: Encoder, group: Group, progress: Progress) -> None:
    """Encode all that the cache lacks, together with every other process that does; none waits for another's word."""
    if dataset.cache is None or dataset.preparer is None:
        raise ValueError("there is no cache to fill")
    with closing(dataset.preparer) as preparer:
        report = Fill(
            plan=dataset.plan,
            pictures=dataset.found.pictures,
            contents=dataset.found.contents,
            cache=dataset.cache,
            encoder=encoder,
            preparer=preparer,
            claims=Claims(latent_folder(config) / dataset.claims_name),
            start=group.rank / group.world_size,
        ).run(progress)
    progress.message(report.describe())
    if isinstance(preparer, DaliPreparer):
        progress.message(preparer.describe())
