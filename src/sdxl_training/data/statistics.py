"""Figures of a planned data set: what lies in which bucket, which tags there are, captions' lengths, steps.

Everything is counted in passing: of a million pictures nothing is kept but counts.

Shape legend: P pictures, N records (a picture at one resolution).
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_training.data.buckets import Integers
from sdxl_training.data.captions import CaptionRules, whole_captions
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.pictures import Pictures
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.records import SizeHW

TOKEN_LIMITS = (75, 150, 225)
TAGS_SHOWN = 30
REPEATS_WRITTEN_OUT = 4  # different numbers of repeats in the sum


@dataclass(frozen=True, slots=True)
class BucketRow:
    """What lies in one bucket. pictures: records in it. images: these times their repeats.

    cropped_mean, cropped_worst: shares of the resized pictures' area, 0 to 1, each picture counted once. scale_largest:
    resized over original length, above 1 is an upscale.
    """

    size_hw: SizeHW
    pictures: int
    images: int
    cropped_mean: float
    cropped_worst: float
    scale_largest: float


@dataclass(frozen=True, slots=True)
class SourceRow:
    """What one source holds. found = quarantined + without_caption + filtered + usable.

    quarantined: unreadable by their headers. without_caption: readable pictures left out for that. filtered: those that
    do not pass the source's filters. planned: usable pictures that have a bucket. images: these times repeats, at all
    their resolutions.
    """

    path: str
    found: int
    quarantined: int
    without_caption: int
    filtered: int
    usable: int
    planned: int
    images: int
    repeats: int
    weight: float


@dataclass(frozen=True, slots=True)
class TagTable:
    """How many pictures have each tag. most, rarest: (tag, pictures), equal counts by name.

    pictures: all that were counted. untagged: those without tags. distinct: different tags. once: tags of one picture.
    """

    pictures: int
    untagged: int
    distinct: int
    once: int
    most: tuple[tuple[str, int], ...]
    rarest: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class LengthTable:
    """How long captions are, in tokens. over: how many captions exceed each limit. mean and longest: 0 without any."""

    captions: int
    over: dict[int, int]
    mean: float
    longest: int


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What an update is made of: the numbers of the training section, and how many processes there are."""

    batch_size: int
    pixels_per_batch: int | None
    accumulation: int
    processes: int
    max_steps: int


@dataclass(frozen=True, slots=True)
class BucketSteps:
    """The steps of one bucket: images / images_a_step, where that is micro_batch x accumulation x processes."""

    size_hw: SizeHW
    images: int
    micro_batch: int
    images_a_step: int
    steps: float


@dataclass(frozen=True, slots=True)
class StepSum:
    """How pictures become steps. pictures_by_repeats: pictures for each number of repeats.

    micro_batch: None where it differs between buckets (pixels_per_batch).
    """

    pictures_by_repeats: dict[int, int]
    images: int
    micro_batch: int | None
    pixels_per_batch: int | None
    accumulation: int
    processes: int
    by_bucket: tuple[BucketSteps, ...]
    steps_per_epoch: float
    max_steps: int
    epochs: float


def bucket_table(plan: PicturePlan) -> tuple[BucketRow, ...]:
    """Return a row for each bucket that has pictures, in the order of their sizes."""
    cropped_N, scales_N, repeats_N = plan.cropped, plan.scales, plan.repeats
    return tuple(
        BucketRow(
            size_hw=bucket.size_hw,
            pictures=len(numbers),
            images=int(repeats_N[numbers].sum()),
            cropped_mean=float(cropped_N[numbers].mean()),
            cropped_worst=float(cropped_N[numbers].max()),
            scale_largest=float(scales_N[numbers].max()),
        )
        for bucket, numbers in plan.by_bucket.items()
    )


def source_table(pictures: Pictures, plan: PicturePlan, paths: Sequence[str]) -> tuple[SourceRow, ...]:
    """Return a row for each source; paths: their names, one each. plan: that of `pictures`."""
    first_N, repeats_N = plan.first_N, plan.repeats
    source_N = pictures.source_P[plan.picture_N]
    rows = []
    for number, (path, source) in enumerate(zip(paths, pictures.sources, strict=True)):
        found, usable = source.table.num_rows, int((pictures.source_P == number).sum())
        quarantined = len(source.quarantined())
        without_caption = 0 if source.rules.missing == "empty" else len(source.without_caption())
        own_N = source_N == number
        rows.append(
            SourceRow(
                path=path,
                found=found,
                quarantined=quarantined,
                without_caption=without_caption,
                filtered=found - quarantined - without_caption - usable,
                usable=usable,
                planned=int((own_N & first_N).sum()),
                images=int(repeats_N[own_N].sum()),
                repeats=source.rules.repeats,
                weight=source.rules.weight,
            )
        )
    return tuple(rows)


def crop_lines(plan: PicturePlan) -> Iterator[str]:
    """Yield what becomes of each record as a line of JSON: path, size, bucket, scale, share that is cut away."""
    columns = zip(plan.picture_N, plan.bucket_N, plan.scales, plan.cropped, strict=True)
    for picture, bucket, scale, cropped in columns:
        record = plan.pictures[int(picture)]
        said = {
            "path": record.path,
            "size_hw": record.size_hw,
            "bucket_hw": plan.buckets[int(bucket)].size_hw,
            "scale": round(float(scale), 4),
            "cropped": round(float(cropped), 4),
        }
        yield json.dumps(said)


