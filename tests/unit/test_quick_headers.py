"""Quick headers: never other than what Pillow's say, whatever the bytes; and quick for ordinary files."""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from sdxl_training.data.decoding import PictureHeader, UnreadablePicture, read_header
from sdxl_training.data.images import look_at
from sdxl_training.data.quick_headers import look_quickly, parse_start
from tests.pictures import encoded, png

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "a maker of cameras"
    tags[0x011A], tags[0x0128] = 72.0, 2
    tags.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return tags.tobytes()


def directory(order: str, *entries: tuple[int, int, int, int]) -> bytes:
    """EXIF data of these entries: tag, type, count, value."""
    data = b"Exif\0\0" + {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack(f"{order}HHL", tag, kind, count)
        data += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}L", value)
    return data + bytes(4)


def text(key: str) -> PngInfo:
    info = PngInfo()
    info.add_text(key, "Exif\0\0II*\0 a prompt")
    return info


@functools.cache
def files() -> dict[str, tuple[bytes, bool]]:
    """Files by name, and whether they are ordinary: their headers must be found without Pillow."""
    pixels = np.random.default_rng(0).integers(0, 256, (31, 22, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made: dict[str, tuple[bytes, bool]] = {
        "jpeg": (encoded(rgb, "JPEG"), True),
        "progressive": (encoded(rgb, "JPEG", progressive=True, optimize=True), True),
        "grey jpeg": (encoded(rgb.convert("L"), "JPEG"), True),
        "cmyk": (encoded(rgb.convert("CMYK"), "JPEG"), True),
        "profile": (encoded(rgb, "JPEG", icc_profile=profile), True),
        "long profile": (encoded(rgb, "JPEG", icc_profile=profile * 100), True),
        "comment, dpi": (encoded(rgb, "JPEG", comment=b"hello", dpi=(300, 300)), True),
        "restarts": (encoded(rgb, "JPEG", restart_marker_blocks=1), True),
        "camera": (encoded(rgb, "JPEG", exif=exif(6) + bytes(30_000)), True),
        "xmp": (encoded(rgb, "JPEG", xmp=XMP), False),
        "xmp and exif": (encoded(rgb, "JPEG", xmp=XMP, exif=exif(3)), False),
        "webp": (encoded(rgb, "WEBP"), True),
        "lossless webp": (encoded(rgb, "WEBP", lossless=True), True),
        "rgba webp": (encoded(rgb.convert("RGBA"), "WEBP", lossless=True), True),
        "turned webp": (encoded(rgb, "WEBP", exif=exif(6)), False),
        "profiled webp": (encoded(rgb, "WEBP", icc_profile=profile), True),
        "tiff": (encoded(rgb, "TIFF"), False),
        "gif": (encoded(rgb, "GIF"), False),
        "png": (encoded(rgb), True),
        "png text": (encoded(rgb, pnginfo=text("parameters")), True),
        "png dpi": (encoded(rgb, dpi=(300, 300)), True),
        "png exif": (encoded(rgb, exif=exif(6)), False),
        "png profile": (encoded(rgb, icc_profile=profile), False),
        "png xmp": (encoded(rgb, pnginfo=text("XML:com.adobe.xmp")), False),
        "png text exif": (encoded(rgb, pnginfo=text("exif")), False),
        "animated png": (encoded(rgb, save_all=True, append_images=[rgb.rotate(180)]), False),
        "no pixels": (png(0, 5, 8, 2, b""), False),
        "too many pixels": (png(2**16, 2**16, 8, 2, b""), False),
        "no mode": (png(5, 5, 3, 2, b""), False),
        "nothing": (b"", False),
        "text": (b"a caption", False),
    }
    jpeg = made["jpeg"][0]
    for segment in (
        b"\xff\xe0\0\x08JFIF\0\1",
        b"\xff\xee\0\x08Adobe\0",
        b"\xff\xe2\0\x0fICC_PROFILE\0\1",
        b"\xff\xc0\0\x0b\x0c\0\5\0\5\1\1\x11\0",
        b"\xff\xdb\0\x10" + bytes(14),
        b"\xff\xed\0\x18Photoshop 3.0\x008BIM\4\4\0\0",
        b"\xff\xff",
        b"\0",
    ):
        made[f"with {segment!r}"] = (jpeg[:2] + segment + jpeg[2:], False)
    for orientation in (*range(10), 300):
        made[f"orientation {orientation}"] = (encoded(rgb, "JPEG", exif=exif(orientation)), True)
    for order in "<>":
        for entry in ((274, 3, 1, 6), (274, 4, 1, 6), (274, 3, 2, 6), (274, 2, 4, 6), (282, 1, 1, 7), (296, 2, 3, 65)):
            plain = entry == (274, 3, 1, 6)
            made[f"by hand {order} {entry}"] = (encoded(rgb, "JPEG", exif=directory(order, entry)), plain)
        twice = directory(order, (274, 3, 1, 6), (274, 3, 1, 3))
        made[f"twice {order}"] = (encoded(rgb, "JPEG", exif=twice), False)
        made[f"far away {order}"] = (encoded(rgb, "JPEG", exif=directory(order, (270, 2, 99, 10**6))), False)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        made[f"png {mode}"] = (encoded(rgb.convert("L" if mode == "I;16" else mode).convert(mode)), True)
    for depth, colour in ((1, 0), (2, 0), (4, 0), (16, 0), (16, 2), (1, 3), (4, 3), (16, 4), (16, 6)):
        made[f"png {depth} bits, colour {colour}"] = (png(7, 9, depth, colour, bytes(700), (b"PLTE", bytes(48))), True)
    return made


def slow(data: bytes) -> PictureHeader | None:
    try:
        return read_header(io.BytesIO(data), "a")
    except UnreadablePicture:
        return None


@pytest.mark.parametrize("name", files())
def test_headers_are_pillows_and_ordinary_ones_are_found_without_it(name: str, tmp_path: Path) -> None:
    data, ordinary = files()[name]
    found = parse_start(data)
    assert found == (slow(data) if ordinary else None)
    assert not ordinary or found is not None
    path = tmp_path / "picture"
    path.write_bytes(data)
    if slow(data) is None:
        with pytest.raises(UnreadablePicture) as quick:
            look_quickly(str(path))
        with pytest.raises(UnreadablePicture) as pillow:
            look_at(str(path))
        assert quick.value.reason == pillow.value.reason
    else:
        assert look_quickly(str(path)) == look_at(str(path))


@settings(max_examples=1500)
@given(
    name=st.sampled_from(sorted(files())),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
    cut=st.none() | st.integers(0, 700),
    inserted=st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=6)),
    fix_checksums=st.booleans(),
)
def test_of_damaged_bytes_a_header_is_pillows_or_left_to_it(
    name: str,
    changes: list[tuple[int, int]],
    cut: int | None,
    inserted: tuple[int, bytes] | None,
    fix_checksums: bool,
) -> None:
    data = bytearray(files()[name][0])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    if inserted is not None:
        data[inserted[0] : inserted[0]] = inserted[1]
    if fix_checksums and name.startswith("png"):
        data = bytearray(with_checksums(bytes(data)))
    start = bytes(data[:cut])
    found = parse_start(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What is read of a file may be its start alone: then Pillow must say the same of the whole.
        assert found in (None, slow(start))
        assert found in (None, slow(bytes(data)))


def with_checksums(data: bytes) -> bytes:
    """The PNG file with checksums that fit its chunks, so that changes get further."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        chunk = data[at + 4 : at + 8 + length]
        if len(chunk) < 4 + length:
            break
        parts.append(data[at : at + 4] + chunk + struct.pack(">L", zlib.crc32(chunk)))
        at += 12 + length
    return b"".join(parts) + data[at:]


def test_a_header_behind_the_first_read_is_found_and_files_that_are_not_there_are_explained(tmp_path: Path) -> None:
    data, _ = files()["long profile"]
    (tmp_path / "a.jpg").write_bytes(data)
    assert parse_start(data[:4096]) is None
    assert look_quickly(str(tmp_path / "a.jpg")).size_hw == (31, 22)
    with pytest.raises(UnreadablePicture, match="No such file"):
        look_quickly(str(tmp_path / "b.jpg"))
