"""Crops of many pictures at once are those of each: places, mirrored twins, sample ids, boxes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data import picture_plan
from sdxl_training.data.bucket_lists import area_buckets
from sdxl_training.data.buckets import Fitting
from sdxl_training.data.crop_columns import read_boxes, written_boxes
from sdxl_training.data.crops import Cut, read_box
from sdxl_training.data.listing import PICTURES
from sdxl_training.data.picture_plan import PicturePlan, plan_resolutions
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.records import Bucket, CropPlan, ImageRecord, UserError

RESOLUTIONS = [area_buckets(64, 16, 32, 128), area_buckets(48, 16, 32, 96)]
SIDES = st.integers(20, 200)
WHOLE = st.integers(-20, 220)
ANY = st.one_of(WHOLE, st.floats(-2, 2), st.floats(-300, 300), st.sampled_from([0.0, 1.0, 1e300, -1e300]))
cuts = st.builds(
    lambda position, variants, flip, seed: Cut(position, variants if position == "random" else 1, flip, seed),
    st.sampled_from(["centre", "random", "focus"]),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**70),
)


@st.composite
def pictures(draw) -> ImageRecord:
    height, width = draw(SIDES), draw(SIDES)
    start = (draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1)))
    length = [draw(st.floats(0.5, side - first + 5)) for first, side in zip(start, (height, width), strict=True)]
    focus = draw(st.sampled_from([None, (*map(float, start), *length)]))
    sample_id = draw(st.integers(0, 2**63 - 1))
    return ImageRecord(sample_id, "x.png", (height, width), ("",), (), focus=focus)


def crops_of(plan: PicturePlan) -> list[list[CropPlan]]:
    """Return the crops of each record, made of columns."""
    made: list[list[CropPlan]] = [[] for _ in plan.records]
    for part in plan.parts():
        crops = plan.crops(part)
        for m, number in enumerate(crops.picture_M.tolist()):
            bucket = next(bucket for bucket in plan.buckets if bucket.size_hw == tuple(crops.bucket_M2[m].tolist()))
            original_hw = plan.records[part.start + number].size_hw
            places = (tuple(sizes[m].tolist()) for sizes in (crops.resized_M2, crops.crop_tl_M2))
            made[part.start + number].append(CropPlan(original_hw, *places, bucket, bool(crops.flipped_M[m])))
    return made


@settings(max_examples=80, deadline=None)
@given(
    records=st.lists(pictures(), min_size=1, max_size=12),
    cut=cuts,
    each=st.booleans(),
    chosen=st.lists(st.integers(0, 1000), max_size=20),
    at_once=st.integers(1, 9),
)
def test_crops_of_many_are_those_of_each(records, cut, each, chosen, at_once):
    plan = plan_resolutions(records, RESOLUTIONS, Fitting("upscale", "each" if each else "largest"), cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture_plan, "CROPPED_AT_ONCE", at_once)
        for some in (plan, plan.subset([number % len(plan.records) for number in chosen])):
            assert crops_of(some) == [list(variants) for variants in some.variants]
            assert some.latents() == sum(map(len, some.variants))


def test_random_crops_that_coincide_are_counted_once():
    """A picture that is cut by two pixels has three places, one that is not cut has one."""
    sizes = [(64, 66)] * 300 + [(64, 64)] * 100
    records = [ImageRecord(i, "x.png", size, ("",), ()) for i, size in enumerate(sizes)]
    plan = plan_resolutions(records, [[Bucket((64, 64))]], Fitting(), Cut("random", 20, flip=True))
    counts = np.bincount(plan.crops(slice(0, 400)).picture_M)
    assert set(counts[300:].tolist()) == {2}
    assert counts[:300].max() == 6
    assert plan.latents() == counts.sum()


@settings(max_examples=300, deadline=None)
@given(value=st.none() | st.lists(ANY | st.just(float("nan")), min_size=0, max_size=5), height=SIDES, width=SIDES)
def test_boxes_are_read_as_one_by_one(value, height, width):
    written = written_boxes(pa.array([value, None], pa.list_(pa.float64())))
    box, none = read_boxes(written, np.array([(height, width)] * 2)).tolist()
    assert none == [0, 0, 0, 0]
    assert np.isnan(written[1]).all()
    assert np.isnan(written[0]).any() == (value is None), "a box that is none is told from no box"
    try:
        expected = list(read_box(None if value is None else [*map(float, value)], (height, width), "x"))
    except UserError:
        expected = [0, 0, 0, 0]
    assert box == expected


def test_a_box_that_is_none_is_refused_in_columns_as_in_a_record():
    boxes = [None, (0, 0, 0, 5)]
    records = [ImageRecord(i, f"/{i}.png", (64, 96), ("",), (), focus=box) for i, box in enumerate(boxes)]
    plan = plan_resolutions(records, RESOLUTIONS, Fitting(), Cut("focus"))
    with pytest.raises(UserError, match=r"^/1.png: focus = .*inside the picture of 64x96"):
        plan.crops(slice(0, 2))


class Place:
    def path(self, name: str) -> str:
        return name


def test_columns_of_an_index_are_those_of_its_records():
    def source(count: int, *boxes: object) -> IndexedSource:
        rows = [
            {"name": f"{i}.png".encode(), "file": b"", "start": 0, "length": 1, "height": 60 + i, "width": 90}
            | {"captions": ["a"], "focus": boxes[i % len(boxes)], "reason": "bad" if i % 7 == 3 else None}
            for i in range(count)
        ]
        return IndexedSource(Place(), SourceRules(), pa.Table.from_pylist(rows, PICTURES).combine_chunks())

    everything = Pictures([source(30, None, [1, 2, 30, 40]), source(5, [0.1, 0.2, 0.5, 0.5]), source(9, None)])
    some = everything.subset(np.arange(len(everything)) % 3 != 1)
    for found in (everything, some):
        columns, records = found.columns(), list(found)
        assert columns.sample_ids.tolist() == [record.sample_id for record in records]
        assert len(set(columns.sample_ids.tolist())) == len(records), "no two sources' pictures are one"
        boxes = [None if np.isnan(box[0]) else tuple(box) for box in columns.boxes.tolist()]
        assert boxes == [record.focus for record in records]
        assert len({*boxes}) == 3
