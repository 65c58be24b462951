"""From file to network input: reading patiently, resizing as Lanczos does, cutting where the plan says."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data import decoding, images
from sdxl_training.data.buckets import make_buckets, plan_crop
from sdxl_training.data.images import (
    UnreadablePicture,
    digest_content,
    look_at,
    read_file,
    read_pixels,
    resize_and_crop,
    to_model_range,
)
from sdxl_training.records import Bucket, CropPlan
from tests.pictures import NOISE, RAMP, encoded

# Files


def test_a_picture_is_read_from_its_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RAMP))
    assert np.array_equal(read_pixels(str(path)).numpy(), RAMP)
    assert look_at(str(path)).size_hw == (20, 30)
    path.write_bytes(encoded(np.zeros((1, 1, 4), np.uint8)))
    assert read_pixels(str(path)).tolist() == [[[255, 255, 255]]]
    assert read_pixels(str(path), background=(1, 2, 3)).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize("read", [read_pixels, look_at])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"just text", "the content is not a JPEG, PNG, .* or JPEG XL picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "the content is not a JPEG, PNG, .* or JPEG XL picture"),
        (encoded(RAMP)[:20], "the picture is damaged: "),
        (None, "the file cannot be read: No such file"),
    ],
)
def test_what_is_no_picture_says_why(read, content, reason, tmp_path):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadablePicture, match=rf"a\.png: {reason}") as caught:
        read(str(path))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("read", [read_file, look_at])
def test_a_hiccup_of_the_disk_is_retried(read, monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RAMP))
    original, calls = type(path).open, []

    def hiccup(self, *given, **options):
        calls.append(self)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return original(self, *given, **options)

    monkeypatch.setattr(images, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(type(path), "open", hiccup)
    assert read(str(path))
    calls.clear()
    monkeypatch.setattr(images, "RETRY_SECONDS", (0,))
    with pytest.raises(UnreadablePicture, match="Input/output error"):
        read(str(path))


def test_a_disk_that_fails_in_the_midst_is_no_damaged_picture(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RAMP))

    def failing(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(images, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(decoding, "_orientation", failing)
    with pytest.raises(UnreadablePicture, match=r"the file cannot be read: Input/output error"):
        look_at(str(path))


def test_content_is_what_the_hash_stands_for():
    assert digest_content(b"a") == digest_content(bytes([97])) != digest_content(b"b")
    assert len(digest_content(b"")) == 16


# Pixels


def lanczos(length: int, wanted: int) -> np.ndarray:
    """Return the matrix that resamples `length` samples to `wanted`: three lobes, stretched to the coarser grid."""
    scale = length / wanted
    stretch = max(scale, 1.0)
    distance = (np.arange(length)[None] + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / stretch
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def resampled(pixels: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Resample in float64, rows and columns one after the other; nothing is rounded between."""
    rows, columns = lanczos(pixels.shape[0], size_hw[0]), lanczos(pixels.shape[1], size_hw[1])
    return np.einsum("ij,jkc,lk->ilc", rows, pixels.astype(float), columns, optimize=True).clip(0, 255)


def whole(original_hw: tuple[int, int], resized_hw: tuple[int, int]) -> CropPlan:
    return CropPlan(original_hw, resized_hw, (0, 0), Bucket(resized_hw))


@given(size=st.tuples(*[st.integers(1, 90)] * 2), wanted=st.tuples(*[st.integers(1, 90)] * 2), seed=st.integers(0, 5))
def test_resizing_is_lanczos_down_and_up(size, wanted, seed):
    # Away from black and white: where a pass overshoots and is cut, the order of the passes shows.
    pixels = np.random.default_rng(seed).integers(70, 186, (*size, 3), np.uint8)
    ours = resize_and_crop(torch.from_numpy(pixels), whole(size, wanted)).numpy()
    assert ours.shape == (*wanted, 3)
    if images.RESAMPLING == "lanczos":
        assert np.abs(ours - resampled(pixels, wanted)).max() < 2
        theirs = np.asarray(Image.fromarray(pixels).resize(wanted[::-1], Image.Resampling.LANCZOS))
        assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_lanczos_is_used_where_torch_has_it():
    try:
        torch.nn.functional.interpolate(torch.zeros(1, 3, 4, 4), (2, 2), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        assert images.RESAMPLING == "bicubic"
    else:
        assert images.RESAMPLING == "lanczos"


@pytest.mark.parametrize("mode", [images.RESAMPLING, "bicubic"])
def test_the_result_is_close_to_that_of_exact_arithmetic(mode, monkeypatch):
    monkeypatch.setattr(images, "RESAMPLING", mode)
    ours = resize_and_crop(torch.from_numpy(NOISE), whole(NOISE.shape[:2], (58, 84))).numpy()
    error = np.square(ours - resampled(NOISE, (58, 84))).mean()
    assert 10 * np.log10(255**2 / error) > 45


def test_the_cut_is_where_the_plan_says():
    plan = plan_crop(NOISE.shape[:2], make_buckets(64, 16, 32, 128))
    assert plan.cropped_fraction > 0
    (top, left), (height, width) = plan.crop_tl, plan.bucket.size_hw
    everything = resize_and_crop(torch.from_numpy(NOISE), whole(plan.original_hw, plan.resized_hw))
    cut = resize_and_crop(torch.from_numpy(NOISE), plan)
    assert cut.dtype == torch.uint8
    assert cut.is_contiguous()
    assert torch.equal(cut, everything[top : top + height, left : left + width])


@pytest.mark.parametrize("resized_hw", [(20, 30), (25, 40)])
def test_a_mirrored_plan_mirrors_the_pixels_that_were_cut(resized_hw):
    plan = CropPlan((20, 30), resized_hw, (2, 5), Bucket((16, 16)))
    mirrored = resize_and_crop(torch.from_numpy(RAMP), replace(plan, flipped=True))
    assert torch.equal(mirrored, resize_and_crop(torch.from_numpy(RAMP), plan).flip(1))
    assert mirrored.is_contiguous()


def test_an_exact_size_keeps_its_pixels_and_a_wrong_size_is_refused():
    pixels = torch.from_numpy(RAMP)
    untouched = whole((20, 30), (20, 30))
    assert torch.equal(resize_and_crop(pixels, untouched), pixels)
    cut = CropPlan((20, 30), (20, 30), (2, 5), Bucket((16, 16)))
    assert np.array_equal(resize_and_crop(pixels, cut).numpy(), RAMP[2:18, 5:21])
    assert resize_and_crop(pixels, cut).is_contiguous()
    with pytest.raises(ValueError, match="do not match"):
        resize_and_crop(pixels[1:], untouched)


def test_model_range():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 3)
    assert to_model_range(pixels).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    batch = torch.randint(0, 256, (4, 2, 5, 3), dtype=torch.uint8)
    assert torch.equal(to_model_range(batch), torch.stack([to_model_range(pixels) for pixels in batch]))
    assert to_model_range(batch).shape == (4, 3, 2, 5)
