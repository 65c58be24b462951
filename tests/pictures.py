"""Small pictures in every encoding, and colour profiles written by hand: their pixels are known without our code."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import product
from typing import Any

import cv2
import numpy as np
from PIL import Image

from sdxl_training.data.decoding import PictureHeader, decode_pixels, read_header

RAMP = np.stack([*np.meshgrid(np.arange(0, 240, 8), np.arange(0, 160, 8)), np.full((20, 30), 40)], -1).astype(np.uint8)
# Few colours in large patches, so that lossy formats and palettes keep them.
PATCHES = np.kron(np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [250, 240, 30]]]), np.ones((16, 24, 1))).astype(
    np.uint8
)
NOISE = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8), (104, 72))
LOSSLESS = {
    "png": ("PNG", {}), "bmp": ("BMP", {}), "webp": ("WEBP", {"lossless": True, "exact": True}), "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}), "tiff zip": ("TIFF", {"compression": "tiff_deflate"}),
}  # fmt: skip
LOSSY = {
    "jpeg": ("JPEG", {"quality": 98, "subsampling": 0}), "progressive": ("JPEG", {"quality": 98, "progressive": True}),
    "lossy webp": ("WEBP", {"quality": 98}), "avif": ("AVIF", {"quality": 98, "subsampling": "4:4:4"}),
}  # fmt: skip
FORMATS = LOSSLESS | LOSSY | {"gif": ("GIF", {})}


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Return the file of a picture."""
    sink = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(sink, kind, **options)
    return sink.getvalue()


def decoded(data: bytes, **options: Any) -> np.ndarray:
    """Return what our decoder makes of a file."""
    return decode_pixels(data, "a.png", **options).numpy()


def header(data: bytes) -> PictureHeader:
    """Return what our reader of headers makes of a file."""
    return read_header(io.BytesIO(data), "a.png")


def difference(a: Any, b: Any) -> int:
    """Return the largest difference of two arrays of one shape."""
    assert np.shape(a) == np.shape(b)
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, so that its pixels are known without Pillow."""
    start = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", start), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


# EXIF 2.32, 4.6.4 A: where row 0 and column 0 of the stored picture lie when it is shown.
SHOWN = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}  # fmt: skip


# Colour profiles

SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))  # XYZ, D50
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))


def icc_profile(space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    """An ICC v2 profile written by hand (ICC.1:2001-04)."""
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249), **tags}
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(body), bytes(4), 0x02400000, kind, space, pcs, bytes(12), b"acsp"
    )
    head += bytes(68 - len(head)) + xyz(0.9642, 1.0, 0.8249)[8:]
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(*values: float) -> bytes:
    scale = 256 if len(values) == 1 else 65535
    return b"curv\0\0\0\0" + struct.pack(f">I{len(values)}H", len(values), *(round(value * scale) for value in values))


def name_tag(name: str) -> dict[bytes, bytes]:
    text = name.encode() + b"\0"
    return {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)}


def linear(values):
    """IEC 61966-2-1."""
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def levels(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def rgb_profile(primaries=SRGB, gamma: float | None = None, name: str = "some screen") -> bytes:
    """A screen's profile: primaries in XYZ and a power curve, or sRGB's."""
    response = curve(gamma) if gamma else curve(*linear(np.arange(256)))
    colours = {f"{c}XYZ".encode(): xyz(*primary) for c, primary in zip("rgb", primaries, strict=True)}
    return icc_profile(b"RGB ", {**name_tag(name), **colours, **{f"{c}TRC".encode(): response for c in "rgb"}})


def grey_profile(gamma: float) -> bytes:
    return icc_profile(b"GRAY", {**name_tag("sRGB by name"), b"kTRC": curve(gamma)})


def press_profile() -> bytes:
    """A printing press on which cyan ink is red, magenta ink green, and everything else black."""
    lab = {(0, 0, 0, 0): (100, 0, 0), (1, 0, 0, 0): (54.29, 80.81, 69.89), (0, 1, 0, 0): (87.82, -79.27, 80.99)}
    nodes = (lab.get(inks, (0, 0, 0)) for inks in product((0, 1), repeat=4))
    grid = b"".join(bytes([round(L * 2.55), round(a + 128), round(b + 128)]) for L, a, b in nodes)
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    same = bytes(range(256))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + same * 4 + grid + same * 3
    return icc_profile(b"CMYK", {**name_tag("press"), b"A2B0": table}, kind=b"prtr", pcs=b"Lab ")
