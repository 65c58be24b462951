"""What each head's output means: round trips, Karras' preconditioning, flow velocities, equal losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.heads import CleanHead, EpsilonHead, FlowHead, FlowVelocityHead, Head, VelocityHead
from sdxl_training.objectives.objective import per_sample
from sdxl_training.objectives.paths import Levels
from sdxl_training.objectives.weights import LossWeight, MinSNR
from tests.objective_table import (
    OBJECTIVES,
    WEIGHTS,
    X0_WEIGHT,
    head_weights,
    is_defined,
    objective_called,
    problem,
    weight_called,
)

every_objective = pytest.mark.parametrize("name", OBJECTIVES)
SIGMAS = torch.tensor([0.0292, 0.1, 0.4472, 0.45, 1.0, 3.0, 14.6], dtype=torch.float64)
"""Within SDXL's table; SNR passes 5 at 0.44721."""
NATIVE_X0_WEIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda sigma: sigma**-2,
    "v": lambda sigma: sigma**-2 + 1,
    "x0": lambda sigma: sigma**0,
    "flow": lambda sigma: (1 + 1 / sigma) ** 2,
    "edm": lambda sigma: sigma**-2 + 1,
    "edm_half": lambda sigma: sigma**-2 + 4,
}
"""The weight on |error of x0|^2 of each objective's own loss (Karras et al. 2022, table 1, for edm)."""


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def native_x0_weight(name: str, sigma: Tensor) -> Tensor:
    kind = name.removesuffix("_c_noise").removesuffix("_zt").removesuffix("_raw").removesuffix("_vp")
    return NATIVE_X0_WEIGHT[kind](sigma)


def output_that_means(head: Head, clean: Tensor, x: Tensor, levels: Levels) -> Tensor:
    """The output by which `head` says `clean` at input x."""
    a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
    return head.target(clean, (x - a * clean) / b, a, b)


# --- round trips and signs -------------------------------------------------------------------------------------------


@given(
    x0=st.floats(-5, 5),
    eps=st.floats(-5, 5),
    angle=st.floats(0, 1.5),
    time=st.floats(0, 1),
    sigma_data=st.floats(0.2, 3),
)
def test_target_determines_clean_and_noise(x0: float, eps: float, angle: float, time: float, sigma_data: float) -> None:
    """Also where a or b is 0, for heads that are defined there."""
    preserving = (number(angle).cos(), number(angle).sin())
    straight = (number(1 - time), number(time))
    scaled = (preserving[0] / sigma_data, preserving[1])
    noisy = (number(angle).sin(), number(angle).cos())  # b is away from 0
    for head, (a, b) in (
        (EpsilonHead(), preserving),
        (CleanHead(), noisy),
        (VelocityHead(), preserving),
        (VelocityHead(), noisy),
        (FlowVelocityHead(), noisy),
        (VelocityHead(sigma_data), scaled),
        (FlowHead(), straight),
    ):
        x = a * x0 + b * eps
        clean, noise = head.clean_and_noise(head.target(number(x0), number(eps), a, b), x, a, b)
        assert float(clean) == pytest.approx(x0, abs=1e-12), head
        assert float(noise) == pytest.approx(eps, abs=1e-12), head


