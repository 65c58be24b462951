"""Throughput, waiting, memory and time left. Clocks are monotonic and passed in, so that tests need not sleep."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Clock = Callable[[], float]


class Meter:
    """Images a second and the share of time spent waiting for data, over the last `window_steps` steps.

    Call `step` at the end of every update. What happens inside `paused` (a checkpoint, a preview) is not counted.
    Times are taken from step end to step end, so work queued on a GPU is counted in the step that waits for it.
    """

    def __init__(self, window_steps: int = 50, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=window_steps)  # images, seconds, seconds waited
        self._last_end = clock()
        self._paused = 0.0
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for the loader."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the figures."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self, images: int) -> None:
        """Mark the end of an update that trained on `images` images over all ranks."""
        now = self._clock()
        self._steps.append((images, now - self._last_end - self._paused, self._waited))
        self._last_end, self._paused, self._waited = now, 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """Images a second over the window; 0 before the first step."""
        return _ratio(sum(images for images, _, _ in self._steps), self._seconds)

    @property
    def data_wait_fraction(self) -> float:
        """Share of the window's time spent waiting for the loader, 0 to 1; 0 before the first step."""
        return _ratio(sum(waited for _, _, waited in self._steps), self._seconds)

    @property
    def _seconds(self) -> float:
        return sum(seconds for _, seconds, _ in self._steps)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory ever held, in GiB: tensors on a CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**30
