"""Figures of small plans, counted by hand and by slower means."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.buckets import Fitting
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.filters import Filter
from sdxl_training.data.listing import pictures_of
from sdxl_training.data.picture_plan import plan_resolutions
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.sampler import BatchSchedule, batch_sizes
from sdxl_training.data.statistics import (
    BatchParts,
    BucketRow,
    SourceRow,
    bucket_table,
    captions_of,
    crop_lines,
    evenly_spread,
    length_table,
    planned_pictures,
    source_table,
    sum_steps,
    tag_table,
    tags_of,
)
from sdxl_training.records import Bucket, ImageRecord

SQUARE, WIDE = Bucket((64, 64)), Bucket((32, 128))
words = st.lists(st.sampled_from(["a", "b", "c", "d", "ä", "😀"]), max_size=6)


def record(number, size_hw, repeats=1) -> ImageRecord:
    return ImageRecord(number, f"{number}.png", size_hw, ("a",), ("a",), repeats)


def plan_of(records, buckets=((SQUARE, WIDE),), **fitting):
    return plan_resolutions(records, buckets, Fitting(**fitting))


def row(name, size_hw=(64, 64), captions=("a",), **more):
    height, width = size_hw
    columns = {"file": name, "name": name, "height": height, "width": width, "captions": captions}
    return columns | more


class Place:
    """A source of which only names are asked."""

    captions_are = "beside"

    def path(self, name):
        return f"/place/{name}"


def pictures(*sources) -> Pictures:
    return Pictures([IndexedSource(Place(), rules, pictures_of(rows)) for rules, rows in sources])


def test_bucket_rows_are_counted_by_hand():
    # 64x100 -> 64x64: 36 % is cut. 128x128: halved, nothing cut. 32x32: doubled. 64x256: halved into 32x128.
    records = [record(0, (64, 100), 3), record(1, (128, 128)), record(2, (32, 32), 2), record(3, (64, 256), 5)]
    assert bucket_table(plan_of(records, small_pictures="upscale")) == (
        BucketRow((32, 128), pictures=1, images=5, cropped_mean=0.0, cropped_worst=0.0, scale_largest=0.5),
        BucketRow((64, 64), 3, 6, pytest.approx(0.36 / 3), pytest.approx(0.36), 2.0),
    )


def test_a_picture_in_two_resolutions_counts_in_both_buckets():
    plan = plan_of([record(0, (64, 64)), record(1, (32, 32), 4)], ([SQUARE], [Bucket((32, 32))]), resolutions="each")
    assert [(row.size_hw, row.pictures, row.images) for row in bucket_table(plan)] == [
        ((32, 32), 2, 5),
        ((64, 64), 1, 1),
    ]
    assert planned_pictures(plan).tolist() == [0, 1]


def test_sources_are_counted_by_hand():
    rules = SourceRules(repeats=3, weight=0.5, missing="leave_out", only=Filter(min_side_px=40))
    rows = [
        row(b"a"),
        row(b"b", (0, 0), None, reason="broken"),
        row(b"c", captions=None),
        row(b"d", (39, 64)),
        row(b"e", (48, 48)),
        row(b"f", (0, 0), reason="broken, though it has a caption"),
    ]
    both = pictures((rules, rows), (SourceRules(missing="empty"), [row(b"a", captions=None), row(b"b", (8, 8))]))
    plan = plan_of(both)
    first, second = source_table(both, plan, ["one", "two"])
    assert first == SourceRow("one", 6, 2, 1, 1, usable=2, planned=1, images=3, repeats=3, weight=0.5)
    assert second == SourceRow("two", 2, 0, 0, 0, usable=2, planned=1, images=1, repeats=1, weight=1.0)
    with pytest.raises(ValueError, match="zip"):
        source_table(both, plan, ["one"])


def test_a_picture_at_two_resolutions_is_planned_once_and_drawn_twice():
    both = pictures((SourceRules(repeats=3), [row(b"a"), row(b"b", (32, 32))]))
    (one,) = source_table(both, plan_of(both, ([SQUARE], [Bucket((32, 32))]), resolutions="each"), ["one"])
    assert (one.usable, one.planned, one.images) == (2, 2, 9)


def test_tags_and_captions_are_those_of_the_records():
    both = pictures(
        (SourceRules(separator=";"), [row(b"a", captions=["x; y", "z"]), row(b"b", captions=["p"], tags=["q", "r"])]),
        (SourceRules(lines=True, missing="empty"), [row(b"a", captions=["u, v\n\nw"]), row(b"b", captions=None)]),
    )
    numbers = range(len(both))
    assert list(tags_of(both, numbers)) == [one.tags for one in both]
    prose = [CaptionRules(kind="prose")] * 2
    assert list(captions_of(both, numbers, prose)) == [caption for one in both for caption in one.captions]
    varied = [CaptionRules(";", templates=("{caption}", "of {tags}"), front=("n",)), CaptionRules(back=("v", "k"))]
    assert list(captions_of(both, [0, 2], varied)) == ["n; x; y", "n; of x; y", "n; z", "n; of z", "u, v, k", "w, v, k"]
    assert list(tags_of(both, np.array([2, 0]))) == [("u", "v"), ("x", "y")]


@given(st.lists(words, max_size=12), st.integers(0, 7))
def test_tags_are_counted_once_a_picture(tags, top):
    table = tag_table(iter(tags), top)
    expected = {tag: sum(tag in own for own in tags) for own in tags for tag in own}
    assert table.pictures == len(tags)
    assert table.untagged == sum(not own for own in tags)
    assert table.distinct == len(expected)
    assert table.once == list(expected.values()).count(1)
    assert list(table.most) == sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:top]
    assert list(table.rarest) == sorted(expected.items(), key=lambda item: (item[1], item[0]))[:top]


@given(st.lists(st.integers(0, 300)))
def test_lengths_are_counted_above_each_limit(lengths):
    table = length_table(iter(lengths))
    assert table.captions == len(lengths)
    assert table.over == {limit: sum(length > limit for length in lengths) for limit in (75, 150, 225)}
    assert table.longest == max(lengths, default=0)
    assert table.mean == pytest.approx(sum(lengths) / max(len(lengths), 1))


@given(count=st.integers(0, 300), most=st.integers(1, 100))
def test_a_spread_sample_is_even(count, most):
    sample = evenly_spread(np.arange(count), most)
    assert len(sample) == min(count, most)
    gaps = np.diff(sample)
    assert not count or (sample[0] == 0 and sample[-1] >= count - -(-count // most))
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_steps_are_the_sum_in_the_issue():
    # 598 pictures, of which 2 are drawn 8 times: 612 images / (4 x 2 x 1) = 76.5 steps.
    plan = plan_of([record(i, (64, 64), 8 if i < 2 else 1) for i in range(598)])
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, 8)
    steps = sum_steps(plan, schedule, BatchParts(4, None, 2, 1, 1530))
    assert (steps.images, steps.steps_per_epoch, steps.epochs) == (612, 76.5, 20.0)
    assert steps.pictures_by_repeats == {1: 596, 8: 2}
    assert (steps.micro_batch, steps.accumulation, steps.processes) == (4, 2, 1)


def test_steps_by_pixels_are_a_sum_over_buckets():
    small = Bucket((32, 32))
    records = [record(i, (64, 64)) for i in range(10)] + [record(i, (32, 32), 2) for i in range(7)]
    plan = plan_of(records, ([SQUARE], [small]))
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, batch_sizes(plan.by_bucket, 64 * 64, parts=6))
    steps = sum_steps(plan, schedule, BatchParts(1, 64 * 64, 3, 2, 10))
    told = [(one.size_hw, one.images, one.micro_batch, one.images_a_step) for one in steps.by_bucket]
    assert told == [((32, 32), 14, 4, 24), ((64, 64), 10, 1, 6)]
    assert [one.steps for one in steps.by_bucket] == [14 / 24, 10 / 6]
    assert steps.micro_batch is None
    assert steps.steps_per_epoch == pytest.approx(14 / 24 + 10 / 6)


def test_every_record_has_a_line_with_its_crop():
    plan = plan_of([record(0, (64, 100)), record(1, (63, 63))], ([SQUARE], [Bucket((32, 32))]), resolutions="each")
    lines = [json.loads(line) for line in crop_lines(plan)]
    assert lines[0] == {
        "path": "0.png", "size_hw": [64, 100], "bucket_hw": [64, 64], "scale": 1.0, "cropped": 0.36
    }  # fmt: skip
    expected = [
        (one.path, list(crop.bucket.size_hw), round(crop.scale, 4), round(crop.cropped_fraction, 4))
        for one, crop in zip(plan.records, plan.plans, strict=True)
    ]
    assert [(line["path"], line["bucket_hw"], line["scale"], line["cropped"]) for line in lines] == expected
    assert len(lines) == 3


def test_tags_of_a_hundred_thousand_pictures_take_seconds():
    """A million take a quarter of a minute; the bound is loose because the machine may be busy."""
    vocabulary = [f"tag {i}" for i in range(2000)]
    tags = [random.Random(i).sample(vocabulary, 20) for i in range(1000)] * 100
    started = time.process_time()
    table = tag_table(tags)
    assert time.process_time() - started < 10
    assert table.most[0][1] == max(Counter(tag for own in tags[:1000] for tag in own).values()) * 100
