"""Moving averages of the weights, which draw better pictures than the weights of the last update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor


class WeightAverage(Protocol):
    """An average that follows the trained parameters."""

    def update(self, step: int) -> None:
        """Follow the parameters after update `step`, counted from 0."""
        ...

    def swapped_in(self) -> AbstractContextManager[None]:
        """Context in which the model has the averaged weights."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name; empty when nothing is averaged."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's average."""
        ...


class NoAverage:
    """No average: the model's own weights are used throughout."""

    def update(self, step: int) -> None:
        """Follow nothing."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Leave the model as it is."""
        yield

    def state(self) -> dict[str, Tensor]:
        """Nothing to save."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""


class ExponentialAverage:
    """average <- d average + (1 - d) weights with d = min(decay, (1 + s) / (10 + s)) at update s.

    The ramp, that of diffusers' EMAModel, keeps the first weights from staying in the average. fp32.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = dict(parameters)
        self._averages = {name: value.detach().clone().float() for name, value in self._parameters.items()}
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move every average a little towards its parameter."""
        decay = min(self._decay, (1 + step) / (10 + step))
        values = [value.float() for value in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), values, 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange weights and averages for the time of the context, also when it is left by an error."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self._averages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's averages; names must be the same."""
        for name, average in self._averages.items():
            average.copy_(state[name])
