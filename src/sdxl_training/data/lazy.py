"""Sequences whose items are made when they are asked for: a million records cost what their columns cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Lazy(Sequence[Item_co]):
    """`length` items; number i is what `make(i)` returns, anew each time."""

    length: int
    make: Callable[[int], Item_co]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item_co]: ...
    def __getitem__(self, index: int | slice) -> Item_co | Sequence[Item_co]:
        if isinstance(index, slice):
            return [self.make(number) for number in range(self.length)[index]]
        return self.make(range(self.length)[index])
