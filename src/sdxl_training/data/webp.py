"""The header of a WebP file, read by seeking: Pillow reads the whole file for it.

The container is RIFF: chunks of a four-letter name, a length, and that many bytes, padded to even. Layout after RFC
9649; lengths and sizes are little-endian.
"""

from __future__ import annotations

from typing import BinaryIO

KEPT = {b"EXIF": "exif", b"XMP ": "xmp"}  # chunks that may say how the picture is turned; names as in Pillow's info
HAS_ALPHA, HAS_METADATA = 0x10, 0x08 | 0x04  # flags of the extended header: alpha; EXIF, XMP


def read_webp_header(file: BinaryIO) -> tuple[int, int, str, dict[str, bytes]]:
    """Return width and height as stored, the mode Pillow decodes to, and the metadata that may turn the picture.

    Raises ValueError when the content does not keep to the format.
    """
    file.seek(12)  # "RIFF", length, "WEBP"
    name, length = _next_chunk(file)
    start = file.tell()
    head = file.read(min(length, 10))
    if name == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        return _number(head[6:8]) & 0x3FFF, _number(head[8:10]) & 0x3FFF, "RGB", {}
    if name == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:
        bits = _number(head[1:5])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, "RGBA" if bits >> 28 & 1 else "RGB", {}
    if name == b"VP8X" and len(head) == 10:
        file.seek(start + length + length % 2)
        info = _metadata(file) if head[0] & HAS_METADATA else {}
        mode = "RGBA" if head[0] & HAS_ALPHA else "RGB"
        return _number(head[4:7]) + 1, _number(head[7:10]) + 1, mode, info
    raise ValueError("no WebP header where it should be")


def _metadata(file: BinaryIO) -> dict[str, bytes]:
    """Return the chunks of KEPT among those that follow; the pixels are stepped over."""
    info: dict[str, bytes] = {}
    while True:
        name, length = _next_chunk(file)
        if not name:
            return info
        end = file.tell() + length + length % 2
        if name in KEPT:
            info.setdefault(KEPT[name], file.read(length))
        file.seek(end)


def _next_chunk(file: BinaryIO) -> tuple[bytes, int]:
    """Return the name and the length of the chunk here; no name at the end of the file."""
    head = file.read(8)
    return (head[:4], _number(head[4:])) if len(head) == 8 else (b"", 0)


def _number(little_endian: bytes) -> int:
    return int.from_bytes(little_endian, "little")
