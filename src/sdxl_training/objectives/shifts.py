"""Resolution shift: more noise for larger pictures.

t' = alpha t / (1 + (alpha - 1) t) moves logit t by ln alpha (Esser et al. 2024, equation 23), which is sigma times
alpha: NovelAI's rule to double sigma with the length of the canvas, and simple diffusion's ln SNR - 2 ln alpha, are
the same statement. A larger picture repeats each of its features over more pixels and so sees through more noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from sdxl_training.records import SizeHW


class LevelShift(Protocol):
    """A factor on sigma."""

    def log_factor(self, size_hw: SizeHW) -> float:
        """Return ln alpha for pictures of `size_hw` pixels."""
        ...


@dataclass(frozen=True)
class NoShift:
    """Levels as the density draws them."""

    def log_factor(self, size_hw: SizeHW) -> float:
        """Return 0."""
        return 0.0


@dataclass(frozen=True)
class FixedShift:
    """One factor for all pictures."""

    factor: float

    def log_factor(self, size_hw: SizeHW) -> float:
        """Return ln factor."""
        return math.log(self.factor)


@dataclass(frozen=True)
class PerBucketShift:
    """factor * sqrt(height width) / reference_px: the same noise per picture in every bucket. After equation 23."""

    factor: float
    reference_px: int

    def log_factor(self, size_hw: SizeHW) -> float:
        """Return ln alpha of this picture size."""
        return math.log(self.factor * math.sqrt(size_hw[0] * size_hw[1]) / self.reference_px)


SHIFTS: dict[str, type[LevelShift]] = {"none": NoShift, "fixed": FixedShift, "per_bucket": PerBucketShift}
