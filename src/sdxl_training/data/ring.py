"""Memory that a trainer and its workers share from the fork on, into which the workers write batches.

Torch gives each tensor that travels between processes a new shared segment, whose pages are new to both sides: that
costs more than making a cached batch does. Slots that are used again and again cost nothing but the writing.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sdxl_training.data.loader import RawBatch

ALIGNMENT = 64  # bytes: of a tensor's first


class Ring:
    """`slots` places of `slot_bytes` bytes for one batch each; batch number i lies in slot i mod `slots`.

    No message says that a slot is free: a ring has as many as there can be batches on their way and in use at a time.
    Beside each slot stands the number of the batch in it, so that a mistake in that count is an error, and not a batch
    with another one's numbers.

    The memory has no name and is no file: it is gone when no process that knows it is left. Pages that nothing was
    written to cost nothing.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = _aligned(slot_bytes)
        self._memory = _shared(slots * self.slot_bytes)
        self._holders = _shared(slots * torch.int64.itemsize).view(torch.int64)

    def slot(self, position: int) -> Slot:
        """Take the slot of batch `position`, to write it there."""
        number = position % self.slots
        self._holders[number] = position
        return Slot(self._memory, position, number * self.slot_bytes, (number + 1) * self.slot_bytes)

    def received(self, handed: Handed) -> RawBatch:
        """Return the batch as it lies in its slot, valid until that is taken again."""
        self._require(handed.position)
        found = {name: self._found(value) for name, value in handed.values.items()}
        return RawBatch(**found)

    def forget(self, handed: Handed, batch: RawBatch) -> None:
        """Empty the tensors of a batch whose slot may now be taken: keeping it is an error, not another batch."""
        self._require(handed.position)
        for name, value in handed.values.items():
            if isinstance(value, _Place):
                getattr(batch, name).set_()

    def _found(self, value: Any) -> Any:
        return value.of(self._memory) if isinstance(value, _Place) else value

    def _require(self, position: int) -> None:
        holder = int(self._holders[position % self.slots])
        if holder != position:
            raise RuntimeError(f"batch {position} was overwritten by batch {holder}: {self.slots} slots are too few")


class Slot:
    """Memory for one batch, given out from beginning to end."""

    def __init__(self, memory: Tensor, position: int, start: int, end: int) -> None:
        self.position = position
        self._memory, self._next, self._end = memory, start, end

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor to be written to: in the slot, or where that is full in memory of the process's own."""
        place = _Place(self._next, tuple(shape), dtype)
        if place.end > self._end:
            return torch.empty(place.shape, dtype=dtype)
        self._next = _aligned(place.end)
        return place.of(self._memory)

    def hand_over(self, batch: RawBatch) -> Handed:
        """Return what travels of the batch. Tensors that are not in the slot are copied to it, as far as they fit."""
        values = {one.name: getattr(batch, one.name) for one in fields(batch)}
        placed = {name: self._placed(value) for name, value in values.items() if isinstance(value, Tensor)}
        return Handed(self.position, values | placed)

    def _placed(self, tensor: Tensor) -> _Place | Tensor:
        if not self._has(tensor):
            own, tensor = tensor, self.empty(tensor.shape, tensor.dtype)
            if not self._has(tensor):
                return own
            tensor.copy_(own)
        return _Place(int(tensor.storage_offset()) * tensor.itemsize, tuple(tensor.shape), tensor.dtype)

    def _has(self, tensor: Tensor) -> bool:
        ours, its = (one.untyped_storage().data_ptr() for one in (self._memory, tensor))
        return ours == its and tensor.is_contiguous()


@dataclass(frozen=True, slots=True)
class Handed:
    """A batch on its way between processes: its fields, with the places of those tensors that lie in its slot."""

    position: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the ring's memory a tensor lies."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.end].view(self.dtype).view(self.shape)


def _shared(size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
