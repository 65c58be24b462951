"""Every kind of file becomes the pixels a viewer shows, whichever decoder reads it."""

import io
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.data import decoding
from sdxl_training.data.decoding import UnreadablePicture, decode_pixels, read_header
from tests.pictures import (
    ADOBE,
    FORMATS,
    LOSSLESS,
    LOSSY,
    NOISE,
    PATCHES,
    RAMP,
    SHOWN,
    decoded,
    difference,
    encoded,
    header,
    png,
    rgb_profile,
)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_come_back_exactly(name):
    kind, options = LOSSLESS[name]
    data = encoded(RAMP, kind, **options)
    assert np.array_equal(decoded(data), RAMP)
    assert (header(data).size_hw, header(data).mode, header(data).orientation) == ((20, 30), "RGB", 1)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_come_back_nearly(name):
    kind, options = LOSSY[name]
    data = encoded(cv2.GaussianBlur(PATCHES, (0, 0), 3), kind, **options)
    assert difference(decoded(data), cv2.GaussianBlur(PATCHES, (0, 0), 3)) <= (12 if "avif" not in name else 20)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "txt"])
def test_the_content_decides_not_the_name(name, ending, tmp_path):
    kind, options = FORMATS[name]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(encoded(PATCHES, kind, **options))
    assert np.array_equal(decode_pixels(path.read_bytes(), str(path)).numpy(), decoded(path.read_bytes()))
    with path.open("rb") as file:
        assert read_header(file, str(path)).format.upper() == kind


@pytest.mark.parametrize(
    ("start", "package"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "a Pillow that is built with AVIF"),
        (b"\xff\x0a" + bytes(20), "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "pillow-jxl-plugin"),
    ],
)
def test_a_format_that_cannot_be_read_here_names_the_package(start, package, monkeypatch):
    without = tuple(replace(kind, reader=None) for kind in decoding.FORMATS)
    monkeypatch.setattr(decoding, "FORMATS", without)
    for read in (header, decoded):
        with pytest.raises(UnreadablePicture, match=f"to read it, install {package}"):
            read(start)


def test_heif_where_its_package_is_installed():
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = cv2.GaussianBlur(PATCHES, (0, 0), 3)
    for orientation in (1, 6):  # its decoder turns the pixels itself
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(smooth, "HEIF", quality=100, exif=exif)
        assert difference(decoded(data), smooth) < 40
        assert header(data).size_hw == smooth.shape[:2]


def test_jpeg_xl_where_its_package_is_installed(tmp_path):
    pytest.importorskip("pillow_jxl")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(decoded(encoded(PATCHES, "JXL", lossless=True)), PATCHES)
    # The codestream has an orientation of its own, which its decoder heeds; EXIF has no say ...
    pixels = encoded(PATCHES, "JXL", lossless=True, exif=exif.tobytes())
    assert np.array_equal(decoded(pixels), PATCHES)
    # ... but what was a JPEG comes back as that JPEG.
    jpeg = tmp_path / "a.jpg"
    jpeg.write_bytes(encoded(NOISE, "JPEG", exif=exif))
    repacked = encoded(Image.open(jpeg), "JXL", lossless_jpeg=True)
    assert np.array_equal(decoded(repacked), decoded(jpeg.read_bytes()))
    for data in (pixels, repacked):
        assert header(data).size_hw == decoded(data).shape[:2]


# Orientation


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("name", ["png", "jpeg", "webp", "lossy webp", "tiff", "tiff zip", "avif"])
def test_orientation_is_respected_and_the_header_agrees(name, orientation):
    kind, options = FORMATS[name]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PATCHES, kind, exif=exif, **options)
    pixels = decoded(data)
    assert header(data).size_hw == pixels.shape[:2]
    assert header(data).orientation == (1 if kind == "TIFF" else orientation)
    # The middles of the patches, where nothing bleeds over.
    assert difference(pixels[4::16, 4::16], SHOWN[orientation](PATCHES)[4::16, 4::16]) <= (
        0 if name in LOSSLESS else 16
    )
    assert pixels.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("orientation", SHOWN)
