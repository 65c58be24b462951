"""Noise paths: x = a x0 + b eps, one (a, b, label) per noise level.

The one variable of a noise level is ln sigma with sigma = b / a: minus infinity is clean, plus infinity pure noise.
Everything is computed from it in float64 and handed out in float32; levels and labels are never cast to a half
precision: in bf16 49 % of the labels 0..999 change and 12 % are off by more than one.

Shape legend: B samples, T table entries. `label` is the number the U-Net's timestep embedding reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SDXL_TRAIN_STEPS = 1000
FLOW_EDGE = 1e-4
"""Flow times are kept this far from 0 and 1 in training, where weights and conversions have poles."""
FLOW_LOG_SIGMA = math.log((1 - FLOW_EDGE) / FLOW_EDGE)


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


class NoisePath(Protocol):
    """How a noise level becomes network input and label.

    zero_terminal_snr: whether its labels come from the table that ends in pure noise. log_sigma_range: levels drawn in
    training are clamped to it.
    """

    zero_terminal_snr: bool
    log_sigma_range: tuple[float, float]

    def clock(self, position_B: Tensor) -> Tensor:
        """Return ln sigma, float64, at positions in [0, 1] on the path's own clock; 0 is clean."""
        ...

    def at(self, log_sigma_B: Tensor) -> Levels:
        """Return the levels of ln sigma in float64; plus infinity is pure noise."""
        ...


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


class TimestepTable:
    """SDXL's thousand noise levels, and the fractional timestep of any level between them.

    Between two entries ln sigma is linear in the timestep (as in k-diffusion's `sigma_to_t`). The last stretch of a
    table with zero terminal SNR ends at an infinite sigma; there a is linear in the timestep, as it is in the rescale.
    """

    def __init__(self, zero_terminal_snr: bool) -> None:
        table_T = sdxl_alphas_bar()
        self.zero_terminal_snr = zero_terminal_snr
        self.alphas_bar_T = rescale_zero_terminal_snr(table_T) if zero_terminal_snr else table_T
        self.log_sigma_T = 0.5 * (torch.log1p(-self.alphas_bar_T) - self.alphas_bar_T.log())
        self.finite_T = self.log_sigma_T[:-1] if zero_terminal_snr else self.log_sigma_T

    def log_sigma(self, timestep_B: Tensor) -> Tensor:
        """Return ln sigma at timesteps in [0, 999], fractions included."""
        lower_B = timestep_B.double().floor().long().clamp(0, len(self.finite_T) - 2)
        fraction_B = timestep_B.double() - lower_B
        inside_B = torch.lerp(self.finite_T[lower_B], self.finite_T[lower_B + 1], fraction_B)
        if not self.zero_terminal_snr:
            return inside_B
        last = len(self.finite_T) - 1
        a_B = self.alphas_bar_T[last].sqrt() * (last + 1 - timestep_B.double()).clamp(0, 1)
        beyond_B = 0.5 * torch.log1p(-a_B.square()) - a_B.log()
        return torch.where(timestep_B > last, beyond_B, inside_B)

    def timestep(self, log_sigma_B: Tensor) -> Tensor:
        """Return the timestep, fractions included, of ln sigma in float64; clamped to the table's ends."""
        upper_B = torch.searchsorted(self.finite_T, log_sigma_B).clamp(1, len(self.finite_T) - 1)
        low_B, high_B = self.finite_T[upper_B - 1], self.finite_T[upper_B]
        inside_B = upper_B - 1 + ((log_sigma_B - low_B) / (high_B - low_B)).clamp(0, 1)
        if not self.zero_terminal_snr:
            return inside_B
        share_B = torch.sigmoid(-2 * log_sigma_B).sqrt() / self.alphas_bar_T[-2].sqrt()
        return torch.where(log_sigma_B > self.finite_T[-1], len(self.finite_T) - share_B, inside_B)


