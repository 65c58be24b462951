"""Level densities: each draws ln sigma as its paper says, over every objective's own range.

A density is an inverse distribution function, so "draws as published" is: the published distribution function of what
it returns is the number it was given. Published functions are written here by themselves, or integrated numerically.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch import Tensor

from sdxl_training.objectives.densities import (
    DENSITIES as KINDS,
)
from sdxl_training.objectives.densities import (
    CosMap,
    Histogram,
    Karras,
    LevelDensity,
    LogNormal,
    Mode,
    Uniform,
    quantile,
)
from sdxl_training.objectives.paths import EDMPath, FlowPath, VariancePreservingPath
from tests.objective_table import DENSITIES, OBJECTIVES, density_called, levels_of, objective_called

Function = Callable[[float], float]
UNIFORMS = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
LOG_NORMALS = [(0.0, 1.0), (0.5, 0.6), (1.0986, 1.0), (-1.2, 1.2), (-0.4, 1.0)]


def log_sigmas(density: LevelDensity, uniforms: Tensor = UNIFORMS) -> Tensor:
    return density.log_sigma(uniforms, FlowPath())


def times(density: LevelDensity, uniforms: Tensor = UNIFORMS) -> numpy.ndarray:
    """Flow times t = sigma / (1 + sigma)."""
    return torch.sigmoid(log_sigmas(density, uniforms)).numpy()


def test_the_tests_table_has_every_density() -> None:
    assert {kind for kind, _ in DENSITIES.values()} == set(KINDS)


# --- published densities of flow time --------------------------------------------------------------------------------


def logit_normal(mean: float, std: float) -> Function:
    """Esser et al. 2024, equation 19."""

    def density(time: float) -> float:
        logit = math.log(time / (1 - time))
        return math.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * time * (1 - time))

    return density


def cosmap(time: float) -> float:
    """Esser et al. 2024, equation 21."""
    return 2 / (math.pi - 2 * math.pi * time + 2 * math.pi * time**2)


def mode(scale: float) -> Function:
    """The density of t = f(u), u uniform, with f of equation 20: |d/dt f^-1(t)|, found by solving and differencing."""

    def published(u: float) -> float:
        return 1 - u - scale * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)

    def inverse(time: float) -> float:
        return float(optimize.brentq(lambda u: published(u) - time, 0, 1, xtol=1e-14, rtol=1e-14))

    return lambda time: (inverse(time - 1e-6) - inverse(time + 1e-6)) / 2e-6


PUBLISHED: dict[str, tuple[LevelDensity, Function]] = {
    **{f"logit_normal{row}": (LogNormal(*row), logit_normal(*row)) for row in LOG_NORMALS},
    "uniform": (Uniform(), lambda time: 1.0),
    "cosmap": (CosMap(), cosmap),
    **{f"mode({scale})": (Mode(scale), mode(scale)) for scale in (-1.0, -0.5, 0.0, 0.81, 1.29, 1.75)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_density_is_the_published_one_and_integrates_to_one(name: str) -> None:
    """Between any two quantiles lies the integral of the published density: their uniform numbers' difference."""
    density, published = PUBLISHED[name]
    uniforms = torch.tensor([0.002, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 0.998], dtype=torch.float64)
    edges = times(density, uniforms)
    for i in range(len(edges) - 1):
        mass, _ = integrate.quad(published, edges[i], edges[i + 1], epsabs=1e-9, limit=200)
        assert mass == pytest.approx(float(uniforms[i + 1] - uniforms[i]), abs=2e-6)
    total, _ = integrate.quad(published, 2e-6, 1 - 2e-6, epsabs=1e-8, limit=400, points=[float(edges[4])])
    assert total == pytest.approx(1.0, abs=3e-3 if name.startswith("mode(-1") else 2e-5), "sqrt pole at the ends for -1"


def test_golden_quantiles(oracles: dict[str, Any]) -> None:
    golden = {float(level): value for level, value in oracles["logit_normal_quantiles"].items()}
    quantiles = times(LogNormal(0.0, 1.0), torch.tensor(list(golden), dtype=torch.float64))
    assert quantiles == pytest.approx(list(golden.values()), abs=1e-12)


def test_golden_density(oracles: dict[str, Any]) -> None:
    """The slope of the inverse distribution function is one over the density."""
    for key, golden in oracles["logit_normal_pdf"].items():
        mean, std = (float(part[1:]) for part in key.split("_"))
        for time, density in golden.items():
            uniform = stats.norm.cdf((math.log(float(time) / (1 - float(time))) - mean) / std)
            step = 1e-4 * min(uniform, 1 - uniform)
            if step < 1e-12:  # float64 holds no draw this close to 1
                continue
            low, high = times(LogNormal(mean, std), torch.tensor([uniform - step, uniform + step]).double())
            assert 2 * step / (high - low) == pytest.approx(density, rel=1e-3), (key, time)


