"""An objective: a path, a head on it, a density of levels and a weight, chosen independently.

Shape legend: B samples, C channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdxl_training.objectives.densities import LevelDensity
from sdxl_training.objectives.heads import EpsilonHead, FlowHead, Head, VelocityHead
from sdxl_training.objectives.paths import FlowPath, Levels, NoisePath, VariancePreservingPath
from sdxl_training.objectives.weights import LossWeight
from sdxl_training.rng import Stream, torch_generator


def per_sample(value_B: Tensor) -> Tensor:
    """Shape one number a sample for arithmetic with B x C x H x W."""
    return value_B[:, None, None, None]


@dataclass(frozen=True)
class Objective:
    """Everything that turns clean latents into a training problem, and a network into a sampler."""

    name: str
    path: NoisePath
    head: Head
    density: LevelDensity
    loss_weight: LossWeight

    def draw_levels(self, seed: int, visits: Sequence[int], sample_ids: Sequence[int]) -> Levels:
        """Draw each sample's noise level from (seed, visit, sample id) alone; float32 on the CPU."""
        uniforms = [
            torch.rand((), dtype=torch.float64, generator=torch_generator(seed, Stream.LEVEL, visit, sample_id))
            for visit, sample_id in zip(visits, sample_ids, strict=True)
        ]
        return self.path.levels(self.density.position(torch.stack(uniforms)))

    def add_noise(self, x0_BCHW: Tensor, eps_BCHW: Tensor, levels: Levels) -> Tensor:
        """Return the network's input a x0 + b eps."""
        return per_sample(levels.a_B) * x0_BCHW + per_sample(levels.b_B) * eps_BCHW

    def loss_per_sample(self, output_BCHW: Tensor, x0_BCHW: Tensor, eps_BCHW: Tensor, levels: Levels) -> Tensor:
        """Return the weighted mean squared error of each sample, float32.

        Weights multiply per sample, before any mean over the batch.
        """
        target_BCHW = self.head.target(x0_BCHW, eps_BCHW, per_sample(levels.a_B), per_sample(levels.b_B))
        errors_B = (output_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        return errors_B * self.loss_weight.weight(self.head, levels.a_B, levels.b_B)


def noise_like(latents_BCHW: Tensor, seed: int, visits: Sequence[int], sample_ids: Sequence[int]) -> Tensor:
    """Return standard normal noise, each sample's from (seed, visit, sample id) alone.

    Drawn in float32 on the CPU and then moved, so that every device trains on the same noise.
    """
    noise = [
        torch.randn(latents_BCHW.shape[1:], generator=torch_generator(seed, Stream.NOISE, visit, sample_id))
        for visit, sample_id in zip(visits, sample_ids, strict=True)
    ]
    return torch.stack(noise).to(latents_BCHW.device, non_blocking=True)


def _epsilon() -> tuple[NoisePath, Head]:
    return VariancePreservingPath(zero_terminal_snr=False), EpsilonHead()


def _v_prediction(zero_terminal_snr: bool) -> tuple[NoisePath, Head]:
    return VariancePreservingPath(zero_terminal_snr), VelocityHead()


def _flow_matching() -> tuple[NoisePath, Head]:
    return FlowPath(), FlowHead()


OBJECTIVES: dict[str, Callable[..., tuple[NoisePath, Head]]] = {
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
    "flow_matching": _flow_matching,
}


def make_objective(name: str, options: Mapping[str, Any], density: LevelDensity, loss_weight: LossWeight) -> Objective:
    """Build the objective of the table above called `name` with that type's own options."""
    path, head = OBJECTIVES[name](**options)
    return Objective(name, path, head, density, loss_weight)
