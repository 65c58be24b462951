"""How a picture becomes its bucket: scaled to cover it, cut at the centre, at random or around a box, and mirrored.

Whole numbers only. A picture may have several variants (crops, mirrored twins); all have one bucket, each is encoded
and cached by itself, and each visit of the picture sees the next of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.lazy import Lazy
from sdxl_training.records import Bucket, CropPlan, SizeHW, UserError
from sdxl_training.rng import Stream, Words, derive_seed, mixed_bits

Position = Literal["centre", "random", "focus"]
Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the upright, unscaled picture."""

Integers = NDArray[np.int64]
Whole = TypeVar("Whole", int, Integers)

REMEMBERED = 2**14  # sizes of pictures
NO_END = 2**62


@dataclass(frozen=True, slots=True)
class Cut:
    """What is cut out of a picture.

    position: `centre`; `random`: `variants` crops, each anywhere that covers the bucket, functions of (seed, sample id,
    variant); `focus`: around the picture's box, at the centre where it has none. flip: every crop also mirrored.
    Raises ValueError for several variants of a crop that is not random.
    """

    position: Position = "centre"
    variants: int = 1
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variants < 1 or (self.variants > 1 and self.position != "random"):
            raise ValueError(f"{self.variants} variants of a crop with position {self.position}")

    def plans(
        self, original_hw: SizeHW, bucket: Bucket, sample_id: int = 0, focus: Box | None = None
    ) -> tuple[CropPlan, ...]:
        """Return the variants of a picture, at least one and no two alike."""
        centre = centre_crop(original_hw, bucket)
        places: tuple[tuple[int, int], ...] = (centre.crop_tl,)
        if self.position == "random":
            drawn = (random_place(centre, self.seed, sample_id, variant) for variant in range(self.variants))
            places = tuple(dict.fromkeys(drawn))
        elif self.position == "focus" and focus is not None:
            places = (focus_place(centre, focus),)
        return _cut_at(original_hw, bucket, places, self.flip)

    def without_end(self, original_hw: SizeHW, bucket: Bucket, sample_id: int = 0) -> Sequence[CropPlan]:
        """Return more random crops than there are visits, functions of (seed, sample id, number); mirrored in turns."""
        centre = centre_crop(original_hw, bucket)

        def cut(number: int) -> CropPlan:
            place = random_place(centre, self.seed, sample_id, number)
            return replace(centre, crop_tl=place, flipped=self.flip and number % 2 == 1)

        return Lazy(NO_END, cut)


