"""Aspect-ratio buckets: which sizes there are, which one a picture goes to, and how it is cut (integers only)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sdxl_training.records import Bucket, CropPlan, ImageRecord, SizeHW, UserError

SmallPictures = Literal["leave_out", "upscale"]
NOTABLE_CROP = 0.10
BAR_WIDTH = 30


def make_buckets(resolution: int, step_px: int, min_side_px: int, max_side_px: int) -> tuple[Bucket, ...]:
    """Return all buckets, sorted: for each height the widest width of at most `resolution`² pixels, in both orders.

    Sides are multiples of `step_px` within [min_side_px, max_side_px]. With (1024, 64, 512, 2048) these are 33 of
    SDXL's 40 training sizes (Podell et al. 2023, Appendix I). Raises UserError when no size fits.
    """
    first = -(-min_side_px // step_px) * step_px
    sizes: set[SizeHW] = set()
    for height in range(first, max_side_px + 1, step_px):
        width = min(resolution**2 // height, max_side_px) // step_px * step_px
        if width >= min_side_px:
            sizes |= {(height, width), (width, height)}
    if not sizes:
        raise UserError(
            f"data.buckets: no size fits: sides must be multiples of {step_px} between {min_side_px} and {max_side_px} "
            f"with at most {resolution}x{resolution} pixels. Lower min_side_px or step_px, or raise data.resolution."
        )
    return tuple(Bucket(size_hw) for size_hw in sorted(sizes))


def plan_crop(original_hw: SizeHW, buckets: Sequence[Bucket]) -> CropPlan:
    """Plan a picture: nearest bucket by log aspect ratio, scaled to cover it, cut at the centre.

    Never distorts by more than the rounding of one side to a whole pixel; a picture of exactly a bucket's size is
    neither resized nor cut.
    """
    bucket = min(buckets, key=lambda candidate: _mismatch(original_hw, candidate))
    (height, width), (target_h, target_w) = original_hw, bucket.size_hw
    if target_h * width >= target_w * height:  # the picture is the wider one: heights meet, the width is cut
        resized_hw = (target_h, _divide_rounded(width * target_h, height))
    else:
        resized_hw = (_divide_rounded(height * target_w, width), target_w)
    crop_tl = ((resized_hw[0] - target_h) // 2, (resized_hw[1] - target_w) // 2)
    return CropPlan(original_hw, resized_hw, crop_tl, bucket)


def _mismatch(original_hw: SizeHW, bucket: Bucket) -> tuple[float, bool, int, Bucket]:
    """Order buckets by exp |ln(aspect) - ln(aspect of bucket)|; then the exact size first, then the largest.

    One division of whole numbers is correctly rounded, so equal ratios tie exactly and on every machine.
    """
    across = original_hw[0] * bucket.size_hw[1]
    down = original_hw[1] * bucket.size_hw[0]
    area = bucket.size_hw[0] * bucket.size_hw[1]
    return max(across, down) / min(across, down), bucket.size_hw != original_hw, -area, bucket


def _divide_rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A readable picture that does not take part, and why."""

    record: ImageRecord
    reason: str


@dataclass(frozen=True)
class PicturePlan:
    """What becomes of every picture. `records[i]` is prepared by `plans[i]`; record numbers are positions here."""

    records: tuple[ImageRecord, ...]
    plans: tuple[CropPlan, ...]
    left_out: tuple[LeftOut, ...]

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
        return max(self.by_bucket, key=lambda bucket: bucket.size_hw[0] * bucket.size_hw[1])

    def subset(self, numbers: Sequence[int]) -> PicturePlan:
        """Return the plan of these record numbers only, renumbered in the order given."""
        records = tuple(self.records[number] for number in numbers)
        return PicturePlan(records, tuple(self.plans[number] for number in numbers), self.left_out)

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
        return "\n".join([*self._histogram(), *self._crops(examples), *self._enlarged(), *self._absent(examples)])

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


def plan_pictures(
    records: Iterable[ImageRecord], buckets: Sequence[Bucket], small_pictures: SmallPictures
) -> PicturePlan:
    """Plan every picture; one smaller than its bucket is enlarged or left out, as `small_pictures` says.

    Raises UserError when no picture is left.
    """
    plan_of_size: dict[SizeHW, CropPlan] = {}
    kept: list[ImageRecord] = []
    plans: list[CropPlan] = []
    left_out: list[LeftOut] = []
    for record in records:
        if record.size_hw not in plan_of_size:
            plan_of_size[record.size_hw] = plan_crop(record.size_hw, buckets)
        plan = plan_of_size[record.size_hw]
        if plan.scale > 1.0 and small_pictures == "leave_out":
            left_out.append(LeftOut(record, _too_small(plan)))
        else:
            kept.append(record)
            plans.append(plan)
    if not kept:
        raise UserError(_nothing_left(left_out))
    return PicturePlan(tuple(kept), tuple(plans), tuple(left_out))


def _too_small(plan: CropPlan) -> str:
    return f"{_size(plan.original_hw)} is smaller than its bucket {plan.bucket} (needs enlarging {plan.scale:.2f}x)"


def _nothing_left(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "data.sources: there is no picture to plan. Add pictures to a source folder."
    example = left_out[0]
    return (
        f"data.sources: all {len(left_out)} pictures are smaller than their bucket, for example {example.record.path}: "
        f"{example.reason}. Lower data.resolution, or set data.buckets.small_pictures: upscale."
    )


def _size(size_hw: SizeHW) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
