"""The weight of every picture as it is now: static, dynamic and trust together, within bounds, of mean 1.

    ln w_i = A(S)_i + ramp A(D)_i + ln rho_i - ln Z,   clipped to the bounds

Shape legend: P pictures, K tags, B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sdxl_training.weighting.normaliser import Bounds, weights_of
from sdxl_training.weighting.tag_lists import Numbers, TagLists


class TagTerm(Protocol):
    """What moves the weights of tags during training."""

    def log_weights(self) -> Numbers:
        """Return D_k of each tag."""
        ...


class PictureTerm(Protocol):
    """What moves the weights of single pictures during training."""

    def log_trust(self) -> Numbers:
        """Return ln rho of each picture."""
        ...


@dataclass(frozen=True, slots=True)
class Ramp:
    """0 for `warmup_steps` steps, then linearly to 1 over as many again."""

    warmup_steps: int = 0

    def at(self, step: int) -> float:
        """Return the share of the dynamic weights that counts after `step` updates."""
        if not self.warmup_steps:
            return 1.0
        return min(max(step / self.warmup_steps - 1.0, 0.0), 1.0)


class EqualWeights:
    """Every picture counts the same."""

    moves = False

    def of(self, pictures: Sequence[int]) -> Tensor:
        """Return 1 for each of these pictures, fp32, on the CPU."""
        return torch.ones(len(pictures))

    def all_of(self, pictures: int) -> Numbers:
        """Return 1 for each of so many pictures."""
        return np.ones(pictures)

    def refresh(self, step: int) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class PictureWeights:
    """The weights, from the terms at the last refresh.

    static_K: S of each tag. share_P: how often a picture is drawn in an epoch times the weight of its source.
    """

    def __init__(
        self,
        lists: TagLists,
        share_P: Numbers,
        static_K: Numbers,
        bounds: Bounds,
        tags: TagTerm | None = None,
        pictures: PictureTerm | None = None,
        ramp: Ramp | None = None,
    ) -> None:
        self.lists, self.share_P, self.bounds = lists, share_P, bounds
        self._static_P = lists.spread(static_K)
        self._tags, self._pictures, self._ramp = tags, pictures, ramp or Ramp()
        self.weight_P = weights_of(self._static_P, share_P, bounds).astype(np.float32)

    @property
    def moves(self) -> bool:
        """Whether the weights follow the training."""
        return self._tags is not None or self._pictures is not None

    def refresh(self, step: int) -> None:
        """Bring the weights up to what is known after `step` updates."""
        log_P = self._static_P.copy()
        ramp = self._ramp.at(step)
        if self._tags is not None and ramp > 0:
            log_P += ramp * self.lists.spread(self._tags.log_weights())
        if self._pictures is not None:
            log_P += self._pictures.log_trust()
        self.weight_P = weights_of(log_P, self.share_P, self.bounds).astype(np.float32)

    def of(self, pictures: Sequence[int]) -> Tensor:
        """Return the weights of these pictures, fp32, on the CPU."""
        return torch.from_numpy(self.weight_P[np.asarray(pictures, np.int64)])

    def all_of(self, pictures: int) -> Numbers:
        """Return the weights of all pictures."""
        return self.weight_P.astype(np.float64)

    def state(self) -> dict[str, Tensor]:
        """Return everything that has to be saved: between two refreshes the weights are not those of the terms."""
        return {"weight": torch.from_numpy(self.weight_P.copy())} if self.moves else {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put saved weights back; raises ValueError where they are of other pictures."""
        if not self.moves or "weight" not in state:
            return
        if len(state["weight"]) != len(self.weight_P):
            raise ValueError(f"the saved state has {len(state['weight'])} pictures, here are {len(self.weight_P)}")
        self.weight_P = state["weight"].numpy().copy()


Weights = EqualWeights | PictureWeights
EQUAL_WEIGHTS = EqualWeights()