@every_objective
def test_round_trip_at_the_levels_that_are_trained(name: str) -> None:
    """The same with the float32 levels of the objective's own path."""
    objective = objective_called(name)
    levels = objective.path.at(SIGMAS.log())
    a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
    x0, eps = torch.randn(2, len(SIGMAS), 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x = objective.add_noise(x0, eps, levels)
    clean, noise = objective.head.clean_and_noise(objective.head.target(x0, eps, a, b), x, a, b)
    assert torch.allclose(clean, x0, atol=5e-6)
    assert torch.allclose(noise, eps, atol=5e-6)


def test_velocity_target_is_minus_clean_where_nothing_is_left_of_it() -> None:
    x0, eps = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(VelocityHead().target(x0, eps, torch.tensor(0.0), torch.tensor(1.0)), -x0)
    assert torch.equal(VelocityHead(0.5).target(x0, eps, torch.tensor(0.0), torch.tensor(1.0)), -x0 / 0.5)


def test_targets_have_the_signs_of_the_literature() -> None:
    x0, eps = torch.tensor(2.0), torch.tensor(3.0)
    assert FlowHead().target(x0, eps, torch.tensor(0.5), torch.tensor(0.5)) == 1.0, "noise minus data"
    assert VelocityHead().target(x0, eps, torch.tensor(0.8), torch.tensor(0.6)) == pytest.approx(0.8 * 3 - 0.6 * 2)


# --- EDM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sigma_data"), [("edm", 1.0), ("edm_half", 0.5), ("edm_half_c_noise", 0.5)])
def test_edm_is_karras_preconditioning_with_the_network_negated(name: str, sigma_data: float) -> None:
    """Karras et al. 2022, table 1, written out. Our output is -F: at sigma_data 1 it must be v itself, not -v, so that
    a v-prediction checkpoint is already the network (k-diffusion and sgm turn the sign of c_out for that)."""
    objective = objective_called(name)
    sigma = torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)
    levels = objective.path.at(sigma.log())
    x0, eps, output = torch.randn(3, len(sigma), 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    sigma_B = per_sample(sigma)
    c_skip = sigma_data**2 / (sigma_B**2 + sigma_data**2)
    c_out = sigma_B * sigma_data / (sigma_B**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_B**2 + sigma_data**2).sqrt()
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    x_exploding = x0 + sigma_B * eps

    x = objective.add_noise(x0, eps, levels)
    assert torch.allclose(x, c_in * x_exploding, rtol=1e-5, atol=1e-6)
    denoised = c_skip * x_exploding + c_out * -output
    a, b = per_sample(levels.a_B), per_sample(levels.b_B)
    assert torch.allclose(objective.head.clean_and_noise(output, x, a, b)[0], denoised, rtol=1e-5, atol=2e-5)
    network_target = (x0 - c_skip * x_exploding) / c_out
    assert torch.allclose(objective.head.target(x0, eps, a, b), -network_target, rtol=1e-5, atol=1e-5)

    assert torch.allclose(weight * c_out.flatten() ** 2, torch.ones(len(sigma)).double()), "lambda c_out^2 = 1"
    loss_B = objective.errors(output, x0, eps, levels).double()
    expected_B = weight * (denoised - x0).square().mean(dim=(1, 2, 3))
    assert torch.allclose(loss_B, expected_B, rtol=1e-4), "the loss is lambda |D - x0|^2"


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_input_and_target_have_unit_variance(sigma_data: float) -> None:
    name = "edm_half" if sigma_data == 0.5 else "edm"
    path = objective_called(name).path
    if sigma_data == 2.0:
        path = type(path)(2.0, "timestep", False)  # type: ignore[call-arg]
    levels = path.at(torch.linspace(-9, 9, 19, dtype=torch.float64))
    a, b, head = levels.a_B.double(), levels.b_B.double(), VelocityHead(sigma_data)
    one, none = torch.ones_like(a), torch.zeros_like(a)
    input_variance = (sigma_data * a) ** 2 + b**2
    target_variance = (sigma_data * head.target(one, none, a, b)) ** 2 + head.target(none, one, a, b) ** 2
    assert torch.allclose(input_variance, one, rtol=1e-6)
    assert torch.allclose(target_variance, one, rtol=1e-6)


@pytest.mark.parametrize(("edm", "v"), [("edm", "v"), ("edm_zt", "v_zt")])
def test_edm_at_sigma_data_one_is_v_prediction(edm: str, v: str) -> None:
    """One input, one label, one target, one loss: only the default density differs."""
    edm_objective, v_objective = objective_called(edm), objective_called(v)
    ours, theirs = edm_objective.path.at(SIGMAS.log()), v_objective.path.at(SIGMAS.log())
    x0, eps, output = torch.randn(3, len(SIGMAS), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.label_B, theirs.label_B)
    assert torch.equal(edm_objective.add_noise(x0, eps, ours), v_objective.add_noise(x0, eps, theirs))
    assert torch.equal(edm_objective.errors(output, x0, eps, ours), v_objective.errors(output, x0, eps, theirs))
    assert torch.allclose(head_weights(edm_objective.loss_weight, edm_objective, ours), torch.ones(len(SIGMAS)))


# --- flow ------------------------------------------------------------------------------------------------------------


@given(time=st.floats(1e-3, 1 - 1e-3))
def test_preconditioned_flow_has_the_velocity_of_the_raw_one(time: float) -> None:
    """u = (a + b) F + (b - a) x_VP, with coefficients that no level makes singular."""
    log_sigma_B = torch.logit(torch.tensor([time], dtype=torch.float64))
    objective = objective_called("flow_vp_zt")
    levels = objective.path.at(log_sigma_B)
    a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
    x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x_preserving = objective.add_noise(x0, eps, levels)
    x_straight = (1 - time) * x0 + time * eps
    assert torch.allclose(x_preserving, x_straight / math.sqrt((1 - time) ** 2 + time**2), atol=1e-6)
    velocity = (a + b) * objective.head.target(x0, eps, a, b) + (b - a) * x_preserving
    assert torch.allclose(velocity, eps - x0, atol=2e-6)
    assert 1 - 1e-6 <= float(a + b) <= math.sqrt(2) + 1e-6
    assert -1 <= float(b - a) <= 1


@pytest.mark.parametrize("name", ["flow_vp", "flow_vp_zt"])
def test_preconditioned_flow_loss_is_the_raw_flow_loss(name: str) -> None:
    """Of one denoiser, over all of flow time. It is v-prediction's loss times (a + b)^2, between 1 and 2."""
    time_B = torch.tensor([1e-3, 0.1, 0.5, 0.9, 1 - 1e-3], dtype=torch.float64)
    x0, eps, error = torch.randn(3, 5, 4, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    losses = {}
    for row in ("flow_raw", name):
        objective = objective_called(row)
        levels = objective.path.at(torch.logit(time_B))
        a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
        x = objective.add_noise(x0, eps, levels)
        truth = objective.head.target(x0, eps, a, b)
        step = output_that_means(objective.head, x0 + 0.1 * per_sample(time_B) * error, x, levels) - truth
        errors_B = objective.errors(truth + step, x0, eps, levels)
        losses[row] = (errors_B * head_weights(objective.loss_weight, objective, levels)).double()
    expected_B = 0.01 * error.square().mean(dim=(1, 2, 3))
    assert torch.allclose(losses["flow_raw"], expected_B, rtol=1e-3), "|error of x0| / t"
    assert torch.allclose(losses[name], losses["flow_raw"], rtol=1e-3)
    factor_B = head_weights(objective_called(name).loss_weight, objective_called(name), levels).double()
    assert torch.allclose(factor_B, 1 / ((1 - time_B) ** 2 + time_B**2), rtol=1e-5)


# --- losses and gradients --------------------------------------------------------------------------------------------


def loss_of_one_denoiser(name: str, loss_weight: LossWeight | None, theta: Tensor) -> Tensor:
    """Each level's loss when the network says x0 = theta_0 x_VP + theta_1, in whichever way its head says so."""
    generator = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(2, len(SIGMAS), 4, 4, 4, generator=generator).double()
    sigma_B = per_sample(SIGMAS)
    clean = per_sample(theta[:, 0]) * (x0 + sigma_B * eps) / (1 + sigma_B**2).sqrt() + per_sample(theta[:, 1])
    if name == "denoiser":
        losses_B: Tensor = (clean - x0).square().mean(dim=(1, 2, 3))
        return losses_B
    objective = objective_called(name, loss_weight=loss_weight)
    levels = objective.path.at(SIGMAS.log())
    output = output_that_means(objective.head, clean, objective.add_noise(x0, eps, levels), levels)
    errors_B = objective.errors(output, x0, eps, levels).double()
    return errors_B * head_weights(objective.loss_weight, objective, levels).double()


def losses_and_gradient(name: str, loss_weight: LossWeight | None = None) -> tuple[Tensor, Tensor]:
    theta = torch.full((len(SIGMAS), 2), 0.3, dtype=torch.float64, requires_grad=True)
    losses_B = loss_of_one_denoiser(name, loss_weight, theta)
    (gradient_B2,) = torch.autograd.grad(losses_B.sum(), theta)
    return losses_B.detach(), gradient_B2


@every_objective
def test_own_loss_is_the_denoisers_loss_times_the_known_weight(name: str) -> None:
    """loss_v abar = loss_eps, loss_v (1 - abar) = loss_x0, loss_flow t^2 = loss_x0, and EDM's lambda."""
    losses_B, gradient_B2 = losses_and_gradient(name)
    denoiser_B, denoiser_gradient_B2 = losses_and_gradient("denoiser")
    weight_B = native_x0_weight(name, SIGMAS)
    assert torch.allclose(losses_B, weight_B * denoiser_B, rtol=2e-4)
    assert torch.allclose(gradient_B2, weight_B[:, None] * denoiser_gradient_B2, rtol=2e-3, atol=1e-6)


@every_objective
def test_a_weight_is_the_same_weight_for_every_head(name: str) -> None:
    """The gradient is W(SNR) times that of |error of x0|^2, whatever the network says; W is written from the papers."""
    denoiser_B, denoiser_gradient_B2 = losses_and_gradient("denoiser")
    for weight, formula in X0_WEIGHT.items():
        if not is_defined(weight, name):
            continue
        losses_B, gradient_B2 = losses_and_gradient(name, weight_called(weight, problem(name)))
        weight_B = torch.from_numpy(formula((SIGMAS**-2).numpy()))
        assert torch.allclose(losses_B, weight_B * denoiser_B, rtol=2e-4), weight
        assert torch.allclose(gradient_B2, weight_B[:, None] * denoiser_gradient_B2, rtol=2e-3, atol=1e-6), weight


def test_the_sigmoid_weight_is_the_same_for_heads_drawn_alike() -> None:
    """It depends on the density, so only objectives with one clock can be compared."""
    flows = ("flow_raw", "flow_vp", "flow_vp_zt")
    for rows in (("v", "x0", "epsilon"), ("v_zt", "x0_zt"), flows, ("edm_zt", "edm_half"), ("edm", "edm_half_c_noise")):
        reference_B, _ = losses_and_gradient(rows[0], weight_called("sigmoid", problem(rows[0])))
        for name in rows[1:]:
            losses_B, _ = losses_and_gradient(name, weight_called("sigmoid", problem(name)))
            assert torch.allclose(losses_B, reference_B, rtol=1e-3), name


def test_the_weights_left_out_are_those_that_depend_on_the_head() -> None:
    assert set(WEIGHTS) - set(X0_WEIGHT) == {"none", "sigmoid", "min_snr_patched", "min_snr_floor", "debiased_kohya"}


# --- broadcasting and precision --------------------------------------------------------------------------------------


@every_objective
def test_coefficients_belong_to_samples_not_to_columns(name: str) -> None:
    """With B = H = W a wrong broadcast of [B] against [B, C, H, W] would pass silently."""
    objective = objective_called(name, loss_weight=MinSNR(5.0))
    levels = objective.path.at(torch.tensor([-2.0, -0.5, 0.5, 2.0], dtype=torch.float64))
    x0, eps, output = torch.randn(3, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    together_B = objective.errors(output, x0, eps, levels)
    weights_B = head_weights(objective.loss_weight, objective, levels)
    noisy = objective.add_noise(x0, eps, levels)
    for i in range(4):
        cut = slice(i, i + 1)
        alone = Levels(levels.a_B[cut], levels.b_B[cut], levels.label_B[cut])
        assert torch.allclose(objective.errors(output[cut], x0[cut], eps[cut], alone), together_B[cut])
        assert torch.equal(head_weights(objective.loss_weight, objective, alone), weights_B[cut])
        assert torch.allclose(objective.add_noise(x0[cut], eps[cut], alone), noisy[cut])
    assert together_B.shape == weights_B.shape == (4,)


@every_objective
def test_half_precision_output_is_compared_in_float32(name: str) -> None:
    """The error of an output is its distance from a target that was never rounded to bf16."""
    objective = objective_called(name)
    levels = objective.path.at(torch.tensor([0.3], dtype=torch.float64))
    x0, eps = torch.full((2, 1, 4, 8, 8), 0.001)
    eps = eps * 1.5
    target = objective.head.target(x0, eps, levels.a_B, levels.b_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors_B = objective.errors(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), x0, eps, levels)
    assert errors_B.dtype == torch.float32
    assert float(errors_B) == pytest.approx(float(target.double().square().mean()), rel=1e-5)
    assert float(target.bfloat16().double().square().mean()) != pytest.approx(float(errors_B), rel=1e-5)
