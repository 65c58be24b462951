"""Ending a run on request: finish the update, save, leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ANNOUNCEMENT = b"\nstopping: this update is finished and saved first; Ctrl-C once more ends at once, without saving\n"


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second Ctrl-C interrupts at once."""

    def __init__(self, announce: bool = False) -> None:
        self.signal_name: str | None = None
        self._announce = announce

    @property
    def requested(self) -> bool:
        """Whether a signal has asked for the end."""
        return self.signal_name is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal and say so; a repeated SIGINT raises KeyboardInterrupt."""
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._announce and not self.requested:
            os.write(2, ANNOUNCEMENT)  # not print: the signal may have come in the middle of one
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_on_signals(announce: bool = True) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request for the time of the context; `announce`: say so on stderr."""
    request = StopRequest(announce)
    before = {number: signal.signal(number, request.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
