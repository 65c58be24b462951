"""Weights of pictures from their logarithms: bounded, and with mean exactly 1 over an epoch.

Shape legend: P pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdxl_training.weighting.tag_lists import Numbers

BISECTIONS = 200  # far more than float64 can tell apart


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least and most that a picture counts, around 1."""

    least: float = 0.25
    most: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1 <= self.most:
            raise ValueError(f"bounds {self.least} to {self.most} do not enclose 1")


@dataclass(frozen=True, slots=True)
class Figures:
    """What there is to say of weights. effective: (sum w)^2 / (N sum w^2), 1 where all count the same."""

    mean: float
    least: float
    most: float
    effective: float
    at_bounds: float


def log_normaliser(log_weight_P: Numbers, share_P: Numbers, bounds: Bounds) -> float:
    """Return ln Z with sum share clip(exp(log_weight) / Z, bounds) = sum share, by bisection.

    share_P: how often a picture is drawn, times what else its losses are multiplied by; at least one is positive. The
    mean falls with ln Z, so there is one solution up to stretches where all weights are at a bound, of mean 1.
    """
    taking_part = share_P > 0
    values, shares = log_weight_P[taking_part], share_P[taking_part]
    # At the low end every weight is at the upper bound, at the high end at the lower one.
    low, high = values.min() - np.log(bounds.most), values.max() - np.log(bounds.least)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if np.average(np.clip(np.exp(values - middle), bounds.least, bounds.most), weights=shares) > 1:
            low = middle
        else:
            high = middle
    return float(0.5 * (low + high))


def weights_of(log_weight_P: Numbers, share_P: Numbers, bounds: Bounds) -> Numbers:
    """Return the weights with mean 1 under share_P, within the bounds."""
    centred_P = log_weight_P - log_normaliser(log_weight_P, share_P, bounds)
    return np.clip(np.exp(centred_P), bounds.least, bounds.most)


def figures_of(weight_P: Numbers, share_P: Numbers, bounds: Bounds) -> Figures:
    """Return mean, ends and effective sample size of the pictures that take part."""
    taking_part = share_P > 0
    weights, shares = weight_P[taking_part], share_P[taking_part]
    mean = float(np.average(weights, weights=shares))
    return Figures(
        mean=mean,
        least=float(weights.min()),
        most=float(weights.max()),
        effective=mean**2 / float(np.average(weights**2, weights=shares)),
        at_bounds=float(np.average((weights <= bounds.least) | (weights >= bounds.most), weights=shares)),
    )
