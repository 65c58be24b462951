"""Loss weights over the noise level, defined once in x0 space.

A scheme is a weight W(SNR) on the squared error of x0, which makes it the same scheme for every head. It is written as
b^2 W in terms of a^2 and b^2 (SNR = a^2 / b^2), which stays finite at both ends of the path, so that no limit is ever
found by dividing floats: b^2 min(SNR, gamma) = min(a^2, gamma b^2). All of it is float64.

Shape legend: B samples, N levels of a quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy
import torch
from torch import Tensor

from sdxl_training.objectives.densities import LevelDensity
from sdxl_training.objectives.heads import EpsilonHead, Head, VelocityHead
from sdxl_training.objectives.paths import SDXL_TRAIN_STEPS, Levels, NoisePath
from sdxl_training.records import UserError

TerminalPolicy = Literal["official", "official_patched", "plus_one", "floor"]
KOHYA_SNR_LIMIT = 1000.0


@dataclass(frozen=True)
class Problem:
    """What a weight may depend on beside the level: the head, and how levels are drawn.

    log_shift: the resolution shift's ln alpha.
    """

    path: NoisePath
    head: Head
    density: LevelDensity
    log_shift: float = 0.0

    def quadrature(self) -> tuple[Tensor, Levels]:
        """Return ln sigma and the levels at the midpoints of N equal shares of probability.

        N is a multiple of SDXL's steps, so that a mean over its table is exact.
        """
        count = 16 * SDXL_TRAIN_STEPS
        uniform_N = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        log_sigma_N = self.density.log_sigma(uniform_N, self.path) + self.log_shift
        log_sigma_N = log_sigma_N.clamp(*self.path.log_sigma_range)
        return log_sigma_N, self.path.at(log_sigma_N)


class LossWeight(Protocol):
    """A weight on each sample's mean error in the head's own space."""

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return one weight a sample, float32."""
        ...


@dataclass(frozen=True)
class Scheme:
    """A weight that is nothing but W(SNR)."""

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        raise NotImplementedError

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return W in the head's own space."""
        a, b = a_B.double(), b_B.double()
        return head.native_weight(self.b2_weight(a.square(), b.square()), a, b).float()


@dataclass(frozen=True)
class NoWeight:
    """The objective's own loss: SNR in x0 space for eps, SNR + 1 for v, 1 / t^2 for flow, lambda(sigma) for EDM."""

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return the head's own weight in its own space: ones, but for a flow that is trained through v."""
        a, b = a_B.double(), b_B.double()
        return head.native_weight(head.own_b2_weight(a, b), a, b).float()


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


@dataclass(frozen=True)
class SoftMinSNR(Scheme):
    """W = gamma SNR / (gamma + SNR), Min-SNR without the corner (Crowson et al. 2024; k-diffusion's `soft-min-snr`)."""

    gamma: float

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        return self.gamma * a2 * b2 / (self.gamma * b2 + a2)


@dataclass(frozen=True)
class Debiased(Scheme):
    """W = sqrt(SNR): 1 / sqrt(SNR) on the error of eps (Yu et al. 2023, "Debias the Training of Diffusion Models")."""

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        return (a2 * b2).sqrt()


@dataclass(frozen=True)
class DebiasedKohya:
    """What sd-scripts calls debiased estimation, for runs that must match: eps 1 / sqrt(SNR), v 1 / (SNR + 1).

    The SNR is cut off at 1000. For v this is the plain loss on x0, another weight than the exact `Debiased`.
    """

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return the weight; raises ValueError for heads that sd-scripts does not define it for."""
        snr_B = (a_B.double() / b_B.double()).square().clamp(max=KOHYA_SNR_LIMIT)
        if isinstance(head, EpsilonHead):
            return snr_B.rsqrt().float()
        if type(head) is VelocityHead and head.sigma_data == 1:
            return (1 / (snr_B + 1)).float()
        raise ValueError("debiased_kohya is defined for epsilon and v_prediction only; use debiased")


@dataclass(frozen=True)
class P2(Scheme):
    """W = SNR / (k + SNR)^gamma (Choi et al. 2022, equation 8, there as a weight on eps)."""

    k: float
    gamma: float

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        return a2 * (b2 / (self.k * b2 + a2)) ** self.gamma


@dataclass(frozen=True)
class TruncatedSNR(Scheme):
    """W = max(SNR, 1) (Salimans & Ho 2022, section 4)."""

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        return torch.maximum(a2, b2)


@dataclass(frozen=True)
class EDMWeight(Scheme):
    """W = SNR + 1 / sigma_data^2, the lambda(sigma) of Karras et al. 2022 (table 1)."""

    sigma_data: float

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W."""
        return a2 + b2 / self.sigma_data**2


