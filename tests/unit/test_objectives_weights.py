"""Loss weights: golden tables, limits at both ends, SNR 0, mean 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.heads import CleanHead, EpsilonHead, FlowHead, FlowVelocityHead, Head, VelocityHead
from sdxl_training.objectives.paths import FlowPath, TimestepTable, VariancePreservingPath
from sdxl_training.objectives.shifts import FixedShift
from sdxl_training.objectives.weights import (
    P2,
    Debiased,
    DebiasedKohya,
    EDMWeight,
    LossWeight,
    MinSNR,
    NoWeight,
    SoftMinSNR,
    TerminalPolicy,
    TruncatedSNR,
)
from sdxl_training.objectives.weights import (
    WEIGHTS as KINDS,
)
from tests.objective_table import (
    DENSITIES,
    OBJECTIVES,
    WEIGHTS,
    X0_WEIGHT,
    density_called,
    head_weights,
    is_defined,
    levels_of,
    objective_called,
    problem,
    training_range,
    weight_called,
)

POLICIES: tuple[TerminalPolicy, ...] = ("official", "official_patched", "plus_one", "floor")
HEADS: dict[str, Head] = {"eps": EpsilonHead(), "v": VelocityHead(), "x0": CleanHead()}
VANISHES_WITH_SNR = ("min_snr", "soft_min_snr", "debiased", "p2", "p2_mild", "sigmoid")
"""What the configuration warns of where pure noise is trained."""
every_weight = pytest.mark.parametrize("weight", WEIGHTS)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def table_weights(loss_weight: LossWeight, head: Head, zero_terminal_snr: bool) -> Tensor:
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(torch.arange(1000))
    return loss_weight.weight(head, levels.a_B, levels.b_B)


def test_the_tests_table_has_every_weight() -> None:
    assert {kind for kind, _ in WEIGHTS.values()} == set(KINDS)


# --- golden tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_min_snr_golden_table(oracles: dict[str, Any], head: str) -> None:
    weights_T = table_weights(MinSNR(5.0), HEADS[head], zero_terminal_snr=False)
    for timestep, golden in oracles["min_snr_gamma5"].items():
        assert float(weights_T[int(timestep)]) == pytest.approx(golden[head], abs=1e-5)


def test_min_snr_golden_table_of_the_rescaled_schedule(oracles: dict[str, Any]) -> None:
    """Two well-known trainers weight by the SNR from before the rescale; this table tells the two apart."""
    weights_T = table_weights(MinSNR(5.0), VelocityHead(), zero_terminal_snr=True)
    stale_T = table_weights(MinSNR(5.0), VelocityHead(), zero_terminal_snr=False)
    golden = oracles["min_snr_gamma5_ztsnr_v"]
    for timestep, value in golden.items():
        assert float(weights_T[int(timestep)]) == pytest.approx(value, abs=1e-6)
    assert max(abs(float(stale_T[int(timestep)]) - value) for timestep, value in golden.items()) > 0.01


def test_soft_min_snr_golden_table(oracles: dict[str, Any]) -> None:
    weights_T = table_weights(SoftMinSNR(1.0), VelocityHead(), zero_terminal_snr=False)
    for timestep, golden in oracles["soft_min_snr_v_sigma_data1"].items():
        assert float(weights_T[int(timestep)]) == pytest.approx(golden, abs=1e-6)


X0_ROWS: dict[str, tuple[LossWeight, Head]] = {
    "eps": (NoWeight(), EpsilonHead()),
    "v": (NoWeight(), VelocityHead()),
    "rf": (NoWeight(), FlowVelocityHead()),
    "edm_sd1": (EDMWeight(1.0), CleanHead()),
    "edm_sd05": (EDMWeight(0.5), CleanHead()),
    "min_snr5": (MinSNR(5.0), CleanHead()),
    "softmin_sd05": (SoftMinSNR(4.0), CleanHead()),
    "trunc": (TruncatedSNR(), CleanHead()),
    "debiased": (Debiased(), CleanHead()),
    "p2": (P2(1.0, 1.0), CleanHead()),
}


def test_every_golden_weight_in_x0_space_is_tested(oracles: dict[str, Any]) -> None:
    assert set(oracles["x0_space_weights"]) == set(X0_ROWS)


@pytest.mark.parametrize("row", X0_ROWS)
def test_golden_weights_in_x0_space(oracles: dict[str, Any], row: str) -> None:
    """A weight on the x0 head is W itself; a head's own weight is divided by what turns W into the head's space."""
    loss_weight, head = X0_ROWS[row]
    for timestep, golden in oracles["x0_space_weights"][row].items():
        levels = VariancePreservingPath(False).at_timesteps(torch.tensor([int(timestep)]))
        a, b = levels.a_B.double(), levels.b_B.double()
        of_one = head.native_weight(b.square(), a, b)
        assert float(loss_weight.weight(head, a, b) / of_one) == pytest.approx(golden, rel=1e-5)


def test_flows_own_weight_is_one_over_time_squared(oracles: dict[str, Any]) -> None:
    for timestep, golden in oracles["x0_space_weights"]["rf"].items():
        levels = FlowPath().at(TimestepTable(False).log_sigma_T[int(timestep)][None])
        assert float(levels.b_B) ** -2 == pytest.approx(golden, rel=1e-5)
        assert float(NoWeight().weight(FlowHead(), levels.a_B, levels.b_B)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("zero_terminal_snr", "key"), [(False, "plain"), (True, "zt")])
def test_sum_of_weights(oracles: dict[str, Any], zero_terminal_snr: bool, key: str) -> None:
    weights_T = table_weights(MinSNR(5.0), VelocityHead(), zero_terminal_snr)
    assert float(weights_T.double().sum()) == pytest.approx(oracles["v_weights_sum"][key], abs=1e-3)


def test_share_of_the_noisiest_levels(oracles: dict[str, Any]) -> None:
    """What is left of zero terminal SNR under each policy: all of 0.1 %, or nothing."""
    shares = {}
    for policy in POLICIES:
        weights_T = table_weights(MinSNR(5.0, policy), VelocityHead(), True).double()
        shares[policy] = float(weights_T[999] / weights_T.sum())
        if policy == "official":
            last_ten = float(weights_T[-10:].sum() / weights_T.sum())
            assert last_ten == pytest.approx(oracles["v_weights_sum"]["zt_frac_last10"], rel=1e-3)
    golden = oracles["ztsnr_terminal_share_of_weight"]
    assert shares["official"] == golden["official_formula"] == 0
    assert shares["official_patched"] == pytest.approx(golden["official_repo_patch"], rel=1e-4)
    assert shares["plus_one"] == pytest.approx(golden["plus_one_variant"], rel=1e-4)


def test_clip_is_active_up_to_the_known_timesteps() -> None:
    """SNR passes 5 between 146 and 147, after the rescale between 138 and 139."""
    for zero_terminal_snr, last in ((False, 146), (True, 138)):
        weights_T = table_weights(MinSNR(5.0), EpsilonHead(), zero_terminal_snr)[:999]
        assert int((weights_T < 1 - 1e-6).sum()) == last + 1


# --- formulas and limits ---------------------------------------------------------------------------------------------


@given(time=st.floats(1e-4, 1 - 1e-4))
def test_weights_on_the_flow_velocity_are_the_papers_formulas(time: float) -> None:
    """W t^2 for every scheme; down to the ends of what is trained."""
    levels = FlowPath().at_times(torch.tensor([time], dtype=torch.float64))
    snr = ((1 - time) / time) ** 2
    for weight, formula in X0_WEIGHT.items():
        ours = float(weight_called(weight, problem("flow_raw")).weight(FlowHead(), levels.a_B, levels.b_B))
        assert ours == pytest.approx(float(formula(snr)) * time**2, rel=2e-3), weight
    cosine = 2 / (math.pi * (1 - 2 * time + 2 * time**2))
    assert float(weight_called("cosmap", problem("flow_raw")).weight(FlowHead(), levels.a_B, levels.b_B)) == (
        pytest.approx(cosine, rel=1e-5)
    )


@every_objective
def test_every_weight_is_finite_at_both_ends_of_every_path(name: str) -> None:
    """Where nothing but noise is left, t = 1e-4, 1 - 1e-4, and exactly clean where the head is defined there."""
    objective = objective_called(name)
    places = training_range(objective)
    if name != "epsilon":
        places = torch.cat([places, torch.tensor([math.inf], dtype=torch.float64)])
    if objective.path.log_sigma_range[0] < -9:
        places = torch.cat([torch.tensor([-math.inf], dtype=torch.float64), places])
    levels = objective.path.at(places)
    for weight in WEIGHTS:
        if not is_defined(weight, name):
            continue
        weights_B = head_weights(weight_called(weight, problem(name)), objective, levels)
        assert weights_B.dtype == torch.float32
        assert weights_B.shape == places.shape
        assert weights_B.isfinite().all(), weight
        assert (weights_B >= 0).all(), weight


LIMITS = {
    "none": (1, 1),
    "min_snr": (0, 0),
    "min_snr_plus_one": (1, 0),
    "soft_min_snr": (0, 0),
    "debiased": (0, 0),
    "p2": (0, 0),
    "snr_trunc": (1, 1),
    "edm": (4, 1),
    "cosmap": (2 / math.pi, 2 / math.pi),
}
"""Weight on the error of v, or of u, where SNR goes to 0 and to infinity."""


@pytest.mark.parametrize(("name", "scale"), [("edm_zt", 1.0), ("flow_raw", 1.0), ("flow_vp", 1.0), ("edm_half", 0.25)])
def test_limits_of_weights_on_a_velocity(name: str, scale: float) -> None:
    """At the ends of what is trained, SNR 1e8 and 1e-8. EDM's weight is W / (SNR + 1 / sigma_data^2)."""
    objective = objective_called(name)
    ends = objective.path.at(torch.tensor(objective.path.log_sigma_range, dtype=torch.float64))
    for weight, (noise, clean) in LIMITS.items():
        at_clean, at_noise = head_weights(weight_called(weight, problem(name)), objective, ends).tolist()
        assert at_noise == pytest.approx(noise if weight == "none" else scale * noise, abs=1e-3), weight
        assert at_clean == pytest.approx(clean, abs=1e-3), weight


