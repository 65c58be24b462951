"""Samplers against data whose best network is known in closed form, under every objective.

For data N(m, s^2) and x = a x0 + b eps: E[x0 | x] = m + a s^2 / (a^2 s^2 + b^2) (x - a m), and the exact flow carries
(x - a m) / sqrt(a^2 s^2 + b^2) unchanged from level to level. For a finite data set E[x0 | x] is a softmax over it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.grids import Grid, Karras, Linear, Native, default_grid
from sdxl_training.objectives.heads import Head
from sdxl_training.objectives.objective import path_and_head
from sdxl_training.objectives.paths import NoisePath, VariancePreservingPath
from sdxl_training.objectives.sampling import SAMPLERS, draw, guide

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("epsilon", {}),
    "v": ("v_prediction", {"zero_terminal_snr": False}),
    "v_zt": ("v_prediction", {"zero_terminal_snr": True}),
    "x0": ("x0", {"zero_terminal_snr": False}),
    "x0_zt": ("x0", {"zero_terminal_snr": True}),
    "flow": ("flow_matching", {"mode": "raw", "zero_terminal_snr": True}),
    "preconditioned": ("flow_matching", {"mode": "preconditioned", "zero_terminal_snr": False}),
    "preconditioned_zt": ("flow_matching", {"mode": "preconditioned", "zero_terminal_snr": True}),
    "edm": ("edm", {"sigma_data": 1.0, "label": "timestep", "zero_terminal_snr": False}),
    "edm_half": ("edm", {"sigma_data": 0.5, "label": "timestep", "zero_terminal_snr": True}),
    "edm_c_noise": ("edm", {"sigma_data": 0.5, "label": "c_noise", "zero_terminal_snr": False}),
}
REACH_PURE_NOISE = ("v_zt", "x0_zt", "flow", "preconditioned", "preconditioned_zt")
ON_FLOW_TIME = ("flow", "preconditioned", "preconditioned_zt")
MEAN, STD = 0.7, 0.4
Clean = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, a, b) -> E[x0 | x]."""

every_objective = pytest.mark.parametrize("name", OPTIONS)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


class Setting(NamedTuple):
    """What a sampler reads of an objective."""

    path: NoisePath
    head: Head


def setting(name: str) -> Any:
    return Setting(*path_and_head(*OPTIONS[name]))


def oracle(name: str, clean: Clean) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """An objective and a network that knows the data and, by labels that are ln sigma, every level of it."""
    objective = setting(name)
    levels_at = objective.path.at
    objective.path.at = lambda log_sigma_B: replace(levels_at(log_sigma_B), label_B=log_sigma_B)

    def predict(x: Tensor, label_B: Tensor) -> Tensor:
        a, b = (value_B.double() for value_B in (levels_at(label_B[:1]).a_B, levels_at(label_B[:1]).b_B))
        x0 = clean(x, a, b)
        output: Tensor = objective.head.target(x0, (x - a * x0) / b, a, b)
        return output

    return objective, predict


def gaussian_clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN)


def nonlinear_clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A denoiser that mixes neighbours, the same function of sigma on every path."""
    scale = (a**2 + b**2).sqrt()
    return torch.tanh(2 * (x / scale).roll(1, -1)) * (0.5 + a / scale)


def finite_clean(points: Tensor) -> Clean:
    def clean(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        distances_BN = (x.flatten(1)[:, None] - a * points.flatten(1)).square().sum(-1)
        return (-distances_BN / (2 * b**2)).softmax(-1).matmul(points.flatten(1)).view_as(x)

    return clean


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise_for(objective: Any, grid: Grid, steps: int, x_vp: Tensor) -> Tensor:
    """The noise from which `draw` begins at x_vp, a network input scaled to unit variance."""
    first = objective.path.at(grid.log_sigma(objective.path, steps))
    a, b = float(first.a_B[0]), float(first.b_B[0])
    return x_vp if isinstance(objective.path, VariancePreservingPath) else x_vp * math.hypot(a, b) / b


@dataclass(frozen=True)
class Chosen:
    """A grid of given sigmas."""

    sigmas: tuple[float, ...]

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        return torch.tensor(self.sigmas, dtype=torch.float64).log()


# --- the exact flow --------------------------------------------------------------------------------------------------


def error_of(name: str, sampler: str, grid: Grid, steps: int) -> float:
    """Distance from the exact flow to the last level, where the network's x0 is what every sampler returns."""
    objective, predict = oracle(name, gaussian_clean)
    levels = objective.path.at(grid.log_sigma(objective.path, steps))
    (a_first, a_last), (b_first, b_last) = (value[[0, -1]].double() for value in (levels.a_B, levels.b_B))
    start = normal(1, 4, 8, 8)
    moved = (start - a_first * MEAN) * (a_last**2 * STD**2 + b_last**2).sqrt()
    at_last = a_last * MEAN + moved / (a_first**2 * STD**2 + b_first**2).sqrt()
    noise = start if isinstance(objective.path, VariancePreservingPath) else start / b_first
    drawn = draw(predict, objective, noise, steps, sampler, grid)
    return float((drawn - gaussian_clean(at_last, a_last, b_last)).abs().max())


