"""Uniform draws for the levels of a batch: each sample's own, or spread evenly over the global batch.

Shape legend: B samples of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxl_training.records import Batch
from sdxl_training.rng import Stream, numpy_generator, uniform


class Draws(Protocol):
    """One number in [0, 1) a sample."""

    def uniform(self, seed: int, batch: Batch) -> Tensor:
        """Return the draws, float64 on the CPU."""
        ...


@dataclass(frozen=True)
class IndependentDraws:
    """A function of (seed, visit, sample id) alone."""

    def uniform(self, seed: int, batch: Batch) -> Tensor:
        """Return each sample's own number."""
        numbers = [
            uniform(seed, Stream.LEVEL, visit, sample_id)
            for visit, sample_id in zip(batch.visits, batch.sample_ids, strict=True)
        ]
        return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class StratifiedDraws:
    """One number from each of G equal strata, G the global batch: u = (permutation[slot] + own number) / G.

    The density of one sample's level is unchanged; the levels of an update cover the whole range every time, so the
    mean loss varies less (Kingma et al. 2021, there with one offset for all). The permutation is a
    function of (seed, step), so ranks and micro-batches agree on it without talking.
    """

    def uniform(self, seed: int, batch: Batch) -> Tensor:
        """Return each sample's own number, moved into its stratum."""
        order = numpy_generator(seed, Stream.STRATA, batch.step).permutation(batch.global_batch)
        strata_B = torch.from_numpy(order)[torch.tensor(batch.slots)]
        return (strata_B + IndependentDraws().uniform(seed, batch)) / batch.global_batch
