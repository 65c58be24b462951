"""Loss scaling for float16, whose gradients underflow below 6e-8; other precisions use the do-nothing twin.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2. Everything stays on the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class LossScale(Protocol):
    """A factor on the loss before backward and out of the gradients after it."""

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to run backward from."""
        ...

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the factor out of the gradients in place."""
        ...

    def update(self, skipped: Tensor) -> None:
        """Adapt the factor after an update; `skipped` is 1 where it was void."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a checkpoint's state."""
        ...


class NoLossScale:
    """The factor 1."""

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss."""
        return loss

    def unscale(self, gradients: list[Tensor]) -> None:
        """Leave the gradients."""

    def update(self, skipped: Tensor) -> None:
        """Nothing adapts."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class DynamicLossScale:
    """Halve after a void update, double after `growth_interval` good ones in a row."""

    def __init__(self, device: torch.device, initial: float = 2.0**16, growth_interval: int = 1000) -> None:
        self._scale = torch.full((), initial, device=device)
        self._good_steps = torch.zeros((), device=device)
        self._growth_interval = growth_interval

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return loss * self._scale

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide the gradients by the factor; infinities stay infinite and are found by the norm."""
        torch._foreach_div_(gradients, self._scale)

    def update(self, skipped: Tensor) -> None:
        """Halve, or count and perhaps double."""
        self._good_steps = torch.where(skipped > 0, 0.0, self._good_steps + 1)
        grow = self._good_steps >= self._growth_interval
        factor = torch.where(skipped > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self._scale = (self._scale * factor).clamp(min=2.0**-14, max=2.0**24)
        self._good_steps = torch.where(grow, 0.0, self._good_steps)

    def state(self) -> dict[str, Tensor]:
        """Return factor and count."""
        return {"scale": self._scale, "good_steps": self._good_steps}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over factor and count."""
        self._scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])
