"""Grids of noise levels: golden numbers, ends, order, limits, and what each path refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.objectives.grids import GRIDS, Grid, Karras, Linear, Native, Trailing, default_grid
from sdxl_training.objectives.paths import (
    EDMPath,
    FlowPath,
    NoisePath,
    PreconditionedFlowPath,
    VariancePreservingPath,
)
from sdxl_training.records import UserError

PLAIN, ZERO_TERMINAL = VariancePreservingPath(False), VariancePreservingPath(True)
PATHS: dict[str, NoisePath] = {
    "vp": PLAIN,
    "vp_zt": ZERO_TERMINAL,
    "flow": FlowPath(),
    "preconditioned": PreconditionedFlowPath(False),
    "preconditioned_zt": PreconditionedFlowPath(True),
    "edm": EDMPath(1.0, "timestep", False),
    "edm_zt": EDMPath(1.0, "timestep", True),
    "edm_half": EDMPath(0.5, "timestep", False),
    "edm_c_noise": EDMPath(0.5, "c_noise", False),
}
SHIFTED: dict[str, Grid] = {"linear_3": Linear(3.0), "linear_third": Linear(1 / 3), "karras_1": Karras(1.0)}
EVERY_GRID: dict[str, Grid] = {**{name: grid() for name, grid in GRIDS.items()}, **SHIFTED}
FITTING = [
    (path, grid) for path in PATHS for grid in EVERY_GRID if not (path == "flow" and grid in ("native", "trailing"))
]
SDXL_SIGMAS = (0.029167158151720367, 14.61464122933364)


def sigmas(grid: Grid, path: NoisePath, steps: int) -> list[float]:
    return grid.log_sigma(path, steps).exp().tolist()


def labels(grid: Grid, path: NoisePath, steps: int) -> list[float]:
    return path.at(grid.log_sigma(path, steps)).label_B.tolist()


# --- golden numbers --------------------------------------------------------------------------------------------------


def test_native_zero_terminal_grid_has_the_golden_values(oracles: dict[str, Any]) -> None:
    """The oracle writes 20000 where we keep exact infinity."""
    golden = oracles["native28_ztsnr_20000"]
    ours = sigmas(Native(), ZERO_TERMINAL, 28)
    assert ours[0] == math.inf
    assert golden[0] == pytest.approx(20000)
    assert ours[1:] == pytest.approx(golden[1:], rel=1e-8)


@pytest.mark.parametrize("steps", [5, 10, 18])
def test_karras_grid_has_the_golden_values_of_edm(oracles: dict[str, Any], steps: int) -> None:
    golden = oracles["karras"][f"{steps}_0.002_80.0"]
    for name in ("edm", "edm_zt", "edm_half", "edm_c_noise"):
        assert sigmas(Karras(), PATHS[name], steps) == pytest.approx(golden, rel=1e-12)
    assert sigmas(Karras(7.0, 0.002, 80.0), FlowPath(), steps) == pytest.approx(golden, rel=1e-12)


@pytest.mark.parametrize("path", ["vp", "preconditioned", "flow"])
def test_karras_grid_has_the_golden_values_of_sdxl(oracles: dict[str, Any], path: str) -> None:
    golden = oracles["karras"]["10_0.029167158151720367_14.61464122933364"]
    assert sigmas(Karras(), PATHS[path], 10) == pytest.approx(golden, rel=1e-9)


def test_karras_grid_of_a_zero_terminal_table_begins_at_the_practical_infinity() -> None:
    for path in ("vp_zt", "preconditioned_zt"):
        ours = sigmas(Karras(), PATHS[path], 28)
        assert [ours[0], ours[-1]] == pytest.approx([20000, SDXL_SIGMAS[0]], rel=1e-9)
        assert ours[13] > 400, "half of it lies there, as the docstring warns"


def test_trailing_steps_are_those_of_lin_et_al() -> None:
    for path in ("vp", "vp_zt", "preconditioned_zt", "edm"):
        assert labels(Trailing(), PATHS[path], 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert labels(Trailing(), ZERO_TERMINAL, 1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 3.0])
def test_linear_grid_has_the_golden_shifted_times(oracles: dict[str, Any], shift: float) -> None:
    golden = oracles["shift_table"][str(shift)]
    times = [label / 1000 for label in labels(Linear(shift), FlowPath(), 20)]
    assert times[0] == 1
    for time in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert times[round(20 * (1 - time))] == pytest.approx(golden[str(time)], abs=1e-6)


def test_linear_flow_grid_is_even() -> None:
    assert labels(Linear(), FlowPath(), 4) == pytest.approx([1000, 750, 500, 250], abs=1e-4)


def test_fractional_native_timesteps_are_labels_of_their_own() -> None:
    expected = torch.linspace(999, 0, 30, dtype=torch.float64).tolist()
    for path in ("vp", "vp_zt", "preconditioned", "edm"):
        assert labels(Native(), PATHS[path], 30) == pytest.approx(expected, abs=1e-3)


# --- properties of all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path_name", "grid_name"), FITTING)
def test_levels_descend_strictly_and_never_leave_the_path(path_name: str, grid_name: str) -> None:
    path, grid = PATHS[path_name], EVERY_GRID[grid_name]
    for steps in (1, 2, 7, 28, 36, 333, 1000):
        log_sigma_S = grid.log_sigma(path, steps)
        levels = path.at(log_sigma_S)
        assert log_sigma_S.dtype == torch.float64
        assert len(log_sigma_S) == steps
        assert (log_sigma_S[1:] < log_sigma_S[:-1]).all()
        assert (levels.b_B > 0).all(), "the clean end is implied, never a level"
        for value_B in (levels.a_B, levels.b_B, levels.label_B):
            assert value_B.isfinite().all()
        if path_name in ("vp", "vp_zt"):
            low, high = path.log_sigma_range
            assert low - 1e-9 <= log_sigma_S.min()
            assert log_sigma_S.max() <= high + 1e-9
            assert len(set(levels.label_B.tolist())) == steps, "no two levels share a label inside the table"


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Native(), {"vp": 14.6146412, "vp_zt": math.inf, "preconditioned": 14.6146412, "edm_zt": math.inf}),
        (Trailing(), {"vp": 14.6146412, "vp_zt": math.inf, "preconditioned_zt": math.inf, "edm": 14.6146412}),
        (Karras(), {"vp": 14.6146412, "vp_zt": 20000, "flow": 14.6146412, "preconditioned_zt": 20000, "edm_zt": 80}),
        (Linear(), {"vp": 14.6146412, "vp_zt": math.inf, "flow": math.inf, "preconditioned": math.inf, "edm": 80}),
        (Linear(3.0), {"vp": 14.6146412, "vp_zt": math.inf, "flow": math.inf, "edm_half": 80}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_level_is_the_noisiest_of_the_path(grid: Grid, expected: dict[str, float]) -> None:
    for path, sigma in expected.items():
        for steps in (1, 20):
            assert sigmas(grid, PATHS[path], steps)[0] == pytest.approx(sigma, rel=1e-7), path


def test_every_path_has_its_own_grid() -> None:
    expected = {
        "vp": Trailing,
        "vp_zt": Trailing,
        "flow": Linear,
        "preconditioned": Linear,
        "preconditioned_zt": Linear,
    }
    for name, path in PATHS.items():
        assert type(default_grid(path)) is expected.get(name, Karras), name


# --- the rho-schedule ------------------------------------------------------------------------------------------------


def test_rho_one_is_even_in_sigma_and_infinite_rho_even_in_its_logarithm() -> None:
    low, high = SDXL_SIGMAS
    even = torch.linspace(high, low, 12, dtype=torch.float64).tolist()
    geometric = torch.linspace(math.log(high), math.log(low), 12, dtype=torch.float64).exp().tolist()
    assert sigmas(Karras(rho=1.0), PLAIN, 12) == pytest.approx(even, rel=1e-9)
    assert sigmas(Karras(rho=1e6), PLAIN, 12) == pytest.approx(geometric, rel=1e-4)
    assert sigmas(Karras(rho=7.0), PLAIN, 12) != pytest.approx(geometric, rel=0.05)


@given(rho=st.floats(0.5, 50), low=st.floats(0.001, 1), ratio=st.floats(1.5, 1e4), steps=st.integers(2, 60))
def test_karras_ends_are_exact(rho: float, low: float, ratio: float, steps: int) -> None:
    ours = sigmas(Karras(rho, low, min(low * ratio, 9000.0)), FlowPath(), steps)
    assert [ours[0], ours[-1]] == pytest.approx([min(low * ratio, 9000.0), low], rel=1e-9)


@pytest.mark.parametrize("name", ["preconditioned", "edm", "flow"])
def test_karras_ends_may_lie_beyond_the_table_where_the_path_trains_that(name: str) -> None:
    assert sigmas(Karras(sigma_max=300.0), PATHS[name], 5)[0] == pytest.approx(300)


def test_rounded_table_ends_are_accepted() -> None:
    assert sigmas(Karras(sigma_min=0.0292, sigma_max=14.615), PLAIN, 3)[0] == pytest.approx(14.615)


# --- the shift -------------------------------------------------------------------------------------------------------


@given(first=st.floats(0.1, 10), second=st.floats(0.1, 10), steps=st.integers(2, 50))
def test_shifts_form_a_group_and_scale_sigma(first: float, second: float, steps: int) -> None:
    path = FlowPath()
    plain = Linear().log_sigma(path, steps)[1:]
    once = Linear(first).log_sigma(path, steps)[1:]
    both = Linear(first * second).log_sigma(path, steps)[1:]
    assert torch.allclose(once - plain, torch.full_like(plain, math.log(first)), atol=1e-9)
    assert torch.allclose(both - once, torch.full_like(plain, math.log(second)), atol=1e-9)


def test_a_shift_moves_the_inner_levels_only_where_the_path_has_an_end() -> None:
    plain, shifted = sigmas(Linear(), PLAIN, 10), sigmas(Linear(3.0), PLAIN, 10)
    assert shifted[0] == pytest.approx(plain[0], rel=1e-12)
    assert all(after > before for after, before in zip(shifted[1:], plain[1:], strict=True))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "path", "steps", "fragments"),
    [
        (Native(), "flow", 10, ["grid = native", "mode raw", "linear or karras"]),
        (Trailing(), "flow", 10, ["grid = trailing", "mode raw", "linear or karras"]),
        (Native(), "vp", 1001, ["steps = 1001", "1000 noise levels", "1 to 1000"]),
        (Trailing(), "edm", 1001, ["steps = 1001", "1000 noise levels", "1 to 1000"]),
        (Native(), "vp", 0, ["steps = 0", "at least one", "use 1 or more"]),
        (Trailing(), "vp", -1, ["steps = -1", "use 1 or more"]),
        (Karras(), "edm", 0, ["steps = 0", "use 1 or more"]),
        (Linear(), "flow", 0, ["steps = 0", "use 1 or more"]),
        (Linear(0.0), "flow", 10, ["shift = 0", "above 0", "leave it out"]),
        (Linear(-1.0), "flow", 10, ["shift = -1", "above 0"]),
        (Linear(math.inf), "flow", 10, ["shift = inf", "finite"]),
        (Linear(math.nan), "flow", 10, ["shift = nan", "finite"]),
        (Karras(rho=0.0), "edm", 10, ["rho = 0", "above 0"]),
        (Karras(sigma_min=-1.0), "edm", 10, ["sigma_min = -1", "above 0"]),
        (Karras(sigma_min=5.0, sigma_max=5.0), "edm", 10, ["sigma_min = 5", "sigma_max = 5", "below"]),
        (Karras(sigma_min=90.0), "edm", 10, ["sigma_min = 90", "sigma_max = 80", "below"]),
        (Karras(sigma_max=80.0), "vp", 10, ["sigma_max = 80", "0.02917 to 14.61", "leave it out"]),
        (Karras(sigma_min=0.002), "vp_zt", 10, ["sigma_min = 0.002", "0.02917 to inf", "leave it out"]),
        (Karras(sigma_max=20000.0), "flow", 10, ["sigma_max = 20000", "0.0001 to 9999", "leave it out"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_place_value_rule_and_remedy(
    grid: Grid, path: str, steps: int, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        grid.log_sigma(PATHS[path], steps)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("grid", [Native(), Trailing()])
def test_pure_noise_has_no_c_noise_label(grid: Grid) -> None:
    with pytest.raises(UserError, match="no number"):
        grid.log_sigma(EDMPath(0.5, "c_noise", True), 10)
