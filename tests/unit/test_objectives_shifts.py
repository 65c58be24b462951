"""Resolution shift: one statement in three notations, a group, and the table of golden numbers."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.config.schema import Training
from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.paths import FlowPath
from sdxl_training.objectives.shifts import SHIFTS, FixedShift, LevelShift, NoShift, PerBucketShift

factors = st.floats(0.1, 10)
times = st.floats(1e-3, 1 - 1e-3)


def shifted_time(shift: LevelShift, time: float, size_hw: tuple[int, int] = (1024, 1024)) -> float:
    """Return flow time t after the shift of ln sigma = logit t."""
    return 1 / (1 + math.exp(-(math.log(time / (1 - time)) + shift.log_factor(size_hw))))


def test_table_names_every_choice() -> None:
    sections = get_args(Training.model_fields["level_shift"].annotation)
    assert set(SHIFTS) == {section.model_fields["type"].default for section in sections}


def test_the_oracles_table(oracles: dict[str, Any]) -> None:
    entries = [(float(alpha), row) for alpha, row in oracles["shift_table"].items()]
    assert len(entries) >= 4
    for alpha, row in entries:
        for time, expected in row.items():
            assert shifted_time(FixedShift(alpha), float(time)) == pytest.approx(expected, abs=1e-12), (alpha, time)


@given(time=times, alpha=factors)
def test_it_is_the_formula_of_sd3(time: float, alpha: float) -> None:
    expected = alpha * time / (1 + (alpha - 1) * time)
    assert shifted_time(FixedShift(alpha), time) == pytest.approx(expected, rel=1e-9)


@given(time=times, alpha=factors)
def test_it_is_a_factor_on_sigma(time: float, alpha: float) -> None:
    sigma = time / (1 - time)
    after = shifted_time(FixedShift(alpha), time)
    assert after / (1 - after) == pytest.approx(alpha * sigma, rel=1e-9)


@given(time=times, alpha=factors, beta=factors)
def test_shifts_are_a_group(time: float, alpha: float, beta: float) -> None:
    both = shifted_time(FixedShift(beta), shifted_time(FixedShift(alpha), time))
    assert both == pytest.approx(shifted_time(FixedShift(alpha * beta), time), rel=1e-9)
    there_and_back = shifted_time(FixedShift(1 / alpha), shifted_time(FixedShift(alpha), time))
    assert there_and_back == pytest.approx(time, rel=1e-9)


def test_one_and_none_change_nothing() -> None:
    assert FixedShift(1.0).log_factor((512, 512)) == NoShift().log_factor((512, 512)) == 0.0


def test_fixed_looks_at_no_size() -> None:
    assert FixedShift(3.0).log_factor((64, 64)) == FixedShift(3.0).log_factor((2048, 1024)) == math.log(3)


def test_a_shifted_logit_normal_is_one_with_another_mean() -> None:
    uniform_B = (torch.arange(99, dtype=torch.float64) + 0.5) / 99
    shifted_B = LogNormal(0.0, 1.0).log_sigma(uniform_B, FlowPath()) + FixedShift(3.0).log_factor((1024, 1024))
    torch.testing.assert_close(shifted_B, LogNormal(math.log(3), 1.0).log_sigma(uniform_B, FlowPath()))


@given(height=st.integers(1, 64), width=st.integers(1, 64), factor=factors)
def test_per_bucket_is_the_root_of_the_share_of_pixels(height: int, width: int, factor: float) -> None:
    size_hw = (32 * height, 32 * width)
    expected = factor * math.sqrt(size_hw[0] * size_hw[1] / 1024**2)
    shift = PerBucketShift(factor, 1024)
    assert math.exp(shift.log_factor(size_hw)) == pytest.approx(expected, rel=1e-9)
    assert shift.log_factor(size_hw) == shift.log_factor(size_hw[::-1])


def test_twice_the_length_is_twice_the_sigma() -> None:
    """NovelAI's rule, quoted in many places: the canvas twice as long, the variance of the noise four times as large.

    A field that is constant on 2 x 2 blocks shows why: their mean has a quarter of the noise's variance.
    """
    shift = PerBucketShift(1.0, 512)
    assert math.exp(shift.log_factor((512, 512))) == pytest.approx(1.0)
    assert math.exp(shift.log_factor((1024, 1024))) == pytest.approx(2.0)
    block_mean = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)).mul(2).mean(dim=1)
    assert float(block_mean.std()) == pytest.approx(1.0, abs=0.03)


def test_sdxls_own_buckets_hardly_differ(oracles: dict[str, Any]) -> None:
    factors_of = [math.exp(PerBucketShift(1.0, 1024).log_factor((h, w))) for h, w in oracles["sdxl_buckets_hw"]]
    assert len(factors_of) == 40
    assert max(factors_of) <= 1.0 + 1e-9
    assert min(factors_of) == pytest.approx(math.sqrt(oracles["sdxl_bucket_area_range"][0]))
    assert min(factors_of) > 0.94
