"""SDXL's noise table, its rescaling to zero terminal SNR, and the levels that each objective makes of ln sigma."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.objective import OBJECTIVES as KINDS
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import (
    FLOW_EDGE,
    EDMPath,
    FlowPath,
    PreconditionedFlowPath,
    TimestepTable,
    VariancePreservingPath,
    rescale_zero_terminal_snr,
    sdxl_alphas_bar,
)
from tests.objective_table import OBJECTIVES, ON_THE_TABLE, objective_called, training_range

TABLES = {"sdxl_schedule": False, "ztsnr_schedule": True}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
both_tables = pytest.mark.parametrize("zero_terminal_snr", [False, True])


def ln(sigma: float) -> Tensor:
    return torch.tensor([sigma], dtype=torch.float64).log()


def test_the_tests_table_has_every_objective() -> None:
    assert {kind for kind, _ in OBJECTIVES.values()} == set(KINDS)


# --- SDXL's table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("oracle", "zero_terminal_snr"), TABLES.items())
def test_table_has_the_golden_values(oracles: dict[str, Any], oracle: str, zero_terminal_snr: bool) -> None:
    table = TimestepTable(zero_terminal_snr)
    assert table.alphas_bar_T.dtype == table.log_sigma_T.dtype == torch.float64
    betas_T = 1 - table.alphas_bar_T / torch.cat([torch.ones(1).double(), table.alphas_bar_T[:-1]])
    for key, golden in oracles[oracle].items():
        timestep = int(key)
        assert float(table.alphas_bar_T[timestep]) == pytest.approx(golden["abar"], rel=1e-9)
        assert float(betas_T[timestep]) == pytest.approx(golden["beta"], rel=1e-9)
        assert math.exp(float(table.log_sigma_T[timestep])) == pytest.approx(golden["sigma_ve"], rel=1e-8)
        assert math.exp(-2 * float(table.log_sigma_T[timestep])) == pytest.approx(golden["snr"], rel=1e-8)


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
    assert after_T[-1] == 0.0, "so the last beta is exactly 1"
    assert (after_T.diff() < 0).all()
    assert before_T[-1] > 0.004, "the argument must not be changed"


def test_rescale_is_idempotent() -> None:
    once_T = rescale_zero_terminal_snr(sdxl_alphas_bar())
    assert torch.allclose(rescale_zero_terminal_snr(once_T), once_T, rtol=1e-12, atol=0)


@given(timestep=st.floats(0, 999), zero_terminal_snr=st.booleans())
def test_timestep_and_sigma_are_inverse_to_each_other(timestep: float, zero_terminal_snr: bool) -> None:
    table = TimestepTable(zero_terminal_snr)
    log_sigma = table.log_sigma(torch.tensor([timestep], dtype=torch.float64))
    assert float(table.timestep(log_sigma)) == pytest.approx(timestep, abs=1e-9)


@both_tables
def test_between_entries_the_timestep_is_linear_in_ln_sigma(zero_terminal_snr: bool) -> None:
    """k-diffusion's `sigma_to_t`, by numpy; beyond the ends of SDXL's own table it is clamped."""
    table = TimestepTable(zero_terminal_snr)
    known = ((1 - table.alphas_bar_T) / table.alphas_bar_T).sqrt().log().numpy()[: 999 if zero_terminal_snr else 1000]
    log_sigma = numpy.linspace(-6, known[-1] if zero_terminal_snr else 6, 5001)
    expected = numpy.interp(log_sigma, known, numpy.arange(len(known)))
    assert table.timestep(torch.from_numpy(log_sigma)).numpy() == pytest.approx(expected, abs=1e-9)


def test_the_last_stretch_to_pure_noise_is_linear_in_the_signal_amplitude() -> None:
    """ln sigma is infinite at its end, so nothing could be linear in it."""
    path = VariancePreservingPath(True)
    levels = path.at_timesteps(torch.tensor([998.0, 998.25, 998.5, 998.75, 999.0]))
    golden = math.sqrt(1.967888443896892e-07)  # alpha-bar at 998
    assert levels.a_B.tolist() == pytest.approx([golden, 0.75 * golden, 0.5 * golden, 0.25 * golden, 0.0], rel=2e-6)
    assert levels.label_B.tolist() == pytest.approx([998, 998.25, 998.5, 998.75, 999], abs=1e-4)


@both_tables
def test_whole_timesteps_keep_their_number_exactly(zero_terminal_snr: bool) -> None:
    timesteps = torch.arange(1000)
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(timesteps)
    assert torch.equal(levels.label_B, timesteps.float())
    assert (levels.b_B.diff() > 0).all(), "label 0 is clean, label 999 is the noisiest"


def test_zero_terminal_level_is_exactly_pure_noise() -> None:
    levels = VariancePreservingPath(True).at_timesteps(torch.tensor([999]))
    assert (float(levels.a_B), float(levels.b_B), float(levels.label_B)) == (0.0, 1.0, 999.0)


def test_signal_left_at_a_sigma_that_stands_for_infinity(oracles: dict[str, Any]) -> None:
    """14.6 of SDXL, 80 of EDM, 4096 of diffusers, 4518 of ComfyUI, 20000 of NovelAI."""
    for sigma, golden in oracles["finite_infinity"].items():
        levels = VariancePreservingPath(True).at(ln(float(sigma)))
        assert float(levels.a_B) == pytest.approx(golden["sqrt_abar"], rel=1e-7)


# --- every path ------------------------------------------------------------------------------------------------------


def expected_coefficients(objective: Objective, sigma: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(a, b) from each path's own definition."""
    if isinstance(objective.path, FlowPath):
        return 1 / (1 + sigma), sigma / (1 + sigma)
    sigma_data = objective.path.sigma_data if isinstance(objective.path, EDMPath) else 1.0
    c_in = 1 / numpy.sqrt(sigma**2 + sigma_data**2)
    return c_in, sigma * c_in


