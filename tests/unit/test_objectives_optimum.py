"""Objectives and sampler against data whose best network is known in closed form.

For data N(m, s^2) and x = a x0 + b eps, with D = a^2 s^2 + b^2: E[x0 | x] = m + a s^2 / D (x - a m); the best loss is
a^2 s^2 / D for eps, s^2 / D for v and for flow. For a finite data set E[x0 | x] is a softmax over its points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.densities import Uniform
from sdxl_training.objectives.heads import EpsilonHead, FlowHead, VelocityHead
from sdxl_training.objectives.objective import Objective, make_objective, per_sample
from sdxl_training.objectives.paths import FlowPath, Levels, VariancePreservingPath
from sdxl_training.objectives.sampling import draw, guide
from sdxl_training.objectives.weights import NoWeight

MEAN, STD = 0.7, 0.4
OBJECTIVES = {
    "epsilon": make_objective("epsilon", {}, Uniform(), NoWeight()),
    "v_prediction": make_objective("v_prediction", {"zero_terminal_snr": False}, Uniform(), NoWeight()),
    "v_prediction_zt": make_objective("v_prediction", {"zero_terminal_snr": True}, Uniform(), NoWeight()),
    "flow_matching": make_objective("flow_matching", {}, Uniform(), NoWeight()),
}
Clean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, a, b) -> E[x0 | x]."""

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def gaussian_clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)


def finite_clean(points: Tensor) -> Clean:
    def clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        distances_BN = (x.flatten(1)[:, None] - a * points.flatten(1)).square().sum(-1)
        return (-distances_BN / (2 * b**2)).softmax(-1).matmul(points.flatten(1)).view_as(x)

    return clean


def output_for(objective: Objective, clean: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The head's output that says `clean` at x, also where a or b is 0."""
    if isinstance(objective.head, FlowHead):
        return (x - clean) / b
    if isinstance(objective.head, EpsilonHead):
        return (x - a * clean) / b
    return (a * x - clean) / b  # v, valid at a = 0


def network(objective: Objective, clean: Clean) -> Callable[[Tensor, Tensor], Tensor]:
    """A network that knows the data and is told the noise level by its label alone, as the U-Net is."""

    def predict(x: Tensor, label_B: Tensor) -> Tensor:
        path = objective.path
        if isinstance(path, FlowPath):
            levels = path.at_times(label_B.double() / 1000)
        else:
            levels = path.at_timesteps(label_B.long())
        a, b = levels.a_B[0].double(), levels.b_B[0].double()
        return output_for(objective, clean(x, a, b), x, a, b)

    return predict


def levels_at(objective: Objective, position: float) -> Levels:
    return objective.path.levels(torch.tensor([position], dtype=torch.float64))


@every_objective
@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.9, 0.9999])
def test_best_network_attains_the_known_loss_and_others_do_worse(name: str, position: float) -> None:
    objective = OBJECTIVES[name]
    levels = levels_at(objective, position)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1, 4, 128, 128, dtype=torch.float64, generator=generator)
    x0 = MEAN + STD * torch.randn(1, 4, 128, 128, dtype=torch.float64, generator=generator)
    x = objective.add_noise(x0, eps, levels)
    a, b = levels.a_B.double(), levels.b_B.double()
    variance = a**2 * STD**2 + b**2
    known = STD**2 / variance * (a**2 if isinstance(objective.head, EpsilonHead) else 1)
    best = output_for(objective, gaussian_clean(x, a, b), x, a, b)

    def loss(output: Tensor) -> float:
        return float(objective.loss_per_sample(output, x0, eps, levels))

    assert loss(best) == pytest.approx(float(known), rel=0.03)
    for step in (-0.1, 0.1):
        assert loss(best + step) - loss(best) == pytest.approx(step**2, rel=0.25), "a constant error adds its square"
        assert loss(best + step * (x - a * MEAN)) > loss(best)


def test_pure_noise_teaches_v_the_mean_of_the_data() -> None:
    objective = OBJECTIVES["v_prediction_zt"]
    levels = levels_at(objective, 0.9999)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    best = output_for(objective, gaussian_clean(x, levels.a_B, levels.b_B), x, levels.a_B, levels.b_B)
    assert torch.allclose(best, torch.full_like(best, -MEAN))


@every_objective
@pytest.mark.parametrize("position", [0.2, 0.7])
def test_training_reaches_the_same_denoiser_under_every_objective(name: str, position: float) -> None:
    """A network linear in x, fitted with the objective's own loss, ends at E[x0 | x]."""
    objective = OBJECTIVES[name]
    level = levels_at(objective, position)
    count = 64
    levels = Levels(*(value.expand(count) for value in (level.a_B, level.b_B, level.label_B)))
    generator = torch.Generator().manual_seed(3)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=30, line_search_fn="strong_wolfe")
    x0 = MEAN + STD * torch.randn(count, 4, 32, 32, dtype=torch.float64, generator=generator)
    eps = torch.randn(count, 4, 32, 32, dtype=torch.float64, generator=generator)
    x = objective.add_noise(x0, eps, levels)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective.loss_per_sample(theta[0] * x + theta[1], x0, eps, levels).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    a, b = per_sample(levels.a_B), per_sample(levels.b_B)
    clean, _ = objective.head.clean_and_noise(theta[0] * x + theta[1], x, a, b)
    assert torch.allclose(clean, gaussian_clean(x, a, b), atol=0.02)


