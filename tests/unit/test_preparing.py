"""Pictures prepared on the CPU, many at once: what decoder and resampling give one at a time, in order."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_training.data import preparing
from sdxl_training.data.images import RESAMPLING, UnreadablePicture, decode_pixels, resize_and_crop
from sdxl_training.data.preparing import CpuPreparer, Job, prepare
from sdxl_training.records import Bucket, CropPlan
from tests.pictures import FORMATS, LOSSLESS, NOISE, encoded

BUCKET = Bucket((32, 48))
PLANS = tuple(
    CropPlan((72, 104), (36, 52), crop_tl, BUCKET, flipped)
    for crop_tl in ((0, 0), (2, 3), (4, 4))
    for flipped in (False, True)
)
OTHER_SIZE = CropPlan((72, 104), (44, 64), (5, 6), BUCKET)
UNTOUCHED = CropPlan((72, 104), (72, 104), (0, 0), Bucket((72, 104)))


@pytest.fixture
def preparer():
    preparer = CpuPreparer(threads=2)
    yield preparer
    preparer.close()


@pytest.mark.parametrize("plans", [PLANS, (OTHER_SIZE, PLANS[3]), (UNTOUCHED,)])
@pytest.mark.parametrize("kind", FORMATS)
def test_each_plan_gives_what_it_gives_alone(preparer, kind, plans):
    data = encoded(NOISE, FORMATS[kind][0], **FORMATS[kind][1])
    [prepared] = preparer([Job(data, "a", plans)])
    for pixels_HWC, plan in zip(prepared, plans, strict=True):
        expected = resize_and_crop(decode_pixels(data, "a"), plan)
        assert pixels_HWC.dtype == torch.uint8
        assert pixels_HWC.is_contiguous()
        assert torch.equal(pixels_HWC, expected)


def test_results_come_in_the_order_of_the_jobs(preparer):
    jobs = [Job(encoded(np.full((72, 104, 3), level, np.uint8)), f"{level}", PLANS[:1]) for level in range(40)]
    assert [int(prepared[0].float().mean()) for prepared in preparer(jobs)] == list(range(40))
    assert preparer([]) == []


def test_an_unreadable_picture_is_named_and_its_neighbours_are_not_lost(preparer):
    good, bad = encoded(NOISE), encoded(NOISE)[:-30]
    before, error, after = preparer([Job(good, "a.png", PLANS), Job(bad, "b.png", PLANS), Job(good, "c.png", PLANS)])
    assert isinstance(error, UnreadablePicture)
    assert error.path == "b.png"
    assert len(before) == len(after) == len(PLANS)


def test_a_picture_is_decoded_once_and_resized_once_a_size(monkeypatch):
    decodes, resizes = [], []
    decode, resample = preparing.decode_pixels, preparing.resize_and_crop

    def resize(pixels_HWC, plan):
        resizes.extend([plan.resized_hw] if plan.original_hw != plan.resized_hw else [])
        return resample(pixels_HWC, plan)

    monkeypatch.setattr(preparing, "decode_pixels", lambda *given: decodes.append(given) or decode(*given))
    monkeypatch.setattr(preparing, "resize_and_crop", resize)
    prepare(Job(encoded(NOISE), "a", (*PLANS, OTHER_SIZE)))
    assert len(decodes) == 1
    assert resizes == [(36, 52), (44, 64)]


def test_a_header_that_is_not_true_is_no_reason_to_start_again(monkeypatch):
    """Decoders are strict about ours, so one that is not stands for those of other formats."""
    monkeypatch.setattr(preparing, "decode_pixels", lambda *_: torch.zeros(70, 100, 3, dtype=torch.uint8))
    error = prepare(Job(encoded(NOISE), "a.webp", PLANS))
    assert str(error) == (
        "a.webp: its header says 72x104 (height x width), its pixels are 70x100; save it anew, by another program"
    )


def test_what_is_transparent_shows_the_background():
    clear = Image.new("RGBA", (104, 72), (1, 2, 3, 0))
    job = Job(encoded(clear), "a", PLANS[:1])
    preparer = CpuPreparer(1, background=(10, 20, 30))
    assert preparer([job])[0][0].unique(dim=0).tolist()[0][0] == [10, 20, 30]
    assert prepare(job)[0].unique().tolist() == [255]
    preparer.close()


def test_pictures_are_prepared_at_once(monkeypatch, preparer):
    both = threading.Barrier(2, timeout=5)
    decode = preparing.decode_pixels
    monkeypatch.setattr(preparing, "decode_pixels", lambda *given: both.wait() * 0 or decode(*given))
    assert len(preparer([Job(encoded(NOISE), "a", PLANS)] * 4)) == 4


def test_a_picture_of_another_size_than_planned_has_changed(preparer):
    (result,) = preparer([Job(encoded(NOISE[:, :100].copy()), "a", PLANS)])
    assert str(result) == "a: it is no longer 72x104 as when it was indexed; start again"


def test_plans_of_one_job_are_for_one_size():
    with pytest.raises(ValueError, match="must be for one size"):
        Job(b"", "a", (PLANS[0], CropPlan((72, 105), (36, 52), (0, 0), BUCKET)))
    with pytest.raises(ValueError, match="must be for one size"):
        Job(b"", "a", ())


def test_the_recipe_is_the_resampling_and_lossless_files_agree(preparer):
    assert preparer.recipe == RESAMPLING
    files = [encoded(NOISE, kind, **options) for kind, options in LOSSLESS.values()]
    first, *others = preparer([Job(data, "a", PLANS) for data in files])
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_a_closed_preparer_refuses():
    preparer = CpuPreparer(1)
    preparer.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        preparer([Job(encoded(NOISE), "a", PLANS)])
