"""The sigmoid weight, the one weight that depends on how levels are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.densities import CosMap, Karras, LevelDensity, LogNormal, Uniform
from sdxl_training.objectives.paths import Levels, TimestepTable, VariancePreservingPath
from sdxl_training.objectives.weights import Sigmoid, SoftMinSNR
from tests.objective_table import density_called, levels_of, objective_called, problem


def logistic(x: Any) -> Any:
    return 1 / (1 + numpy.exp(-x))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_over_timesteps_is_the_sigmoid_times_the_slope_of_ln_snr(zero_terminal_snr: bool, bias: float) -> None:
    """On epsilon; on v times SNR / (SNR + 1). The slope per unit of the draw, by numpy's gradient over the table."""
    log_snr_T = -2 * TimestepTable(zero_terminal_snr).finite_T.numpy()
    expected_T = logistic(bias - log_snr_T) * numpy.abs(numpy.gradient(log_snr_T)) * 1000
    name = "v_zt" if zero_terminal_snr else "v"
    of = problem(name)
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(torch.arange(1000))
    weights_T = Sigmoid(of, bias).weight(of.head, levels.a_B, levels.b_B).numpy()
    assert weights_T[: len(log_snr_T)] == pytest.approx(expected_T * logistic(log_snr_T), rel=1e-4)
    if zero_terminal_snr:
        assert weights_T[999] == 0
    else:
        of_epsilon = problem("epsilon")
        weights_T = Sigmoid(of_epsilon, bias).weight(of_epsilon.head, levels.a_B, levels.b_B).numpy()
        assert weights_T == pytest.approx(expected_T, rel=1e-4)


LOG_TIME_DENSITY: dict[str, tuple[LevelDensity, Callable[[numpy.ndarray], numpy.ndarray]]] = {
    "uniform": (Uniform(), lambda time: time * (1 - time)),
    "cosmap": (CosMap(), lambda time: time * (1 - time) * 2 / (math.pi * (1 - 2 * time + 2 * time**2))),
    "logit_normal": (
        LogNormal(0.3, 1.2),
        lambda time: numpy.exp(-(((numpy.log(time / (1 - time)) - 0.3) / 1.2) ** 2) / 2) / 1.2 / math.sqrt(2 * math.pi),
    ),
    "karras": (
        Karras(0.01, 100.0, 3.0),
        lambda time: (time / (1 - time)) ** (1 / 3) / 3 / (100 ** (1 / 3) - 0.01 ** (1 / 3)),
    ),
}
"""Densities over ln sigma, written in t; each d t / d ln sigma = t (1 - t) times the published one."""


@pytest.mark.parametrize("density", LOG_TIME_DENSITY)
def test_sigmoid_times_density_is_the_same_for_every_density(density: str) -> None:
    """Only the product is a choice (Kingma & Gao 2023): density over ln SNR x weight on epsilon = sigmoid."""
    drawn, published = LOG_TIME_DENSITY[density]
    of = problem("flow_raw", drawn)
    time = numpy.linspace(0.05, 0.95, 200)
    levels = of.path.at(torch.logit(torch.from_numpy(time)))
    on_epsilon = Sigmoid(of, 0.7).weight(of.head, levels.a_B, levels.b_B).double().numpy() / (1 - time) ** 2
    log_snr = -2 * numpy.log(time / (1 - time))
    assert on_epsilon * published(time) / 2 == pytest.approx(logistic(0.7 - log_snr), rel=2e-3)


def test_the_expected_sigmoid_weight_is_the_same_for_every_density() -> None:
    """The integral of the sigmoid over the levels that are reached, here all of SDXL's table."""
    of = problem("epsilon")
    low, high = (-2 * end for end in of.path.log_sigma_range)
    expected = numpy.logaddexp(0, 0.7 - high) - numpy.logaddexp(0, 0.7 - low)
    uniforms = (torch.arange(64_000, dtype=torch.float64) + 0.5) / 64_000
    for density in ("uniform", "karras", "cosmap", "logit_normal", "mode", "mode_ends"):
        over = problem("epsilon", density_called(density))
        drawn = levels_of(objective_called("epsilon", over.density, Sigmoid(over, 0.7)), uniforms)
        assert float(drawn.weight_B.double().mean()) == pytest.approx(abs(expected), rel=0.02), density


def test_the_bias_shifts_the_sigmoid_along_ln_snr() -> None:
    """Under a density even in ln SNR, where nothing else depends on the level."""
    of = problem("edm", Karras(1e-3, 1e3, 1e6))

    def on_epsilon(bias: float, log_snr: Tensor) -> Tensor:
        levels: Levels = of.path.at(-log_snr / 2)
        return Sigmoid(of, bias).weight(of.head, levels.a_B, levels.b_B) * (1 + torch.exp(-log_snr)).float()

    log_snr = torch.linspace(-6, 6, 49, dtype=torch.float64)
    assert torch.allclose(on_epsilon(0.0, log_snr), on_epsilon(2.0, log_snr + 2), rtol=1e-3)
    half = on_epsilon(1.5, torch.tensor([1.5], dtype=torch.float64)) / on_epsilon(1.5, torch.tensor([-12.0]).double())
    assert float(half) == pytest.approx(0.5, rel=1e-3)
    levels = of.path.at(-log_snr / 2)
    soft_B = SoftMinSNR(math.exp(2.0)).weight(of.head, levels.a_B, levels.b_B)
    ratio = Sigmoid(of, 2.0).weight(of.head, levels.a_B, levels.b_B) / soft_B
    assert torch.allclose(ratio, ratio[0].expand(49), rtol=1e-3), "then it is soft Min-SNR with gamma = e^bias"