class VariancePreservingPath:
    """SDXL's own path: a = sqrt(alpha-bar), b = sqrt(1 - alpha-bar), label the timestep, fractional between entries.

    Its clock ticks in SDXL's integer timesteps. With `zero_terminal_snr` the table is rescaled before anything
    (weights included) is derived from it.
    """

    def __init__(self, zero_terminal_snr: bool) -> None:
        self.table = TimestepTable(zero_terminal_snr)
        self.zero_terminal_snr = zero_terminal_snr
        self.log_sigma_range = (float(self.table.log_sigma_T[0]), float(self.table.log_sigma_T[-1]))

    def clock(self, position_B: Tensor) -> Tensor:
        """Map positions to the timestep floor(1000 position)."""
        timestep_B = (position_B * SDXL_TRAIN_STEPS).floor().long().clamp(max=SDXL_TRAIN_STEPS - 1)
        return self.table.log_sigma_T[timestep_B]

    def at(self, log_sigma_B: Tensor) -> Levels:
        """Return a = 1 / sqrt(1 + sigma^2), b = sigma / sqrt(1 + sigma^2); as sigmoids they are exact at both ends."""
        a2_B, b2_B = torch.sigmoid(-2 * log_sigma_B), torch.sigmoid(2 * log_sigma_B)
        return Levels(a2_B.sqrt().float(), b2_B.sqrt().float(), self.table.timestep(log_sigma_B).float())

    def at_timesteps(self, timestep_B: Tensor) -> Levels:
        """Return the levels of timesteps in [0, 999]."""
        return self.at(self.table.log_sigma(timestep_B))


class FlowPath:
    """The straight path of rectified flow: a = 1 - t, b = t, t from 0 (clean) to 1 (noise); label 1000 t, not rounded.

    Its clock is t itself. Source: Liu et al. 2023 (rectified flow), Lipman et al. 2023 with sigma_min = 0; time runs as
    in Esser et al. 2024.
    """

    zero_terminal_snr = True
    log_sigma_range = (-FLOW_LOG_SIGMA, FLOW_LOG_SIGMA)

    def clock(self, position_B: Tensor) -> Tensor:
        """Return ln(t / (1 - t))."""
        return torch.logit(position_B)

    def at(self, log_sigma_B: Tensor) -> Levels:
        """Return t = sigma / (1 + sigma)."""
        t_B = torch.sigmoid(log_sigma_B)
        return Levels(torch.sigmoid(-log_sigma_B).float(), t_B.float(), (SDXL_TRAIN_STEPS * t_B).float())

    def at_times(self, time_B: Tensor) -> Levels:
        """Return the levels of times in [0, 1]."""
        return self.at(torch.logit(time_B.double()))


class PreconditionedFlowPath(VariancePreservingPath):
    """Flow time, but the network sees SDXL's own input scale and SDXL's own labels.

    x_t / sqrt((1 - t)^2 + t^2) is the variance-preserving input of the same sigma = t / (1 - t); the label is the
    timestep of that sigma, clamped where the table ends. So a v-prediction network can be trained as a flow model
    without relearning a thing, and what it becomes is still a v-prediction network. Ours, no paper.
    """

    def __init__(self, zero_terminal_snr: bool) -> None:
        super().__init__(zero_terminal_snr)
        self.log_sigma_range = FlowPath.log_sigma_range

    def clock(self, position_B: Tensor) -> Tensor:
        """Return ln(t / (1 - t)): the clock is flow time."""
        return torch.logit(position_B)


class EDMPath:
    """Karras et al. 2022: x = c_in (x0 + sigma eps) with c_in = 1 / sqrt(sigma^2 + sigma_data^2).

    Labels are SDXL's timesteps ("timestep"), or c_noise = ln(sigma) / 4 (table 1) for models trained that way. The
    clock ticks in SDXL's timesteps, fractions included. At sigma_data = 1 this is the variance-preserving path.
    """

    log_sigma_range = (-FLOW_LOG_SIGMA, FLOW_LOG_SIGMA)

    def __init__(self, sigma_data: float, label: str, zero_terminal_snr: bool) -> None:
        self.sigma_data, self.label, self.zero_terminal_snr = sigma_data, label, zero_terminal_snr
        self.table = TimestepTable(zero_terminal_snr)

    def clock(self, position_B: Tensor) -> Tensor:
        """Map positions to timesteps evenly."""
        return self.table.log_sigma(position_B * (SDXL_TRAIN_STEPS - 1))

    def at(self, log_sigma_B: Tensor) -> Levels:
        """Return a = c_in and b = sigma c_in."""
        relative_B = log_sigma_B - math.log(self.sigma_data)
        a_B = torch.sigmoid(-2 * relative_B).sqrt() / self.sigma_data
        b_B = torch.sigmoid(2 * relative_B).sqrt()
        label_B = log_sigma_B / 4 if self.label == "c_noise" else self.table.timestep(log_sigma_B)
        return Levels(a_B.float(), b_B.float(), label_B.float())
