"""Lossless compression of half-precision tensors that gives them back at memory speed: byte shuffle and zstd.

The bytes of each word are set apart into planes: sign and exponent repeat and shrink to half, the bytes of the mantissa
are noise. Each plane is compressed by itself, which is smaller and faster than one stream over all of them, and a plane
that does not shrink is stored as it is and costs only a copy. What this gains is measured in benchmarks/cache_reads.py.

Packed form: the stored length of every plane (little-endian u32), then the planes, lowest byte first. A plane stored
with its full length is not compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

LEVEL = 1  # higher levels find nothing more in such data and cost time
WORTH_IT = 0.97  # a plane that shrinks less is not worth the time of unpacking it

Bytes = NDArray[np.uint8]


def pack(payload_N: Bytes, word_bytes: int) -> bytes | None:
    """Return the packed form of the bytes of words of `word_bytes` each, or None where it would not be smaller.

    Raises ValueError when the payload is not whole words.
    """
    if payload_N.size % word_bytes:
        raise ValueError(f"{payload_N.size} bytes are not whole words of {word_bytes}")
    codec = _codec()
    planes = [np.ascontiguousarray(plane).data for plane in payload_N.reshape(-1, word_bytes).T]
    stored = [_smaller(codec.compress(plane, asbytes=True), plane) for plane in planes]
    lengths = np.array([len(plane) for plane in stored], "<u4")
    packed = b"".join((lengths.tobytes(), *stored))
    return packed if len(packed) < payload_N.size else None


def unpack(packed_M: Bytes, size: int, word_bytes: int) -> Bytes:
    """Return the `size` bytes that were packed; raises ValueError where the packed form is damaged."""
    planes = list(_planes(packed_M, size // word_bytes, word_bytes))
    # OpenCV's merge interleaves with SIMD: twice as fast as shifts in NumPy, four times as fast as strided copies.
    words: Bytes = cv2.merge(planes)
    return words.reshape(-1)


def _planes(packed_M: Bytes, plane_size: int, word_bytes: int) -> Iterator[Bytes]:
    start = 4 * word_bytes
    if packed_M.size < start:
        raise ValueError(f"{packed_M.size} bytes are no packed tensor")
    codec = _codec()
    for length in packed_M[:start].view("<u4").tolist():
        plane = packed_M[start : start + length]
        if plane.size < length:
            raise ValueError(f"a plane of {length} bytes is cut short at {plane.size}")
        if length != plane_size:
            try:
                plane = np.frombuffer(codec.decompress(plane.data, plane_size), np.uint8)
            except OSError as error:  # what Arrow makes of zstd's errors
                raise ValueError(f"a plane cannot be decompressed ({error})") from error
        yield plane.reshape(-1, 1)
        start += length


def _smaller(compressed: bytes, plain: memoryview) -> bytes | memoryview:
    return compressed if len(compressed) < WORTH_IT * len(plain) else plain


def _codec() -> Any:
    # Made for each call: cheap (about a microsecond), and threads then share nothing.
    return pa.Codec("zstd", compression_level=LEVEL)
