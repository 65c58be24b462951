"""SDXL's noise table, its rescaling to zero terminal SNR, and the levels made from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.objectives.paths import (
    FLOW_EDGE,
    FlowPath,
    VariancePreservingPath,
    rescale_zero_terminal_snr,
    sdxl_alphas_bar,
)
from sdxl_training.records import UserError

TABLES = {"sdxl_schedule": False, "ztsnr_schedule": True}


@pytest.mark.parametrize(("oracle", "zero_terminal_snr"), TABLES.items())
def test_table_has_the_golden_values(oracles: dict[str, Any], oracle: str, zero_terminal_snr: bool) -> None:
    alphas_bar_T = VariancePreservingPath(zero_terminal_snr).alphas_bar_T
    assert alphas_bar_T.dtype == torch.float64
    for timestep, golden in oracles[oracle].items():
        alpha_bar = float(alphas_bar_T[int(timestep)])
        assert alpha_bar == pytest.approx(golden["abar"], rel=1e-9)
        assert ((1 - alpha_bar) / alpha_bar) ** 0.5 == pytest.approx(golden["sigma_ve"], rel=1e-8)


def test_golden_end_of_the_sdxl_table() -> None:
    assert float(sdxl_alphas_bar()[999]) == pytest.approx(0.0046600985, abs=1e-10)


def test_rescale_is_affine_in_the_signal_amplitude() -> None:
    before_T = sdxl_alphas_bar().sqrt()
    after_T = rescale_zero_terminal_snr(sdxl_alphas_bar()).sqrt()
    slopes = after_T.diff() / before_T.diff()
    assert torch.allclose(slopes, slopes[0].expand_as(slopes), rtol=1e-9)


def test_rescale_keeps_the_first_entry_and_zeroes_the_last_exactly() -> None:
    before_T = sdxl_alphas_bar()
    after_T = rescale_zero_terminal_snr(before_T)
    assert after_T[0] == before_T[0]
    assert after_T[-1] == 0.0
    assert (after_T.diff() < 0).all()
    assert before_T[-1] > 0.004, "the argument must not be changed"


def test_rescale_is_idempotent() -> None:
    once_T = rescale_zero_terminal_snr(sdxl_alphas_bar())
    assert torch.allclose(rescale_zero_terminal_snr(once_T), once_T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_vp_levels_keep_the_variance_and_label_the_timestep(zero_terminal_snr: bool) -> None:
    timesteps = torch.arange(1000)
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(timesteps)
    assert torch.allclose(levels.a_B.double() ** 2 + levels.b_B.double() ** 2, torch.ones(1000).double(), atol=2e-7)
    assert torch.equal(levels.label_B, timesteps.float())
    assert (levels.b_B.diff() > 0).all(), "label 0 is clean, label 999 is the noisiest"
    assert {levels.a_B.dtype, levels.b_B.dtype, levels.label_B.dtype} == {torch.float32}


def test_zero_terminal_level_is_exactly_pure_noise() -> None:
    levels = VariancePreservingPath(True).at_timesteps(torch.tensor([999]))
    assert (float(levels.a_B), float(levels.b_B)) == (0.0, 1.0)


def test_positions_cover_all_timesteps_equally() -> None:
    positions = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    labels = VariancePreservingPath(False).levels(positions).label_B
    assert torch.equal(labels.long().bincount(), torch.full((1000,), 5))


@given(st.floats(0, 1))
def test_every_position_has_a_level(position: float) -> None:
    at = torch.tensor([position], dtype=torch.float64)
    assert 0 <= float(VariancePreservingPath(True).levels(at).label_B) <= 999
    flow = FlowPath().levels(at)
    assert FLOW_EDGE <= float(flow.label_B) / 1000 <= 1 - FLOW_EDGE + 1e-7
    assert float(flow.a_B) > 0
    assert float(flow.b_B) > 0


@given(st.floats(0, 1))
def test_flow_levels_run_straight_from_clean_to_noise(time: float) -> None:
    levels = FlowPath().at_times(torch.tensor([time], dtype=torch.float64))
    assert float(levels.b_B) == pytest.approx(time, abs=1e-7)
    assert float(levels.a_B) == pytest.approx(1 - time, abs=1e-7)
    assert float(levels.label_B) == pytest.approx(1000 * time, abs=1e-4), "1000 t, not rounded"


def test_flow_labels_are_not_rounded_to_timesteps() -> None:
    labels = FlowPath().at_times(torch.tensor([0.1234567], dtype=torch.float64)).label_B
    assert float(labels) == pytest.approx(123.4567, abs=1e-5)


def test_ten_trailing_steps_are_those_of_lin_et_al() -> None:
    labels = VariancePreservingPath(True).sampling_levels(10).label_B
    assert labels.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


@given(st.integers(1, 1000))
def test_sampling_levels_start_at_pure_noise_and_descend(steps: int) -> None:
    for path, noisiest in ((VariancePreservingPath(True), 999), (FlowPath(), 1000)):
        levels = path.sampling_levels(steps)
        assert len(levels.label_B) == len(levels.a_B) == len(levels.b_B) == steps
        assert levels.label_B[0] == noisiest
        assert (levels.label_B.diff() < 0).all()
        assert levels.label_B[-1] >= 0


@pytest.mark.parametrize("steps", [0, 1001, 2000])
def test_more_steps_than_noise_levels_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"{steps} sampler steps.*1 to 1000"):
        VariancePreservingPath(True).sampling_levels(steps)


def test_levels_move_between_devices_whole() -> None:
    moved = FlowPath().sampling_levels(3).to(torch.device("meta"))
    assert moved.a_B.is_meta
    assert moved.b_B.is_meta
    assert moved.label_B.is_meta
