"""Min-SNR against golden tables, its limits at both ends, and what each terminal policy does at SNR 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.objectives.densities import Uniform
from sdxl_training.objectives.heads import EpsilonHead, FlowHead, Head, VelocityHead
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import FlowPath, VariancePreservingPath
from sdxl_training.objectives.weights import MinSNR, NoWeight, TerminalPolicy

POLICIES: tuple[TerminalPolicy, ...] = ("official", "official_patched", "plus_one", "floor")
HEADS: dict[str, Head] = {"eps": EpsilonHead(), "v": VelocityHead()}


def table_weights(loss_weight: MinSNR, head: Head, zero_terminal_snr: bool) -> torch.Tensor:
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(torch.arange(1000))
    return loss_weight.weight(head, levels.a_B, levels.b_B)


@pytest.mark.parametrize("head", ["eps", "v"])
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


@pytest.mark.parametrize(("zero_terminal_snr", "key"), [(False, "plain"), (True, "zt")])
def test_sum_of_weights(oracles: dict[str, Any], zero_terminal_snr: bool, key: str) -> None:
    weights_T = table_weights(MinSNR(5.0), VelocityHead(), zero_terminal_snr)
    assert float(weights_T.double().sum()) == pytest.approx(oracles["v_weights_sum"][key], abs=1e-3)


def test_clip_is_active_up_to_the_known_timesteps() -> None:
    """SNR passes 5 between 146 and 147, after the rescale between 138 and 139."""
    for zero_terminal_snr, last in ((False, 146), (True, 138)):
        weights_T = table_weights(MinSNR(5.0), EpsilonHead(), zero_terminal_snr)[:999]
        assert int((weights_T < 1 - 1e-6).sum()) == last + 1


@pytest.mark.parametrize("head", ["eps", "v", "flow"])
def test_no_weight_is_the_known_weight_in_x0_space(oracles: dict[str, Any], head: str) -> None:
    """b^2 W read backwards: handing each head the published W must give it weight 1."""
    name = {"flow": "rf"}.get(head, head)
    path = VariancePreservingPath(False)
    for timestep, golden in oracles["x0_space_weights"][name].items():
        levels = path.at_timesteps(torch.tensor([int(timestep)]))
        chosen: Head = {**HEADS, "flow": FlowHead()}[head]
        a, b = levels.a_B.double(), levels.b_B.double()
        if head == "flow":
            a, b = a / (a + b), b / (a + b)
        assert float(chosen.native_weight(b**2 * golden, a, b)) == pytest.approx(1.0, rel=2e-5)
    ones = NoWeight().weight(VelocityHead(), torch.rand(7), torch.rand(7))
    assert torch.equal(ones, torch.ones(7))


@given(time=st.floats(1e-4, 1 - 1e-4), gamma=st.floats(0.5, 20))
def test_min_snr_on_the_straight_path(time: float, gamma: float) -> None:
    levels = FlowPath().at_times(torch.tensor([time], dtype=torch.float64))
    weight = float(MinSNR(gamma).weight(FlowHead(), levels.a_B, levels.b_B))
    snr = ((1 - time) / time) ** 2
    assert weight == pytest.approx(min(snr, gamma) * time**2, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_are_finite_at_both_ends_of_every_path(policy: TerminalPolicy) -> None:
    loss_weight = MinSNR(5.0, policy, 0.01)
    assert table_weights(loss_weight, VelocityHead(), True).isfinite().all()
    ends = FlowPath().at_times(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert loss_weight.weight(FlowHead(), ends.a_B, ends.b_B).isfinite().all()
    if policy != "plus_one":
        assert table_weights(loss_weight, EpsilonHead(), False).isfinite().all()


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


def test_plus_one_is_the_formula_of_the_literature() -> None:
    weights_T = table_weights(MinSNR(5.0, "plus_one"), VelocityHead(), True).double()
    snr_T = VariancePreservingPath(True).alphas_bar_T / (1 - VariancePreservingPath(True).alphas_bar_T)
    assert torch.allclose(weights_T, (snr_T + 1).clamp(max=5.0) / (snr_T + 1), atol=1e-6)


def test_plus_one_is_refused_for_epsilon() -> None:
    with pytest.raises(ValueError, match=r"plus_one is not defined for epsilon"):
        MinSNR(5.0, "plus_one").weight(EpsilonHead(), torch.tensor([0.6]), torch.tensor([0.8]))


@pytest.mark.parametrize(
    ("policy", "moves"), [("official", False), ("official_patched", True), ("plus_one", True), ("floor", True)]
)
def test_gradient_from_a_batch_of_pure_noise(policy: TerminalPolicy, moves: bool) -> None:
    """Plain Min-SNR switches zero terminal SNR off; a policy that is meant to keep it must move the weights."""
    path = VariancePreservingPath(True)
    objective = Objective("v", path, VelocityHead(), Uniform(), MinSNR(5.0, policy, 0.01))
    levels = path.at_timesteps(torch.tensor([999, 999]))
    x0, eps = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor(0.5, requires_grad=True)
    objective.loss_per_sample(theta * objective.add_noise(x0, eps, levels), x0, eps, levels).mean().backward()
    assert theta.grad is not None
    assert theta.grad.isfinite()
    assert bool(theta.grad != 0) is moves
