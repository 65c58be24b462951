"""What each head's output means: round trips, equal losses, equal gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.densities import Uniform
from sdxl_training.objectives.heads import EpsilonHead, FlowHead, Head, VelocityHead
from sdxl_training.objectives.objective import Objective, per_sample
from sdxl_training.objectives.paths import FlowPath, Levels, NoisePath, VariancePreservingPath
from sdxl_training.objectives.weights import LossWeight, MinSNR, NoWeight, TerminalPolicy

TIMESTEPS = torch.tensor([0, 50, 146, 147, 500, 900, 998])


@dataclass(frozen=True)
class PlainCleanHead:
    """Predicts x0 itself: its loss is the x0-space loss all others are compared with."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return output, (x - a * output) / b

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return b2_weight / b.square()


def objective_with(path: NoisePath, head: Head, loss_weight: LossWeight | None = None) -> Objective:
    return Objective("test", path, head, Uniform(), loss_weight or NoWeight())


def matched_flow_levels(levels: Levels) -> Levels:
    """The straight path's levels of equal SNR: t = b / (a + b)."""
    return FlowPath().at_times(levels.b_B.double() / (levels.a_B.double() + levels.b_B.double()))


def output_that_means(head: Head, clean: Tensor, x: Tensor, levels: Levels) -> Tensor:
    """The output by which `head` says `clean` at input x."""
    a, b = per_sample(levels.a_B), per_sample(levels.b_B)
    return head.target(clean, (x - a * clean) / b, a, b)


@given(
    x0=st.floats(-5, 5),
    eps=st.floats(-5, 5),
    angle=st.floats(0, 1.5),
    time=st.floats(0, 1),
)
def test_target_determines_clean_and_noise(x0: float, eps: float, angle: float, time: float) -> None:
    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    vp = (number(angle).cos(), number(angle).sin())
    straight = (number(1 - time), number(time))
    for head, (a, b) in ((EpsilonHead(), vp), (VelocityHead(), vp), (FlowHead(), straight)):
        x = a * x0 + b * eps
        clean, noise = head.clean_and_noise(head.target(number(x0), number(eps), a, b), x, a, b)
        assert float(clean) == pytest.approx(x0, abs=1e-12)
        assert float(noise) == pytest.approx(eps, abs=1e-12)


def test_velocity_target_is_minus_clean_where_nothing_is_left_of_it() -> None:
    x0, eps = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(VelocityHead().target(x0, eps, torch.tensor(0.0), torch.tensor(1.0)), -x0)


def test_targets_have_the_signs_of_the_literature() -> None:
    x0, eps = torch.tensor(2.0), torch.tensor(3.0)
    assert FlowHead().target(x0, eps, torch.tensor(0.5), torch.tensor(0.5)) == 1.0, "noise minus data"
    assert VelocityHead().target(x0, eps, torch.tensor(0.8), torch.tensor(0.6)) == pytest.approx(0.8 * 3 - 0.6 * 2)


def same_prediction_losses(loss_weight: LossWeight | None = None) -> dict[str, Tensor]:
    """Each head's loss per sample when all say one and the same slightly wrong x0, at levels of equal SNR."""
    generator = torch.Generator().manual_seed(1)
    x0, eps, error = torch.randn(3, len(TIMESTEPS), 4, 4, 4, generator=generator)
    path = VariancePreservingPath(True)
    levels = path.at_timesteps(TIMESTEPS)
    flow_levels = matched_flow_levels(levels)
    losses = {}
    for name, head, at, head_path in (
        ("eps", EpsilonHead(), levels, path),
        ("v", VelocityHead(), levels, path),
        ("x0", PlainCleanHead(), levels, path),
        ("flow", FlowHead(), flow_levels, FlowPath()),
    ):
        objective = objective_with(head_path, head, loss_weight)
        x = objective.add_noise(x0.double(), eps.double(), at)
        output = output_that_means(head, x0.double() + 0.1 * error.double(), x, at)
        losses[name] = objective.loss_per_sample(output, x0.double(), eps.double(), at).double()
    return losses


