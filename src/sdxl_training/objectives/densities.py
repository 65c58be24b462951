"""Level densities: inverse distribution functions from a uniform draw in [0, 1) to ln sigma, sigma = b / a.

Each is increasing: 0 is the cleanest level, 1 the noisiest. Because ln sigma is the one variable, every density works
with every objective. Flow time and sigma are related by t = sigma / (1 + sigma), so ln sigma = logit t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxl_training.objectives.paths import NoisePath


class LevelDensity(Protocol):
    """How often each noise level is trained."""

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Map uniform draws in [0, 1), float64, to ln sigma."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every position of the objective's own clock equally often: SDXL's timesteps, or flow time."""

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return the clock at the draws themselves."""
        return path.clock(uniform_B)


@dataclass(frozen=True)
class LogNormal:
    """ln sigma = mean + std z, z standard normal (Karras et al. 2022, table 1); a higher mean is more noise.

    This is at once the logit-normal density of flow time, t = sigmoid(mean + std z) (Esser et al. 2024, equation 19):
    both names stand for it.
    """

    mean: float
    std: float

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return mean + std * inverse normal CDF of the draws."""
        normal_B: Tensor = torch.special.ndtri(uniform_B)
        return self.mean + self.std * normal_B


@dataclass(frozen=True)
class Mode:
    """Flow time t = f(1 - u), f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) (Esser et al. 2024, equation 20).

    s > 0 prefers the middle, s < 0 the ends. Increasing for -1 <= s <= 2 / (pi - 2).
    """

    scale: float

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return logit f(1 - u)."""
        down_B = 1 - uniform_B
        time_B = uniform_B - self.scale * (torch.cos(math.pi / 2 * down_B).square() - uniform_B)
        return torch.logit(time_B.clamp(0, 1))


@dataclass(frozen=True)
class CosMap:
    """Flow time with the density 2 / (pi - 2 pi t + 2 pi t^2) (Esser et al. 2024, equation 21).

    It gives the straight path the levels of a cosine schedule: sigma = tan(pi u / 2).
    """

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return ln tan(pi u / 2), since t = 1 - 1 / (1 + tan(pi u / 2))."""
        return torch.tan(math.pi / 2 * uniform_B).log()


@dataclass(frozen=True)
class Karras:
    """Uniform on the rho-schedule: sigma^(1/rho) is uniform between its ends (Karras et al. 2022, equation 5)."""

    sigma_min: float
    sigma_max: float
    rho: float

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return rho ln(sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.rho * torch.log(low + uniform_B * (high - low))


@dataclass(frozen=True)
class Histogram:
    """Bars of equal width over the objective's own clock, cleanest first; only their ratios matter."""

    bars: Sequence[float]

    def log_sigma(self, uniform_B: Tensor, path: NoisePath) -> Tensor:
        """Return the clock at the draws' quantiles of the histogram."""
        return path.clock(quantile(torch.tensor(self.bars, dtype=torch.float64), uniform_B))


def quantile(bars_K: Tensor, uniform_B: Tensor) -> Tensor:
    """Return where in [0, 1] the histogram of equally wide bars has `uniform_B` of its mass below."""
    edges_K = torch.cat([bars_K.new_zeros(1), bars_K.cumsum(0)])
    edges_K = edges_K / edges_K[-1]  # so that the last edge is exactly 1, which `sum` with its other order would miss
    bin_B = (torch.searchsorted(edges_K, uniform_B, right=True) - 1).clamp(0, len(bars_K) - 1)
    within_B = (uniform_B - edges_K[bin_B]) / (edges_K[bin_B + 1] - edges_K[bin_B])
    return ((bin_B + within_B) / len(bars_K)).clamp(0, 1)


DENSITIES: dict[str, type[LevelDensity]] = {
    "uniform": Uniform,
    "logit_normal": LogNormal,
    "log_normal_sigma": LogNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "karras": Karras,
    "histogram": Histogram,
}
