"""Randomness is a pure function of its coordinates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.rng import Stream, derive_seed, mixed_bits, numpy_generator, torch_generator

INTEGERS = st.integers(-(2**63), 2**64 - 1)
WORDS = st.integers(0, 2**64 - 1)


@given(seed=INTEGERS, coordinates=st.lists(INTEGERS, max_size=4))
def test_seed_is_64_bits_and_repeats(seed: int, coordinates: list[int]) -> None:
    first = derive_seed(seed, Stream.NOISE, *coordinates)
    assert 0 <= first < 2**64
    assert first == derive_seed(seed, Stream.NOISE, *coordinates)


def test_every_coordinate_order_and_length_matters() -> None:
    seeds = {
        derive_seed(seed, stream, *coordinates)
        for seed in (0, 1)
        for stream in Stream
        for coordinates in ((), (0,), (0, 0), (0, 1), (1, 0), (1,), (2**32,), (2**63,))
    }
    assert len(seeds) == 2 * len(Stream) * 8


def test_another_process_derives_the_same_seed() -> None:
    program = "from sdxl_training.rng import *; print(derive_seed(7, Stream.LEVEL, 3, 2**60))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(output) == derive_seed(7, Stream.LEVEL, 3, 2**60)


def test_golden_value_pins_the_meaning_of_a_seed() -> None:
    """A change here changes every run ever made with a seed: never update this number."""
    assert derive_seed(0, Stream.NOISE, 1, 2) == 6190263992153078767


def test_stream_numbers_never_change() -> None:
    names = ["NOISE", "LEVEL", "POSTERIOR", "CAPTION", "ORDER", "INITIAL_WEIGHTS", "PREVIEW", "BUCKET_ORDER"]
    assert {stream.name: stream.value for stream in Stream if stream.value <= 8} == {
        name: i + 1 for i, name in enumerate(names)
    }


def test_generators_are_fresh_and_leave_global_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=torch_generator(5, Stream.NOISE, 1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(before, torch.get_rng_state())
    arrays = [numpy_generator(5, Stream.ORDER, 1).permutation(9) for _ in range(2)]
    assert numpy.array_equal(*arrays)


def test_neighbouring_samples_are_independent() -> None:
    draws = torch.stack([torch.randn(4096, generator=torch_generator(0, Stream.NOISE, 0, i)) for i in range(8)])
    correlations = torch.corrcoef(draws) - torch.eye(8)
    assert correlations.abs().max() < 5 / 4096**0.5


# The same numbers for one and for columns


def splitmix64(seed: int) -> Iterator[int]:
    """Vigna's splitmix64.c, as it is written."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def test_splitmix_gives_its_published_numbers() -> None:
    assert list(islice(splitmix64(1234567), 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seed=st.integers(0, 2**64 - 1), coordinates=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_mixed_bits_are_splitmix_sequences_within_each_other(seed: int, coordinates: list[int]) -> None:
    expected = seed
    for number in (int(Stream.CROP), *coordinates):
        expected = next(islice(splitmix64(expected), number, None))
    assert mixed_bits(seed, Stream.CROP, *coordinates) == expected


@given(seed=st.integers(0, 2**70), words=st.lists(WORDS, min_size=1, max_size=9), more=st.lists(WORDS, max_size=2))
def test_mixed_bits_of_a_column_are_those_of_each(seed: int, words: list[int], more: list[int]) -> None:
    column = numpy.array(words, numpy.uint64)
    mixed = mixed_bits(seed, Stream.CROP, column, *more)
    assert mixed.dtype == numpy.uint64
    assert mixed.tolist() == [mixed_bits(seed, Stream.CROP, word, *more) for word in words]
    columns = (numpy.full(len(words), each, numpy.uint64) for each in more)
    assert mixed_bits(seed, Stream.CROP, column, *columns).tolist() == mixed.tolist()
    assert column.tolist() == words, "nothing is changed in place"


@pytest.mark.parametrize("place", ["seed", "first", "second"])
def test_one_bit_of_a_coordinate_changes_half_of_the_mixed_bits(place: str) -> None:
    random = numpy.random.default_rng(0).integers(0, 2**63, (3, 200)).tolist()
    random[2] = list(range(200))  # variants are small numbers
    for bit in (0, 1, 5, 31, 62):
        changed = 0
        for seed, first, second in zip(*random, strict=True):
            flips = {name: (1 << bit) * (name == place) for name in ("seed", "first", "second")}
            other = mixed_bits(seed ^ flips["seed"], Stream.CROP, first ^ flips["first"], second ^ flips["second"])
            changed += (mixed_bits(seed, Stream.CROP, first, second) ^ other).bit_count()
        assert abs(changed / (200 * 64) - 0.5) < 5 * 0.5 / (200 * 64) ** 0.5


def test_golden_value_pins_the_meaning_of_mixed_bits() -> None:
    """A change here changes every crop ever drawn: never update this number."""
    assert mixed_bits(0, Stream.CROP, 1, 2) == 18291470974473660946