def test_losses_of_one_prediction_are_related_by_the_level() -> None:
    """science: |d eps|^2 = abar |dv|^2, |d x0|^2 = (1 - abar) |dv|^2, |d x0|^2 = t^2 |du|^2."""
    losses = same_prediction_losses()
    levels = VariancePreservingPath(True).at_timesteps(TIMESTEPS)
    alpha_bar = levels.a_B.double() ** 2
    time = matched_flow_levels(levels).b_B.double()
    assert torch.allclose(losses["v"] * alpha_bar, losses["eps"], rtol=2e-4)
    assert torch.allclose(losses["v"] * (1 - alpha_bar), losses["x0"], rtol=2e-4)
    assert torch.allclose(losses["flow"] * time**2, losses["x0"], rtol=2e-4)


@pytest.mark.parametrize("terminal", ["official", "official_patched"])
def test_equal_x0_weight_is_an_equal_loss_for_every_head(terminal: TerminalPolicy) -> None:
    losses = same_prediction_losses(MinSNR(5.0, terminal))
    for head in ("eps", "v", "flow"):
        assert torch.allclose(losses[head], losses["x0"], rtol=5e-4), head


def test_equal_x0_weight_is_an_equal_gradient_for_every_head() -> None:
    """One network f(x_VP) = theta x_VP + phi for x0, read through three heads: one gradient per level."""
    generator = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(2, len(TIMESTEPS), 4, 4, 4, generator=generator).double()
    path = VariancePreservingPath(True)
    levels = path.at_timesteps(TIMESTEPS)
    x_vp = objective_with(path, VelocityHead()).add_noise(x0, eps, levels)
    gradients = {}
    for name, head, at, head_path in (
        ("eps", EpsilonHead(), levels, path),
        ("v", VelocityHead(), levels, path),
        ("flow", FlowHead(), matched_flow_levels(levels), FlowPath()),
    ):
        objective = objective_with(head_path, head, MinSNR(5.0))
        theta = torch.full((len(TIMESTEPS), 2), 0.3, dtype=torch.float64, requires_grad=True)
        clean = per_sample(theta[:, 0]) * x_vp + per_sample(theta[:, 1])
        x = objective.add_noise(x0, eps, at)
        losses = objective.loss_per_sample(output_that_means(head, clean, x, at), x0, eps, at)
        (gradients[name],) = torch.autograd.grad(losses.sum(), theta)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients["v"], rtol=2e-3, atol=1e-6), name


def test_coefficients_belong_to_samples_not_to_columns() -> None:
    """With B = H = W a wrong broadcast of [B] against [B, C, H, W] would pass silently."""
    objective = objective_with(FlowPath(), FlowHead(), MinSNR(5.0))
    levels = FlowPath().at_times(torch.tensor([0.1, 0.4, 0.7, 0.9]))
    x0, eps, output = torch.randn(3, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    together = objective.loss_per_sample(output, x0, eps, levels)
    for i in range(4):
        alone = Levels(levels.a_B[i : i + 1], levels.b_B[i : i + 1], levels.label_B[i : i + 1])
        cut = slice(i, i + 1)
        assert torch.allclose(objective.loss_per_sample(output[cut], x0[cut], eps[cut], alone), together[cut])
        assert torch.allclose(objective.add_noise(x0[cut], eps[cut], alone), objective.add_noise(x0, eps, levels)[cut])
    assert together.shape == (4,)


def test_half_precision_output_is_compared_in_float32() -> None:
    objective = objective_with(FlowPath(), FlowHead())
    levels = FlowPath().at_times(torch.tensor([0.5]))
    x0 = torch.full((1, 4, 8, 8), 0.001)
    losses = objective.loss_per_sample(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), x0, torch.zeros_like(x0), levels)
    assert losses.dtype == torch.float32
    assert float(losses) == pytest.approx(1e-6, rel=1e-5)