@every_objective
def test_levels_are_those_of_the_papers(name: str) -> None:
    objective = objective_called(name)
    log_sigma_B = training_range(objective)
    log_sigma_B = log_sigma_B[log_sigma_B.isfinite()]
    levels = objective.path.at(log_sigma_B)
    a, b = expected_coefficients(objective, log_sigma_B.exp().numpy())
    assert levels.a_B.numpy() == pytest.approx(a, rel=1e-6)
    assert levels.b_B.numpy() == pytest.approx(b, rel=1e-6)
    assert {levels.a_B.dtype, levels.b_B.dtype, levels.label_B.dtype} == {torch.float32}


@every_objective
def test_pure_noise_is_exactly_the_noise(name: str) -> None:
    objective = objective_called(name)
    levels = objective.path.at(torch.tensor([math.inf], dtype=torch.float64))
    assert (float(levels.a_B), float(levels.b_B)) == (0.0, 1.0)
    label = 1000.0 if name == "flow_raw" else 999.0
    assert float(levels.label_B) == (math.inf if name.endswith("c_noise") else label)


@every_objective
def test_labels_rise_with_noise_and_stay_in_their_range(name: str) -> None:
    objective = objective_called(name)
    labels = objective.path.at(training_range(objective, 2001)).label_B
    low, high = (0.1, 999.9) if name == "flow_raw" else (0.0, 999.0)
    if name.endswith("c_noise"):
        low, high = (end / 4 for end in objective.path.log_sigma_range)
    assert (labels.diff() >= 0).all()
    assert labels[0] >= low - 1e-6
    assert labels[-1] <= high + 1e-6
    clamped = ((labels == labels[0]) | (labels == labels[-1])).float().mean()
    # Beyond the table there is no label of its own: ln sigma of -9.2 to -3.5, and 2.7 to 9.2 where it ends at 14.6.
    assert clamped < (0.68 if name in ("flow_vp", "edm") else 0.34 if "c_noise" not in name else 0.01)


