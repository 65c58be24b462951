"""Randomness that belongs to the sample, not to the process.

Every random number is a pure function of (seed, stream, coordinates). Nothing advances, so nothing has to be saved:
a resumed run, another worker count or another number of GPUs draws the same numbers.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Generator

Words = TypeVar("Words", int, "NDArray[numpy.uint64]")

WORD = 2**64 - 1  # all its bits
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, odd


class Stream(IntEnum):
    """What a generator is used for. Numbers are part of the meaning of a seed: never renumber."""

    NOISE = 1
    LEVEL = 2
    POSTERIOR = 3
    CAPTION = 4
    ORDER = 5
    INITIAL_WEIGHTS = 6
    PREVIEW = 7
    BUCKET_ORDER = 8
    STRATA = 9
    NOISE_SHAPE = 10
    PERTURBATION = 11
    FEATURES = 12
    CROP = 13
    PROBE = 14
    META_BATCH = 15


def derive_seed(seed: int, stream: Stream, *coordinates: int) -> int:
    """Return 64 well-mixed bits for (seed, stream, coordinates), equal on every machine and Python."""
    message = struct.pack(f"<{2 + len(coordinates)}Q", *(value % 2**64 for value in (seed, stream, *coordinates)))
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def mixed_bits(seed: int, stream: Stream, first: Words, *more: Words | int) -> Words:
    """Return 64 well-mixed bits for (seed, stream, coordinates): others than `derive_seed`, but of columns, too.

    With columns of uint64 it is the same numbers, of a million samples at once. Each coordinate c picks number c of the
    SplitMix64 sequence (Steele, Lea & Flood 2014) whose seed is what the coordinates before it gave.
    """
    mixed: Any = seed & WORD
    for coordinate in (int(stream), first, *more):
        mixed = _splitmix(mixed, coordinate)
    return mixed  # type: ignore[no-any-return]


def _splitmix(state: Any, number: Any) -> Any:
    """Return output `number`, counted from 0, of SplitMix64 with this seed."""
    z = state + ((number + 1) * GOLDEN & WORD) & WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def uniform(seed: int, stream: Stream, *coordinates: int) -> float:
    """Return one number in [0, 1) with 53 random bits; much cheaper than seeding a generator for it."""
    return (derive_seed(seed, stream, *coordinates) >> 11) * 2.0**-53


def torch_generator(seed: int, stream: Stream, *coordinates: int) -> Generator:
    """Return a fresh CPU generator for (seed, stream, coordinates); the numbers do not depend on the device used."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, stream, *coordinates))


def numpy_generator(seed: int, stream: Stream, *coordinates: int) -> numpy.random.Generator:
    """Return a fresh Philox generator for (seed, stream, coordinates)."""
    import numpy

    return numpy.random.Generator(numpy.random.Philox(derive_seed(seed, stream, *coordinates)))