def test_plus_one_is_the_formula_of_the_literature() -> None:
    weights_T = table_weights(MinSNR(5.0, "plus_one"), VelocityHead(), True).double()
    alphas_bar_T = TimestepTable(True).alphas_bar_T
    snr_T = alphas_bar_T / (1 - alphas_bar_T)
    assert torch.allclose(weights_T, (snr_T + 1).clamp(max=5.0) / (snr_T + 1), atol=1e-6)


def test_what_is_not_defined_is_refused() -> None:
    a_B, b_B = torch.tensor([0.6]), torch.tensor([0.8])
    with pytest.raises(ValueError, match=r"plus_one is not defined for epsilon"):
        MinSNR(5.0, "plus_one").weight(EpsilonHead(), a_B, b_B)
    for head in (CleanHead(), FlowHead(), FlowVelocityHead(), VelocityHead(0.5)):
        with pytest.raises(ValueError, match=r"epsilon and v_prediction only"):
            DebiasedKohya().weight(head, a_B, b_B)


# --- SNR 0 -----------------------------------------------------------------------------------------------------------


def test_each_policy_at_and_near_snr_zero() -> None:
    at_end = {policy: table_weights(MinSNR(5.0, policy, 0.01), VelocityHead(), True) for policy in POLICIES}
    assert float(at_end["official"][999]) == 0.0
    assert float(at_end["official_patched"][999]) == 1.0
    assert torch.equal(at_end["official_patched"][:999], at_end["official"][:999])
    assert float(at_end["plus_one"][999]) == 1.0
    assert float(at_end["plus_one"][998]) == pytest.approx(1.0, abs=1e-6), "smooth"
    assert float(at_end["floor"].min()) == pytest.approx(0.01)
    above = at_end["official"] > 0.01
    assert torch.equal(at_end["floor"][above], at_end["official"][above])


