"""Which bucket a picture goes to, and what becomes of a whole data set (integers only)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdxl_training.data.bucket_lists import area_buckets
from sdxl_training.data.crops import Box, Cut, centre_crop, sample_id_at
from sdxl_training.records import Bucket, CropPlan, ImageRecord, SizeHW, UserError

SmallPictures = Literal["leave_out", "upscale"]
Resolutions = Literal["largest", "each"]
NOTABLE_CROP = 0.10
BAR_WIDTH = 30
CHUNK = 2**14  # pictures at a time, so that a column of them stays in the processor's cache

make_buckets = area_buckets
CENTRE = Cut()
NO_BOXES: Mapping[int, Box] = MappingProxyType({})


def plan_crop(original_hw: SizeHW, buckets: Sequence[Bucket]) -> CropPlan:
    """Plan a picture: nearest bucket by log aspect ratio, scaled to cover it, cut at the centre."""
    return centre_crop(original_hw, min(buckets, key=lambda bucket: _mismatch(original_hw, bucket)))


def _mismatch(original_hw: SizeHW, bucket: Bucket) -> tuple[float, bool, int, Bucket]:
    """Order buckets by exp |ln(aspect) - ln(aspect of bucket)|; then the exact size first, then the largest.

    One division of whole numbers is correctly rounded, so equal ratios tie exactly and on every machine.
    """
    across = original_hw[0] * bucket.size_hw[1]
    down = original_hw[1] * bucket.size_hw[0]
    return max(across, down) / min(across, down), bucket.size_hw != original_hw, -_area(bucket), bucket


def assign_buckets(heights_N: ArrayLike, widths_N: ArrayLike, buckets: Sequence[Bucket]) -> NDArray[np.intp]:
    """Return which of `buckets` each of N pictures goes to: what `plan_crop` chooses, for a million in well under 1 s.

    Products of two sides are exact in float64, and so the ratios are the same correctly rounded numbers.
    """
    heights_N, widths_N = np.asarray(heights_N, dtype=np.float64), np.asarray(widths_N, dtype=np.float64)
    # In order of preference: of equally near buckets the first stays, unless a later one has the very size.
    by_area = sorted(range(len(buckets)), key=lambda i: (-_area(buckets[i]), buckets[i]))
    chosen_N = np.empty(heights_N.shape, dtype=np.intp)
    for first in range(0, len(heights_N), CHUNK):
        chunk = slice(first, first + CHUNK)
        h_C, w_C = heights_N[chunk], widths_N[chunk]
        nearest_C, number_C = np.full(h_C.shape, np.inf), np.zeros(h_C.shape, dtype=np.intp)
        for number in by_area:
            height, width = buckets[number].size_hw
            across_C, down_C = h_C * width, w_C * height
            ratio_C = np.maximum(across_C, down_C) / np.minimum(across_C, down_C)
            better_C = (ratio_C < nearest_C) | ((h_C == height) & (w_C == width))
            np.copyto(nearest_C, ratio_C, where=better_C)
            np.copyto(number_C, number, where=better_C)
        chosen_N[chunk] = number_C
    return chosen_N


def _area(bucket: Bucket) -> int:
    return bucket.size_hw[0] * bucket.size_hw[1]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A readable picture that does not take part, and why."""

    record: ImageRecord
    reason: str


