"""Level densities: inverse distribution functions from a uniform draw in (0, 1) to a position on the noise path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class LevelDensity(Protocol):
    """How often each noise level is trained."""

    def position(self, uniform_B: Tensor) -> Tensor:
        """Map uniform draws in [0, 1), float64, to positions in [0, 1]; 0 is clean."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every position equally often."""

    def position(self, uniform_B: Tensor) -> Tensor:
        """Return the draws themselves."""
        return uniform_B


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std z), z standard normal (Esser et al. 2024, equation 19); mean > 0 leans to noise.

    On the straight path this is a log-normal density of sigma = t / (1 - t) with the same two parameters.
    """

    mean: float = 0.0
    std: float = 1.0

    def position(self, uniform_B: Tensor) -> Tensor:
        """Return sigmoid(mean + std * inverse normal CDF of the draws)."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform_B))


DENSITIES: dict[str, type[Uniform] | type[LogitNormal]] = {"uniform": Uniform, "logit_normal": LogitNormal}
