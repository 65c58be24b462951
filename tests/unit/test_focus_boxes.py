"""Focus boxes are judged as columns as each would be by itself; a bad one costs its picture, not the run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.assemble.dataset import FoundPictures, find_pictures
from sdxl_training.config.schema import Config
from sdxl_training.data.crops import read_box
from sdxl_training.data.focus_boxes import boxes_inside, with_bad_boxes
from sdxl_training.data.index_files import INDEX
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from tests.indexed import index_of

numbers = st.sampled_from([0.0, 0.25, 1.0, 1.5, -0.5, -3.0, 40.0, 63.5, 64.0, 1e300, float("nan"), float("inf")])
boxes = st.lists(numbers | st.floats(-100, 200) | st.none(), min_size=3, max_size=5) | st.lists(numbers, min_size=4)


def is_inside(box, size_hw) -> bool:
    try:
        read_box(box, size_hw, "x")
    except UserError:
        return False
    return True


@given(boxes=st.lists(boxes, min_size=1, max_size=4), size_hw=st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_columns_are_judged_as_single_boxes(boxes, size_hw):
    column = index_of([{"focus": box} for box in boxes])["focus"].chunk(0)
    sides = [np.full(len(boxes), side, np.int32) for side in size_hw]
    assert boxes_inside(column, *sides).tolist() == [is_inside(box, size_hw) for box in boxes]


def test_bad_boxes_become_reasons_and_nothing_else_changes():
    good, bad = [0, 0, 9, 9], [70, 0, 9, 9]
    table = index_of([{"focus": good}, {"focus": bad}, {}, {"focus": bad, "reason": "damaged"}])
    table = table.replace_schema_metadata({"generation": "1"})
    judged = with_bad_boxes(table)
    reasons = judged["reason"].to_pylist()
    assert reasons[0] is reasons[2] is None
    assert reasons[1].startswith("its focus [70.0, 0.0, 9.0, 9.0]: must be [top, left, height, width] of a box inside")
    assert "picture of 64x64" in reasons[1]
    assert reasons[3] == "damaged"
    assert judged.drop_columns("reason").equals(table.drop_columns("reason"))
    assert judged.schema.equals(INDEX)
    assert judged.schema.metadata == {b"generation": b"1"}
    assert judged["reason"].num_chunks == 1
    assert with_bad_boxes(table.slice(0, 1)).equals(table.slice(0, 1))


@pytest.mark.parametrize("position", ["focus", "centre"])
def test_a_bad_box_quarantines_its_picture_where_boxes_count(tmp_path, position):
    for number, box in enumerate([[0, 0, 9, 9], [0, 0, 0, 9], [0.5, 0.5, 0.1, 0.1]]):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(json.dumps({"caption": "a", "focus": box}))

    def found(**data) -> FoundPictures:
        given = {
            "sources": [{"path": str(tmp_path)}],
            "resolution": 64,
            "captions": {"extension": ".json"},
            "cache": {"path": str(tmp_path / "cache")},
            "crop": {"position": position},
            "buckets": {"generator": "list", "sizes": [[64, 64]]},
            "max_bad_fraction": 0.5,
        }
        return find_pictures(Config.model_validate({"data": {**given, **data}}), SilentProgress())

    bad = set() if position == "centre" else {f"{tmp_path}/1.png"}
    assert {entry.path for entry in found().quarantined()} == bad
    assert len(found().plan.variants) == 3 - len(bad)
    if bad:
        with pytest.raises(UserError, match=r"max_bad_fraction.*1 of 3 pictures cannot be used:\n.*1\.png: its focus"):
            found(max_bad_fraction=0.1)
