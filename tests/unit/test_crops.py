"""Crops, mirrored twins and variants: what a crop must never do, and the size conditioning that goes with it."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data.bucket_lists import area_buckets
from sdxl_training.data.buckets import plan_crop
from sdxl_training.data.crops import Cut, centre_crop, random_start, read_box, variant_of_visit
from sdxl_training.data.images import resize_and_crop
from sdxl_training.records import Bucket, UserError

SDXL = area_buckets(1024, 64, 512, 2048)
SMALL = area_buckets(64, 16, 32, 128)
FULL_HD = Bucket((768, 1344))

sides = st.integers(1, 6000)
cuts = st.builds(
    lambda position, variants, flip, seed: Cut(position, variants if position == "random" else 1, flip, seed),
    st.sampled_from(["centre", "random", "focus"]),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 2**32),
)


@st.composite
def boxes(draw, height: int, width: int):
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))


@given(height=sides, width=sides, buckets=st.sampled_from([SDXL, SMALL]))
def test_the_centre_crop_covers_its_bucket_without_distortion(height, width, buckets):
    plan = plan_crop((height, width), buckets)
    (resized_h, resized_w), (target_h, target_w), (top, left) = plan.resized_hw, plan.bucket.size_hw, plan.crop_tl
    assert resized_h >= target_h
    assert resized_w >= target_w
    assert resized_h == target_h or resized_w == target_w, "more is cut than needed"
    scale = max(Fraction(target_h, height), Fraction(target_w, width))
    assert abs(resized_h - scale * height) <= Fraction(1, 2)
    assert abs(resized_w - scale * width) <= Fraction(1, 2)
    assert top == (resized_h - target_h) // 2
    assert left == (resized_w - target_w) // 2
    assert not plan.flipped
    assert plan.time_ids == (height, width, top, left, target_h, target_w)
    assert (plan.scale > 1) == (scale > 1)


@given(data=st.data(), height=sides, width=sides, cut=cuts, sample_id=st.integers(0, 2**63 - 1))
def test_every_variant_lies_inside_the_picture_as_the_centre_crop_scales_it(data, height, width, cut, sample_id):
    centre = plan_crop((height, width), SMALL)
    box = data.draw(st.none() | boxes(height, width))
    variants = cut.plans((height, width), centre.bucket, sample_id, box)
    assert 1 <= len(variants) == len(set(variants)) <= cut.variants * (1 + cut.flip)
    for plan in variants:
        assert (plan.original_hw, plan.resized_hw, plan.bucket) == (
            centre.original_hw,
            centre.resized_hw,
            centre.bucket,
        )
        for start, target, resized in zip(plan.crop_tl, plan.bucket.size_hw, plan.resized_hw, strict=True):
            assert 0 <= start <= resized - target
        _, _, top, left, _, target_w = plan.time_ids
        assert top >= 0
        assert 0 <= left <= plan.resized_hw[1] - target_w
    assert sum(plan.flipped for plan in variants) == (len(variants) // 2 if cut.flip else 0)
    assert {replace(plan, flipped=False) for plan in variants if plan.flipped} <= set(variants)
    assert cut.plans((height, width), centre.bucket, sample_id, box) == variants


def test_random_crops_reach_every_place_equally_often_and_belong_to_seed_picture_and_variant():
    size_hw, bucket = (64, 84), Bucket((64, 64))  # 21 places
    cut = Cut("random", seed=3)
    lefts = Counter(cut.plans(size_hw, bucket, sample_id)[0].crop_tl[1] for sample_id in range(21 * 200))
    assert set(lefts) == set(range(21))
    assert all(abs(count - 200) < 5 * 200**0.5 for count in lefts.values())
    several = replace(cut, variants=4).plans(size_hw, bucket, 7)
    assert len(several) == 4
    assert replace(cut, variants=2).plans(size_hw, bucket, 7) == several[:2], "more variants must keep those cached"
    assert replace(cut, variants=4).plans(size_hw, bucket, 8) != several
    assert replace(cut, variants=4, seed=4).plans(size_hw, bucket, 7) != several


@pytest.mark.parametrize("flip", [False, True])
def test_crops_without_end_differ_from_visit_to_visit_and_are_valid(flip):
    size_hw, bucket = (64, 84), Bucket((64, 64))
    cut = Cut("random", flip=flip, seed=3)
    crops = cut.without_end(size_hw, bucket, 7)
    shown = [crops[variant_of_visit(5, 7, visit, len(crops))] for visit in range(2000)]
    again = cut.without_end(size_hw, bucket, 7)
    assert shown == [again[variant_of_visit(5, 7, visit, len(again))] for visit in range(2000)]
    lefts = Counter(plan.crop_tl[1] for plan in shown)
    assert set(lefts) == set(range(21))
    assert max(lefts.values()) < 2 * 2000 / 21
    assert sum(plan.flipped for plan in shown) == (1000 if flip else 0)
    assert [replace(crops[variant], flipped=False) for variant in range(3)] == [
        replace(plan, flipped=False) for plan in replace(cut, variants=3, flip=False).plans(size_hw, bucket, 7)
    ]
    assert cut.without_end(size_hw, bucket, 8)[0:5] != crops[0:5]
    assert replace(cut, seed=4).without_end(size_hw, bucket, 7)[0:5] != crops[0:5]


def independent(table: np.ndarray) -> bool:
    """Return whether the counts of pairs are as if their halves had nothing to do with each other (chi-square)."""
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return abs(((table - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5


def test_random_crops_of_variants_neighbours_and_seeds_have_nothing_to_do_with_each_other():
    ids = np.arange(40_000, dtype=np.uint64)  # numbers that differ little are the worst case
    width = np.full(len(ids), 20, np.uint64)
    start = {key: random_start(*key[:1], ids, *key[1:], width).astype(int) for key in [(0, 0), (0, 1), (0, 2), (1, 0)]}
    pairs = [(start[0, 0], start[0, 1]), (start[0, 1], start[0, 2]), (start[0, 0], start[1, 0])]
    pairs.append((start[0, 0][:-1], start[0, 0][1:]))
    for one, other in pairs:
        assert independent(np.histogram2d(one, other, bins=(21, 21), range=((0, 21), (0, 21)))[0])
    assert not independent(np.histogram2d(start[0, 0], start[0, 0], bins=21)[0]), "the measure sees what is the same"


def test_crops_that_coincide_are_one_variant():
    assert Cut("random", variants=9).plans((128, 128), Bucket((64, 64))) == (centre_crop((128, 128), Bucket((64, 64))),)
    assert len(Cut("random", variants=99).plans((64, 66), Bucket((64, 64)))) == 3


def test_several_variants_of_one_place_are_refused():
    with pytest.raises(ValueError, match="2 variants of a crop with position centre"):
        Cut("centre", variants=2)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), height=st.integers(1, 200), width=st.integers(1, 200))
def test_the_focus_crop_keeps_as_much_of_the_box_as_any_crop_can_and_is_centred_on_it(data, height, width):
    bucket = plan_crop((height, width), SMALL).bucket
    box = data.draw(boxes(height, width))
    (plan,) = Cut("focus").plans((height, width), bucket, focus=box)
    for axis in (0, 1):
        original, resized, target = plan.original_hw[axis], plan.resized_hw[axis], bucket.size_hw[axis]
        begin = Fraction(box[axis] * resized, original)
        end = begin + Fraction(box[axis + 2] * resized, original)

        def judged(start, begin=begin, end=end, target=target):
            kept = min(start + target, end) - max(start, begin)
            return max(kept, 0), -abs(start + Fraction(target, 2) - (begin + end) / 2)

        places = range(resized - target + 1)
        assert judged(plan.crop_tl[axis]) == max(map(judged, places))


def test_without_a_box_the_focus_is_the_centre():
    assert Cut("focus").plans((900, 800), FULL_HD) == (centre_crop((900, 800), FULL_HD),)


def test_boxes_are_read_in_pixels_or_fractions_and_kept_inside():
    assert read_box([10, 20, 30, 40], (100, 200), "x") == (10, 20, 30, 40)
    assert read_box([0.25, 0.5, 0.5, 0.125], (100, 200), "x") == (25, 100, 50, 25)
    assert read_box((0, 0, 1, 1), (100, 200), "x") == (0, 0, 100, 200)
    assert read_box([-5, 190.5, 20, 40], (100, 200), "x") == (0, 190, 15, 10)
    assert read_box([0.5, 0.1, 0.001, 0.001], (100, 200), "x") == (50, 20, 1, 1)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "10 20 30 40",
        [1, 2, 3],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 5],
        [0, 0, -3, 5],
        [120, 0, 5, 5],
        [0, 0, "a", 5],
        [0, 0, float("nan"), 5],
        [0, 0, float("inf"), 5],
    ],
    ids=str,
)
def test_a_box_that_is_none_is_refused_by_place(value):
    with pytest.raises(UserError, match=r"^a\.json: focus = .*inside the picture of 100x200"):
        read_box(value, (100, 200), "a.json: focus")


# Size conditioning


def test_heights_come_first():
    plan = centre_crop((1500, 1000), Bucket((1216, 832)))
    assert plan.time_ids == (1500, 1000, 16, 0, 1216, 832)
    assert plan.time_ids[0] > plan.time_ids[1]
    assert plan.time_ids[4] > plan.time_ids[5]


@given(data=st.data(), height=sides, width=sides, cut=cuts)
def test_the_size_conditioning_has_diffusers_layout(data, height, width, cut):
    """Parity with the pipeline's own function, told where the picture is cut as it is shown."""
    bucket = plan_crop((height, width), SDXL).bucket
    plan = data.draw(st.sampled_from(cut.plans((height, width), bucket, 5)))
    (top, left), (_, target_w) = plan.crop_tl, bucket.size_hw
    if plan.flipped:
        left = plan.resized_hw[1] - (left + target_w)
    pipeline = SimpleNamespace(
        unet=SimpleNamespace(
            config=SimpleNamespace(addition_time_embed_dim=256),
            add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=2816)),
        )
    )
    theirs = StableDiffusionXLPipeline._get_add_time_ids(
        pipeline, (height, width), (top, left), bucket.size_hw, torch.float32, 1280
    )
    assert theirs.tolist() == [list(plan.time_ids)]


