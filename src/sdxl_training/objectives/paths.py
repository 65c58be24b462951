"""Noise paths: x = a x0 + b eps, one (a, b, label) per noise level.

Shape legend: B samples, T table entries. `label` is the number the U-Net's timestep embedding reads: 0 is clean and 999
(VP) or 1000 (flow) the noisiest. Tables and levels are computed in float64 and handed out in float32; they are never
cast to a half precision, where 24 % of the labels 0..999 are off by more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_training.records import UserError

SDXL_TRAIN_STEPS = 1000
FLOW_EDGE = 1e-4
"""Flow times are kept this far from 0 and 1 in training, where weights and conversions have poles."""


@dataclass(frozen=True)
class Levels:
    """Noise levels of a batch: x = a_B x0 + b_B eps, and the label the network is given. All float32, one a sample."""

    a_B: Tensor
    b_B: Tensor
    label_B: Tensor

    def to(self, device: torch.device) -> Levels:
        """Return the same levels on `device`."""
        a_B, b_B, label_B = (value_B.to(device, non_blocking=True) for value_B in (self.a_B, self.b_B, self.label_B))
        return Levels(a_B, b_B, label_B)


def sdxl_alphas_bar() -> Tensor:
    """Return SDXL's cumulative signal power alpha-bar_T in float64: "scaled_linear" betas from 0.00085 to 0.012.

    Source: Stability-AI generative-models, `LegacyDDPMDiscretization`.
    """
    betas_T = torch.linspace(0.00085**0.5, 0.012**0.5, SDXL_TRAIN_STEPS, dtype=torch.float64) ** 2
    return (1.0 - betas_T).cumprod(0)


def rescale_zero_terminal_snr(alphas_bar_T: Tensor) -> Tensor:
    """Return the table with exactly no signal left at its last entry and its first entry unchanged.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed", Algorithm 1: an affine map
    of sqrt(alpha-bar).
    """
    root_T = alphas_bar_T.sqrt()
    first, last = root_T[0], root_T[-1]
    rescaled_T = ((root_T - last) * (first / (first - last))) ** 2
    rescaled_T[0] = alphas_bar_T[0]
    return rescaled_T


class VariancePreservingPath:
    """SDXL's own path: a = sqrt(alpha-bar_t), b = sqrt(1 - alpha-bar_t) at integer timesteps t; label t.

    With `zero_terminal_snr` the table is rescaled before anything (weights included) is derived from it.
    """

    def __init__(self, zero_terminal_snr: bool) -> None:
        table_T = sdxl_alphas_bar()
        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_bar_T = rescale_zero_terminal_snr(table_T) if zero_terminal_snr else table_T

    def levels(self, position_B: Tensor) -> Levels:
        """Map positions in [0, 1) to the timestep floor(position T)."""
        count = len(self.alphas_bar_T)
        return self.at_timesteps((position_B * count).floor().long().clamp(max=count - 1))

    def at_timesteps(self, timestep_B: Tensor) -> Levels:
        """Return the levels of integer timesteps in 0..999."""
        alphas_bar_B = self.alphas_bar_T[timestep_B]
        return Levels(alphas_bar_B.sqrt().float(), (1.0 - alphas_bar_B).sqrt().float(), timestep_B.float())

    def sampling_levels(self, steps: int) -> Levels:
        """Return `steps` levels, noisiest first, in the "trailing" spacing, which visits timestep 999 (Lin et al.).

        Raises UserError for more steps than the table has levels: rounding would then visit a timestep -1.
        """
        count = len(self.alphas_bar_T)
        if not 1 <= steps <= count:
            raise UserError(f"{steps} sampler steps: SDXL's schedule has {count} noise levels; use 1 to {count} steps.")
        timesteps = torch.arange(count, 0, -count / steps, dtype=torch.float64)[:steps]
        return self.at_timesteps(timesteps.round().long() - 1)


class FlowPath:
    """The straight path of rectified flow: a = 1 - t, b = t, t from 0 (clean) to 1 (noise); label 1000 t, not rounded.

    Source: Liu et al. 2023 (rectified flow), Lipman et al. 2023 with sigma_min = 0; time runs as in Esser et al. 2024.
    """

    zero_terminal_snr = True

    def levels(self, position_B: Tensor) -> Levels:
        """Take positions as times t, kept 1e-4 away from both ends."""
        return self.at_times(position_B.clamp(FLOW_EDGE, 1.0 - FLOW_EDGE))

    def at_times(self, time_B: Tensor) -> Levels:
        """Return the levels of times in [0, 1]."""
        time_B = time_B.double()
        return Levels((1.0 - time_B).float(), time_B.float(), (SDXL_TRAIN_STEPS * time_B).float())

    def sampling_levels(self, steps: int) -> Levels:
        """Return `steps` equally spaced times from 1 down to 1/steps."""
        return self.at_times(torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64))


NoisePath = VariancePreservingPath | FlowPath
