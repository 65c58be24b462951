"""Lists of sizes against published ones; the choice of a bucket against its definition; what becomes of a data set."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data.bucket_lists import (
    GENERATORS,
    area_buckets,
    buckets_at_resolutions,
    listed_buckets,
    novelai_buckets,
    sdxl_buckets,
)
from sdxl_training.data.buckets import Fitting, assign_buckets, make_buckets, plan_crop, plan_pictures, plan_resolutions
from sdxl_training.data.crops import Cut
from sdxl_training.records import Bucket, ImageRecord, UserError

# sd-scripts' list for 1024, 512..2048, step 64, as (width, height); the set is symmetric.
SDXL_33 = [
    (512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728), (576, 1792), (640, 1536), (640, 1600),
    (704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024),
    (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640),
    (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
]  # fmt: skip
# The sample output in the read-me of NovelAI's aspect ratio bucketing, as (width, height).
NOVELAI_19 = [
    (256, 1024), (320, 1024), (384, 1024), (384, 960), (384, 896), (448, 832), (512, 768), (512, 704), (512, 512),
    (576, 640), (640, 576), (704, 512), (768, 512), (832, 448), (896, 384), (960, 384), (1024, 384), (1024, 320),
    (1024, 256),
]  # fmt: skip
SDXL = make_buckets(1024, 64, 512, 2048)
SMALL = make_buckets(64, 16, 32, 128)
# Each shape at two sizes, so that every choice has exact ties.
TWICE = (*SMALL, *(Bucket((2 * b.size_hw[0], 2 * b.size_hw[1])) for b in SMALL))
THREE = buckets_at_resolutions(area_buckets, [512, 1024, 768], 64, 512, 2048)

sides = st.integers(1, 6000)


def record(number: int, size_hw: tuple[int, int], repeats: int = 1) -> ImageRecord:
    return ImageRecord(number, f"/pictures/{number}.png", size_hw, f"{number:032x}", ("a",), ("a",), repeats)


def sizes_of(buckets) -> list[tuple[int, int]]:
    return [bucket.size_hw for bucket in buckets]


def test_generated_sizes_are_the_published_ones(oracles):
    assert sizes_of(sdxl_buckets(1024, 64, 512, 2048)) == sorted(map(tuple, oracles["sdxl_buckets_hw"]))
    assert set(sizes_of(SDXL)) == set(SDXL_33)
    assert len(make_buckets(1024, 64, 256, 1024)) == 25  # counted with sd-scripts
    assert sizes_of(novelai_buckets(512, 64, 256, 1024)) == sorted((h, w) for w, h in NOVELAI_19)


def test_sdxl_sizes_scale_exactly_or_not_at_all():
    halves = sdxl_buckets(512, 32, 256, 1024)
    assert sizes_of(halves) == [(h // 2, w // 2) for h, w in sizes_of(sdxl_buckets(1024, 64, 512, 2048))]
    assert len(sdxl_buckets(768, 16, 384, 1536)) == 40
    with pytest.raises(UserError, match=r"at resolution 768 are multiples of 48, which step_px = 64 does not divide"):
        sdxl_buckets(768, 64, 384, 1536)


@given(
    name=st.sampled_from(sorted(GENERATORS)),
    resolution=st.integers(1, 32),
    step_px=st.sampled_from([8, 16, 32, 64]),
    min_side=st.integers(1, 32),
    max_side=st.integers(1, 64),
)
def test_every_generator_keeps_the_limits(name, resolution, step_px, min_side, max_side):
    limits = (step_px * resolution, step_px, step_px * min_side, step_px * max_side)
    try:
        buckets = GENERATORS[name](*limits)
    except UserError:
        return
    assert buckets == tuple(sorted(set(buckets)))
    for height, width in sizes_of(buckets):
        assert height % step_px == width % step_px == 0
        assert limits[2] <= min(height, width) <= max(height, width) <= limits[3]
        assert height * width <= limits[0] ** 2 * (1.5 if name == "novelai" else 1)


def test_a_smaller_resolution_shrinks_the_limits_with_it():
    assert [max(h * w for h, w in sizes_of(buckets)) for buckets in THREE] == [1024**2, 768**2, 512**2]
    assert THREE[0] == SDXL
    assert THREE[1] == area_buckets(768, 64, 384, 1536)
    assert THREE[2] == area_buckets(512, 64, 256, 1024)
    assert buckets_at_resolutions(area_buckets, [1024], 64, 512, 2048) == (SDXL,)


def test_a_users_list_is_taken_as_it_is():
    assert sizes_of(listed_buckets([[1216, 832], [512, 512], [1216, 832]])) == [(512, 512), (1216, 832)]
    for wrong in ([1216, 830], [0, 64], [1024], [64, 64, 64]):
        with pytest.raises(UserError, match=r"data\.buckets\.sizes\.1 = \[.*multiple of 8"):
            listed_buckets([[64, 64], wrong])
    with pytest.raises(UserError, match="empty"):
        listed_buckets([])


@given(
    resolution=st.integers(32, 256),
    step_px=st.sampled_from([8, 16, 32]),
    min_side_px=st.integers(8, 64),
    max_side_px=st.integers(64, 512),
)
def test_buckets_are_exactly_the_widest_sizes_that_fit(resolution, step_px, min_side_px, max_side_px):
    allowed = range(step_px, max_side_px + 1, step_px)
    fitting = {(h, w) for h in allowed for w in allowed if min(h, w) >= min_side_px and h * w <= resolution**2}
    widest = {(h, w) for h, w in fitting if (h, w + step_px) not in fitting}
    expected = widest | {(w, h) for h, w in widest}
    if not expected:
        with pytest.raises(UserError, match="no size fits"):
            make_buckets(resolution, step_px, min_side_px, max_side_px)
    else:
        assert [bucket.size_hw for bucket in make_buckets(resolution, step_px, min_side_px, max_side_px)] == sorted(
            expected
        )


@given(height=sides, width=sides, buckets=st.sampled_from([SDXL, SMALL]))
def test_the_bucket_is_the_nearest_by_log_aspect(height, width, buckets):
    chosen = plan_crop((height, width), buckets).bucket

    def distance(bucket: Bucket) -> float:
        return abs(math.log(height / width) - math.log(bucket.aspect))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-12


@given(
    sizes=st.lists(st.tuples(sides, sides), max_size=30),
    buckets=st.sampled_from([SDXL, SMALL, TWICE, TWICE[::-1], sdxl_buckets(1024, 64, 512, 2048)]),
    factor=st.integers(1, 4),
)
def test_all_at_once_chooses_as_one_by_one(sizes, buckets, factor):
    sizes += [(factor * bucket.size_hw[0], factor * bucket.size_hw[1]) for bucket in buckets]
    heights, widths = zip(*sizes, strict=True)
    numbers = assign_buckets(heights, widths, buckets)
    assert [buckets[number] for number in numbers] == [plan_crop(size_hw, buckets).bucket for size_hw in sizes]


def test_a_million_pictures_of_different_sizes_are_assigned_within_a_second():
    heights_N, widths_N = np.divmod(np.arange(10**6), 1000) + np.array([[300], [301]])
    began = time.process_time()
    numbers_N = assign_buckets(heights_N, widths_N, sdxl_buckets(1024, 64, 512, 2048))
    assert time.process_time() - began < 1
    assert set(numbers_N.tolist()) == set(range(40))


@given(height=sides, width=sides)
def test_turning_the_picture_turns_the_crop(height, width):
    plan, turned = plan_crop((height, width), SDXL), plan_crop((width, height), SDXL)
    if height != width and plan.bucket.size_hw[::-1] != turned.bucket.size_hw:
        # Only an exact tie between two buckets may be broken differently.
        ratios = [Fraction(*sorted((height * b.size_hw[1], width * b.size_hw[0]))) for b in SDXL]
        assert sorted(ratios)[-1] == sorted(ratios)[-2]
    else:
        assert plan.resized_hw == turned.resized_hw[::-1]


@pytest.mark.parametrize("bucket", SDXL, ids=str)
def test_an_exact_size_passes_untouched(bucket):
    plan = plan_crop(bucket.size_hw, SDXL)
    assert plan.bucket == bucket
    assert plan.resized_hw == bucket.size_hw
    assert plan.crop_tl == (0, 0)
    assert plan.cropped_fraction == 0


def test_an_exact_size_wins_over_a_larger_bucket_of_the_same_shape():
    small, large = Bucket((32, 64)), Bucket((64, 128))
    assert plan_crop((32, 64), [large, small]).bucket == small
    assert plan_crop((31, 62), [small, large]).bucket == large


def test_the_worked_example_of_sdxl():
    plan = plan_crop((1500, 1000), SDXL)  # 1000 wide, 1500 high in 832x1216 cuts 16 rows at the top
    assert plan.bucket.size_hw == (1216, 832)
    assert plan.resized_hw == (1248, 832)
    assert plan.crop_tl == (16, 0)


def test_small_pictures_are_left_out_by_name_or_enlarged():
    records = [record(0, (64, 64), repeats=3), record(1, (40, 40)), record(2, (65, 63)), record(3, (300, 100))]
    strict = plan_pictures(records, SMALL, "leave_out")
    assert [kept.sample_id for kept in strict.records] == [0, 3]
    assert [absent.record.sample_id for absent in strict.left_out] == [1, 2]
    assert "40x40 is smaller than its bucket 64x64" in strict.left_out[0].reason
    assert strict.upscaled == 0
    lenient = plan_pictures(records, SMALL, "upscale")
    assert lenient.records == tuple(records)
    assert lenient.left_out == ()
    assert lenient.upscaled == 2
    assert lenient.images_per_epoch == 6
    assert lenient.counts == {Bucket((64, 64)): 3, lenient.plans[3].bucket: 1}
    assert sum(lenient.by_bucket.values(), ()) == (0, 1, 2, 3)


def test_nothing_left_is_an_error_with_a_remedy():
    with pytest.raises(UserError, match=r"none of the 1 pictures.*10x10 is smaller.*small_pictures: upscale"):
        plan_pictures([record(0, (10, 10))], SMALL, "leave_out")
    with pytest.raises(UserError, match="there is no picture to plan"):
        plan_pictures([], SMALL, "leave_out")


@settings(deadline=None)
@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=20), each=st.booleans(), upscale=st.booleans())
def test_a_picture_goes_to_the_largest_resolution_it_fills_or_to_each(sizes, each, upscale):
    records = [record(number, size_hw) for number, size_hw in enumerate(sizes)]
    fitting = Fitting("upscale" if upscale else "leave_out", "each" if each else "largest")
    expected = []
    for size_hw in sizes:
        nearest = [plan_crop(size_hw, buckets).bucket for buckets in THREE]
        filled = [b for b in nearest if size_hw[0] >= b.size_hw[0] and size_hw[1] >= b.size_hw[1]]
        chosen = filled or nearest[-1:] * upscale
        expected.append(chosen if each else chosen[:1])
    if not any(expected):
        with pytest.raises(UserError, match="none of the"):
            plan_resolutions(records, THREE, fitting)
        return
    plan = plan_resolutions(records, THREE, fitting)
    got = [[p.bucket for r, p in plan.prepared() if r.path == one.path] for one in records]
    assert got == expected
    assert [absent.record.sample_id for absent in plan.left_out] == [i for i, e in enumerate(expected) if not e]
    for absent in plan.left_out:
        assert f"smaller than its bucket {plan_crop(absent.record.size_hw, THREE[-1]).bucket} " in absent.reason
    assert len({r.sample_id for r in plan.records}) == len(plan.records), "two appearances share their randomness"
    first = {r.path: r.sample_id for r in reversed(plan.records)}
    assert all(first[r.path] == r.sample_id for r in records if r.path in first)


def test_one_resolution_is_planned_as_ever():
    records = [record(number, (64 + 7 * number, 150 - 5 * number)) for number in range(10)]
    assert plan_resolutions(records, [SMALL], Fitting("upscale")) == plan_pictures(records, SMALL, "upscale")
    assert plan_pictures(records, SMALL, "upscale").plans == tuple(plan_crop(r.size_hw, SMALL) for r in records)


def test_a_picture_that_would_lose_too_much_is_left_out_by_name():
    records = [record(0, (64, 64)), record(1, (64, 640)), record(2, (70, 70))]
    plan = plan_resolutions(records, [SMALL], Fitting("upscale", max_crop=0.5))
    assert [kept.sample_id for kept in plan.records] == [0, 2]
    assert plan.left_out[0].reason == "64x640 loses 60% of its area in its bucket 32x128 (more than 50%)"


def test_variants_share_their_picture_and_bucket():
    records = [record(number, (64 + number, 90)) for number in range(5)]
    plan = plan_resolutions(records, [SMALL], Fitting("upscale"), Cut("random", variants=3, flip=True, seed=1))
    assert [len({p.bucket for p in variants}) for variants in plan.variants] == [1] * 5
    assert len(list(plan.prepared())) == sum(map(len, plan.variants)) > 10
    assert plan.plans == tuple(variants[0] for variants in plan.variants)
    assert plan.subset([3, 1]).variants == (plan.variants[3], plan.variants[1])
    assert f"variants: {len(list(plan.prepared()))} latents of 5 pictures" in plan.describe()
    assert "variants" not in plan_pictures(records, SMALL, "upscale").describe()


def test_boxes_belong_to_their_pictures():
    records = [record(number, (300, 64)) for number in range(3)]
    plan = plan_resolutions(records, [SMALL], Fitting("upscale"), Cut("focus"), {1: (0, 0, 20, 64)})
    assert [p.crop_tl for p in plan.plans] == [(11, 0), (0, 0), (11, 0)]


def test_the_description_tells_what_happens_to_every_picture():
    records = [record(0, (64, 64), 2), record(1, (64, 64)), record(2, (90, 70)), record(3, (10, 10))]
    text = plan_pictures(records, SMALL, "leave_out").describe()
    assert "3 pictures in 1 bucket; pictures x repeats = 4 images an epoch" in text
    assert "64x64                  3          4  ####" in text
    assert "2 untouched" in text
    assert "22.0% cut, scaled 0.91x: /pictures/2.png (90x70 -> 64x64)" in text
    assert "left out: 1\n  /pictures/3.png: 10x10 is smaller" in text
