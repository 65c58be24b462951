"""Which pictures make up which update: a pure function of (seed, step), so resuming is a look-up.

Bucket b has n_b slots (its records times their repeats). Its stream is the endless concatenation of permutations of the
slots, one for each round e = 0, 1, 2, ..., drawn from (seed, ORDER, e, b). Its j-th global batch is stream[jG : (j+1)G]
with G the global batch size. Epoch e consists of the batches floor(e n_b / G) .. floor((e+1) n_b / G) - 1 of every
bucket, in an order drawn from (seed, BUCKET_ORDER, e).

So every remainder carries over exactly, nothing is dropped, a bucket smaller than a batch is trained too, and how many
steps come before an epoch is arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sdxl_training.records import Bucket, Draw
from sdxl_training.rng import Stream, numpy_generator

Integers = NDArray[np.int64]


class BatchSchedule:
    """The endless sequence of global batches, each of one bucket.

    buckets: record numbers in each bucket. repeats: for each record number, how often it counts in an epoch. Raises
    ValueError without pictures or with a global batch below 1.
    """

    def __init__(
        self, buckets: Mapping[Bucket, Sequence[int]], repeats: Sequence[int], seed: int, global_batch: int
    ) -> None:
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, not {global_batch}")
        self._arguments = (buckets, repeats, seed, global_batch)
        self.seed = seed
        self.global_batch = global_batch
        self.repeats = np.asarray(repeats, dtype=np.int64)
        self.buckets = tuple(bucket for bucket in sorted(buckets) if len(buckets[bucket]))
        self._members = [np.asarray(buckets[bucket], dtype=np.int64) for bucket in self.buckets]
        self._slots = [int(self.repeats[members].sum()) for members in self._members]
        if not self.buckets or min(self._slots) < 1:
            raise ValueError("a schedule needs at least one picture, and each at least one repeat")
        # An epoch touches two rounds of each bucket that is not smaller than a batch, and workers are a little ahead.
        self._round = lru_cache(maxsize=3 * len(self.buckets))(self._draw_round)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __reduce__(self) -> tuple[type[BatchSchedule], tuple[object, ...]]:
        return BatchSchedule, self._arguments

    @property
    def images_per_epoch(self) -> int:
        """Return pictures times repeats."""
        return sum(self._slots)

    def batch_at(self, step: int) -> tuple[Bucket, tuple[Draw, ...]]:
        """Return bucket and `global_batch` draws of update `step` (0 is the first)."""
        epoch = self._epoch_containing(step)
        bucket_numbers, batch_numbers = self._epoch(epoch)
        place = step - self.steps_before_epoch(epoch)
        return self._draws(int(bucket_numbers[place]), int(batch_numbers[place]))

    def steps_before_epoch(self, epoch: int) -> int:
        """Return how many updates epochs 0 .. epoch - 1 have together."""
        return sum(epoch * slots // self.global_batch for slots in self._slots)

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are over before update `step`, with the fraction of the one under way."""
        epoch = self._epoch_containing(step)
        first, end = self.steps_before_epoch(epoch), self.steps_before_epoch(epoch + 1)
        return epoch + (step - first) / (end - first)

    def _epoch_containing(self, step: int) -> int:
        """Return e with steps_before_epoch(e) <= step < steps_before_epoch(e + 1)."""
        if step < 0:
            raise ValueError(f"step must not be negative, not {step}")
        # Rounding down loses less than one batch a bucket, so the epoch lies between these two.
        earliest = step * self.global_batch // self.images_per_epoch
        latest = (step + len(self.buckets)) * self.global_batch // self.images_per_epoch + 1
        return bisect_right(range(latest + 1), step, lo=earliest, key=self.steps_before_epoch) - 1

    def _draw_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Return (bucket number, batch number within the bucket's stream) of each update of an epoch, in order."""
        starts = [epoch * slots // self.global_batch for slots in self._slots]
        ends = [(epoch + 1) * slots // self.global_batch for slots in self._slots]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        bucket_numbers = np.repeat(np.arange(len(self.buckets)), counts)
        batch_numbers = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        order = numpy_generator(self.seed, Stream.BUCKET_ORDER, epoch).permutation(len(bucket_numbers))
        return bucket_numbers[order], batch_numbers[order]

    def _draw_round(self, bucket_number: int, round_number: int) -> Integers:
        """Return (record number, which repeat) in the order of one round through a bucket, shape (slots, 2)."""
        members, slots = self._members[bucket_number], self._slots[bucket_number]
        repeats = self.repeats[members]
        records = np.repeat(members, repeats)
        which = np.arange(slots) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        size_hw = self.buckets[bucket_number].size_hw
        order = numpy_generator(self.seed, Stream.ORDER, round_number, *size_hw).permutation(slots)
        return np.stack([records[order], which[order]], axis=1)

    def _draws(self, bucket_number: int, batch_number: int) -> tuple[Bucket, tuple[Draw, ...]]:
        slots = self._slots[bucket_number]
        position, end = batch_number * self.global_batch, (batch_number + 1) * self.global_batch
        # A bucket smaller than a batch runs through many tiny rounds, which would crowd the others out of the cache.
        round_of = self._round if slots >= self.global_batch else self._draw_round
        draws: list[Draw] = []
        while position < end:
            round_number, offset = divmod(position, slots)
            taken = round_of(bucket_number, round_number)[offset : offset + end - position]
            for record, which in taken.tolist():
                draws.append(Draw(record, round_number * int(self.repeats[record]) + which))
            position += len(taken)
        return self.buckets[bucket_number], tuple(draws)
