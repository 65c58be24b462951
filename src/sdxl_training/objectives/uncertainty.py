"""The learned log-variance u(sigma) of EDM2: every noise level brings itself to unit expected loss.

L = loss / e^u + u (Karras et al. 2024, EDM2), u trained beside the network and dropped afterwards. At its optimum
u = ln E[loss | sigma], so each level's gradient is divided by what that level cannot help losing.

Shape legend: B samples, F features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sdxl_training.rng import Stream, torch_generator


class NoUncertainty(nn.Module):
    """Losses as they are."""

    def scaled(self, losses_B: Tensor, log_sigma_B: Tensor) -> Tensor:
        """Return the losses."""
        return losses_B

    def forward(self, losses_B: Tensor, log_sigma_B: Tensor) -> Tensor:
        """Return the losses."""
        return losses_B


class LogVariance(nn.Module):
    """u = one linear layer on random Fourier features of c_noise = ln(sigma) / 4, starting at u = 0.

    Fourier features as in EDM2: sqrt(2) cos(2 pi (f c_noise + phi)), f standard normal, phi
    uniform. Unlike there the layer is an ordinary one, because SDXL's other layers are.
    """

    EDGE = math.log(1e4)
    frequency_F: Tensor
    phase_F: Tensor

    def __init__(self, seed: int, channels: int = 128) -> None:
        super().__init__()
        generator = torch_generator(seed, Stream.FEATURES)
        self.register_buffer("frequency_F", torch.randn(channels, generator=generator))
        self.register_buffer("phase_F", torch.rand(channels, generator=generator))
        self.weight_F = nn.Parameter(torch.zeros(channels))

    def log_variance(self, log_sigma_B: Tensor) -> Tensor:
        """Return u for ln sigma, which is clamped to where levels are finite."""
        c_noise_B1 = (log_sigma_B.float().clamp(-self.EDGE, self.EDGE) / 4)[:, None]
        angle_BF = 2 * math.pi * (c_noise_B1 * self.frequency_F + self.phase_F)
        features_BF = math.sqrt(2) * angle_BF.cos()
        return features_BF @ self.weight_F / math.sqrt(len(self.weight_F))

    def scaled(self, losses_B: Tensor, log_sigma_B: Tensor) -> Tensor:
        """Return losses / e^u, float32: what pulls at the network."""
        with torch.autocast(losses_B.device.type, enabled=False):
            return losses_B / self.log_variance(log_sigma_B).exp()

    def forward(self, losses_B: Tensor, log_sigma_B: Tensor) -> Tensor:
        """Return losses / e^u + u, float32."""
        with torch.autocast(losses_B.device.type, enabled=False):
            u_B = self.log_variance(log_sigma_B)
            return losses_B / u_B.exp() + u_B
