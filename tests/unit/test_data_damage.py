"""What is broken, cut short, made to exhaust memory or no picture at all is refused, with a reason; nothing crashes."""

import struct
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sdxl_training.data import decoding
from sdxl_training.data.decoding import UnreadablePicture
from tests.pictures import FORMATS, NOISE, RAMP, decoded, encoded, header, png

BROKEN = {
    name: encoded(NOISE, kind, **options) for name, (kind, options) in FORMATS.items()
} | {
    "alpha": encoded(np.dstack([NOISE, NOISE[..., :1]])),
    "grey jpeg": encoded(Image.fromarray(NOISE).convert("L"), "JPEG"),
    "cmyk": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "deep": cv2.imencode(".png", NOISE.astype(np.uint16) * 257)[1].tobytes(),
    "deep tiff": cv2.imencode(".tiff", NOISE.astype(np.uint16) * 257)[1].tobytes(),
    "animated": encoded(NOISE, "WEBP", save_all=True, append_images=[Image.fromarray(NOISE[::-1])]),
}  # fmt: skip
WHOLE = {name: decoded(data) for name, data in BROKEN.items()}


def decoded_if_readable(data: bytes) -> np.ndarray | None:
    try:
        pixels = decoded(data)
    except UnreadablePicture as error:
        return None if error.reason and error.path == "a.png" else pytest.fail(repr(error))
    assert header(data).size_hw == pixels.shape[:2]
    return pixels


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(list(BROKEN)))
def test_a_truncated_picture_is_refused_or_whole_never_partly_grey(data, name):
    whole = BROKEN[name]
    length = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 40, len(whole) - 1))
    pixels = decoded_if_readable(whole[:length])
    assert pixels is None or np.array_equal(pixels, WHOLE[name])  # only what follows the pixels may be missing
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(list(BROKEN)))
def test_damage_anywhere_is_either_survived_or_named(data, name):
    damaged = bytearray(BROKEN[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    decoded_if_readable(damaged)  # anything but UnreadablePicture would end the run


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", BROKEN)
def test_any_byte_of_a_header_may_be_wrong(name):
    for position in range(min(160, len(BROKEN[name]))):
        damaged = bytearray(BROKEN[name])
        damaged[position] ^= 0xFF
        decoded_if_readable(bytes(damaged))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=200)
@given(start=st.sampled_from([b"", *(data[:n] for data in BROKEN.values() for n in (4, 12, 30))]), rest=st.binary())
def test_random_bytes_after_a_good_start_are_no_crash(start, rest):
    decoded_if_readable(start + rest)


@settings(max_examples=200)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_no_picture(data):
    for read in (header, decoded):
        with pytest.raises(UnreadablePicture):
            read(data)


def test_what_follows_the_picture_does_not_matter():
    for name in ("png", "deep", "jpeg", "progressive", "webp", "gif", "tiff"):
        assert np.array_equal(decoded(BROKEN[name] + b"more from the camera"), WHOLE[name])


def test_opencv_is_not_shown_a_png_that_lies_about_its_lengths(monkeypatch):
    """It would make room for all 4 GB."""
    monkeypatch.setattr(decoding.cv2, "imdecode", lambda *_: pytest.fail("the decoder was called"))
    for name in ("png", "deep"):
        at = BROKEN[name].index(b"IDAT") - 4
        decoded_if_readable(BROKEN[name][:at] + b"\xff" + BROKEN[name][at + 1 :])


def huge(kind: str) -> bytes:
    """A small file whose header claims 16,000 x 60,000 pixels (WebP: 16,000 x 16,000)."""
    if kind == "PNG":
        return png(16_000, 60_000, 8, 2, bytes(100))
    small = bytearray(encoded(NOISE, kind))
    if kind == "JPEG":
        at = small.index(b"\xff\xc0") + 5
        small[at : at + 4] = struct.pack(">HH", 60_000, 16_000)
    elif kind == "BMP":
        small[18:26] = struct.pack("<ii", 16_000, 60_000)
    elif kind == "GIF":
        small[6:10] = struct.pack("<HH", 16_000, 60_000)
        at = small.index(b",\0\0\0\0")
        small[at + 5 : at + 9] = struct.pack("<HH", 16_000, 60_000)
    elif kind == "WEBP":
        small[26:30] = struct.pack("<HH", 16_000, 16_000)
    else:
        return encoded(NOISE, "TIFF", tiffinfo={}).replace(
            struct.pack("<HHIHH", 256, 4, 1, 104, 0), struct.pack("<HHII", 256, 4, 1, 60_000_000)
        )
    return bytes(small)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_a_decompression_bomb_is_refused_from_its_header(kind):
    for read in (header, decoded):
        with pytest.raises(UnreadablePicture, match=r"its header claims \d+ x \d+ pixels; over 179 million are not"):
            read(huge(kind))


def test_pillows_own_settings_neither_matter_nor_change(monkeypatch):
    large = encoded(Image.new("1", (10_000, 9_500)))  # Pillow would warn above 89 million pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert header(large).size_hw == (9_500, 10_000)
        assert np.array_equal(decoded(encoded(RAMP)), RAMP)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert warnings.filters == filters