def gradient_of_pure_noise(name: str, weight: str) -> float:
    """Of one parameter that scales the input, from a batch in which nothing but noise is left."""
    objective = objective_called(name)
    levels = objective.path.at(torch.tensor([math.inf, math.inf], dtype=torch.float64))
    x0, eps = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor(0.5, requires_grad=True)
    errors_B = objective.errors(theta * objective.add_noise(x0, eps, levels), x0, eps, levels)
    loss = (errors_B * head_weights(weight_called(weight, problem(name)), objective, levels)).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    return float(gradient)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("epsilon", "v", "x0")])
def test_gradient_from_a_batch_of_pure_noise(name: str) -> None:
    """A weight that vanishes with SNR switches zero terminal SNR off; all others must move the network there."""
    for weight in WEIGHTS:
        if is_defined(weight, name):
            gradient = gradient_of_pure_noise(name, weight)
            assert math.isfinite(gradient)
            assert (gradient != 0) is (weight not in VANISHES_WITH_SNR), weight


@pytest.mark.parametrize("name", ["flow_raw", "flow_vp_zt", "edm_zt", "edm_half_c_noise"])
def test_near_pure_noise_the_same_weights_vanish(name: str) -> None:
    """Flow and EDM train down to SNR 1e-8. Patching SNR exactly 0 has no effect there, and is refused beforehand."""
    objective = objective_called(name)
    end = objective.path.at(torch.tensor(objective.path.log_sigma_range[1:], dtype=torch.float64))
    for weight in WEIGHTS:
        if is_defined(weight, name):
            value = float(head_weights(weight_called(weight, problem(name)), objective, end))
            if weight in (*VANISHES_WITH_SNR, "min_snr_patched"):
                assert value < 1e-3, weight
            else:
                assert value > 0.0099, weight


