"""Loss shapes: what becomes of one element's error before the mean over a sample.

All but `l1` equal the squared error for errors well below their threshold, so weights and learning rates keep their
meaning. Thresholds may follow the noise level, measured in flow time t = b / (a + b).

Shape legend: B samples, C channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ThresholdSchedule = Literal["constant", "exponential", "snr"]


class LossShape(Protocol):
    """A function of the error, element by element."""

    def __call__(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the loss of each element; a and b broadcast."""
        ...


@dataclass(frozen=True)
class MeanSquared:
    """error^2."""

    def __call__(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the loss of each element."""
        return error.square()


@dataclass(frozen=True)
class Absolute:
    """|error|: the median instead of the mean is learnt, so what is drawn is no longer the data's distribution."""

    def __call__(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the loss of each element."""
        return error.abs()


@dataclass(frozen=True)
class PseudoHuber:
    """2 c (sqrt(error^2 + c^2) - c) (Khrapov et al. 2024): error^2 where |error| << c, 2 c |error| beyond."""

    threshold: float
    schedule: ThresholdSchedule

    def __call__(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the loss of each element, written so that small errors do not cancel."""
        c = THRESHOLDS[self.schedule](self.threshold, a, b)
        squared = error.square()
        return 2 * c * squared / ((squared + c.square()).sqrt() + c)


@dataclass(frozen=True)
class SmoothL1:
    """error^2 where |error| < c, 2 c |error| - c^2 beyond: 2 c times torch's `smooth_l1_loss` with beta = c."""

    threshold: float
    schedule: ThresholdSchedule

    def __call__(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the loss of each element."""
        c = THRESHOLDS[self.schedule](self.threshold, a, b)
        size = error.abs()
        return torch.where(size < c, size.square(), 2 * c * size - c.square())


def _constant(threshold: float, a: Tensor, b: Tensor) -> Tensor:
    return torch.full_like(b, threshold)


def _exponential(threshold: float, a: Tensor, b: Tensor) -> Tensor:
    """threshold^t: from 1 where it is clean to the threshold at pure noise (Khrapov et al. 2024, in timesteps)."""
    return threshold ** (b / (a + b))


def _snr(threshold: float, a: Tensor, b: Tensor) -> Tensor:
    """(1 - threshold) / (1 + sigma)^2 + threshold, as sd-scripts has it; 1 / (1 + sigma) = 1 - t."""
    return (1 - threshold) * (a / (a + b)).square() + threshold


THRESHOLDS: dict[str, Callable[[float, Tensor, Tensor], Tensor]] = {
    "constant": _constant,
    "exponential": _exponential,
    "snr": _snr,
}
SHAPES: dict[str, Callable[..., LossShape]] = {
    "mse": MeanSquared,
    "l1": Absolute,
    "pseudo_huber": PseudoHuber,
    "smooth_l1": SmoothL1,
}
