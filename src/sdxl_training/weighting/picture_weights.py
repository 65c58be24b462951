"""The weight of every picture as it is now: static, dynamic and trust together, within bounds, of mean 1.

    ln w_i = A(S)_i + ramp A(D)_i + ln rho_i - ln Z,   clipped to the bounds

Shape legend: P pictures, K tags, B samples.
"""

from __future__ import annotations

import hashlib
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

    def resume(self, step: int, anew: bool) -> None:
        """Do nothing."""


class PictureWeights:
    """The weights, from the terms at the last refresh.

    static_P: A(S) of each picture. share_P: how often a picture is drawn in an epoch times the weight of its source.
    """

    def __init__(
        self,
        lists: TagLists,
        share_P: Numbers,
        static_P: Numbers,
        bounds: Bounds,
        tags: TagTerm | None = None,
        pictures: PictureTerm | None = None,
        ramp: Ramp | None = None,
    ) -> None:
        self.lists, self.share_P, self.bounds = lists, share_P, bounds
        self._static_P = static_P
        self._tags, self._pictures, self._ramp = tags, pictures, ramp or Ramp()
        self._begun = 0  # the step from which the ramp counts
        self._outdated = False  # by other settings than those of the weights that were loaded
        self.weight_P = weights_of(static_P, share_P, bounds).astype(np.float32)

    @property
    def moves(self) -> bool:
        """Whether the weights follow the training."""
        return self._tags is not None or self._pictures is not None

    def refresh(self, step: int) -> None:
        """Bring the weights up to what is known after `step` updates."""
        log_P = self._static_P.copy()
        ramp = self._ramp.at(step - self._begun)
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
        if not self.moves:
            return {}
        weight = torch.from_numpy(self.weight_P.copy())
        return {"weight": weight, "begun": torch.tensor([self._begun]), "settings": self._settings()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put saved weights back; raises ValueError where they are of other pictures.

        Where they were made by other settings `resume` makes new ones, which must not wait for the next refresh.
        """
        if not self.moves or "weight" not in state:
            return
        if len(state["weight"]) != len(self.weight_P):
            raise ValueError(f"the saved state has {len(state['weight'])} pictures, here are {len(self.weight_P)}")
        self._begun = int(state["begun"])
        self.weight_P = state["weight"].numpy().copy()
        self._outdated = not torch.equal(state["settings"], self._settings())

    def resume(self, step: int, anew: bool) -> None:
        """Go on when everything is loaded. anew: what moves the weights begins to watch only now; the warm-up, too."""
        if anew:
            self._begun = step
        if anew or self._outdated:
            self.refresh(step)

    def _settings(self) -> Tensor:
        """Return a digest of what the weights are made of beside the terms."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._static_P, self.share_P, np.array([self.bounds.least, self.bounds.most])):
            digest.update(part.tobytes())
        return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


Weights = EqualWeights | PictureWeights
EQUAL_WEIGHTS = EqualWeights()