def test_both_decoders_turn_alike(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, with_profile = (encoded(NOISE, "JPEG", exif=exif, icc_profile=p) for p in (None, rgb_profile(ADOBE, 1.8)))
    assert np.array_equal(decoded(plain), SHOWN[orientation](pillow(encoded(NOISE, "JPEG"))))
    slow = decoded(with_profile)
    undone = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    assert np.array_equal(SHOWN[undone](slow), decoded(encoded(NOISE, "JPEG", icc_profile=rgb_profile(ADOBE, 1.8))))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(RAMP, exif=exif)
    assert (header(data).size_hw, header(data).orientation) == ((20, 30), 1)
    assert np.array_equal(decoded(data), RAMP)


# The two decoders


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    grey=st.booleans(),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    restart=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_opencv_decodes_jpeg_to_the_bytes_pillow_does(size, grey, quality, subsampling, progressive, restart, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    options = {"subsampling": subsampling, "progressive": progressive, "restart_marker_blocks": restart}
    data = encoded(Image.fromarray(pixels).convert("L" if grey else "RGB"), "JPEG", quality=quality, **options)
    assert np.array_equal(decoded(data), pillow(data))


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (8, 2)])
def test_opencv_decodes_png_to_the_bytes_pillow_does(depth, colour):
    width = 16
    rows = np.random.default_rng(depth).integers(0, 256, (9, 1 + width * depth * (1 + colour) // 8), np.uint8)
    rows[:, 0] = [0, 1, 2, 3, 4, 1, 2, 3, 4]  # all filters
    data = png(width, 9, depth, colour, rows.tobytes())
    assert np.array_equal(decoded(data), pillow(data))


@pytest.fixture
def opencv_calls(monkeypatch):
    calls, original = [], cv2.imdecode
    monkeypatch.setattr(decoding.cv2, "imdecode", lambda *given: calls.append(given) or original(*given))
    return calls


def test_opencv_decodes_what_is_plain_and_nothing_else(opencv_calls):
    grey, alpha = Image.fromarray(RAMP).convert("L"), Image.fromarray(RAMP).convert("RGBA")
    frames = {"save_all": True, "append_images": [Image.fromarray(RAMP[::-1])]}
    plain = [encoded(RAMP), encoded(RAMP, "JPEG"), encoded(grey, "JPEG"), encoded(RAMP, icc_profile=rgb_profile())]
    other = [
        encoded(alpha), encoded(grey.convert("P")), encoded(RAMP, transparency=(0, 0, 40)), encoded(RAMP, **frames),
        encoded(Image.fromarray(RAMP).convert("CMYK"), "JPEG"), encoded(RAMP, "JPEG", icc_profile=rgb_profile(ADOBE)),
        encoded(RAMP, "WEBP"), encoded(RAMP, "TIFF"),
    ]  # fmt: skip
    for data, expected in [*((data, 1) for data in plain), *((data, 0) for data in other)]:
        opencv_calls.clear()
        decoded(data)
        assert len(opencv_calls) == expected
    assert cv2.getNumThreads() == 1  # none of its own


def test_pillow_has_the_last_word_where_opencv_refuses(monkeypatch):
    monkeypatch.setattr(decoding.cv2, "imdecode", lambda *_: None)
    assert np.array_equal(decoded(encoded(RAMP)), RAMP)


def test_threads_may_decode_at_once():
    kinds = [*FORMATS.values(), ("PNG", {"icc_profile": rgb_profile(ADOBE, 1.8)})]
    files = [encoded(NOISE, kind, **options) for kind, options in kinds] * 8
    with ThreadPoolExecutor(8) as threads:
        for together, alone in zip(threads.map(decoded, files), map(decoded, files), strict=True):
            assert np.array_equal(together, alone)


# Animation


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "MPO"])  # MPO: JPEGs of one shot, one after another
def test_of_an_animation_the_first_picture_counts(kind):
    frames = [Image.fromarray(np.roll(PATCHES, shift, 1)) for shift in (0, 24, 12)]
    fine = {"quality": 98, "subsampling": "4:4:4"}
    options = {"WEBP": {"lossless": True}, "AVIF": fine, "MPO": fine}.get(kind, {})
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert difference(decoded(data)[8::16, 8::16], PATCHES[8::16, 8::16]) <= (16 if kind in ("AVIF", "MPO") else 0)


# Headers


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, *given):
        found = super().read(*given)
        self.count += len(found)
        return found


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "avif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_a_header_costs_no_more_than_a_header(name, alpha):
    kind, options = FORMATS[name]
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 4 if alpha and kind != "JPEG" else 3), np.uint8)
    extra = {} if kind in ("BMP", "GIF") else {"exif": exif}
    file = Counting(encoded(noise, kind, **extra, **options))
    assert read_header(file, "x").size_hw == ((400, 300) if extra else (300, 400))
    assert file.count < 6000 < len(file.getvalue()) / 10


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    alpha=st.booleans(),
    lossless=st.booleans(),
    orientation=st.sampled_from([None, *SHOWN]),
    xmp=st.booleans(),
)
def test_our_reading_of_webp_headers_agrees_with_pillows(size, alpha, lossless, orientation, xmp):
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 4 if alpha else 3), np.uint8)
    extra = {}
    if orientation:
        extra["exif"] = Image.Exif()
        extra["exif"][0x0112] = orientation
    if xmp:
        extra["xmp"] = b"<x tiff:Orientation='1'/>" + b'<y tiff:Orientation="8"/>'
    data = encoded(pixels, "WEBP", lossless=lossless, **extra)
    with Image.open(io.BytesIO(data)) as image:
        assert header(data).mode == image.mode
        assert header(data).orientation == image.getexif().get(0x0112, 1) == (orientation or (8 if xmp else 1))
        turned = header(data).orientation >= 5
        assert header(data).size_hw == (image.size if turned else image.size[::-1]) == decoded(data).shape[:2]


def test_header_and_pixels_of_webp_agree_where_its_parts_do_not():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(RAMP, "WEBP", exif=exif))
    at = data.index(b"EXIF")
    short, unannounced = bytearray(data), bytearray(data)
    short[4:8] = struct.pack("<I", at - 8)  # the length of the file stops before EXIF
    unannounced[20] &= ~0x08  # no flag says that there is EXIF
    for odd in (data, short, unannounced):
        assert header(bytes(odd)).size_hw == decoded(bytes(odd)).shape[:2]