@every_objective
def test_trained_range_ends_where_the_path_ends(name: str) -> None:
    objective = objective_called(name)
    low, high = objective.path.log_sigma_range
    if name in ON_THE_TABLE:
        assert math.exp(low) == pytest.approx(0.02916716, rel=1e-6)
        assert math.exp(high) == (math.inf if name.endswith("zt") else pytest.approx(14.61464123, rel=1e-8))
    else:
        ends = torch.sigmoid(torch.tensor([low, high], dtype=torch.float64))
        assert ends.tolist() == pytest.approx([FLOW_EDGE, 1 - FLOW_EDGE], rel=1e-9)


@given(st.floats(0, 1, exclude_max=True))
def test_every_position_of_every_clock_has_a_level(position: float) -> None:
    at = torch.tensor([position], dtype=torch.float64)
    for name in OBJECTIVES:
        path = objective_called(name).path
        levels = path.at(path.clock(at).clamp(*path.log_sigma_range))
        assert all(math.isfinite(float(value_B)) for value_B in vars(levels).values()), name


def test_the_timestep_clock_visits_all_timesteps_equally() -> None:
    positions = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    for zero_terminal_snr in (False, True):
        path = VariancePreservingPath(zero_terminal_snr)
        labels = path.at(path.clock(positions)).label_B
        assert torch.equal(labels.long().bincount(), torch.full((1000,), 5))
        assert torch.equal(labels, labels.round())


def test_the_flow_clock_is_flow_time() -> None:
    positions = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for path in (FlowPath(), PreconditionedFlowPath(True), PreconditionedFlowPath(False)):
        levels = path.at(path.clock(positions))
        time_B = levels.b_B.double() / (levels.a_B.double() + levels.b_B.double())
        assert torch.allclose(time_B, positions, atol=1e-6)


def test_the_edm_clock_is_even_in_timesteps() -> None:
    positions = torch.linspace(0, 1, 101, dtype=torch.float64)
    for zero_terminal_snr in (False, True):
        path = EDMPath(0.5, "timestep", zero_terminal_snr)
        assert torch.allclose(path.at(path.clock(positions)).label_B.double(), 999 * positions, atol=1e-4)


# --- flow and EDM beside SDXL's own path -----------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_flow_levels_run_straight_from_clean_to_noise(time: float) -> None:
    levels = FlowPath().at_times(torch.tensor([time], dtype=torch.float64))
    assert float(levels.b_B) == pytest.approx(time, abs=1e-7)
    assert float(levels.a_B) == pytest.approx(1 - time, abs=1e-7)
    assert float(levels.label_B) == pytest.approx(1000 * time, abs=1e-4), "1000 t, not rounded"


def test_what_sdxl_sees_at_a_flow_time(oracles: dict[str, Any]) -> None:
    """The label that has the same SNR on SDXL's table, and the raw label, which mostly has not."""
    for time, golden in oracles["rf_t_to_sdxl_timestep"].items():
        log_sigma_B = torch.logit(torch.tensor([float(time)], dtype=torch.float64))
        matched = PreconditionedFlowPath(zero_terminal_snr=False).at(log_sigma_B)
        assert float(matched.label_B) == pytest.approx(golden["matched"], abs=1e-3)
        assert float(matched.b_B) / float(matched.a_B) == pytest.approx(golden["sigma"], rel=1e-6)
        assert float(FlowPath().at(log_sigma_B).label_B) == pytest.approx(golden["times1000"], rel=1e-6)


def test_flow_times_beyond_sdxls_table_are_labelled_with_its_ends(oracles: dict[str, Any]) -> None:
    first, last = oracles["sdxl_rf_t_range"]
    path = PreconditionedFlowPath(zero_terminal_snr=False)
    inside = path.at(torch.logit(torch.tensor([first + 1e-5, last - 1e-5], dtype=torch.float64))).label_B
    assert 0 < inside[0] < 0.01
    assert 998.9 < inside[1] < 999
    beyond = torch.tensor([1e-4, first - 1e-5, last + 1e-5, 0.99, 1 - 1e-4], dtype=torch.float64)
    assert path.at(torch.logit(beyond)).label_B.tolist() == [0, 0, 999, 999, 999]