@lru_cache(maxsize=REMEMBERED)
def centre_crop(original_hw: SizeHW, bucket: Bucket) -> CropPlan:
    """Scale the picture until it just covers the bucket and cut at the centre.

    Never distorts by more than the rounding of one side to a whole pixel; a picture of exactly the bucket's size is
    neither resized nor cut.
    """
    (height, width), (target_h, target_w) = original_hw, bucket.size_hw
    if target_h * width >= target_w * height:  # the picture is the wider one: heights meet, the width is cut
        resized_hw = (target_h, _divide_rounded(width * target_h, height))
    else:
        resized_hw = (_divide_rounded(height * target_w, width), target_w)
    crop_tl = ((resized_hw[0] - target_h) // 2, (resized_hw[1] - target_w) // 2)
    return CropPlan(original_hw, resized_hw, crop_tl, bucket)


def covering_sizes(
    heights_N: Integers, widths_N: Integers, target_h_N: Integers, target_w_N: Integers
) -> tuple[Integers, Integers]:
    """Return the resized heights and widths of `centre_crop`, of many pictures at once."""
    wider_N = target_h_N * widths_N >= target_w_N * heights_N
    resized_h_N = np.where(wider_N, target_h_N, _divide_rounded(heights_N * target_w_N, widths_N))
    resized_w_N = np.where(wider_N, _divide_rounded(widths_N * target_h_N, heights_N), target_w_N)
    return resized_h_N, resized_w_N


def random_place(plan: CropPlan, seed: int, sample_id: int, variant: int) -> tuple[int, int]:
    """Return where to cut, drawn evenly from all places inside: a function of (seed, sample id, variant)."""
    (resized_h, resized_w), (target_h, target_w) = plan.resized_hw, plan.bucket.size_hw
    top, left = (random_start(seed, sample_id, variant, cut) for cut in (resized_h - target_h, resized_w - target_w))
    return top, left


def random_start(seed: int, sample_id: Words, variant: int, cut: Words) -> Words:
    """Return where a crop begins along a side of which `cut` pixels are cut away: one picture or a column of them.

    A covering picture is cut along one side only, so the same number serves both.
    """
    return mixed_bits(seed, Stream.CROP, sample_id, variant) % (cut + 1)


def focus_place(plan: CropPlan, box: Box) -> tuple[int, int]:
    """Return where to cut so that most of the box is kept, and its centre is as near as possible to the crop's."""
    top, left = (
        min(max(centred_start(start, length, resized, target, original), 0), resized - target)
        for start, length, resized, target, original in zip(
            box[:2], box[2:], plan.resized_hw, plan.bucket.size_hw, plan.original_hw, strict=True
        )
    )
    return top, left


def centred_start(start: Whole, length: Whole, resized: Whole, target: Whole, original: Whole) -> Whole:
    """Return where a crop begins along a side if its centre is that of a box, which may be outside the picture.

    (start + length / 2) resized / original - target / 2, rounded; one picture or a column of them.
    """
    return _divide_rounded((2 * start + length) * resized - target * original, 2 * original)


@lru_cache(maxsize=REMEMBERED)
def _cut_at(
    original_hw: SizeHW, bucket: Bucket, places: tuple[tuple[int, int], ...], flip: bool
) -> tuple[CropPlan, ...]:
    """Return the plans of these crops; remembered, because of a million pictures few differ."""
    resized_hw = centre_crop(original_hw, bucket).resized_hw
    twins = (False, True) if flip else (False,)
    return tuple(CropPlan(original_hw, resized_hw, crop_tl, bucket, flipped) for crop_tl in places for flipped in twins)


def read_box(value: object, size_hw: SizeHW, place: str) -> Box:
    """Return the box [top, left, height, width] of an upright picture in whole pixels, enlarged to them.

    Numbers that are all at most 1 are fractions of the picture's height and width, others pixels. What lies outside the
    picture is cut off. Raises UserError, beginning with `place`, where no box is left.
    """
    box = _box_inside(value, size_hw) if isinstance(value, list | tuple) else None
    if box is None:
        raise UserError(f"{place} = {not_inside(value, size_hw)}")
    return box


def not_inside(value: object, size_hw: SizeHW) -> str:
    """Return what is wrong with a box that does not lie in its picture."""
    return (
        f"{value}: must be [top, left, height, width] of a box inside the picture of {size_hw[0]}x{size_hw[1]} "
        "(height x width), in pixels or as fractions. Correct it, or take it out."
    )


def _box_inside(values: Sequence[object], size_hw: SizeHW) -> Box | None:
    numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if not len(numbers) == len(values) == 4:
        return None
    if max(numbers) <= 1:
        numbers = [number * size_hw[i % 2] for i, number in enumerate(numbers)]
    top, left, height, width = numbers
    top_px, left_px = max(math.floor(top), 0), max(math.floor(left), 0)
    bottom_px, right_px = min(math.ceil(top + height), size_hw[0]), min(math.ceil(left + width), size_hw[1])
    if min(height, width, bottom_px - top_px, right_px - left_px) <= 0:
        return None
    return top_px, left_px, bottom_px - top_px, right_px - left_px


def variant_of_visit(seed: int, sample_id: int, visit: int, count: int) -> int:
    """Return which of its `count` variants a picture shows on a visit.

    They take turns, so every `count` visits in a row show each once; which comes first is drawn for each picture.
    """
    return 0 if count == 1 else (visit + derive_seed(seed, Stream.CROP, sample_id)) % count


def sample_id_at(sample_id: Words, bucket_h: Words, bucket_w: Words) -> Words:
    """Return the 63-bit sample id of a picture's further appearance in another bucket, with randomness of its own."""
    mixed: Words = mixed_bits(0, Stream.CROP, sample_id, bucket_h, bucket_w)
    return mixed // 2


def _divide_rounded(numerator: Whole, denominator: Whole) -> Whole:
    return (2 * numerator + denominator) // (2 * denominator)
