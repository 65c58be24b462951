"""Learning-rate schedules: pure functions of the update's number, so there is no scheduler state to save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Factor on the learning rate."""

    def factor(self, step: int) -> float:
        """Return the factor for update `step`, counted from 0."""
        ...


def warm_up(step: int, warmup_steps: int) -> float:
    """Rise linearly so that update `warmup_steps` is the first at full rate; the first update already moves."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


@dataclass(frozen=True)
class Constant:
    """Warm up, then stay."""

    warmup_steps: int

    def factor(self, step: int) -> float:
        """Return the warm-up's factor."""
        return warm_up(step, self.warmup_steps)


@dataclass(frozen=True)
class Cosine:
    """Warm up, then half a cosine down to `final_fraction` at `total_steps` (Loshchilov & Hutter 2017, equation 5)."""

    warmup_steps: int
    total_steps: int
    final_fraction: float = 0.0

    def factor(self, step: int) -> float:
        """Return warm-up times cosine decay."""
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return warm_up(step, self.warmup_steps) * (self.final_fraction + (1.0 - self.final_fraction) * decay)