@pytest.mark.parametrize(("mean", "std"), LOG_NORMALS)
def test_logit_normal_in_time_is_log_normal_in_sigma(mean: float, std: float) -> None:
    """SD3's (0, 1), EDM's (-1.2, 1.2) and EDM2's (-0.4, 1) are points of one family: two names, one density."""
    assert KINDS["logit_normal"] is KINDS["log_normal_sigma"]
    density = LogNormal(mean, std)
    assert log_sigmas(density).numpy() == pytest.approx(stats.norm.ppf(UNIFORMS.numpy(), mean, std), abs=1e-9)
    logit = numpy.log(times(density) / (1 - times(density)))
    assert logit == pytest.approx(stats.norm.ppf(UNIFORMS.numpy(), mean, std), abs=1e-9)


def test_a_positive_mean_leans_to_noise() -> None:
    means = [times(LogNormal(mean, 1.0)).mean() for mean in (-1.0, 0.0, 1.0)]
    assert means[0] < means[1] < means[2]


def test_cosmap_has_the_levels_of_a_cosine_schedule() -> None:
    """a = cos(pi u / 2), b = sin(pi u / 2)."""
    angle = math.pi / 2 * UNIFORMS
    assert torch.allclose(log_sigmas(CosMap()), (angle.sin() / angle.cos()).log(), atol=1e-12)


def test_mode_zero_is_uniform_and_its_scale_draws_to_the_middle_or_the_ends() -> None:
    assert times(Mode(0.0)) == pytest.approx(UNIFORMS.numpy(), abs=1e-12)
    spreads = [times(Mode(scale)).std() for scale in (-1.0, 0.0, 1.0, 1.75)]
    assert spreads == sorted(spreads, reverse=True)


@given(scale=st.floats(-1, 1.75), low=st.floats(0, 1, exclude_max=True), high=st.floats(0, 1, exclude_max=True))
def test_mode_rises_over_the_whole_of_its_published_range(scale: float, low: float, high: float) -> None:
    """-1 <= s <= 2 / (pi - 2) = 1.752."""
    low, high = sorted((low, high))
    first, second = times(Mode(scale), torch.tensor([low, high], dtype=torch.float64))
    assert 0 <= first <= second + 1e-15
    assert second <= 1


# --- Karras ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0, 40.0])
def test_karras_is_uniform_on_the_rho_grid(rho: float) -> None:
    low, high = 0.002, 80.0
    sigma = log_sigmas(Karras(low, high, rho)).exp().numpy()
    grid = (sigma ** (1 / rho) - low ** (1 / rho)) / (high ** (1 / rho) - low ** (1 / rho))
    assert grid == pytest.approx(UNIFORMS.numpy(), abs=1e-9)

    def published(s: float) -> float:
        return float(s ** (1 / rho - 1) / rho / (high ** (1 / rho) - low ** (1 / rho)))

    mass, _ = integrate.quad(published, low, high, points=[float(numpy.median(sigma))], limit=300)
    assert mass == pytest.approx(1.0, abs=1e-6)


def test_karras_limits_are_linear_and_geometric() -> None:
    low, high = 0.03, 15.0
    linear = log_sigmas(Karras(low, high, 1.0)).exp()
    geometric = log_sigmas(Karras(low, high, 1e6))
    assert torch.allclose(linear, low + UNIFORMS * (high - low), rtol=1e-12)
    assert torch.allclose(geometric, torch.lerp(ln(low), ln(high), UNIFORMS), atol=1e-4)


def ln(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64).log()


def test_karras_quantiles_are_the_golden_sampler_grids(oracles: dict[str, Any]) -> None:
    for key, golden in oracles["karras"].items():
        low, high = (float(part) for part in key.split("_")[1:])
        uniforms = torch.linspace(1, 0, len(golden), dtype=torch.float64)
        sigmas = log_sigmas(Karras(low, high, 7.0), uniforms).exp()
        assert sigmas.tolist() == pytest.approx(golden, rel=1e-9)


# --- uniform and histogram, which follow the objective's own clock ---------------------------------------------------


def test_uniform_is_the_objectives_own_clock() -> None:
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    table = VariancePreservingPath(False)
    timesteps = table.at(Uniform().log_sigma(even, table)).label_B
    assert torch.equal(timesteps.long().bincount(), torch.full((1000,), 4))
    edm = EDMPath(0.5, "timestep", False)
    assert torch.allclose(edm.at(Uniform().log_sigma(even, edm)).label_B.double(), 999 * even, atol=1e-4)
    assert times(Uniform(), even) == pytest.approx(even.numpy(), abs=1e-12)


def test_histogram_has_its_bars_over_sdxls_timesteps() -> None:
    """Every timestep of a bar as often as its bar is high; none of an empty one."""
    bars = [0.0, 2.0, 1.0, 0.0, 5.0]
    path = VariancePreservingPath(True)
    even = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000
    timesteps = path.at(Histogram(bars).log_sigma(even, path)).label_B.long()
    counts = timesteps.bincount(minlength=1000)
    assert torch.equal(counts, torch.tensor([50 * bar for bar in bars]).long().repeat_interleave(200))