@dataclass(frozen=True)
class PicturePlan:
    """What becomes of every picture; record numbers are positions here.

    variants[i]: the ways in which `records[i]` is prepared, all for one bucket; a visit shows one of them. A picture
    that is trained at several resolutions is a record at each.
    """

    records: tuple[ImageRecord, ...]
    variants: tuple[tuple[CropPlan, ...], ...]
    left_out: tuple[LeftOut, ...]

    @cached_property
    def plans(self) -> tuple[CropPlan, ...]:
        """Return the first variant of each record; bucket and scale are the same in all of them."""
        return tuple(variants[0] for variants in self.variants)

    def prepared(self) -> Iterator[tuple[ImageRecord, CropPlan]]:
        """Yield every record with each of its variants: all that has to be encoded."""
        for record, variants in zip(self.records, self.variants, strict=True):
            for plan in variants:
                yield record, plan

    @cached_property
    def by_bucket(self) -> dict[Bucket, tuple[int, ...]]:
        """Return the record numbers of each bucket that has any, buckets in order."""
        members: dict[Bucket, list[int]] = {}
        for number, plan in enumerate(self.plans):
            members.setdefault(plan.bucket, []).append(number)
        return {bucket: tuple(members[bucket]) for bucket in sorted(members)}

    @property
    def largest_bucket(self) -> Bucket:
        """Return the bucket in use with the largest area."""
        return max(self.by_bucket, key=_area)

    def subset(self, numbers: Sequence[int]) -> PicturePlan:
        """Return the plan of these record numbers only, renumbered in the order given."""
        records = tuple(self.records[number] for number in numbers)
        return PicturePlan(records, tuple(self.variants[number] for number in numbers), self.left_out)

    @property
    def counts(self) -> dict[Bucket, int]:
        """Return the number of pictures in each bucket."""
        return {bucket: len(numbers) for bucket, numbers in self.by_bucket.items()}

    @property
    def images_per_epoch(self) -> int:
        """Return pictures times repeats."""
        return sum(record.repeats for record in self.records)

    @property
    def upscaled(self) -> int:
        """Return how many pictures are enlarged."""
        return sum(plan.scale > 1.0 for plan in self.plans)

    def worst_crops(self, count: int) -> list[tuple[ImageRecord, CropPlan]]:
        """Return the pictures that lose the largest share of their area, worst first; uncut pictures are not listed."""
        cut = [pair for pair in zip(self.records, self.plans, strict=True) if pair[1].cropped_fraction > 0]
        return sorted(cut, key=lambda pair: (-pair[1].cropped_fraction, pair[0].path))[:count]

    def describe(self, examples: int = 10) -> str:
        """Return plain text for people: histogram, crops, enlargements, pictures left out."""
        parts = (self._histogram(), self._varied(), self._crops(examples), self._enlarged(), self._absent(examples))
        return "\n".join(line for part in parts for line in part)

    def _histogram(self) -> list[str]:
        repeated = Counter[Bucket]()
        for record, plan in zip(self.records, self.plans, strict=True):
            repeated[plan.bucket] += record.repeats
        fullest = max(self.counts.values())
        lines = [
            f"{_number(len(self.records), 'picture')} in {_number(len(self.counts), 'bucket')}; "
            f"pictures x repeats = {self.images_per_epoch} images an epoch",
            f"  {'height x width':<15}{'pictures':>9}{'x repeats':>11}",
        ]
        for bucket, count in self.counts.items():
            bar = "#" * -(-BAR_WIDTH * count // fullest)
            lines.append(f"  {bucket!s:<15}{count:>9}{repeated[bucket]:>11}  {bar}")
        return lines

    def _varied(self) -> list[str]:
        latents = sum(map(len, self.variants))
        if latents == len(self.variants):
            return []
        return [f"variants: {latents} latents of {_number(len(self.variants), 'picture')} (crops, mirrored or not)"]

    def _crops(self, examples: int) -> list[str]:
        untouched = sum(plan.resized_hw == plan.original_hw == plan.bucket.size_hw for plan in self.plans)
        notable = sum(plan.cropped_fraction > NOTABLE_CROP for plan in self.plans)
        lines = [
            f"cropping: {untouched} untouched (exactly a bucket's size), "
            f"{notable} lose more than {NOTABLE_CROP:.0%} of their area"
        ]
        for record, plan in self.worst_crops(examples):
            lines.append(
                f"  {plan.cropped_fraction:6.1%} cut, scaled {plan.scale:.2f}x: {record.path} "
                f"({_size(plan.original_hw)} -> {plan.bucket})"
            )
        return lines

    def _enlarged(self) -> list[str]:
        largest = max((plan.scale for plan in self.plans), default=1.0)
        return [f"enlarged: {self.upscaled}" + (f", at most {largest:.2f}x" if self.upscaled else "")]

    def _absent(self, examples: int) -> list[str]:
        lines = [f"left out: {len(self.left_out)}"]
        lines += [f"  {absent.record.path}: {absent.reason}" for absent in self.left_out[:examples]]
        if len(self.left_out) > examples:
            lines.append(f"  and {len(self.left_out) - examples} more")
        return lines


@dataclass(frozen=True, slots=True)
class Fitting:
    """Which buckets a picture takes part in: in each resolution the nearest, if the picture fills it.

    small_pictures: one that fills none is left out, or enlarged to the smallest. resolutions: it goes to the largest
    that it fills, or to each. max_crop: where more than this share of its area would be cut away, it is left out.
    """

    small_pictures: SmallPictures = "leave_out"
    resolutions: Resolutions = "largest"
    max_crop: float = 1.0

    def place(self, size_hw: SizeHW, nearest: Sequence[Bucket]) -> tuple[Bucket, ...] | str:
        """Return the buckets among `nearest`, one a resolution and the largest first; or why there is none."""
        plans = [centre_crop(size_hw, bucket) for bucket in nearest]
        filled = [plan for plan in plans if plan.scale <= 1.0]
        if not filled and self.small_pictures == "leave_out":
            return _too_small(plans[-1])
        chosen = filled or plans[-1:]
        if self.resolutions == "largest":
            chosen = chosen[:1]
        kept = dict.fromkeys(plan.bucket for plan in chosen if plan.cropped_fraction <= self.max_crop)
        return tuple(kept) or _too_narrow(chosen[0], self.max_crop)


def plan_resolutions(
    records: Iterable[ImageRecord],
    resolutions: Sequence[Sequence[Bucket]],
    fitting: Fitting,
    cut: Cut = CENTRE,
    focus: Mapping[int, Box] = NO_BOXES,
) -> PicturePlan:
    """Plan every picture. resolutions: the buckets of each, the largest first. focus: boxes by sample id.

    Further appearances of a picture at other resolutions have sample ids of their own, so their randomness differs.
    Raises UserError when no picture is left.
    """
    records = tuple(records)
    places = _places(dict.fromkeys(record.size_hw for record in records), resolutions, fitting)
    kept: list[ImageRecord] = []
    variants: list[tuple[CropPlan, ...]] = []
    left_out: list[LeftOut] = []
    for record in records:
        place = places[record.size_hw]
        if isinstance(place, str):
            left_out.append(LeftOut(record, place))
            continue
        for bucket in place:
            sample_id = record.sample_id if bucket == place[0] else sample_id_at(record.sample_id, bucket)
            kept.append(record if sample_id == record.sample_id else replace(record, sample_id=sample_id))
            variants.append(cut.plans(record.size_hw, bucket, sample_id, focus.get(record.sample_id)))
    if not kept:
        raise UserError(_nothing_left(left_out))
    return PicturePlan(tuple(kept), tuple(variants), tuple(left_out))


def plan_pictures(
    records: Iterable[ImageRecord], buckets: Sequence[Bucket], small_pictures: SmallPictures
) -> PicturePlan:
    """Plan every picture for one resolution, cut at the centre; see `plan_resolutions`."""
    return plan_resolutions(records, [buckets], Fitting(small_pictures))


def _places(
    sizes: Iterable[SizeHW], resolutions: Sequence[Sequence[Bucket]], fitting: Fitting
) -> dict[SizeHW, tuple[Bucket, ...] | str]:
    sizes = tuple(sizes)
    heights_N, widths_N = np.array(sizes).reshape(-1, 2).T
    numbers = [assign_buckets(heights_N, widths_N, buckets).tolist() for buckets in resolutions]
    return {
        size_hw: fitting.place(size_hw, [buckets[number] for buckets, number in zip(resolutions, nearest, strict=True)])
        for size_hw, *nearest in zip(sizes, *numbers, strict=True)
    }


def _too_small(plan: CropPlan) -> str:
    return f"{_size(plan.original_hw)} is smaller than its bucket {plan.bucket} (needs enlarging {plan.scale:.2f}x)"


def _too_narrow(plan: CropPlan, max_crop: float) -> str:
    return (
        f"{_size(plan.original_hw)} loses {plan.cropped_fraction:.0%} of its area in its bucket {plan.bucket} "
        f"(more than {max_crop:.0%})"
    )


def _nothing_left(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "data.sources: there is no picture to plan. Add pictures to a source folder."
    example = left_out[0]
    return (
        f"data.sources: none of the {len(left_out)} pictures fits its bucket, for example {example.record.path}: "
        f"{example.reason}. Lower data.resolution, set data.buckets.small_pictures: upscale, or allow larger crops."
    )


def _size(size_hw: SizeHW) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
