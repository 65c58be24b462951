"""What is written down of every update, and the end of a run whose updates are void."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sdxl_training.parallel.group import Group
from sdxl_training.records import StepStats, UserError
from sdxl_training.tracking.meters import Meter, peak_memory_gib
from sdxl_training.tracking.progress import Progress, Update
from sdxl_training.tracking.tracker import Tracker


class TrainingStoppedError(UserError):
    """Too many void updates in a row; the weights are those of the last good update."""


@dataclass
class StepLog:
    """Action that keeps every update's numbers and writes them out together every `every_steps` updates.

    Numbers stay on the device until then, so logging costs one transfer an interval. `facts(steps_done)` gives what is
    a function of the step alone (images, epoch, lr); `sample_names(step)` names the pictures of update `step`.
    """

    every_steps: int
    images_before: Callable[[int], int]
    max_skipped_in_a_row: int
    tracker: Tracker
    meter: Meter
    progress: Progress
    show: Update
    group: Group
    facts: Callable[[int], dict[str, float]]
    sample_names: Callable[[int], Sequence[str]]
    _pending: list[tuple[int, StepStats]] = field(default_factory=list)
    _skipped_in_a_row: int = 0

    def after_step(self, steps_done: int, stats: StepStats) -> None:
        """Keep the numbers; write at the interval."""
        self._pending.append((steps_done, stats))
        self.meter.step(self.images_before(steps_done) - self.images_before(steps_done - 1))
        if steps_done % self.every_steps == 0:
            self.write()

    def at_end(self, steps_done: int, finished: bool) -> None:
        """Write what is kept."""
        self.write()

    def write(self) -> None:
        """Write every kept update; all ranks call this at the same step.

        Raises TrainingStoppedError after `max_skipped_in_a_row` void updates.
        """
        if not self._pending:
            return
        losses = self.group.sum(torch.stack([stats.loss for _, stats in self._pending]))
        norms = torch.stack([stats.grad_norm for _, stats in self._pending])
        skips = torch.stack([stats.skipped for _, stats in self._pending])
        rows = torch.stack([losses, norms, skips], dim=1).tolist()
        timing = {
            "images_per_second": self.meter.images_per_second,
            "data_wait_fraction": self.meter.data_wait_fraction,
            "peak_memory_gib": peak_memory_gib(self.group.device),
        }
        for (steps_done, _), (loss, grad_norm, skipped) in zip(self._pending, rows, strict=True):
            facts = self.facts(steps_done)
            numbers = {"images": facts["images"], "epoch": facts["epoch"], "loss": loss, "lr": facts["lr"]}
            self.tracker.scalars(steps_done, {**numbers, "grad_norm": grad_norm, **timing, "skipped": skipped})
            self._watch(steps_done, bool(skipped))
        self.show(self._pending[-1][0], rows[-1][0], self.meter.images_per_second)
        self._pending.clear()

    def _watch(self, steps_done: int, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        names = ", ".join(self.sample_names(steps_done - 1))
        self.progress.message(
            f"step {steps_done}: loss or gradient is not finite; the update was left out. Its pictures: {names}"
        )
        if self._skipped_in_a_row >= self.max_skipped_in_a_row:
            raise TrainingStoppedError(
                f"stopped after {self._skipped_in_a_row} updates in a row without a finite loss and gradient "
                f"(training.max_skipped_in_a_row = {self.max_skipped_in_a_row}). No weight was changed by them and the "
                "checkpoints are untouched. Lower training.optimizer.learning_rate, use training.precision: bf16 or "
                "fp32, or look at the pictures named above."
            )
