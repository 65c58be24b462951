"""Prediction heads: what the network's output means.

For a given input x = a x0 + b eps each head determines both x0 and eps, so training targets, loss weights and samplers
need nothing else of it. Coefficients are per sample and broadcast over C x H x W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Head(Protocol):
    """Conversions between a head's quantity and (x0, eps)."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return what the network should have said."""
        ...

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x0, eps) that the output means for input x."""
        ...

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b^2 W of the objective's own loss, W being the weight it puts on |error of x0|^2."""
        ...

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Turn b^2 W, with W a weight on |error of x0|^2, into the weight on this head's squared error."""
        ...


class EpsilonHead:
    """The network predicts the noise (Ho et al. 2020). Invalid where a = 0: there eps = x and x0 is undetermined."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return eps."""
        return eps

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = (x - b eps) / a and eps."""
        return (x - b * output) / a, output

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b^2 SNR."""
        return a.square()

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W / SNR: an error d of eps is an error -d b/a of x0."""
        return b2_weight / a.square()


class CleanHead:
    """The network predicts x0 itself. Its optimum is the simplest; at low noise eps is badly determined."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return x0."""
        return x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 and eps = (x - a x0) / b."""
        return output, (x - a * output) / b

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b^2: W = 1."""
        return b.square()

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W."""
        return b2_weight / b.square()


@dataclass(frozen=True)
class VelocityHead:
    """The network predicts v = a eps - b x0 on a variance-preserving path (Salimans & Ho 2022, appendix D).

    With `sigma_data` other than 1 it is the network F of Karras et al. 2022 (equation 7) with the opposite sign, so
    that at sigma_data = 1 it is v itself: the sign of k-diffusion's v wrapper and of sgm's `VScaling`.
    """

    sigma_data: float = 1.0

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return sigma_data a eps - b x0 / sigma_data; exactly -x0 where a = 0 and sigma_data = 1."""
        return (self.sigma_data * a) * eps - (b / self.sigma_data) * x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = c_skip x / c_in + c_out F and eps; at sigma_data = 1 a rotation. Regular at every level."""
        scaled_a = self.sigma_data * a
        return self.sigma_data * (scaled_a * x - b * output), b * x + scaled_a * output

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b^2 (SNR + 1 / sigma_data^2), EDM's lambda(sigma)."""
        return a.square() + (b / self.sigma_data).square()

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return sigma_data^2 b^2 W: an error d of the output is an error -sigma_data b d of x0."""
        return b2_weight * self.sigma_data**2


@dataclass(frozen=True)
class FlowVelocityHead(VelocityHead):
    """The network predicts v, and is trained on the error of the flow velocity u = (a + b) v + (b - a) x.

    Since |error of u|^2 = (a + b)^2 |error of v|^2, only the objective's own weight differs from v-prediction.
    """

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return b^2 (sqrt(SNR) + 1)^2, which is the flow loss: W = 1 / t^2."""
        return (a + b).square()


class FlowHead:
    """The network predicts the velocity u = eps - x0 of the straight path a = 1 - t, b = t (Liu et al. 2023)."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return eps - x0."""
        return eps - x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = x - t u and eps = x + (1 - t) u."""
        return x - b * output, x + a * output

    def own_b2_weight(self, a: Tensor, b: Tensor) -> Tensor:
        """Return t^2 W = (1 - t + t)^2 = 1."""
        return (a + b).square()

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return t^2 W: an error d of u is an error -t d of x0."""
        return b2_weight
