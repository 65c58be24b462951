"""What the training step tells of its losses, gathered by tag without the device being waited for.

Each rank knows the losses of its own samples. They are written into a table with a column for every sample of the
global batch, zeros elsewhere, so that the sum over the ranks is the whole update to the last bit, however it was cut.

Shape legend: B samples of a micro-batch, G of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdxl_training.records import Batch
from sdxl_training.weighting.residuals import LEVELS, TagResiduals

UPDATES_KEPT = 64  # on the device, before they are fetched together


def level_bins(uniform_B: Tensor) -> Tensor:
    """Return the bin of each level by the draw in [0, 1) it came from: bins of equal probability."""
    return (uniform_B * LEVELS).long().clamp(0, LEVELS - 1)


class NoWatch:
    """Nothing is noted."""

    def see(self, batch: Batch, uniform_B: Tensor, errors_B: Tensor) -> None:
        """Do nothing."""

    def after_update(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Do nothing."""

    def forget(self) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""


class TagWatch:
    """Notes each sample's unweighted loss for the residuals of its tags. All ranks hold the same state."""

    def __init__(self, residuals: TagResiduals, device: torch.device) -> None:
        self._residuals = residuals
        self._device = device
        self._seen_3G: Tensor | None = None
        self._updates: list[Tensor] = []

    def see(self, batch: Batch, uniform_B: Tensor, errors_B: Tensor) -> None:
        """Take note of a micro-batch. uniform_B: the draws of the levels, on the CPU. errors_B: unweighted losses."""
        if self._seen_3G is None:
            self._seen_3G = torch.zeros(3, batch.global_batch, dtype=torch.float64, device=self._device)
        told_2B = torch.stack([torch.tensor(batch.tagged), level_bins(uniform_B)]).to(self._device, non_blocking=True)
        slots = slice(batch.slots[0], batch.slots[-1] + 1)
        self._seen_3G[:2, slots] = told_2B.double()
        self._seen_3G[2, slots] = errors_B.detach().double()

    def after_update(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """End an update: from now on all ranks know its losses."""
        if self._seen_3G is None:
            return
        self._updates.append(sum_over_ranks(self._seen_3G))
        self._seen_3G = None
        if len(self._updates) >= UPDATES_KEPT:
            self.residuals()

    def forget(self) -> None:
        """Drop what has been seen since the last update, as after a rehearsal."""
        self._seen_3G = None

    def residuals(self) -> TagResiduals:
        """Return the residuals after all updates so far; this waits for the device."""
        for update_3G in (update.cpu() for update in self._updates):
            picture_G, level_G = (row.long().numpy() for row in update_3G[:2])
            self._residuals.see(picture_G, level_G, update_3G[2].numpy())
        self._updates.clear()
        return self._residuals

    def state(self) -> dict[str, Tensor]:
        """Return everything that has to be saved between two updates."""
        return {name: torch.from_numpy(value.copy()) for name, value in self.residuals().state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a saved state back; raises ValueError where it is of other tags."""
        self._residuals.load({name: value.numpy() for name, value in state.items()})


Watch = NoWatch | TagWatch
NO_WATCH = NoWatch()
