"""Every objective against data whose best network is known in closed form.

For data N(m, s^2) and x = a x0 + b eps, with D = a^2 s^2 + b^2: E[x0 | x] = m + a s^2 / D (x - a m), a linear function
of x, and the best mean squared error of x0 is s^2 b^2 / D.

Data and noise here are a sample whose means, variances and correlation are exactly those of the distribution. For
functions linear in x every expectation is then exact, and no tolerance has to make room for chance.
"""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.heads import CleanHead, EpsilonHead, FlowHead
from sdxl_training.objectives.objective import Objective, per_sample
from sdxl_training.objectives.paths import Levels
from sdxl_training.objectives.weights import MinSNR
from tests.objective_table import OBJECTIVES, ON_THE_TABLE, head_weights, objective_called

MEAN, STD = 0.7, 0.4
SIGMAS = (0.03, 0.2, 0.6, 1.0, 3.0, 14.0)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_sigma = pytest.mark.parametrize("sigma", SIGMAS)


def exact_sample(levels: int = 1, mean: float = MEAN, std: float = STD) -> tuple[Tensor, Tensor]:
    """x0 and eps whose sample moments are exact, the same for each of some levels."""
    normal = torch.randn(4 * 32 * 32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white, _ = torch.linalg.qr(normal - normal.mean(0))
    white = white * math.sqrt(len(white))
    x0, eps = (white[:, i].reshape(1, 4, 32, 32).expand(levels, 4, 32, 32) for i in (0, 1))
    return mean + std * x0, eps


def levels_at(objective: Objective, *sigmas: float) -> Levels:
    return objective.path.at(torch.tensor(sigmas, dtype=torch.float64).log())


def best_clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)


def sigma_data_of(name: str) -> float:
    return 0.5 if "half" in name else 1.0


def output_for(objective: Objective, name: str, clean: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The output that says `clean` at x, from each head's definition; also where a is 0."""
    if isinstance(objective.head, FlowHead):
        return (x - clean) / b
    if isinstance(objective.head, EpsilonHead):
        return (x - a * clean) / b
    if isinstance(objective.head, CleanHead):
        return clean
    # D = c_skip x / c_in - c_out F, solved for the F that is minus Karras' own; for sigma_data 1 it is v.
    sigma_data = sigma_data_of(name)
    return (sigma_data**2 * a * x - clean) / (sigma_data * b)


def known_loss(objective: Objective, name: str, a: float, b: float) -> float:
    """The least loss of each objective, its own weight included."""
    variance = a**2 * STD**2 + b**2
    if name == "epsilon":
        return a**2 * STD**2 / variance
    if isinstance(objective.head, CleanHead):
        return STD**2 * b**2 / variance
    if name == "flow_raw":
        return STD**2 / variance
    if name.startswith("flow_vp"):  # that of the raw flow, whose D is smaller by (a + b)^2
        return STD**2 / (variance / (a + b) ** 2)
    return STD**2 / (sigma_data_of(name) ** 2 * variance)


def weighted_loss(objective: Objective, output: Tensor, x0: Tensor, eps: Tensor, levels: Levels) -> Tensor:
    weight_B = head_weights(objective.loss_weight, objective, levels).double()
    return objective.errors(output, x0, eps, levels).double() * weight_B


@every_objective
@every_sigma
def test_best_network_attains_the_known_loss_and_no_other_does_better(name: str, sigma: float) -> None:
    objective = objective_called(name)
    levels = levels_at(objective, sigma)
    x0, eps = exact_sample()
    a, b = levels.a_B.double(), levels.b_B.double()
    x = objective.add_noise(x0, eps, levels)
    best = output_for(objective, name, best_clean(x, a, b), x, a, b)
    least = float(weighted_loss(objective, best, x0, eps, levels))
    weight = float(head_weights(objective.loss_weight, objective, levels))
    assert least == pytest.approx(known_loss(objective, name, float(a), float(b)), rel=2e-4)

    centred = (x - a * MEAN) / x.std()
    for step in (-0.2, 0.2):
        for direction, chance in ((torch.ones_like(x), 0.0), (centred, 0.0), (centred.sin(), 4.0), (centred**2, 4.0)):
            gain = float(weighted_loss(objective, best + step * direction, x0, eps, levels)) - least
            added = weight * step**2 * float(direction.square().mean())
            # Every function of x is orthogonal to what the best network leaves: linear ones exactly, in this sample,
            # others within four standard deviations.
            spread = 2 * math.sqrt(added * least / x.numel())
            assert gain == pytest.approx(added, abs=1e-3 * added + 1e-5 * least + chance * spread), step
            assert gain > 0


@every_objective
def test_the_loss_of_unit_data_is_known_at_every_level(name: str) -> None:
    """m = 0, s = 1: v's is 1 everywhere, flow's 1 / ((1 - t)^2 + t^2), between 1 and 2."""
    objective = objective_called(name)
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    levels = levels_at(objective, *SIGMAS)
    x0, eps = exact_sample(len(SIGMAS), 0.0, 1.0)
    a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
    x = objective.add_noise(x0, eps, levels)
    output = output_for(objective, name, a / (a**2 + b**2) * x, x, a, b)
    time = sigma / (1 + sigma)
    expected = {
        "epsilon": 1 / (1 + sigma**2),
        "x0": sigma**2 / (1 + sigma**2),
        "flow": 1 / ((1 - time) ** 2 + time**2),
        "edm_half": (sigma**-2 + 4) * sigma**2 / (1 + sigma**2),
    }
    key = next((key for key in expected if name.startswith(key)), "v")
    losses_B = weighted_loss(objective, output, x0, eps, levels)
    assert torch.allclose(losses_B, expected.get(key, torch.ones(len(SIGMAS)).double()), rtol=2e-4)


@pytest.mark.parametrize(("name", "sigma_data"), [("edm", 1.0), ("edm_half", 0.5), ("edm_half_c_noise", 0.5)])
def test_edm_needs_no_network_for_data_it_was_told_of(name: str, sigma_data: float) -> None:
    """For N(0, sigma_data^2) the best F is 0 and its loss exactly 1 at every sigma, which is EDM's design."""
    objective = objective_called(name)
    levels = levels_at(objective, 0.002, *SIGMAS, 80.0)
    x0, eps = exact_sample(len(SIGMAS) + 2, 0.0, sigma_data)
    losses_B = weighted_loss(objective, torch.zeros_like(x0), x0, eps, levels)
    assert torch.allclose(losses_B, torch.ones_like(losses_B), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("epsilon", "v", "x0")])