def test_flow_time_one_is_the_last_label_of_the_table_that_ends_in_noise() -> None:
    path = PreconditionedFlowPath(zero_terminal_snr=True)
    left = torch.tensor([1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-9, 0.0], dtype=torch.float64)
    labels = path.at(torch.log1p(-left) - left.log()).label_B.double()
    assert (labels.diff() >= 0).all()
    assert len(set(labels[:5].tolist())) == 5
    assert labels[0] < 999 - 10, "sigma 99 is far from the end of that table"
    assert labels[-2] == pytest.approx(999, abs=1e-4)
    assert labels[-1] == 999


@both_tables
def test_edm_at_sigma_data_one_is_the_variance_preserving_path(zero_terminal_snr: bool) -> None:
    log_sigma_B = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    edm = EDMPath(1.0, "timestep", zero_terminal_snr).at(log_sigma_B)
    preserving = VariancePreservingPath(zero_terminal_snr).at(log_sigma_B)
    for ours, theirs in zip(vars(edm).values(), vars(preserving).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_edm_reads_a_quarter_of_ln_sigma() -> None:
    labels = EDMPath(0.5, "c_noise", False).at(torch.tensor([0.002, 1.0, 80.0]).double().log()).label_B
    assert labels.tolist() == pytest.approx([math.log(0.002) / 4, 0.0, math.log(80) / 4])


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.0])
def test_one_noise_level_on_three_paths_differs_in_scale_alone(sigma: float) -> None:
    """x_VP = x_VE / sqrt(1 + sigma^2), x_RF = x_VE / (1 + sigma) = x_VP / (a + b)."""
    preserving, straight = VariancePreservingPath(False).at(ln(sigma)), FlowPath().at(ln(sigma))
    scale = float(preserving.a_B + preserving.b_B)
    assert float(preserving.a_B) == pytest.approx(1 / math.sqrt(1 + sigma**2), rel=1e-6)
    assert float(straight.a_B) == pytest.approx(float(preserving.a_B) / scale, rel=1e-6)
    assert float(straight.b_B) == pytest.approx(float(preserving.b_B) / scale, rel=1e-6)
    time = float(straight.b_B)
    assert 1 / scale == pytest.approx(math.sqrt((1 - time) ** 2 + time**2), rel=1e-6)


# --- precision -------------------------------------------------------------------------------------------------------


def is_float32_exact(label_B: Tensor, exact_B: Tensor) -> bool:
    """Whether labels differ from float64 by no more than float32's own rounding."""
    return bool(((label_B.double() - exact_B).abs() <= exact_B.abs() * 2.0**-23).all())


@every_objective
def test_labels_are_float32_even_under_autocast(name: str) -> None:
    """In bf16, 999 is read as 1000, and many labels are off by more than one."""
    path = objective_called(name).path
    log_sigma_B = torch.linspace(-3.5, 2.6, 3001, dtype=torch.float64)
    plain = path.at(log_sigma_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = path.at(log_sigma_B)
    if name.endswith("c_noise"):
        exact_B = log_sigma_B / 4
    elif isinstance(path, FlowPath):
        exact_B = 1000 / (1 + (-log_sigma_B).exp())
    else:
        exact_B = TimestepTable(path.zero_terminal_snr).timestep(log_sigma_B)
    assert levels.label_B.dtype == torch.float32
    assert is_float32_exact(levels.label_B, exact_B)
    assert not is_float32_exact(levels.label_B.bfloat16(), exact_B), "this test must see a cast"
    assert torch.equal(levels.a_B, plain.a_B)
    assert torch.equal(levels.b_B, plain.b_B)
    assert len(set(levels.label_B.tolist())) == 3001


def test_levels_move_between_devices_whole() -> None:
    moved = FlowPath().at_times(torch.tensor([0.2, 0.5])).to(torch.device("meta"))
    assert moved.a_B.is_meta
    assert moved.b_B.is_meta
    assert moved.label_B.is_meta
