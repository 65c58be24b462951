"""Buckets and crops against an independent enumeration and against what a crop must never do."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.buckets import make_buckets, plan_crop, plan_pictures
from sdxl_training.records import Bucket, ImageRecord, UserError

# sd-scripts' list for 1024, 512..2048, step 64, as (width, height); the set is symmetric.
SDXL_33 = [
    (512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1664), (576, 1728), (576, 1792), (640, 1536), (640, 1600),
    (704, 1408), (704, 1472), (768, 1280), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024),
    (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640),
    (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
]  # fmt: skip
SDXL = make_buckets(1024, 64, 512, 2048)
SMALL = make_buckets(64, 16, 32, 128)

sides = st.integers(1, 6000)


def record(number: int, size_hw: tuple[int, int], repeats: int = 1) -> ImageRecord:
    return ImageRecord(number, f"/pictures/{number}.png", size_hw, f"{number:032x}", "a", ("a",), repeats)


def test_sdxl_sizes_are_the_published_ones():
    assert {bucket.size_hw for bucket in SDXL} == set(SDXL_33)
    assert len(make_buckets(1024, 64, 256, 1024)) == 25  # counted with sd-scripts


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
def test_a_crop_covers_its_bucket_without_distortion_and_in_the_centre(height, width, buckets):
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
    assert plan.time_ids == (height, width, top, left, target_h, target_w)
    assert (plan.scale > 1) == (scale > 1)


@given(height=sides, width=sides, buckets=st.sampled_from([SDXL, SMALL]))
def test_the_bucket_is_the_nearest_by_log_aspect(height, width, buckets):
    chosen = plan_crop((height, width), buckets).bucket

    def distance(bucket: Bucket) -> float:
        return abs(math.log(height / width) - math.log(bucket.aspect))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-12


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
    with pytest.raises(UserError, match=r"all 1 pictures are smaller.*small_pictures: upscale"):
        plan_pictures([record(0, (10, 10))], SMALL, "leave_out")


def test_the_description_tells_what_happens_to_every_picture():
    records = [record(0, (64, 64), 2), record(1, (64, 64)), record(2, (90, 70)), record(3, (10, 10))]
    text = plan_pictures(records, SMALL, "leave_out").describe()
    assert "3 pictures in 1 bucket; pictures x repeats = 4 images an epoch" in text
    assert "64x64                  3          4  ####" in text
    assert "2 untouched" in text
    assert "22.0% cut, scaled 0.91x: /pictures/2.png (90x70 -> 64x64)" in text
    assert "left out: 1\n  /pictures/3.png: 10x10 is smaller" in text
