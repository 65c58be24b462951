"""Prediction heads: what the network's output means.

For a given input x = a x0 + b eps each head determines both x0 and eps, so training targets, loss weights and samplers
need nothing else of it. Coefficients are per sample and broadcast over C x H x W.
"""

from __future__ import annotations

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

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W / SNR: an error d of eps is an error -d b/a of x0."""
        return b2_weight / a.square()


class VelocityHead:
    """The network predicts v = a eps - b x0 on a variance-preserving path (Salimans & Ho 2022, appendix D)."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return a eps - b x0; exactly -x0 where a = 0."""
        return a * eps - b * x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = a x - b v and eps = b x + a v: a rotation, regular at every level."""
        return a * x - b * output, b * x + a * output

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return W / (SNR + 1) = b^2 W, since a^2 + b^2 = 1."""
        return b2_weight


class FlowHead:
    """The network predicts the velocity u = eps - x0 of the straight path a = 1 - t, b = t (Liu et al. 2023)."""

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return eps - x0."""
        return eps - x0

    def clean_and_noise(self, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = x - t u and eps = x + (1 - t) u."""
        return x - b * output, x + a * output

    def native_weight(self, b2_weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return t^2 W: an error d of u is an error -t d of x0."""
        return b2_weight