def test_histogram_has_its_bars_over_flow_time() -> None:
    bars = [1.0, 0.0, 3.0, 4.0]
    even = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    counts, _ = numpy.histogram(times(Histogram(bars), even), 4, (0, 1))
    assert counts.tolist() == [1000, 0, 3000, 4000]


def test_equal_bars_are_the_uniform_density() -> None:
    even = (torch.arange(999, dtype=torch.float64) + 0.3) / 999
    for path in (VariancePreservingPath(True), FlowPath(), EDMPath(1.0, "timestep", False)):
        flat, uniform = Histogram([3.0] * 7).log_sigma(even, path), Uniform().log_sigma(even, path)
        assert torch.allclose(flat, uniform, atol=1e-9)


@given(
    bars=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=2, max_size=60).filter(lambda bars: sum(bars) > 0),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53, 1 - 2.0**-52])),
)
def test_no_draw_falls_into_an_empty_bar(bars: Sequence[float], uniform: float) -> None:
    place = float(quantile(torch.tensor(bars, dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)))
    assert 0 <= place <= 1
    touched = {min(int(place * len(bars) + edge), len(bars) - 1) for edge in (-1e-9, 1e-9)}
    assert any(bars[i] > 0 for i in touched), (place, touched)


def test_the_last_draws_of_a_long_histogram_are_numbers() -> None:
    """The last edge must be exactly 1: `sum` adds in another order than `cumsum`, and 0 / 0 lies between them."""
    generator = torch.Generator().manual_seed(0)
    for count in range(20, 400, 7):
        bars = torch.cat([torch.rand(count, dtype=torch.float64, generator=generator), torch.zeros(2).double()])
        near_one = 1 - torch.arange(1, 40, dtype=torch.float64) * 2.0**-53
        assert (quantile(bars, near_one) <= count / (count + 2) + 1e-12).all()


# --- every density with every objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", DENSITIES)
def test_every_density_gives_every_objective_its_levels(density: str) -> None:
    """Rising with the draw, in float32, never outside what the objective trains or the network was told of."""
    uniforms = torch.cat([torch.tensor([0.0, 1e-300, 1e-12]).double(), UNIFORMS, 1 - torch.tensor([2.0**-53]).double()])
    for name in OBJECTIVES:
        objective = objective_called(name, density_called(density))
        drawn = levels_of(objective, uniforms)
        low, high = objective.path.log_sigma_range
        label_B = drawn.levels.label_B
        for value_B in (*vars(drawn.levels).values(), drawn.weight_B, drawn.importance_B):
            assert value_B.dtype == torch.float32, name
            assert value_B.isfinite().all(), name
        assert torch.equal(drawn.log_sigma_B, drawn.log_sigma_B.sort().values), name
        assert drawn.log_sigma_B.min() >= low - 1e-6, name
        assert drawn.log_sigma_B.max() <= high + 1e-6, name
        assert (label_B.diff() >= 0).all(), name
        bounds = (-2.4, 2.4) if name.endswith("c_noise") else (0.09, 999.91) if name == "flow_raw" else (0, 999)
        assert bounds[0] <= label_B.min() <= label_B.max() <= bounds[1], name


@pytest.mark.parametrize("density", ["logit_normal", "log_normal_sigma", "mode", "mode_ends", "cosmap", "karras"])
def test_a_density_of_sigma_is_the_same_for_every_objective(density: str) -> None:
    """Between the ends of the narrowest objective; only `uniform` and `histogram` follow the clock."""
    reference_B = levels_of(objective_called("flow_raw", density_called(density)), UNIFORMS).log_sigma_B
    inside_B = (reference_B > -3.5) & (reference_B < 2.6)
    assert inside_B.sum() > 500
    for name in OBJECTIVES:
        drawn = levels_of(objective_called(name, density_called(density)), UNIFORMS)
        assert torch.equal(drawn.log_sigma_B[inside_B], reference_B[inside_B]), name
        sigma_B = (drawn.levels.b_B.double() / drawn.levels.a_B.double())[inside_B]
        assert torch.allclose(sigma_B.log(), reference_B[inside_B].double(), atol=2e-6), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_bf16_run_sees_the_same_levels(name: str) -> None:
    """Of 2000 labels bf16 would keep some 400 timesteps, or a thousand quarters of ln sigma."""
    uniforms = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    objective = objective_called(name, LogNormal(0.0, 1.0))
    plain = levels_of(objective, uniforms)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = levels_of(objective, uniforms)
    for mine, theirs in zip(vars(drawn.levels).values(), vars(plain.levels).values(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(drawn.weight_B, plain.weight_B)
    assert len(set(drawn.levels.label_B.tolist())) > 1900
    assert len(set(drawn.levels.label_B.bfloat16().tolist())) < 1200, "this test must see a cast"
