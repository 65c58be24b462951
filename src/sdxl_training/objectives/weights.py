"""Loss weights over the noise level, defined once in x0 space.

A scheme is a weight W on the squared error of x0, which makes it the same scheme for every head. It is handed out as
b^2 W, which stays finite at both ends of the path (W itself goes to infinity as b goes to 0), so that no limit is ever
found by dividing floats: with SNR = a^2 / b^2, b^2 min(SNR, gamma) = min(a^2, gamma b^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sdxl_training.objectives.heads import EpsilonHead, Head

TerminalPolicy = Literal["official", "official_patched", "plus_one", "floor"]


class LossWeight(Protocol):
    """A weight on each sample's mean squared error in the head's own space."""

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return one weight a sample, float32 in, float32 out."""
        ...


@dataclass(frozen=True)
class NoWeight:
    """The head's own mean squared error: SNR in x0 space for eps, SNR + 1 for v, 1/t^2 for flow."""

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(a_B)


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR-gamma (Hang et al. 2023): W = min(SNR, gamma).

    At zero terminal SNR the published formula gives the noisiest level no weight at all for v and flow, which switches
    the training of that level off. `terminal` says what happens instead:

    * `official`: nothing, the published formula.
    * `official_patched`: weight 1 where SNR is exactly 0, as the authors' code does.
    * `plus_one`: W = min(SNR + 1, gamma), smooth, weight 1 at SNR 0. Not defined for eps.
    * `floor`: at least `minimum`.
    """

    gamma: float = 5.0
    terminal: TerminalPolicy = "official"
    minimum: float = 0.0

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return the head's weight for levels (a, b); raises ValueError for `plus_one` with an eps head."""
        if self.terminal == "plus_one" and isinstance(head, EpsilonHead):
            raise ValueError("Min-SNR's terminal policy plus_one is not defined for epsilon prediction; use official")
        a2_B, b2_B = a_B.double().square(), b_B.double().square()
        signal_B = a2_B + b2_B if self.terminal == "plus_one" else a2_B
        weight_B = head.native_weight(torch.minimum(signal_B, self.gamma * b2_B), a_B.double(), b_B.double())
        if self.terminal == "official_patched":
            weight_B = torch.where(a2_B == 0, 1.0, weight_B)
        if self.terminal == "floor":
            weight_B = weight_B.clamp(min=self.minimum)
        return weight_B.float()


WEIGHTS: dict[str, type[NoWeight] | type[MinSNR]] = {"none": NoWeight, "min_snr": MinSNR}
