"""Level densities: quantiles, densities and the log-normal they are equivalent to."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sdxl_training.objectives.densities import LogitNormal, Uniform
from sdxl_training.objectives.paths import FlowPath


def positions_of(density: LogitNormal, uniforms: list[float] | numpy.ndarray) -> numpy.ndarray:
    return density.position(torch.as_tensor(uniforms, dtype=torch.float64)).numpy()


def test_golden_quantiles(oracles: dict[str, Any]) -> None:
    golden = {float(level): value for level, value in oracles["logit_normal_quantiles"].items()}
    assert positions_of(LogitNormal(), list(golden)) == pytest.approx(list(golden.values()), abs=1e-12)


def published_density(time: numpy.ndarray, mean: float, std: float) -> numpy.ndarray:
    """Esser et al. 2024, equation 19."""
    logit = numpy.log(time / (1 - time))
    return numpy.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * numpy.sqrt(2 * numpy.pi) * time * (1 - time))


def test_golden_density(oracles: dict[str, Any]) -> None:
    """The slope of the inverse distribution function is one over the density."""
    for key, golden in oracles["logit_normal_pdf"].items():
        mean, std = (float(part[1:]) for part in key.split("_"))
        for time, density in golden.items():
            uniform = stats.norm.cdf((numpy.log(float(time) / (1 - float(time))) - mean) / std)
            step = 1e-4 * min(uniform, 1 - uniform)
            if step < 1e-12:  # float64 holds no draw this close to 1
                continue
            low, high = positions_of(LogitNormal(mean, std), [uniform - step, uniform + step])
            assert 2 * step / (high - low) == pytest.approx(density, rel=1e-3), (key, time)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (1.0986, 1.0), (-1.2, 1.2)])
def test_draws_follow_the_published_density(mean: float, std: float) -> None:
    """Kolmogorov's distance between an even sweep of draws and the integral of equation 19."""
    count = 4000
    positions = positions_of(LogitNormal(mean, std), (numpy.arange(count) + 0.5) / count)
    grid = numpy.linspace(1e-6, 1 - 1e-6, 400_001)
    density = published_density(grid, mean, std)
    integral = numpy.concatenate([[0], numpy.cumsum((density[1:] + density[:-1]) / 2 * numpy.diff(grid))])
    distance = numpy.abs(numpy.interp(positions, grid, integral) - (numpy.arange(count) + 0.5) / count).max()
    assert integral[-1] == pytest.approx(1.0, abs=1e-4)
    assert distance < 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.2)])
def test_logit_normal_in_time_is_log_normal_in_sigma(mean: float, std: float) -> None:
    uniforms = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    levels = FlowPath().levels(LogitNormal(mean, std).position(uniforms))
    log_sigma = (levels.b_B.double() / levels.a_B.double()).log().numpy()
    assert log_sigma == pytest.approx(stats.norm.ppf(uniforms.numpy(), mean, std), abs=2e-3)


def test_a_positive_mean_leans_to_noise() -> None:
    uniforms = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    labels = [FlowPath().levels(LogitNormal(mean).position(uniforms)).label_B.mean() for mean in (-1.0, 0.0, 1.0)]
    assert labels[0] < labels[1] < labels[2]


def test_uniform_is_the_identity() -> None:
    uniforms = torch.rand(9, dtype=torch.float64)
    assert torch.equal(Uniform().position(uniforms), uniforms)


@given(st.floats(0, 1, exclude_max=True), st.floats(-3, 3), st.floats(0.1, 3))
def test_no_draw_leaves_the_path(uniform: float, mean: float, std: float) -> None:
    position = LogitNormal(mean, std).position(torch.tensor([uniform], dtype=torch.float64))
    assert 0 <= float(position) <= 1
