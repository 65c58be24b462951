"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers
from rich.console import Console

import sdxl_training
from sdxl_training.assemble.drawing import build_painter
from sdxl_training.assemble.folder import RunFolder, run_folder
from sdxl_training.assemble.resume import find_start, snapshot
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.config.load import LoadedConfig
from sdxl_training.parallel.group import Group, process_group
from sdxl_training.tracking.meters import Meter
from sdxl_training.tracking.progress import ConsoleProgress, Progress, SilentProgress, Update, open_log
from sdxl_training.tracking.report import ReportFacts, write_report
from sdxl_training.tracking.tracker import Trackers, open_trackers
from sdxl_training.training.checkpoint import prune_checkpoints, require_space, save_checkpoint
from sdxl_training.training.log import StepLog
from sdxl_training.training.preview import UnusablePictureError, make_grid
from sdxl_training.training.step import add_gradients
from sdxl_training.training.stop import StopRequest, stop_on_signals
from sdxl_training.training.trainer import Action, Every
from sdxl_training.training.trainer import train as make_updates


def train(loaded: LoadedConfig, resume: str, dry_run: bool) -> None:
    """Train as configured; with `dry_run` only prove that the first minute works, in a folder of its own.

    resume: auto (the newest checkpoint that verifies), never, or the path of a checkpoint. Raises UserError for all
    that a user can mend.
    """
    config = loaded.config
    folder = run_folder(config)
    if dry_run:
        folder = RunFolder(folder.path.with_name(f"{folder.path.name}.dry-run"))
    with ExitStack() as stack:
        group = stack.enter_context(process_group(config.global_config.device))
        stop = stack.enter_context(stop_on_signals())
        if group.is_main:
            folder.make()
            stack.enter_context(folder.held())
        group.wait()
        progress = _open_progress(folder, group)
        checkpoint = None if dry_run else find_start(folder, resume, group.device, progress)
        first_step = 0 if checkpoint is None else checkpoint.state.step
        if first_step >= config.training.max_steps:
            progress.message(
                f"{folder.path}: finished, {first_step} updates are done. Raise training.max_steps to go on."
            )
            return
        session = open_session(config, folder, group, progress, checkpoint, dry_run)
        if group.is_main:
            _note_configuration(folder, loaded, first_step, progress)
        progress.message(_arithmetic(session, first_step))
        if first_step == 0:
            rehearse(session)
        if dry_run:
            progress.message(f"dry run: one step on the largest bucket, one save and one preview worked: {folder.path}")
            return
        _run_to_the_end(session, first_step, stop)


def _open_progress(folder: RunFolder, group: Group) -> Progress:
    if not group.is_main:
        return SilentProgress()
    console = Console()
    open_log(folder.path, console)
    return ConsoleProgress(console)


def _note_configuration(folder: RunFolder, loaded: LoadedConfig, first_step: int, progress: Progress) -> None:
    changes = folder.write_config(loaded)
    if first_step and changes:
        progress.message("settings that differ from before:\n  " + "\n  ".join(changes))


def _arithmetic(session: Session, first_step: int) -> str:
    """Say the step arithmetic in plain words."""
    training, schedule = session.config.training, session.dataset.schedule
    epoch_steps = schedule.images_per_epoch / schedule.global_batch
    return (
        f"{len(session.dataset.plan.records)} pictures, {schedule.images_per_epoch} images an epoch with repeats; "
        f"batch_size {training.batch_size} x accumulation {training.accumulation} x processes "
        f"{session.group.world_size} = {schedule.global_batch} images a step; {epoch_steps:.1f} steps an epoch; "
        f"{training.max_steps} steps = {schedule.epoch_of(training.max_steps):.1f} epochs"
        + (f"; going on at step {first_step}, epoch {schedule.epoch_of(first_step):.2f}" if first_step else "")
    )


def rehearse(session: Session) -> None:
    """Do at once what would otherwise fail hours later: the largest bucket, a save, a preview. Learns nothing."""
    weights = sum(parameter.numel() * 4 for parameter in session.run.update.parameters.values())
    copies_of_weights = 3 + bool(session.run.update.average.state())  # weights, two moments, average
    keep_last = session.config.global_config.checkpoints.keep_last
    if session.group.is_main:
        require_space(session.folder.path, weights * copies_of_weights, keep_last)
    add_gradients(session.run, session.largest_batch())
    session.run.update.optimizer.zero_grad(set_to_none=True)
    save(session, 0)
    draw_preview(session, 0, Trackers())


def save(session: Session, steps_done: int) -> None:
    """Write a checkpoint and delete those that are no longer kept; other ranks wait at the next update."""
    if not session.group.is_main:
        return
    with session.meter.paused():
        state = snapshot(session.run, session.sdxl, session.config, steps_done, session.dataset.fingerprint)
        save_checkpoint(session.folder.checkpoints, state)
        prune_checkpoints(session.folder.checkpoints, session.config.global_config.checkpoints.keep_last, steps_done)


