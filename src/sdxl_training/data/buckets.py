"""Which bucket a picture goes to (integers only), one picture at a time and a million at once.

Shape legend: N pictures, R resolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdxl_training.data.bucket_lists import area_buckets
from sdxl_training.data.crops import centre_crop, covering_sizes
from sdxl_training.records import Bucket, CropPlan, SizeHW

SmallPictures = Literal["leave_out", "upscale"]
Resolutions = Literal["largest", "each"]
Integers = NDArray[np.int64]
CHUNK = 2**14  # pictures at a time, so that a column of them stays in the processor's cache

make_buckets = area_buckets


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
class Places:
    """Which buckets N pictures take part in.

    picture_M, bucket_M: M appearances, by picture and the largest resolution first; bucket is a number in `buckets`.
    first_M: whether it is the picture's first. none_N: pictures that take part in no bucket.
    """

    buckets: tuple[Bucket, ...]
    picture_M: Integers
    bucket_M: Integers
    first_M: NDArray[np.bool_]
    none_N: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fitting:
    """Which buckets a picture takes part in: in each resolution the nearest, if the picture fills it.

    small_pictures: one that fills none is left out, or enlarged to the smallest. resolutions: it goes to the largest
    that it fills, or to each. max_crop: where more than this share of its area would be cut away, it is left out.
    """

    small_pictures: SmallPictures = "leave_out"
    resolutions: Resolutions = "largest"
    max_crop: float = 1.0

    def place(self, heights_N: ArrayLike, widths_N: ArrayLike, resolutions: Sequence[Sequence[Bucket]]) -> Places:
        """Return where pictures of these sizes go. resolutions: the buckets of each, the largest first."""
        heights_N, widths_N = np.asarray(heights_N, dtype=np.int64), np.asarray(widths_N, dtype=np.int64)
        buckets = tuple(dict.fromkeys(bucket for listed in resolutions for bucket in listed))
        number = {bucket: i for i, bucket in enumerate(buckets)}
        sizes_K2 = np.array([bucket.size_hw for bucket in buckets], dtype=np.int64).reshape(-1, 2)
        bucket_RN = np.stack(
            [
                np.array([number[bucket] for bucket in listed])[assign_buckets(heights_N, widths_N, listed)]
                for listed in resolutions
            ]
        )
        target_h_RN, target_w_RN = sizes_K2[bucket_RN, 0], sizes_K2[bucket_RN, 1]
        resized_h_RN, resized_w_RN = covering_sizes(heights_N, widths_N, target_h_RN, target_w_RN)
        chosen_RN = (resized_h_RN <= heights_N) & (resized_w_RN <= widths_N)
        if self.small_pictures == "upscale":
            chosen_RN[-1] |= ~chosen_RN.any(axis=0)
        if self.resolutions == "largest":
            chosen_RN &= np.cumsum(chosen_RN, axis=0) == 1
        # The same sum as CropPlan.cropped_fraction.
        chosen_RN &= 1.0 - target_h_RN * target_w_RN / (resized_h_RN * resized_w_RN) <= self.max_crop
        for r in range(1, len(chosen_RN)):  # two resolutions may share a bucket
            chosen_RN[r] &= ~((bucket_RN[:r] == bucket_RN[r]) & chosen_RN[:r]).any(axis=0)
        picture_M, resolution_M = np.nonzero(chosen_RN.T)
        first_M = np.diff(picture_M, prepend=-1) > 0
        none_N = np.asarray(~chosen_RN.any(axis=0))
        return Places(buckets, picture_M, bucket_RN[resolution_M, picture_M], first_M, none_N)

    def why_nowhere(self, size_hw: SizeHW, resolutions: Sequence[Sequence[Bucket]]) -> str:
        """Return why a picture of this size takes part in no bucket."""
        plans = [plan_crop(size_hw, buckets) for buckets in resolutions]
        filled = [plan for plan in plans if plan.scale <= 1.0]
        if not filled and self.small_pictures == "leave_out":
            return _too_small(plans[-1])
        return _too_narrow((filled or plans[-1:])[0], self.max_crop)


def _too_small(plan: CropPlan) -> str:
    height, width = plan.original_hw
    return f"{height}x{width} is smaller than its bucket {plan.bucket} (needs enlarging {plan.scale:.2f}x)"


def _too_narrow(plan: CropPlan, max_crop: float) -> str:
    height, width = plan.original_hw
    return (
        f"{height}x{width} loses {plan.cropped_fraction:.0%} of its area in its bucket {plan.bucket} "
        f"(more than {max_crop:.0%})"
    )