@every_objective
@pytest.mark.parametrize(("sampler", "low", "high"), [("euler", 1.9, 2.1), ("heun", 3.7, 4.5), ("dpmpp_2m", 3.7, 4.5)])
def test_samplers_have_their_order(name: str, sampler: str, low: float, high: float) -> None:
    errors = [error_of(name, sampler, Karras(7.0, 0.03, 14.0), steps) for steps in (40, 80, 160)]
    assert errors[0] < (0.07 if sampler == "euler" else 0.01)
    for coarse, fine in itertools.pairwise(errors):
        assert low < coarse / fine < high, errors


@pytest.mark.parametrize("name", REACH_PURE_NOISE)
@pytest.mark.parametrize(("sampler", "low", "high"), [("euler", 1.8, 2.2), ("heun", 3.6, 4.4), ("dpmpp_2m", 2.8, 5.0)])
def test_the_order_survives_a_start_at_pure_noise(name: str, sampler: str, low: float, high: float) -> None:
    errors = [error_of(name, sampler, Linear(), steps) for steps in (50, 100, 200)]
    assert errors[0] < (0.05 if sampler == "euler" else 0.01)
    for coarse, fine in itertools.pairwise(errors):
        assert low < coarse / fine < high, errors


@every_objective
@pytest.mark.parametrize(("sampler", "limit"), [("euler", 0.12), ("heun", 0.05), ("dpmpp_2m", 0.05)])
def test_the_grid_of_each_path_draws_the_gaussian(name: str, sampler: str, limit: float) -> None:
    """In 28 steps, but for what the last level's mean lacks of the deviation: it has s^2 / sqrt(s^2 + sigma^2).

    Where the first level has signal left, a start without it pulls the mean toward 0.
    """
    objective, predict = oracle(name, gaussian_clean)
    noise = normal(1, 4, 32, 32)
    drawn = draw(predict, objective, (noise - noise.mean()) / noise.std(), 28, sampler)
    last_sigma = float(default_grid(objective.path).log_sigma(objective.path, 28)[-1].exp())
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.005 if name in REACH_PURE_NOISE else 0.05)
    assert float(drawn.std()) == pytest.approx(STD**2 / math.hypot(STD, last_sigma), rel=limit)


@every_objective
@every_sampler
def test_samples_land_on_a_finite_data_set(name: str, sampler: str) -> None:
    points = normal(3, 4, 2, 2, seed=5)
    objective, predict = oracle(name, finite_clean(points))
    drawn = draw(predict, objective, normal(24, 4, 2, 2, seed=6), 60, sampler)
    nearest = (drawn.flatten(1)[:, None] - points.flatten(1)).abs().amax(-1).min(-1)
    assert float(nearest.values.max()) < 1e-3
    assert set(nearest.indices.tolist()) == {0, 1, 2}, "every point is drawn"


@every_objective
@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_single_picture_is_drawn_exactly_in_any_number_of_steps(name: str, sampler: str, steps: int) -> None:
    picture = normal(1, 4, 2, 2, seed=7)
    objective, predict = oracle(name, lambda x, a, b: picture.expand_as(x))
    drawn = draw(predict, objective, normal(2, 4, 2, 2), steps, sampler)
    assert torch.allclose(drawn, picture.expand_as(drawn), atol=1e-5)