@given(height=sides, width=sides, cut=cuts)
def test_mirroring_moves_only_the_left_and_twice_moves_nothing(height, width, cut):
    plan = cut.plans((height, width), plan_crop((height, width), SDXL).bucket, 5)[0]
    mirrored = replace(plan, flipped=True)
    left, left_mirrored = plan.time_ids[3], mirrored.time_ids[3]
    assert mirrored.time_ids == (*plan.time_ids[:3], left_mirrored, *plan.time_ids[4:])
    assert left + left_mirrored + plan.bucket.size_hw[1] == plan.resized_hw[1]
    assert replace(mirrored, crop_tl=(mirrored.crop_tl[0], left_mirrored)).time_ids == plan.time_ids


# Pixels


@settings(deadline=None, max_examples=60)
@given(data=st.data(), height=st.integers(8, 200), width=st.integers(8, 200), seed=st.integers(0, 99))
def test_a_mirrored_crop_holds_the_mirrored_pixels(data, height, width, seed):
    pixels_HWC = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    bucket = plan_crop((height, width), SMALL).bucket
    plan, mirrored = data.draw(
        st.sampled_from([(p, replace(p, flipped=True)) for p in Cut("random", 3).plans((height, width), bucket)])
    )
    crop_HWC = resize_and_crop(pixels_HWC, mirrored)
    assert torch.equal(crop_HWC.flip(1), resize_and_crop(pixels_HWC, plan)), "twice is identity"
    assert crop_HWC.is_contiguous()
    # The mirrored picture, cut at the coordinates that the conditioning names, is the same but for rounding.
    _, _, top, left, _, _ = mirrored.time_ids
    same = resize_and_crop(pixels_HWC.flip(1).contiguous(), replace(plan, crop_tl=(top, left)))
    assert (crop_HWC.int() - same.int()).abs().max() <= 1


# Which variant a visit shows


@given(
    seed=st.integers(0, 2**32),
    sample_id=st.integers(0, 2**63 - 1),
    first=st.integers(0, 10**6),
    count=st.integers(1, 9),
)
def test_so_many_visits_in_a_row_show_each_variant_once(seed, sample_id, first, count):
    shown = [variant_of_visit(seed, sample_id, visit, count) for visit in range(first, first + count)]
    assert sorted(shown) == list(range(count))
    assert shown == [variant_of_visit(seed, sample_id, visit, count) for visit in range(first, first + count)]


def test_pictures_and_seeds_begin_with_different_variants():
    first = Counter(variant_of_visit(0, sample_id, 0, 4) for sample_id in range(4000))
    assert all(abs(first[variant] - 1000) < 150 for variant in range(4))
    other = [variant_of_visit(1, sample_id, 0, 4) == variant_of_visit(0, sample_id, 0, 4) for sample_id in range(4000)]
    assert abs(sum(other) - 1000) < 150