def planned_pictures(plan: PicturePlan) -> Integers:
    """Return the numbers of the pictures that take part, each once."""
    return plan.picture_N[plan.first_N]


def tags_of(pictures: Pictures, numbers: Iterable[int]) -> Iterator[Sequence[str]]:
    """Yield the tags of these pictures, without making their records."""
    for number in numbers:
        yield pictures.sources[pictures.source_P[number]].tags(int(pictures.row_P[number]))


def captions_of(pictures: Pictures, numbers: Iterable[int], rules: Sequence[CaptionRules]) -> Iterator[str]:
    """Yield every caption of these pictures with nothing dropped: alternatives, templates, added tags. No records.

    rules: how captions vary, for each source.
    """
    for number in numbers:
        source, row = pictures.source_P[number], int(pictures.row_P[number])
        indexed = pictures.sources[source]
        yield from whole_captions(indexed.captions(row), rules[source], indexed.tags(row))


def tag_table(tags: Iterable[Sequence[str]], top: int = TAGS_SHOWN) -> TagTable:
    """Count tags, each once a picture. tags: those of each picture. top: so many of the commonest and rarest."""
    counts: Counter[str] = Counter()
    pictures = untagged = 0
    for own in tags:
        pictures += 1
        untagged += not own
        counts.update(set(own))
    return TagTable(
        pictures=pictures,
        untagged=untagged,
        distinct=len(counts),
        once=sum(count == 1 for count in counts.values()),
        most=tuple(heapq.nsmallest(top, counts.items(), key=lambda item: (-item[1], item[0]))),
        rarest=tuple(heapq.nsmallest(top, counts.items(), key=lambda item: (item[1], item[0]))),
    )


def length_table(lengths: Iterable[int], limits: Sequence[int] = TOKEN_LIMITS) -> LengthTable:
    """Count captions by their length in tokens."""
    lengths_M = np.fromiter(lengths, dtype=np.int64)
    return LengthTable(
        captions=len(lengths_M),
        over={limit: int((lengths_M > limit).sum()) for limit in limits},
        mean=float(lengths_M.mean()) if len(lengths_M) else 0.0,
        longest=int(lengths_M.max(initial=0)),
    )


def evenly_spread(numbers: Integers, most: int) -> Integers:
    """Return at most `most` of the numbers, evenly spread over all of them."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.arange(most) * len(numbers) // most]


def sum_steps(plan: PicturePlan, schedule: BatchSchedule, parts: BatchParts) -> StepSum:
    """Return the sum that leads from pictures to steps."""
    repeats_N, shares = plan.repeats, parts.accumulation * parts.processes
    repeats, counts = np.unique(repeats_N, return_counts=True)
    by_bucket = []
    for bucket, size in schedule.global_batches.items():
        images = int(repeats_N[plan.by_bucket[bucket]].sum())
        by_bucket.append(BucketSteps(bucket.size_hw, images, size // shares, size, images / size))
    return StepSum(
        pictures_by_repeats=dict(zip(repeats.tolist(), counts.tolist(), strict=True)),
        images=schedule.images_per_epoch,
        micro_batch=parts.batch_size if parts.pixels_per_batch is None else None,
        pixels_per_batch=parts.pixels_per_batch,
        accumulation=parts.accumulation,
        processes=parts.processes,
        by_bucket=tuple(by_bucket),
        steps_per_epoch=schedule.steps_per_epoch,
        max_steps=parts.max_steps,
        epochs=schedule.epoch_of(parts.max_steps),
    )


def describe_sum(steps: StepSum) -> str:
    """Return pictures x repeats / (micro-batch x accumulation x processes) = steps with its numbers."""
    groups = [f"{number_of(count, 'picture')} x {repeats}" for repeats, count in steps.pictures_by_repeats.items()]
    if len(groups) > REPEATS_WRITTEN_OUT:
        groups = [f"{number_of(sum(steps.pictures_by_repeats.values()), 'picture')} x repeats"]
    parts = f"x accumulation {steps.accumulation} x processes {steps.processes}"
    images = f"{' + '.join(groups)} = {steps.images:,} images an epoch"
    if steps.micro_batch is None:
        each = f"micro-batches of {steps.pixels_per_batch:,} pixels, or one larger picture, {parts}"
        return f"{images}; {each}; the buckets' steps together = {decimal(steps.steps_per_epoch)} steps an epoch"
    batch = f"(micro-batch {steps.micro_batch} {parts})"
    return f"{images} / {batch} = {decimal(steps.steps_per_epoch)} steps an epoch"


def number_of(count: int, noun: str) -> str:
    """Return a number with its noun: 1 picture, 1,000 pictures."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def decimal(number: float) -> str:
    """Write a number with at most two decimals: 76.5, 1,000, 0.33."""
    return f"{number:,.2f}".rstrip("0").rstrip(".")
