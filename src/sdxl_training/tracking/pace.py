"""How fast a count grows and how long it will take: what every progress line shows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

Clock = Callable[[], float]


class Pace:
    """Rate of a growing count, from marks at least a second apart over the last `window_marks` of them.

    Checkpoints and previews count: the time left is the time a person waits.
    """

    def __init__(self, position: int, window_marks: int = 300, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._marks = deque([(clock(), position)], maxlen=window_marks)
        self._now = self._marks[0]

    def mark(self, position: int) -> None:
        """Say that the count stands at `position` now."""
        self._now = (self._clock(), position)
        if self._now[0] - self._marks[-1][0] >= 1.0:
            self._marks.append(self._now)

    @property
    def per_second(self) -> float | None:
        """Counts a second over the window, or None in the first half second and as long as nothing moved."""
        seconds, counts = self._now[0] - self._marks[0][0], self._now[1] - self._marks[0][1]
        return counts / seconds if seconds >= 0.5 and counts > 0 else None

    def seconds_to(self, position: int) -> float | None:
        """Return the seconds until the count reaches `position`, or None while the rate is unknown."""
        rate = self.per_second
        return max(position - self._now[1], 0) / rate if rate else None


def rate_text(per_second: float | None) -> str:
    """Write a rate with three figures or more: 0.85, 41.2, 12,345; None is "?"."""
    if per_second is None:
        return "?"
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration_text(seconds: float | None) -> str:
    """Write a duration with its two largest units: 42 s, 5 min 02 s, 3 h 07 min, 6 d 04 h; None is "?"."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size:02d} {smaller}"
    return f"{whole} s"


def next_save(step: int, save_every_steps: int, total_steps: int) -> int:
    """Return the step of the next checkpoint after `step`: a multiple of the interval, or the end."""
    return min((step // save_every_steps + 1) * save_every_steps, total_steps)
