"""The loop around the step: data in, actions at their intervals, a clean end on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sdxl_training.records import Batch, StepStats
from sdxl_training.training.step import Run, train_step
from sdxl_training.training.stop import StopRequest


class Action(Protocol):
    """Periodic work beside training; each action knows its own interval."""

    def after_step(self, steps_done: int, stats: StepStats) -> None:
        """Look at an update that has just been made; `steps_done` counts updates since the run began."""
        ...

    def at_end(self, steps_done: int, finished: bool) -> None:
        """Do what must be done when training ends; `finished` is False when it was asked to stop."""
        ...


@dataclass(frozen=True)
class Every:
    """Calls `work(steps_done)` each `steps` updates and at the end, never twice for the same step. 0 steps: never.

    With `when_stopped` False it leaves the end of a stopped run alone, so that somebody who asked need not wait.
    """

    steps: int
    work: Callable[[int], None]
    when_stopped: bool = True

    def after_step(self, steps_done: int, stats: StepStats) -> None:
        """Work when the interval divides the count."""
        if self.steps and steps_done % self.steps == 0:
            self.work(steps_done)

    def at_end(self, steps_done: int, finished: bool) -> None:
        """Work if the last update did not."""
        if self.steps and steps_done % self.steps != 0 and (finished or self.when_stopped):
            self.work(steps_done)


@dataclass(frozen=True)
class Within:
    """Calls `work(steps_done)` each `steps` updates, never at the end: what the training itself depends on.

    A run that is stopped and resumed then does it after the same updates as one that is not.
    """

    steps: int
    work: Callable[[int], None]

    def after_step(self, steps_done: int, stats: StepStats) -> None:
        """Work when the interval divides the count."""
        if steps_done % self.steps == 0:
            self.work(steps_done)

    def at_end(self, steps_done: int, finished: bool) -> None:
        """Do nothing."""


def train(
    run: Run,
    batches: Iterator[Sequence[Batch]],
    first_step: int,
    last_step: int,
    actions: Sequence[Action],
    stop: StopRequest,
) -> int:
    """Make updates number `first_step` to `last_step` - 1, or fewer when asked to stop; return how many are done.

    Actions run in their order after each update: put saving before drawing.
    """
    steps_done = first_step
    while steps_done < last_step and not run.group.any(stop.requested):
        stats = train_step(run, steps_done, next(batches))
        steps_done += 1
        for action in actions:
            action.after_step(steps_done, stats)
    if steps_done > first_step:  # without a new update, the run that came before has already seen to its end
        for action in actions:
            action.at_end(steps_done, finished=steps_done == last_step)
    return steps_done