# --- what does not depend on the path --------------------------------------------------------------------------------

SIGMAS = (14.0, 6.0, 2.5, 1.1, 0.5, 0.2, 0.07)


def drawn_from_one_start(name: str, sampler: str, sigmas: tuple[float, ...]) -> Tensor:
    objective, predict = oracle(name, nonlinear_clean)
    grid = Chosen(sigmas)
    noise = noise_for(objective, grid, len(sigmas), normal(2, 4, 4, 4))
    return draw(predict, objective, noise, len(sigmas), sampler, grid)


def walk_by_hand(step: Callable[[Tensor, Tensor, float, float], Tensor], scale: Callable[[float], float]) -> Tensor:
    """Walk down SIGMAS in the variable scale(sigma) x_ve by `step` (z, x0, sigma, next sigma)."""
    z = normal(2, 4, 4, 4) * math.hypot(1, SIGMAS[0]) * scale(SIGMAS[0])
    for sigma, sigma_next in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
        x_ve = z / scale(sigma)
        z = step(z, nonlinear_clean(x_ve, torch.ones(()), torch.tensor(sigma)), sigma, sigma_next)
    return z


def test_ddim_euler_in_sigma_and_euler_in_flow_time_are_one_step() -> None:
    def ddim(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        kept, kept_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        eps = (x - math.sqrt(kept) * x0) / math.sqrt(1 - kept)
        return math.sqrt(kept_next) * x0 + math.sqrt(1 - kept_next) * eps

    def rotation(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        angle, change = math.atan(sigma), math.atan(sigma_next) - math.atan(sigma)
        v = (math.cos(angle) * x - x0) / math.sin(angle)
        return math.cos(change) * x + math.sin(change) * v

    def euler(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return x + (sigma_next - sigma) * (x - x0) / sigma

    def flow(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        time, time_next = sigma / (1 + sigma), sigma_next / (1 + sigma_next)
        return x + (time_next - time) * (x - x0) / time

    by_hand = [
        walk_by_hand(ddim, lambda sigma: (1 + sigma**2) ** -0.5),
        walk_by_hand(rotation, lambda sigma: (1 + sigma**2) ** -0.5),
        walk_by_hand(euler, lambda sigma: 1.0),
        walk_by_hand(flow, lambda sigma: 1 / (1 + sigma)),
    ]
    assert float(by_hand[0].std()) > 0.1
    for name, other in itertools.product(OPTIONS, by_hand):
        assert torch.allclose(drawn_from_one_start(name, "euler", SIGMAS), other, atol=3e-6), name


@pytest.mark.parametrize("sigmas", [SIGMAS, (math.inf, *SIGMAS)], ids=["finite", "pure_noise"])
def test_the_multistep_sampler_does_not_depend_on_the_path(sigmas: tuple[float, ...]) -> None:
    names = [name for name in OPTIONS if sigmas is SIGMAS or name in (*REACH_PURE_NOISE, "edm", "edm_half")]
    reference = drawn_from_one_start("v_zt", "dpmpp_2m", sigmas)
    assert not torch.allclose(reference, drawn_from_one_start("v_zt", "euler", sigmas), atol=1e-3)
    for name in names:
        assert torch.allclose(drawn_from_one_start(name, "dpmpp_2m", sigmas), reference, atol=3e-6), name


@pytest.mark.parametrize("sigmas", [SIGMAS, (math.inf, *SIGMAS)], ids=["finite", "pure_noise"])
def test_heun_depends_on_the_clock_alone(sigmas: tuple[float, ...]) -> None:
    clocks = [("v_zt", "x0_zt", "edm", "edm_half"), ON_FLOW_TIME]
    references = [drawn_from_one_start(names[0], "heun", sigmas) for names in clocks]
    assert not torch.allclose(references[0], references[1], atol=1e-3), "two clocks, two samplers"
    for names, reference in zip(clocks, references, strict=True):
        for name in names:
            assert torch.allclose(drawn_from_one_start(name, "heun", sigmas), reference, atol=3e-6), name


def test_ddim_is_euler_under_its_second_name() -> None:
    assert torch.equal(drawn_from_one_start("v", "ddim", SIGMAS), drawn_from_one_start("v", "euler", SIGMAS))


# --- what the network is asked ---------------------------------------------------------------------------------------


def calls_of(name: str, sampler: str, grid: Grid, steps: int) -> tuple[list[Tensor], list[float]]:
    inputs: list[Tensor] = []
    labels: list[float] = []

    def predict(x: Tensor, label_B: Tensor) -> Tensor:
        assert label_B.shape == (len(x),)
        assert label_B.dtype == torch.float32
        inputs.append(x)
        labels.append(float(label_B[0]))
        return torch.zeros_like(x, dtype=torch.bfloat16)

    drawn = draw(predict, setting(name), torch.ones(3, 4, 2, 2), steps, sampler, grid)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (3, 4, 2, 2)
    return inputs, labels


@every_objective
@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_a_step_is_one_call_with_the_level_s_own_label(name: str, sampler: str) -> None:
    path = setting(name).path
    grid = default_grid(path)
    assert calls_of(name, sampler, grid, 7)[1] == path.at(grid.log_sigma(path, 7)).label_B.tolist()


def test_heun_asks_twice_a_step_but_once_at_the_last_and_from_infinite_sigma() -> None:
    def asked(name: str, grid: Grid) -> list[int]:
        labels = setting(name).path.at(grid.log_sigma(setting(name).path, 4)).label_B.tolist()
        return [labels.index(label) for label in calls_of(name, "heun", grid, 4)[1]]

    assert asked("v", Native()) == [0, 1, 1, 2, 2, 3, 3]
    assert asked("v_zt", Native()) == [0, 1, 2, 2, 3, 3]
    assert asked("flow", Linear()) == [0, 1, 1, 2, 2, 3, 3]
    assert asked("edm", Karras()) == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("name", "grid", "scale"),
    [
        ("epsilon", Native(), 1.0),
        ("v_zt", Native(), 1.0),
        ("preconditioned", Karras(), 1.0),
        ("flow", Linear(), 1.0),
        ("flow", Karras(sigma_max=9.0), 0.9),
        ("edm", Karras(), 80 / (80**2 + 1) ** 0.5),
        ("edm_half", Karras(sigma_max=1.0), 1 / (1 + 0.25) ** 0.5),
    ],
)
def test_the_first_input_is_noise_on_the_path_s_scale(name: str, grid: Grid, scale: float) -> None:
    first = calls_of(name, "euler", grid, 3)[0][0]
    assert float(first.min()) == float(first.max()) == pytest.approx(scale, abs=1e-7)


@every_objective
@every_sampler
def test_float32_is_enough(name: str, sampler: str) -> None:
    """Also at sigma 20000, where a rho-schedule on a table with zero terminal SNR begins."""
    noise = normal(1, 4, 4, 4)
    for grid in (None, Karras()):
        objective, predict = oracle(name, nonlinear_clean)
        in_double = draw(predict, objective, noise, 20, sampler, grid)
        in_single = draw(predict, objective, noise.float(), 20, sampler, grid)
        assert in_single.dtype == torch.float32
        assert torch.allclose(in_single.double(), in_double, atol=1e-4)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_formula() -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional, atol=1e-6)
    expected = 3.5 * conditional - 2.5 * unconditional
    assert torch.allclose(guide(unconditional, conditional, 3.5), expected, atol=1e-5)


def test_rescale_brings_each_sample_back_to_the_conditional_deviation() -> None:
    unconditional, conditional = normal(2, 3, 4, 8, 8)
    conditional = conditional * torch.tensor([0.5, 1.0, 3.0])[:, None, None, None]
    plain, full = (guide(unconditional, conditional, 7.5, rescale) for rescale in (0.0, 1.0))
    dims = (1, 2, 3)
    assert (plain.std(dims) > 2 * conditional.std(dims)).all()
    assert torch.allclose(full.std(dims), conditional.std(dims))
    assert torch.allclose(guide(unconditional, conditional, 7.5, 0.7), 0.7 * full + 0.3 * plain)
    assert torch.allclose(guide(unconditional, conditional, 1.0, 0.7), conditional), "nothing to undo"
