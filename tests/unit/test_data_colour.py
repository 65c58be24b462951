"""Profiles, inks, depths and transparency: colours come out as a screen shows them."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from sdxl_training.data.decoding import UnreadablePicture
from tests.pictures import (
    ADOBE,
    NOISE,
    RAMP,
    SHOWN,
    SRGB,
    decoded,
    difference,
    encoded,
    grey_profile,
    header,
    levels,
    png,
    press_profile,
    rgb_profile,
)

# Profiles


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_wide_profile_is_applied(kind):
    colours = np.array([[60, 90, 70], [128, 128, 128], [200, 180, 170], [90, 100, 140], [255, 255, 255]])
    patches = np.kron(colours[None], np.ones((16, 16, 1))).astype(np.uint8)
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.get(kind, {"quality": 100, "subsampling": "4:4:4"})
    data = encoded(patches, kind, icc_profile=rgb_profile(ADOBE, 563 / 256), **options)
    light = (colours / 255) ** (563 / 256) @ np.array(ADOBE)
    expected = levels(light @ np.linalg.inv(np.array(SRGB)))
    assert difference(decoded(data)[8, 8::16], expected.round()) <= (5 if kind == "AVIF" else 3)
    assert np.abs(expected - colours).max() > 10  # the profile matters


def test_a_profile_of_swapped_primaries_swaps_the_channels():
    data = encoded(RAMP, icc_profile=rgb_profile(SRGB[::-1]))
    assert difference(decoded(data), RAMP[..., ::-1]) <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_srgb_is_known_by_what_it_does_not_by_its_name(kind, caplog):
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    untouched = decoded(encoded(RAMP, kind))
    for profile in (own, rgb_profile(name="Adobe RGB (1998)")):
        assert np.array_equal(decoded(encoded(RAMP, kind, icc_profile=profile)), untouched)
    pixels = decoded(encoded(RAMP, kind, icc_profile=rgb_profile(gamma=1.0, name="sRGB-elle-V2-g10")))
    assert difference(pixels, levels(untouched / 255).round()) <= 2
    nearly = decoded(encoded(RAMP, kind, icc_profile=rgb_profile(gamma=2.2)))  # differs in the shadows only
    assert difference(nearly, levels((untouched / 255) ** 2.2).round()) <= 2 < difference(nearly, untouched)
    assert caplog.text == ""


def test_a_grey_profile_is_applied():
    grey = np.array([[64, 128, 192]], np.uint8)
    for data in (encoded(grey, icc_profile=grey_profile(1.0)), encoded(grey, "TIFF", icc_profile=grey_profile(1.0))):
        assert difference(decoded(data)[0, :, 1], levels(grey[0] / 255).round()) <= 2
        assert np.ptp(decoded(data), axis=-1).max() <= 1
    opaque = Image.fromarray(np.stack([grey, np.full_like(grey, 255)], -1), "LA")
    assert np.array_equal(decoded(encoded(opaque, icc_profile=grey_profile(1.0))), decoded(data))


def test_unfit_profiles_are_ignored_and_named(caplog):
    for unfit in (grey_profile(1.0), b"no profile at all", rgb_profile()[:200]):
        caplog.clear()
        assert np.array_equal(decoded(encoded(RAMP, icc_profile=unfit)), RAMP)
        assert "a.png: its colour profile cannot be used" in caplog.text


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_with_and_without_profile(kind):
    inks = np.kron(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]]), np.ones((16, 16, 1)))
    image = Image.fromarray(inks.astype(np.uint8), "CMYK")
    options = {} if kind == "TIFF" else {"quality": 100, "subsampling": 0}
    plain = decoded(encoded(image, kind, **options))[8, 8::16]
    assert difference(plain, [[255] * 3, [0, 255, 255], [255, 0, 255], [0] * 3]) <= 4
    printed = decoded(encoded(image, kind, icc_profile=press_profile(), **options))[8, 8::16]
    assert difference(printed, [[255] * 3, [255, 0, 0], [0, 255, 0], [0] * 3]) <= 12


# Depth


def test_sixteen_bits_are_scaled_to_the_nearest_level():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(every / 257)
    grey_png = png(256, 256, 16, 0, b"".join(b"\0" + row.tobytes() for row in every.astype(">u2")))
    in_colour = np.stack([every, every[::-1], every.T], -1)
    for data in (grey_png, encoded(every, "TIFF"), encoded(every, "TIFF", compression="tiff_lzw")):
        assert np.array_equal(decoded(data), np.stack([expected] * 3, -1))
        assert header(data).mode == "I;16"
    for ending in (".png", ".tiff"):
        data = cv2.imencode(ending, in_colour[..., ::-1])[1].tobytes()
        assert np.array_equal(decoded(data), np.round(in_colour / 257))


def test_sixteen_bits_with_alpha_orientation_and_profile():
    rgba = png(2, 1, 16, 6, b"\0" + struct.pack(">8H", 65535, 32896, 0, 0x3333, 1, 2, 3, 0))
    assert decoded(rgba).tolist() == [[[255, 230, 204], [255] * 3]]  # 0x3333 / 65535 is a fifth
    grey = png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 25700, 65535, 0, 0))
    assert decoded(grey, background=(0, 9, 0)).tolist() == [[[100] * 3, [0, 9, 0]]]
    deep = np.arange(6, dtype=np.uint16).reshape(3, 2) * 10280
    for orientation, show in SHOWN.items():
        data = encoded(deep, "TIFF", tiffinfo={0x0112: orientation})
        assert np.array_equal(decoded(data)[..., 0], show(deep[..., None] / 257)[..., 0])
        assert header(data).size_hw == decoded(data).shape[:2]
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert np.array_equal(decoded(encoded(deep, exif=exif))[..., 0], show(deep[..., None] / 257)[..., 0])
    exact = cv2.imencode(".png", NOISE.astype(np.uint16)[..., ::-1] * 257)[1].tobytes()
    profile = rgb_profile(SRGB[::-1])
    chunk = b"iCCP" + b"x\0\0" + zlib.compress(profile)
    marked = exact[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + exact[33:]
    assert difference(decoded(marked), NOISE[..., ::-1]) <= 2


@pytest.mark.parametrize("values", [np.float32([[0.5, 1e6]]), np.int32([[0, 70000]])])
def test_samples_of_no_agreed_range_are_refused(values):
    with pytest.raises(UnreadablePicture, match=r"a\.png: its samples \(mode [FI]\) have no agreed range"):
        decoded(encoded(values, "TIFF"))


def test_bilevel_and_grey():
    assert decoded(encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")))[0, :, 0].tolist() == [0, 255]
    for kind in ("PNG", "TIFF", "BMP"):
        assert decoded(encoded(np.array([[7]], np.uint8), kind)).tolist() == [[[7, 7, 7]]]


# Transparency


BACKGROUNDS = [(255, 255, 255), (10, 200, 90)]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_the_background(kind, background):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = (0, 255, 51)  # 51 / 255 is a fifth
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(rgba, kind, **options)
    fifth = [round(0.2 * over + 0.8 * below) for over, below in zip((200, 0, 0), background, strict=True)]
    assert decoded(data, background=background).tolist() == [[[*background], [200, 0, 0], fifth]]
    assert header(data).mode == "RGBA"


def test_white_is_the_background_nobody_chose():
    grey = np.array([[[100, 0], [100, 255]]], np.uint8)
    assert decoded(encoded(Image.fromarray(grey, "LA"))).tolist() == [[[255] * 3, [100] * 3]]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_transparent_entries_of_palettes_and_transparent_colours(background):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decoded(encoded(palette), background=background).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    for data in (encoded(palette, transparency=1), encoded(palette, "GIF", transparency=1)):
        assert decoded(data, background=background).tolist() == [[[10, 20, 30], [*background]]]
    half = decoded(encoded(palette, transparency=bytes([255, 51])), background=background)
    assert half[0, 1].tolist() == [round(0.2 * o + 0.8 * b) for o, b in zip((40, 50, 60), background, strict=True)]
    keyed = png(2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", (b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert decoded(keyed, background=background).tolist() == [[[*background], [4, 5, 6]]]


def test_a_profile_changes_the_picture_not_its_background():
    rgba = np.array([[[200, 100, 50, 255], [0, 0, 0, 0]]], np.uint8)
    pixels = decoded(encoded(rgba, icc_profile=rgb_profile(SRGB[::-1])), background=(1, 2, 3))
    assert pixels[0, 1].tolist() == [1, 2, 3]
    assert difference(pixels[0, 0], [50, 100, 200]) <= 2
