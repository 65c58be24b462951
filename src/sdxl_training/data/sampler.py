"""Which pictures make up which update: a pure function of (seed, step), so resuming is a look-up.

Bucket b has n_b slots (its records times their repeats). Its stream is the endless concatenation of permutations of the
slots, one for each round e = 0, 1, 2, ..., drawn from (seed, ORDER, e, b). Its j-th global batch is
stream[j G_b : (j+1) G_b] with G_b the bucket's global batch size, the same for all or larger for smaller pictures.
Epoch e consists of the batches floor(e n_b / G_b) .. floor((e+1) n_b / G_b) - 1 of every bucket, in an order drawn from
(seed, BUCKET_ORDER, e).

So every remainder carries over exactly, nothing is dropped, a bucket smaller than a batch is trained too, and how many
steps come before an epoch is arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sdxl_training.records import Bucket, Draw
from sdxl_training.rng import Stream, numpy_generator

Integers = NDArray[np.int64]


def batch_sizes(buckets: Iterable[Bucket], pixels_per_batch: int, parts: int) -> dict[Bucket, int]:
    """Return the global batch of each bucket: `parts` micro-batches of at most `pixels_per_batch` pixels each.

    parts: accumulation x processes, so that all of them get equally many. A picture larger than that is a micro-batch
    by itself.
    """
    return {bucket: parts * max(1, pixels_per_batch // (bucket.size_hw[0] * bucket.size_hw[1])) for bucket in buckets}


def slots_of_part(global_batch: int, part: int, parts: int) -> range:
    """Return the places in a global batch that micro-batch `part` of `parts` takes: equal shares, in order.

    Raises ValueError where the shares would not be equal.
    """
    if global_batch % parts:
        raise ValueError(f"{global_batch} pictures cannot be shared equally among {parts} micro-batches")
    size = global_batch // parts
    return range(part * size, (part + 1) * size)


class BatchSchedule:
    """The endless sequence of global batches, each of one bucket.

    buckets: record numbers in each bucket. repeats: for each record number, how often it counts in an epoch.
    global_batch: pictures in an update, one number or one for each bucket. Raises ValueError without pictures or with a
    global batch below 1.
    """

    def __init__(
        self,
        buckets: Mapping[Bucket, Sequence[int] | Integers],
        repeats: Sequence[int] | Integers,
        seed: int,
        global_batch: int | Mapping[Bucket, int],
    ) -> None:
        self._arguments = (buckets, repeats, seed, global_batch)
        self.seed = seed
        self.repeats = np.asarray(repeats, dtype=np.int64)
        self.buckets = tuple(bucket for bucket in sorted(buckets) if len(buckets[bucket]))
        self._members = [np.asarray(buckets[bucket], dtype=np.int64) for bucket in self.buckets]
        self._slots = [int(self.repeats[members].sum()) for members in self._members]
        if not self.buckets or min(self._slots) < 1:
            raise ValueError("a schedule needs at least one picture, and each at least one repeat")
        self._sizes = [global_batch if isinstance(global_batch, int) else global_batch[b] for b in self.buckets]
        if min(self._sizes) < 1:
            raise ValueError(f"a global batch must hold at least 1 picture, not {min(self._sizes)}")
        self._steps_an_epoch = sum(map(Fraction, self._slots, self._sizes), Fraction())
        # An epoch touches two rounds of each bucket that is not smaller than a batch, and workers are a little ahead.
        self._round = lru_cache(maxsize=3 * len(self.buckets))(self._draw_round)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def __reduce__(self) -> tuple[type[BatchSchedule], tuple[object, ...]]:
        return BatchSchedule, self._arguments

    @property
    def images_per_epoch(self) -> int:
        """Return pictures times repeats."""
        return sum(self._slots)

    @property
    def steps_per_epoch(self) -> float:
        """Return how many updates an epoch has on average; what does not fill a batch is carried over."""
        return float(self._steps_an_epoch)

    @property
    def global_batch(self) -> int:
        """Return the number of pictures in an update, or the largest where buckets differ."""
        return max(self._sizes)

    @property
    def global_batches(self) -> dict[Bucket, int]:
        """Return the number of pictures in an update of each bucket."""
        return dict(zip(self.buckets, self._sizes, strict=True))

    @property
    def heaviest_bucket(self) -> Bucket:
        """Return the bucket whose update has the most pixels."""
        sizes = self.global_batches
        return max(sizes, key=lambda bucket: sizes[bucket] * bucket.size_hw[0] * bucket.size_hw[1])

    def members(self, bucket: Bucket) -> Integers:
        """Return the record numbers of a bucket, as they were given."""
        return self._members[self.buckets.index(bucket)]

    def batch_at(self, step: int) -> tuple[Bucket, tuple[Draw, ...]]:
        """Return bucket and draws of update `step` (0 is the first)."""
        epoch = self._epoch_containing(step)
        bucket_numbers, batch_numbers = self._epoch(epoch)
        place = step - self.steps_before_epoch(epoch)
        return self._draws(int(bucket_numbers[place]), int(batch_numbers[place]))

    def order_of_epoch(self, epoch: int) -> None:
        """Draw an epoch's permutations at once, as its batches do one by one when they are asked for."""
        self._epoch(epoch)
        for number in range(len(self.buckets)):
            self._round(number, epoch)

    def steps_before_epoch(self, epoch: int) -> int:
        """Return how many updates epochs 0 .. epoch - 1 have together."""
        return sum(epoch * slots // size for slots, size in zip(self._slots, self._sizes, strict=True))

    def images_before(self, step: int) -> int:
        """Return how many pictures, repeats counted, updates 0 .. step - 1 draw together."""
        epoch = self._epoch_containing(step)
        whole = sum(epoch * slots // size * size for slots, size in zip(self._slots, self._sizes, strict=True))
        begun = self._epoch(epoch)[0][: step - self.steps_before_epoch(epoch)]
        return whole + int(np.asarray(self._sizes)[begun].sum())

    def epoch_of(self, step: int) -> float:
        """Return how many epochs' worth of pictures updates 0 .. step - 1 draw."""
        return self.images_before(step) / self.images_per_epoch

    def _epoch_containing(self, step: int) -> int:
        """Return e with steps_before_epoch(e) <= step < steps_before_epoch(e + 1)."""
        if step < 0:
            raise ValueError(f"step must not be negative, not {step}")
        # Rounding down loses less than one batch a bucket, so the epoch lies between these two.
        earliest = step // self._steps_an_epoch
        latest = (step + len(self.buckets)) // self._steps_an_epoch + 1
        return bisect_right(range(latest + 1), step, lo=earliest, key=self.steps_before_epoch) - 1

    def _draw_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Return (bucket number, batch number within the bucket's stream) of each update of an epoch, in order."""
        starts = [epoch * slots // size for slots, size in zip(self._slots, self._sizes, strict=True)]
        ends = [(epoch + 1) * slots // size for slots, size in zip(self._slots, self._sizes, strict=True)]
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
        slots, size = self._slots[bucket_number], self._sizes[bucket_number]
        position, end = batch_number * size, (batch_number + 1) * size
        # A bucket smaller than a batch runs through many tiny rounds, which would crowd the others out of the cache.
        round_of = self._round if slots >= size else self._draw_round
        draws: list[Draw] = []
        while position < end:
            round_number, offset = divmod(position, slots)
            taken = round_of(bucket_number, round_number)[offset : offset + end - position]
            for record, which in taken.tolist():
                draws.append(Draw(record, round_number * int(self.repeats[record]) + which))
            position += len(taken)
        return self.buckets[bucket_number], tuple(draws)