@dataclass(frozen=True)
class CosMapWeight(Scheme):
    """2 / (pi (1 - 2 t + 2 t^2)) on the error of u, t = b / (a + b): levels as if drawn by `cosmap`, by weight."""

    def b2_weight(self, a2: Tensor, b2: Tensor) -> Tensor:
        """Return b^2 W with W t^2 the formula above; (a + b)^2 (1 - 2 t + 2 t^2) = a^2 + b^2."""
        return 2 / math.pi * (a2.sqrt() + b2.sqrt()) ** 4 / (a2 + b2)


class Sigmoid:
    """The error of eps weighted by sigmoid(bias - ln SNR) under a uniform density of ln SNR (Kingma & Gao 2023).

    Under the density p that is really drawn from, that is sigmoid(bias - ln SNR) / p(ln SNR). In x0 space the first
    factor is soft Min-SNR with gamma = e^bias; the second is the slope of ln SNR over the uniform draw.
    """

    def __init__(self, problem: Problem, bias: float) -> None:
        self._soft = SoftMinSNR(math.exp(bias))
        log_sigma_N, _ = problem.quadrature()
        place_K, share_K = torch.unique_consecutive(log_sigma_N, return_counts=True)
        centre_K = (share_K.cumsum(0) - share_K / 2.0) / len(log_sigma_N)
        inside_K = place_K.isfinite()
        if inside_K.sum() < 2:
            raise UserError(
                "training.loss_weight.type = sigmoid: it divides by the density of levels, and this one has a single "
                "level. Choose another training.level_density or weight."
            )
        self._place = place_K[inside_K].numpy()
        self._slope = 2 * numpy.gradient(self._place, centre_K[inside_K].numpy())

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return the weight in the head's own space; beyond the outermost finite level its slope is held."""
        a, b = a_B.double(), b_B.double()
        slope = numpy.interp((b.log() - a.log()).cpu().numpy(), self._place, self._slope)
        b2_weight = self._soft.b2_weight(a.square(), b.square()) * torch.from_numpy(slope).to(a.device)
        return head.native_weight(b2_weight, a, b).float()


@dataclass(frozen=True)
class Normalised:
    """A weight divided by its mean under the density of levels, so that learning rates stay comparable."""

    of: LossWeight
    mean: float

    def weight(self, head: Head, a_B: Tensor, b_B: Tensor) -> Tensor:
        """Return the weight with mean 1."""
        return self.of.weight(head, a_B, b_B) / self.mean


WEIGHTS: dict[str, Callable[..., LossWeight]] = {
    "none": NoWeight,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "debiased": Debiased,
    "debiased_kohya": DebiasedKohya,
    "p2": P2,
    "snr_trunc": TruncatedSNR,
    "sigmoid": Sigmoid,
    "edm": EDMWeight,
    "cosmap": CosMapWeight,
}


def make_weight(name: str, options: Mapping[str, Any], normalise: bool, problem: Problem) -> LossWeight:
    """Build the weight called `name` in the table above for a problem, with mean 1 over its levels if asked."""
    weight = Sigmoid(problem, **options) if name == "sigmoid" else WEIGHTS[name](**options)
    return normalised(weight, problem) if normalise else weight


def normalised(weight: LossWeight, problem: Problem) -> LossWeight:
    """Return the weight with mean 1 under the problem's density of levels; raises UserError where it has no mean."""
    _, levels = problem.quadrature()
    mean = float(weight.weight(problem.head, levels.a_B, levels.b_B).double().mean())
    if not 0 < mean < math.inf:
        raise UserError(
            f"training.loss_weight.normalise: the weight's mean over the density of levels is {mean:g}, which cannot "
            "be brought to 1. Choose another weight or density, or normalise: false."
        )
    return Normalised(weight, mean)
