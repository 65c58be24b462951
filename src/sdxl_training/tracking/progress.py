"""What a run says while it works: bars in a terminal, a line every ten seconds elsewhere, and all of it in run.log."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from sdxl_training.tracking.pace import Clock, Pace, duration_text, next_save, rate_text

LOG_NAME = "sdxl_training"
LINES_NAME = f"{LOG_NAME}.progress"
LOG_FILE = "run.log"
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_BARS = 0.1

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class Advance(Protocol):
    """How a job says that items are done."""

    def __call__(self, n: int = 1) -> None:
        """Count `n` more."""


class Update(Protocol):
    """How training says that `step` steps are done, with the last one's loss and images a second."""

    def __call__(self, step: int, loss: float, images_per_second: float) -> None:
        """Show that training stands at `step`."""


class Progress(Protocol):
    """What is shown of scan, cache and training."""

    def track(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Show how far a job of `total` items is."""

    def training(self, first_step: int, total_steps: int, save_every_steps: int) -> AbstractContextManager[Update]:
        """Show how far training is; `first_step` steps were taken before (0 for a new run)."""

    def message(self, text: str) -> None:
        """Say a sentence, above the bars where there are any."""


class ConsoleProgress:
    """Progress on a console: bars where it is a terminal; one line a while in the log, and on other consoles."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock

    def message(self, text: str) -> None:
        """Say a sentence on the console and in run.log."""
        logging.getLogger(LOG_NAME).info(text)

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Show count, rate and time left of a job of `total` items."""
        pace = Pace(0, clock=self._clock)
        done = 0

        def status() -> str:
            return f"{rate_text(pace.per_second)}/s, {duration_text(pace.seconds_to(total))} left"

        with self._display(description, 0, total, status) as show:

            def advance(n: int = 1) -> None:
                nonlocal done
                done += n
                pace.mark(done)
                show(done)

            yield advance

    @contextmanager
    def training(self, first_step: int, total_steps: int, save_every_steps: int) -> Iterator[Update]:
        """Show step, loss, images a second, and the time to the end and to the next checkpoint."""
        pace = Pace(first_step, clock=self._clock)
        figures = ""

        def status() -> str:
            return figures

        with self._display("step", first_step, total_steps, status) as show:

            def update(step: int, loss: float, images_per_second: float) -> None:
                nonlocal figures
                pace.mark(step)
                end = duration_text(pace.seconds_to(total_steps))
                save = duration_text(pace.seconds_to(next_save(step, save_every_steps, total_steps)))
                figures = f"loss {loss:.4f}, {rate_text(images_per_second)} images/s, end in {end}, save in {save}"
                show(step)

            yield update

    @contextmanager
    def _display(self, name: str, first: int, total: int, status: Callable[[], str]) -> Iterator[Callable[[int], None]]:
        """Yield a function that shows a count; the first and the last one given are always shown."""
        log = logging.getLogger(LINES_NAME)

        def say(count: int) -> None:
            log.info("%s %d/%d: %s", name, count, total, status())

        displays = [_NowAndThen(say, SECONDS_BETWEEN_LINES, self._clock)]
        with ExitStack() as stack:
            if draws_bars(self._console):
                bars = stack.enter_context(_bars(self._console))
                task = bars.add_task(name, total=total, completed=first, status="")

                def draw(count: int) -> None:
                    bars.update(task, completed=count, status=status())

                displays.append(_NowAndThen(draw, SECONDS_BETWEEN_BARS, self._clock))

            def show(count: int) -> None:
                for display in displays:
                    display.show(count)

            try:
                yield show
            finally:
                for display in displays:
                    display.finish()


class _NowAndThen:
    """Passes on the first count, then one in `seconds` at most, and the last."""

    def __init__(self, show: Callable[[int], None], seconds: float, clock: Clock) -> None:
        self._show = show
        self._seconds = seconds
        self._clock = clock
        self._due = -math.inf
        self._held: int | None = None

    def show(self, count: int) -> None:
        self._held = count
        if self._clock() >= self._due:
            self.finish()

    def finish(self) -> None:
        if self._held is not None:
            self._show(self._held)
            self._held = None
            self._due = self._clock() + self._seconds


class SilentProgress:
    """The do-nothing twin of ConsoleProgress: every rank but 0."""

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        yield _no_advance

    @contextmanager
    def training(self, first_step: int, total_steps: int, save_every_steps: int) -> Iterator[Update]:
        """Show nothing."""
        yield _no_update

    def message(self, text: str) -> None:
        """Say nothing."""


def _no_advance(n: int = 1) -> None:
    pass


def _no_update(step: int, loss: float, images_per_second: float) -> None:
    pass


def draws_bars(console: Console) -> bool:
    """Tell whether the console can redraw a line."""
    return console.is_terminal and not console.is_dumb_terminal


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


def open_log(run_dir: Path | None, console: Console) -> logging.Logger:
    """Send the logger "sdxl_training" to <run>/run.log (appended, with times) and to the console; return it.

    Without a run, to the console alone. Progress lines go to the console only where it draws no bars. A second call
    replaces the first one's files.
    """
    logger = logging.getLogger(LOG_NAME)
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    if run_dir is not None:
        file = logging.FileHandler(run_dir / LOG_FILE, encoding="utf-8")
        file.setFormatter(_Printable("%(asctime)s %(levelname)-7s %(message)s"))
        logger.addHandler(file)
    screen = _Screen(console)
    screen.setFormatter(_Printable("%(message)s"))
    if draws_bars(console):
        screen.addFilter(lambda record: record.name != LINES_NAME)
    logger.addHandler(screen)
    return logger


class _Printable(logging.Formatter):
    """Formatter that spells out control characters, and bytes that are no text: any file's name can be said."""

    def format(self, record: logging.LogRecord) -> str:
        said = super().format(record).encode("utf-8", "backslashreplace").decode()
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), said)


class _Screen(logging.Handler):
    """Log output through rich, which prints above its bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(Text(self.format(record), style=_STYLES.get(record.levelno, "")), soft_wrap=True)