def draw_preview(session: Session, steps_done: int, trackers: Trackers) -> None:
    """Draw the preview grid with the averaged weights; running out of memory is said, not fatal."""
    previews = session.config.global_config.previews
    if not (session.group.is_main and previews.every_steps and previews.prompts):
        return
    run, side = session.run, session.config.data.resolution
    painter = build_painter(session.sdxl, session.sdxl.unet, run.objective, run.precision, session.group.device)
    path = session.folder.sample(steps_done)
    with session.meter.paused(), run.update.average.swapped_in():
        try:
            pictures = painter.paint(previews.prompts, (side, side), previews.steps, previews.guidance, previews.seed)
        except (torch.OutOfMemoryError, UnusablePictureError) as error:
            session.progress.message(f"step {steps_done}: no preview: {str(error).splitlines()[0]}")
            return
    if any(not picture.any() for picture in pictures):
        session.progress.message(f"step {steps_done}: a preview is all black; look at {path}")
    temporary = path.with_suffix(".tmp")
    make_grid(pictures, previews.prompts).save(temporary, format="PNG")
    temporary.replace(path)
    trackers.picture(steps_done, "samples", path)


def _run_to_the_end(session: Session, first_step: int, stop: StopRequest) -> None:
    config, group = session.config, session.group
    tracking, checkpoints = config.global_config.tracking, config.global_config.checkpoints
    names = ["tensorboard"] if tracking.tensorboard else []
    session.meter = Meter()  # what was rehearsed does not count
    trackers = open_trackers(names, session.folder.path, first_step) if group.is_main else Trackers()
    with session.progress.training(first_step, session.last_step, checkpoints.every_steps) as show:
        log = _step_log(session, trackers, show)

        def write_and_save(steps_done: int) -> None:
            log.write()
            save(session, steps_done)
            _write_report(session, steps_done, "running")

        actions: Sequence[Action] = (
            log,
            Every(checkpoints.every_steps, write_and_save),
            Every(config.global_config.previews.every_steps, lambda step: draw_preview(session, step, trackers), False),
        )
        steps_done = make_updates(
            session.run, session.batches(first_step), first_step, session.last_step, actions, stop
        )
    trackers.close()
    finished = steps_done == session.last_step
    _write_report(session, steps_done, "finished" if finished else "stopped")
    session.progress.message(_closing_words(session, steps_done, stop))


def _step_log(session: Session, trackers: Trackers, show: Update) -> StepLog:
    schedule, update, records = session.dataset.schedule, session.run.update, session.dataset.plan.records

    def facts(steps_done: int) -> dict[str, float]:
        return {
            "images": steps_done * schedule.global_batch,
            "epoch": schedule.epoch_of(steps_done),
            "lr": update.learning_rate_at(steps_done - 1),
        }

    return StepLog(
        every_steps=session.config.global_config.tracking.log_every_steps,
        images_per_step=schedule.global_batch,
        max_skipped_in_a_row=session.config.training.max_skipped_in_a_row,
        tracker=trackers,
        meter=session.meter,
        progress=session.progress,
        show=show,
        group=session.group,
        facts=facts,
        sample_names=lambda step: [records[draw.record].path for draw in schedule.batch_at(step)[1]],
    )


def _write_report(session: Session, steps_done: int, state: Literal["running", "finished", "stopped"]) -> None:
    if not session.group.is_main:
        return
    plan = session.dataset.plan
    facts = ReportFacts(
        run_name=session.config.global_config.run_name,
        state=state,
        total_steps=session.last_step,
        seconds=time.monotonic() - session.started,
        prompts=session.config.global_config.previews.prompts,
        buckets={str(bucket): count for bucket, count in plan.counts.items()},
        quarantined={entry.path: entry.reason for entry in session.dataset.quarantined},
        environment=_environment(session.group.device),
    )
    write_report(session.folder.path, facts)


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "sdxl-training": sdxl_training.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": name,
    }


def _closing_words(session: Session, steps_done: int, stop: StopRequest) -> str:
    folder = session.folder
    lines = [f"{steps_done} of {session.last_step} updates are done."]
    if steps_done < session.last_step:
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        lines = [
            f"stopped by {stop.signal_name} after {steps_done} updates; everything is saved.",
            f"go on with: {command}",
        ]
    elif folder.sample(steps_done).exists():
        lines.append(f"pictures:   {folder.sample(steps_done)}")
    lines.append(f"report:     {folder.path / 'report.html'}")
    lines.append(f"checkpoint: {folder.checkpoints / f'step-{steps_done:06d}'}")
    return "\n".join(lines)