def exact_end(objective: Objective, noise: Tensor) -> Tensor:
    """The exact flow carries (x - a m) / sqrt(a^2 s^2 + b^2) unchanged from the first level to clean data."""
    first = objective.path.sampling_levels(1)
    a, b = first.a_B.double(), first.b_B.double()
    return MEAN + STD * (noise - a * MEAN) / (a**2 * STD**2 + b**2).sqrt()


@every_objective
def test_samples_converge_to_the_exact_flow_with_first_order(name: str) -> None:
    objective = OBJECTIVES[name]
    noise = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    predict = network(objective, gaussian_clean)
    errors = [
        float((draw(predict, objective, noise, steps) - exact_end(objective, noise)).abs().max())
        for steps in (100, 200, 400)
    ]
    assert errors[0] < 0.07
    for coarse, fine in itertools.pairwise(errors):
        assert 1.75 < coarse / fine < 2.25, errors


@every_objective
def test_samples_land_on_a_finite_data_set(name: str) -> None:
    objective = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=generator)
    noise = torch.randn(24, 4, 2, 2, dtype=torch.float64, generator=generator)
    samples = draw(network(objective, finite_clean(points)), objective, noise, 100)
    distances_BN = (samples.flatten(1)[:, None] - points.flatten(1)).abs().amax(-1)
    nearest = distances_BN.min(-1)
    assert float(nearest.values.max()) < 1e-3
    assert len(nearest.indices.unique()) == 3, "every point is drawn"


@dataclass(frozen=True)
class MatchedPath:
    """The straight path sampled at the noise levels of a variance-preserving grid."""

    vp: VariancePreservingPath

    def sampling_levels(self, steps: int) -> Levels:
        levels = self.vp.sampling_levels(steps)
        scale = levels.a_B.double() + levels.b_B.double()
        return Levels((levels.a_B / scale).float(), (levels.b_B / scale).float(), levels.label_B)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_ddim_and_flow_euler_are_one_step_on_matched_grids(zero_terminal_snr: bool) -> None:
    """One denoiser, no linearity: only the path differs."""
    vp = VariancePreservingPath(zero_terminal_snr)
    ddim = Objective("v", vp, VelocityHead(), Uniform(), NoWeight())
    flow = Objective("flow", MatchedPath(vp), FlowHead(), Uniform(), NoWeight())  # type: ignore[arg-type]
    noise = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def clean(x_vp: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(2 * x_vp.roll(1, -1)) * (1 + label / 1000)

    def predict_v(x: Tensor, label_B: Tensor) -> Tensor:
        levels = vp.at_timesteps(label_B[:1].long())
        return output_for(ddim, clean(x, label_B[0]), x, levels.a_B.double(), levels.b_B.double())

    def predict_flow(x: Tensor, label_B: Tensor) -> Tensor:
        levels = vp.at_timesteps(label_B[:1].long())
        scale = levels.a_B.double() + levels.b_B.double()
        return (x - clean(x * scale, label_B[0])) / (levels.b_B / scale)

    first = vp.sampling_levels(1)
    start = noise / (first.a_B.double() + first.b_B.double())
    by_ddim, by_flow = draw(predict_v, ddim, noise, 20), draw(predict_flow, flow, start, 20)
    assert float(by_ddim.std()) > 0.1
    assert torch.allclose(by_ddim, by_flow, atol=2e-6)


@every_objective
def test_the_network_is_called_once_a_step_with_float32_labels(name: str) -> None:
    calls: list[Tensor] = []

    def predict(x: Tensor, label_B: Tensor) -> Tensor:
        calls.append(label_B)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    result = draw(predict, OBJECTIVES[name], torch.randn(3, 4, 2, 2), 7)
    assert result.dtype == torch.float32
    assert len(calls) == 7
    assert all(label_B.shape == (3,) and label_B.dtype == torch.float32 for label_B in calls)
    expected = OBJECTIVES[name].path.sampling_levels(7).label_B
    assert [float(label_B[0]) for label_B in calls] == expected.tolist()


def test_guidance_formula() -> None:
    unconditional, conditional = torch.randn(2, 5)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional)
    expected = 3.5 * conditional - 2.5 * unconditional
    assert torch.allclose(guide(unconditional, conditional, 3.5), expected, atol=1e-6)
