"""Decoding by content, strictly; colours, transparency and orientation as a viewer shows them."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from sdxl_training.data import images
from sdxl_training.data.buckets import make_buckets, plan_crop
from sdxl_training.data.images import (
    UnreadablePicture,
    decode_pixels,
    read_file,
    read_pixels,
    read_size,
    resize_and_crop,
    to_model_range,
)
from sdxl_training.records import Bucket, CropPlan

RAMP = np.stack([*np.meshgrid(np.arange(0, 240, 8), np.arange(0, 160, 8)), np.full((20, 30), 40)], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that its pixels are known without Pillow."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(RAMP), kind, **options)
    assert read_size(data, "x") == (20, 30)
    pixels = decode_pixels(data, "x")
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), RAMP)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_respected_and_the_header_agrees(kind, orientation):
    # EXIF 2.32, 4.6.4 A: where row 0 and column 0 of the stored picture lie when it is shown.
    shown = {
        1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1],
        5: RAMP.transpose(1, 0, 2), 6: RAMP[::-1].transpose(1, 0, 2),
        7: RAMP[::-1, ::-1].transpose(1, 0, 2), 8: RAMP[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(RAMP), kind, exif=exif, **options)
    pixels = decode_pixels(data, "x").numpy()
    assert read_size(data, "x") == pixels.shape[:2] == shown.shape[:2]
    assert np.abs(pixels.astype(int) - shown).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_the_size_is_read_without_the_pixels(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert read_size(data[:1000], "x") == (64, 48)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 255, 51)  # 51 / 255 is a fifth
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        pixels = decode_pixels(encoded(Image.fromarray(rgba), kind, **options), "x")
        assert pixels.tolist() == [[[255, 255, 255], [200, 0, 0], [244, 204, 204]]]
    grey = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    assert decode_pixels(encoded(grey), "x").tolist() == [[[255] * 3, [100] * 3]]


def test_a_palette_with_a_transparent_entry():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decode_pixels(encoded(palette), "x").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode_pixels(encoded(palette, transparency=1), "x").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = [0, 257, 32896, 65535]
    data = png(4, 1, 16, 0, b"\0" + struct.pack(">4H", *values))
    assert decode_pixels(data, "x")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode_pixels(data, "x").shape == (1, 4, 3)


def test_sixteen_bit_colour_and_bilevel_and_grey():
    rgb = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 65535, 32896, 0))
    assert decode_pixels(rgb, "x").tolist() == [[[255, 128, 0]]]
    assert decode_pixels(encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")), "x")[
        0, :, 0
    ].tolist() == [0, 255]
    assert decode_pixels(encoded(Image.fromarray(np.array([[7]], np.uint8))), "x").tolist() == [[[7, 7, 7]]]


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert (decode_pixels(data, "x").float().mean((0, 1)) - torch.tensor([255.0, 0, 0])).abs().max() < 4


def profile_with_gamma(gamma: float, description: str = "bright") -> bytes:
    """A grey ICC v2 profile with the sRGB white point and a power curve, written by hand."""
    text = description.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"kTRC": b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0),
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value += bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    head = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(body), b"\0" * 4, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"\0" * 12, b"acsp"
    )
    head += bytes(68 - len(head)) + struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def test_an_embedded_profile_is_applied():
    grey = Image.fromarray(np.array([[64, 128, 192]], np.uint8))
    pixels = decode_pixels(encoded(grey, icc_profile=profile_with_gamma(1.0)), "x")
    linear = np.array([64, 128, 192]) / 255
    srgb = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert np.abs(pixels[0, :, 1].numpy() - srgb).max() < 2
    assert (pixels[..., :1] - pixels).abs().max() <= 1


def test_srgb_profiles_change_nothing_and_unfit_ones_are_named(caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_pixels(encoded(Image.fromarray(RAMP), icc_profile=srgb), "x").numpy(), RAMP)
    assert caplog.text == ""
    for unfit in (profile_with_gamma(1.0), b"no profile at all"):
        caplog.clear()
        assert np.array_equal(decode_pixels(encoded(Image.fromarray(RAMP), icc_profile=unfit), "a.png").numpy(), RAMP)
        assert "a.png: its colour profile cannot be used" in caplog.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_picture_is_unreadable_and_named(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "broken.png"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UnreadablePicture, match=r"broken\.png: the (picture is damaged|content is not)"):
        read_pixels(str(path))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"just text", "not a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not a PNG"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_picture_says_why(content, reason, tmp_path):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadablePicture, match=reason) as caught:
        read_pixels(str(path))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
def test_damage_anywhere_is_either_survived_or_named(data, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    good = bytearray(encoded(Image.fromarray(RAMP), kind, exif=exif, icc_profile=profile_with_gamma(1.8)))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(1, len(good)))])
    try:
        size_hw = read_size(damaged, "x")
        assert tuple(decode_pixels(damaged, "x").shape[:2]) == size_hw
    except UnreadablePicture:
        pass  # named; anything else would end the run


def test_a_hiccup_of_the_disk_is_retried(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"content")
    original, calls = type(path).read_bytes, []

    def hiccup(self):
        calls.append(self)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return original(self)

    monkeypatch.setattr(images, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(type(path), "read_bytes", hiccup)
    assert read_file(str(path)) == b"content"
    calls.clear()
    monkeypatch.setattr(images, "RETRY_SECONDS", (0,))
    with pytest.raises(UnreadablePicture, match="Input/output error"):
        read_file(str(path))


def test_resize_agrees_with_pillow_and_the_crop_is_where_the_plan_says():
    x, y = np.meshgrid(np.linspace(0, 6, 96), np.linspace(0, 5, 150))
    smooth = np.stack([127 + 100 * np.sin(x + k) * np.cos(y) for k in range(3)], -1).astype(np.uint8)
    plan = plan_crop((150, 96), make_buckets(64, 16, 32, 128))
    assert plan.cropped_fraction > 0
    (top, left), (height, width) = plan.crop_tl, plan.bucket.size_hw
    reference = np.asarray(Image.fromarray(smooth).resize(plan.resized_hw[::-1], Image.Resampling.BICUBIC))
    pixels = resize_and_crop(torch.from_numpy(smooth), plan)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    difference = pixels.numpy().astype(int) - reference[top : top + height, left : left + width]
    assert np.abs(difference).max() <= 2


def test_an_exact_size_keeps_its_pixels_and_a_wrong_size_is_refused():
    pixels = torch.from_numpy(RAMP)
    untouched = CropPlan((20, 30), (20, 30), (0, 0), Bucket((20, 30)))
    assert torch.equal(resize_and_crop(pixels, untouched), pixels)
    cut = CropPlan((20, 30), (20, 30), (2, 5), Bucket((16, 16)))
    assert np.array_equal(resize_and_crop(pixels, cut).numpy(), RAMP[2:18, 5:21])
    with pytest.raises(ValueError, match="do not match"):
        resize_and_crop(pixels[1:], untouched)


def test_model_range():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 3)
    assert to_model_range(pixels).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    assert to_model_range(torch.zeros(2, 5, 3, dtype=torch.uint8)).shape == (3, 2, 5)