# --- normalise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
def test_a_normalised_weight_has_mean_one_over_what_is_drawn(density: str) -> None:
    """By a Monte Carlo that is stratified, through the objective's own draw. Ratios between levels are untouched."""
    count = 20_000
    jitter = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms = (torch.arange(count, dtype=torch.float64) + jitter) / count
    for name in ("epsilon", "v_zt", "x0", "flow_raw", "flow_vp", "edm_half"):
        for weight in WEIGHTS:
            # Across an empty bar the sigmoid's 1 / p has no meaning; its jump is one draw's in ten thousand.
            if not is_defined(weight, name) or (weight, density) == ("sigmoid", "histogram"):
                continue
            of = problem(name, density_called(density))
            plain, normalised = weight_called(weight, of), weight_called(weight, of, normalise=True)
            drawn = levels_of(objective_called(name, of.density, normalised), uniforms)
            mean = float(drawn.weight_B.double().mean())
            assert mean == pytest.approx(1.0, rel=5e-3), (name, weight)
            plain_B = head_weights(plain, objective_called(name), drawn.levels)
            assert torch.allclose(drawn.weight_B / drawn.weight_B[count // 2], plain_B / plain_B[count // 2], rtol=1e-5)


@pytest.mark.parametrize("name", ["v_zt", "flow_raw", "edm_half"])
def test_a_resolution_shift_is_part_of_what_is_drawn(name: str) -> None:
    """SD3's shift 3: both the mean and the sigmoid's density are those of the shifted levels."""
    of = replace(problem(name, LogNormal(0.0, 1.0)), log_shift=math.log(3.0))
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.4) / 20_000
    for weight in ("min_snr_plus_one", "sigmoid"):
        shifted = weight_called(weight, of, normalise=True)
        objective = replace(objective_called(name, of.density, shifted), shift=FixedShift(3.0))
        assert float(levels_of(objective, uniforms).weight_B.double().mean()) == pytest.approx(1.0, rel=1e-3)
        inside = objective.path.at(torch.linspace(-2, 2, 9, dtype=torch.float64))
        moved = weight_called(weight, problem(name, LogNormal(math.log(3.0), 1.0)), normalise=True)
        same_B = head_weights(moved, objective, inside)
        assert torch.allclose(head_weights(shifted, objective, inside), same_B, rtol=1e-4)


def test_the_mean_over_sdxls_table_is_exact(oracles: dict[str, Any]) -> None:
    of = problem("v")
    ratio = table_weights(weight_called("min_snr", of), of.head, False) / table_weights(
        weight_called("min_snr", of, normalise=True), of.head, False
    )
    assert ratio.tolist() == pytest.approx([oracles["v_weights_sum"]["plain"] / 1000] * 1000, rel=1e-6)
