"""An objective: a path, a head on it, a density of levels and a weight, chosen independently.

Shape legend: B samples, C channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdxl_training.objectives.adaptive import LevelDraw, PlainLevels
from sdxl_training.objectives.densities import LevelDensity
from sdxl_training.objectives.heads import CleanHead, EpsilonHead, FlowHead, FlowVelocityHead, Head, VelocityHead
from sdxl_training.objectives.noise import InputNoise
from sdxl_training.objectives.paths import (
    EDMPath,
    FlowPath,
    Levels,
    NoisePath,
    PreconditionedFlowPath,
    VariancePreservingPath,
)
from sdxl_training.objectives.shapes import LossShape, MeanSquared
from sdxl_training.objectives.shifts import LevelShift, NoShift
from sdxl_training.objectives.strata import Draws, IndependentDraws
from sdxl_training.objectives.uncertainty import LogVariance, NoUncertainty
from sdxl_training.objectives.weights import LossWeight
from sdxl_training.records import Batch, SizeHW


def per_sample(value_B: Tensor) -> Tensor:
    """Shape one number a sample for arithmetic with B x C x H x W."""
    return value_B[:, None, None, None]


@dataclass(frozen=True)
class DrawnLevels:
    """A batch's noise levels and all that depends on them alone.

    uniform_B: the draws in [0, 1) they came from, float64 on the CPU. log_sigma_B, weight_B (the loss weight) and
    importance_B (of the draw itself, mean 1): float32.
    """

    levels: Levels
    uniform_B: Tensor
    log_sigma_B: Tensor
    weight_B: Tensor
    importance_B: Tensor

    def to(self, device: torch.device) -> DrawnLevels:
        """Return the same levels on `device`."""
        moved = (
            value_B.to(device, non_blocking=True) for value_B in (self.log_sigma_B, self.weight_B, self.importance_B)
        )
        return DrawnLevels(self.levels.to(device), self.uniform_B, *moved)


@dataclass(frozen=True)
class Objective:
    """Everything that turns clean latents into a training problem, and a network into a sampler."""

    name: str
    path: NoisePath
    head: Head
    density: LevelDensity
    loss_weight: LossWeight
    shift: LevelShift = field(default_factory=NoShift)
    draws: Draws = field(default_factory=IndependentDraws)
    level_draw: LevelDraw = field(default_factory=PlainLevels)
    shape: LossShape = field(default_factory=MeanSquared)
    input_noise: InputNoise = field(default_factory=InputNoise)
    uncertainty: NoUncertainty | LogVariance = field(default_factory=NoUncertainty)

    def draw_levels(self, seed: int, batch: Batch, size_hw: SizeHW) -> DrawnLevels:
        """Draw each sample's noise level from (seed, visit, sample id), and its stratum if asked; on the CPU.

        size_hw: the pictures' size in pixels, which the resolution shift may look at.
        """
        uniform_B, importance_B = self.level_draw.remap(self.draws.uniform(seed, batch))
        log_sigma_B = self.density.log_sigma(uniform_B, self.path) + self.shift.log_factor(size_hw)
        log_sigma_B = log_sigma_B.clamp(*self.path.log_sigma_range)
        levels = self.path.at(log_sigma_B)
        weight_B = self.loss_weight.weight(self.head, levels.a_B, levels.b_B)
        return DrawnLevels(levels, uniform_B, log_sigma_B.float(), weight_B, importance_B.float())

    def add_noise(self, x0_BCHW: Tensor, eps_BCHW: Tensor, levels: Levels) -> Tensor:
        """Return the network's input a x0 + b eps."""
        return per_sample(levels.a_B) * x0_BCHW + per_sample(levels.b_B) * eps_BCHW

    def errors(self, output_BCHW: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor, levels: Levels) -> Tensor:
        """Return the mean error of each sample in the head's own space and the loss's shape, unweighted, float32."""
        a, b = per_sample(levels.a_B), per_sample(levels.b_B)
        target_BCHW = self.head.target(x0_BCHW, eps_BCHW, a, b)
        return self.shape(output_BCHW.float() - target_BCHW, a, b).mean(dim=(1, 2, 3))

    def losses(self, errors_B: Tensor, drawn: DrawnLevels) -> Tensor:
        """Return each sample's loss, float32. Weights multiply per sample, before any mean over the batch."""
        losses_B: Tensor = self.uncertainty(errors_B * drawn.weight_B, drawn.log_sigma_B)
        return losses_B * drawn.importance_B


def _epsilon() -> tuple[NoisePath, Head]:
    return VariancePreservingPath(zero_terminal_snr=False), EpsilonHead()


def _v_prediction(zero_terminal_snr: bool) -> tuple[NoisePath, Head]:
    return VariancePreservingPath(zero_terminal_snr), VelocityHead()


def _x0(zero_terminal_snr: bool) -> tuple[NoisePath, Head]:
    return VariancePreservingPath(zero_terminal_snr), CleanHead()


def _flow_matching(mode: str, zero_terminal_snr: bool) -> tuple[NoisePath, Head]:
    if mode == "preconditioned":
        return PreconditionedFlowPath(zero_terminal_snr), FlowVelocityHead()
    return FlowPath(), FlowHead()


def _edm(sigma_data: float, label: str, zero_terminal_snr: bool) -> tuple[NoisePath, Head]:
    return EDMPath(sigma_data, label, zero_terminal_snr), VelocityHead(sigma_data)


OBJECTIVES: dict[str, Callable[..., tuple[NoisePath, Head]]] = {
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "x0": _x0,
    "flow_matching": _flow_matching,
    "edm": _edm,
}


def path_and_head(name: str, options: Mapping[str, Any]) -> tuple[NoisePath, Head]:
    """Return what the type of the table above called `name` is made of, given that type's own options."""
    return OBJECTIVES[name](**options)


def make_objective(
    name: str, options: Mapping[str, Any], density: LevelDensity, loss_weight: LossWeight, **parts: Any
) -> Objective:
    """Build the objective called `name`; `parts` are further fields of `Objective`."""
    path, head = path_and_head(name, options)
    return Objective(name, path, head, density, loss_weight, **parts)
