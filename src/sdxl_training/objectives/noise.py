"""Noise: standard normal, or shaped.

Each sample's noise is a function of (seed, visit, sample id) alone, drawn in float32 on the CPU, so that every device
and every number of processes trains on the same noise.

Shape legend: C channels, H x W latent rows and columns, B samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_training.rng import Stream, torch_generator


@dataclass(frozen=True)
class Noise:
    """The noise of one sample. With all defaults: standard normal.

    offset: standard deviation o of one extra normal number per channel, so pixels have variance 1 + o^2 and the mean
    of a channel stays noisy at every level (Guttenberg 2023, "Diffusion with Offset Noise").
    pyramid: amplitude of normal noise at half the resolution, its square at a quarter, and so on down to one pixel,
    all enlarged and added, the sum brought back to variance 1 (Whitaker 2023, "Multires noise"; normalised here by its
    exact variance, not by a batch's).
    nearest_of: of so many draws, the one nearest to the latent is kept. Its distribution is no longer normal: it leans
    toward the picture (k-nearest noise, Li et al. 2025, "Improved Immiscible Diffusion").
    """

    offset: float = 0.0
    pyramid: float = 0.0
    nearest_of: int = 1

    def __call__(self, x0_CHW: Tensor, seed: int, visit: int, sample_id: int, out: Tensor | None = None) -> Tensor:
        """Return the noise of this appearance of this sample, float32 on the CPU; written into `out` if given."""
        generator = torch_generator(seed, Stream.NOISE, visit, sample_id)
        eps_CHW = torch.randn(x0_CHW.shape, generator=generator, out=out)
        if self.nearest_of > 1:
            eps_CHW.copy_(self._nearest(x0_CHW, eps_CHW, generator))
        if self.pyramid or self.offset:
            shape_generator = torch_generator(seed, Stream.NOISE_SHAPE, visit, sample_id)
            self._add_pyramid(eps_CHW, shape_generator)
            eps_CHW += self.offset * torch.randn(len(eps_CHW), 1, 1, generator=shape_generator)
        return eps_CHW

    def _nearest(self, x0_CHW: Tensor, first_CHW: Tensor, generator: torch.Generator) -> Tensor:
        more = torch.randn((self.nearest_of - 1, *x0_CHW.shape), generator=generator)
        candidates = torch.cat([first_CHW[None], more])
        return candidates[(candidates - x0_CHW).square().sum(dim=(1, 2, 3)).argmin()]

    def _add_pyramid(self, eps_CHW: Tensor, generator: torch.Generator) -> None:
        """Each coarse cell is repeated over the pixels it covers, so every level has variance amplitude^2 exactly."""
        if not self.pyramid:
            return
        channels, height, width = eps_CHW.shape
        amplitude, variance, cell = self.pyramid, 1.0, 2
        while cell < 2 * max(height, width):
            coarse = torch.randn((channels, -(-height // cell), -(-width // cell)), generator=generator)
            fine = coarse.repeat_interleave(cell, 1)[:, :height].repeat_interleave(cell, 2)[:, :, :width]
            eps_CHW += amplitude * fine
            variance += amplitude**2
            amplitude, cell = amplitude * self.pyramid, cell * 2
        eps_CHW /= math.sqrt(variance)


@dataclass(frozen=True)
class InputNoise:
    """Input perturbation (Ning et al. 2023): the network's input is made with eps + gamma xi, the target keeps eps.

    It trains the network on inputs that are a little off, as its own mistakes make them when drawing. 0 is off.
    """

    gamma: float = 0.0

    def __call__(self, eps_BCHW: Tensor, seed: int, visits: Sequence[int], sample_ids: Sequence[int]) -> Tensor:
        """Return the noise of the network's input."""
        if not self.gamma:
            return eps_BCHW
        xi = [
            torch.randn(eps_BCHW.shape[1:], generator=torch_generator(seed, Stream.PERTURBATION, visit, sample_id))
            for visit, sample_id in zip(visits, sample_ids, strict=True)
        ]
        return eps_BCHW + self.gamma * torch.stack(xi).to(eps_BCHW.device, non_blocking=True)