def test_pure_noise_teaches_the_mean_of_the_data(name: str) -> None:
    """At SNR 0 the best v is -m, with loss s^2; for every objective that has that level, the same denoiser."""
    objective = objective_called(name)
    levels = levels_at(objective, math.inf)
    x0, eps = exact_sample()
    sigma_data = sigma_data_of(name)
    best = {"x0_zt": MEAN + 0 * eps, "flow_raw": eps - MEAN}.get(name, -MEAN / sigma_data + 0 * eps)
    clean, noise = objective.head.clean_and_noise(best, eps, levels.a_B, levels.b_B)
    assert torch.allclose(clean, torch.full_like(clean, MEAN), atol=1e-6)
    assert torch.allclose(noise, eps, atol=1e-6)
    loss = float(weighted_loss(objective, best, x0, eps, levels))
    assert loss == pytest.approx(STD**2 / sigma_data**2, rel=1e-5)
    assert float(weighted_loss(objective, best + 0.1, x0, eps, levels)) == pytest.approx(loss + 0.01, rel=1e-5)


@every_objective
def test_training_reaches_the_same_denoiser_under_every_objective(name: str) -> None:
    """A network linear in x at each of three levels, trained by SGD on batches, with a weight that is not its own."""
    objective = objective_called(name, loss_weight=MinSNR(5.0))
    sigmas = (0.3, 1.0, 4.0)
    levels = levels_at(objective, *sigmas)
    a, b = per_sample(levels.a_B).double(), per_sample(levels.b_B).double()
    x0, eps = exact_sample(3)
    x = objective.add_noise(x0, eps, levels)
    theta = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.5, momentum=0.9)
    weight_B = head_weights(objective.loss_weight, objective, levels)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * min(1.0, (600 - step) / 300)
        rows = slice(4 * (step % 8), 4 * (step % 8) + 4) if step < 500 else slice(None)  # batches, then all of it
        output = per_sample(theta[:, 0]) * x[:, :, rows] + per_sample(theta[:, 1])
        errors_B = objective.errors(output, x0[:, :, rows], eps[:, :, rows], levels)
        loss = (errors_B * weight_B / weight_B.max()).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    output = per_sample(theta[:, 0]) * x + per_sample(theta[:, 1])
    clean, _ = objective.head.clean_and_noise(output, x, a, b)
    off_B = (clean - best_clean(x, a, b)).square().mean(dim=(1, 2, 3)).sqrt()
    assert off_B.max() < 2e-3, off_B.tolist()


def test_what_is_called_the_best_denoiser_is_the_best() -> None:
    """The closed form, against least squares by numpy on one level's sample."""
    x0, eps = exact_sample()
    x = (0.8 * x0 + 0.6 * eps).flatten().numpy()
    slope, offset = numpy.polyfit(x, x0.flatten().numpy(), 1)
    best = best_clean(torch.from_numpy(x), torch.tensor(0.8), torch.tensor(0.6)).numpy()
    assert slope * x + offset == pytest.approx(best, abs=1e-6)


def test_objectives_of_the_table_reach_the_levels_asked_for_here() -> None:
    for name in ON_THE_TABLE:
        low, high = objective_called(name).path.log_sigma_range
        assert low < math.log(min(SIGMAS)) < math.log(max(SIGMAS)) < high
