"""Crops of many pictures at once, as columns: what `crops.Cut.plans` makes of each.

A million pictures with two random crops and their mirrored twins are four million crops, and to tell what the cache
lacks each of them has to be known.

Shape legend: N pictures, V random crops of each, K of them that differ, M with their mirrored twins; 2: (height, width)
or (top, left); 4: a box, (top, left, height, width).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.crops import Cut, Integers, centred_start, covering_sizes, random_start

Bits = NDArray[np.uint64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CropColumns:
    """M crops of N pictures, in order: of which picture, and what a CropPlan says of it beside the original size."""

    picture_M: Integers
    crop_tl_M2: Integers
    flipped_M: NDArray[np.bool_]
    resized_M2: Integers
    bucket_M2: Integers


def make_crops(
    cut: Cut,
    original_N2: Integers,
    bucket_N2: Integers,
    sample_id_N: Bits | None = None,
    box_N4: Integers | None = None,
) -> CropColumns:
    """Return every picture's variants, in the order of `cut.plans`.

    sample_id_N: for random crops. box_N4: for crops around a box; where its height is 0 there is none.
    """
    resized_N2 = np.stack(covering_sizes(*original_N2.T, *bucket_N2.T), axis=1)
    spare_N2 = resized_N2 - bucket_N2
    picture_K, crop_tl_K2 = np.arange(len(spare_N2)), spare_N2 // 2
    if cut.position == "random" and sample_id_N is not None:
        picture_K, crop_tl_K2 = _at_random(cut, sample_id_N, spare_N2)
    elif cut.position == "focus" and box_N4 is not None:
        around_N2 = centred_start(box_N4[:, :2], box_N4[:, 2:], resized_N2, bucket_N2, original_N2)
        crop_tl_K2 = np.where(box_N4[:, 2:3] > 0, np.clip(around_N2, 0, spare_N2), crop_tl_K2)
    twins = 2 if cut.flip else 1
    picture_M = picture_K.repeat(twins)
    return CropColumns(
        picture_M=picture_M,
        crop_tl_M2=crop_tl_K2.repeat(twins, axis=0),
        flipped_M=np.arange(len(picture_M)) % twins == 1,
        resized_M2=resized_N2[picture_M],
        bucket_M2=bucket_N2[picture_M],
    )


def _at_random(cut: Cut, sample_id_N: Bits, spare_N2: Integers) -> tuple[Integers, Integers]:
    """Return picture_K and crop_tl_K2; of a picture's crops that coincide, the first."""
    along_N = spare_N2.max(axis=1).astype(np.uint64)  # a covering picture is cut along one side only
    starts = [random_start(cut.seed, sample_id_N, variant, along_N) for variant in range(cut.variants)]
    start_NV = np.stack(starts, axis=1).astype(np.int64)
    first_NV = np.ones(start_NV.shape, np.bool_)
    for variant in range(1, cut.variants):
        first_NV[:, variant] = np.all(start_NV[:, :variant] != start_NV[:, variant, None], axis=1)
    picture_K = np.nonzero(first_NV)[0]
    return picture_K, np.where(spare_N2[picture_K] > 0, start_NV[first_NV][:, None], 0)


def written_boxes(boxes: pa.ListArray) -> Floats:
    """Return focus boxes (N, 4) as they are written; not a number where there is none, zeros where it is no box."""
    given_N = boxes.is_valid().to_numpy(zero_copy_only=False)
    four_N = pc.fill_null(pc.equal(pc.list_value_length(boxes), 4), fill_value=False)
    written_N4 = np.where(given_N[:, None], np.zeros(4), np.nan)
    values_K4 = pc.list_flatten(boxes.filter(four_N)).to_numpy(zero_copy_only=False).reshape(-1, 4)
    finite_K = np.isfinite(values_K4).all(axis=1)
    written_N4[four_N.to_numpy(zero_copy_only=False)] = np.where(finite_K[:, None], values_K4, 0.0)
    return written_N4


def read_boxes(written_N4: Floats, original_N2: Integers) -> Integers:
    """Return boxes in whole pixels, as `crops.read_box` reads each; zeros where it finds none inside the picture."""
    size_N2 = original_N2.astype(np.float64)
    # What is beyond the picture may be beyond whole numbers, too, so it is cut off first.
    with np.errstate(invalid="ignore", over="ignore"):
        scale_N2 = np.where(written_N4.max(axis=1, keepdims=True) <= 1, size_N2, 1.0)
        start_N2, length_N2 = written_N4[:, :2] * scale_N2, written_N4[:, 2:] * scale_N2
        first_N2 = np.maximum(np.floor(start_N2), 0)
        end_N2 = np.minimum(np.ceil(start_N2 + length_N2), size_N2)
        inside_N = np.all((length_N2 > 0) & (end_N2 > first_N2), axis=1)
    box_N4 = np.concatenate([first_N2, end_N2 - first_N2], axis=1)
    return np.where(inside_N[:, None], box_N4, 0).astype(np.int64)
