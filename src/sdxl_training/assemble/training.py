"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers
from rich.console import Console

import sdxl_training
from sdxl_training.assemble.dataset import arithmetic
from sdxl_training.assemble.drawing import build_painter, sampling_of
from sdxl_training.assemble.folder import RunFolder, run_folder
from sdxl_training.assemble.planning import make_report, worst_crops
from sdxl_training.assemble.resume import find_start, snapshot
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.assemble.tag_actions import figures_now, rehearse_probes, tag_actions
from sdxl_training.assemble.tag_report import sections_of_run, weight_lines
from sdxl_training.config import notes
from sdxl_training.config.load import LoadedConfig
from sdxl_training.parallel.group import Group, process_group
from sdxl_training.records import UserError
from sdxl_training.tracking.meters import Meter
from sdxl_training.tracking.progress import ConsoleProgress, Progress, SilentProgress, Update, open_log
from sdxl_training.tracking.report import ReportFacts, write_report
from sdxl_training.tracking.report_plan import sections_as_html
from sdxl_training.tracking.tracker import Trackers, open_trackers
from sdxl_training.training.checkpoint import prune_checkpoints, require_space, save_checkpoint
from sdxl_training.training.log import StepLog
from sdxl_training.training.mismatch import judge, measure_fit
from sdxl_training.training.preview import UnusablePictureError, make_grid
from sdxl_training.training.step import add_gradients, train_step
from sdxl_training.training.stop import StopRequest, stop_on_signals
from sdxl_training.training.trainer import Action, Every
from sdxl_training.training.trainer import train as make_updates

PICTURES_TO_JUDGE_BY = 8
COUNTED = 10_000  # pictures whose tags and captions the report of a run counts, so that it does not wait


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
        stack.enter_context(_what_ran_out(folder))
        group = stack.enter_context(process_group(config.global_config.device))
        unlocked = ""
        if group.is_main:
            folder.make()
            unlocked = stack.enter_context(folder.held())
        group.wait()
        progress = _open_progress(folder, group)
        if unlocked:
            progress.message(unlocked)
        checkpoint = None if dry_run else find_start(folder, resume, progress)
        first_step = 0 if checkpoint is None else checkpoint.state.step
        if first_step >= config.training.max_steps:
            progress.message(
                f"{folder.path}: finished, {first_step} updates are done. Raise training.max_steps to go on."
            )
            return
        session = stack.enter_context(closing(open_session(config, folder, group, progress, checkpoint)))
        if group.is_main:
            _note_configuration(folder, loaded, first_step, progress)
        progress.message(_arithmetic(session, first_step))
        if group.is_main:
            found, cache = session.dataset.found, session.dataset.cache
            report = make_report(config, found, COUNTED, cache)
            if report.cache is not None:
                progress.message(f"latents: {report.cache.counted}")
            session.data_page = report.html(worst_crops(config, found))
            _note_weights(session)
        del checkpoint  # while its files are mapped, deleting them frees no disk space
        if first_step == 0:
            check_base(session)
            rehearse(session)
        rehearse_probes(session)  # after a resume, too: its settings may be new
        if dry_run:
            _try_updates(session)
            progress.message(f"dry run: one step on the largest bucket, one save and one preview worked: {folder.path}")
            return
        session.fill()
        with stop_on_signals(announce=group.is_main) as stop:
            _run_to_the_end(session, first_step, stop)


@contextmanager
def _what_ran_out(folder: RunFolder) -> Iterator[None]:
    """Say in a sentence that the device's memory or the disk is full; raises UserError for both."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}). Lower training.batch_size or pixels_per_batch "
            "and raise training.accumulation instead, set training.memory.gradient_checkpointing: true or "
            "training.ema: {type: none}, or lower data.resolution; --dry-run tells at once what fits."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{error.filename or folder.path}: the disk is full. Free space, then start the same command again to "
            "resume."
        ) from error


def _open_progress(folder: RunFolder, group: Group) -> Progress:
    if not group.is_main:
        return SilentProgress()
    console = Console()
    open_log(folder.path, console)
    return ConsoleProgress(console)


def _note_configuration(folder: RunFolder, loaded: LoadedConfig, first_step: int, progress: Progress) -> None:
    for note in notes(loaded.config):
        progress.message(f"note: {note}")
    changes = folder.write_config(loaded)
    if first_step and changes:
        progress.message("settings that differ from before:\n  " + "\n  ".join(changes))


def _note_weights(session: Session) -> None:
    """Say what pictures count by their tags, where they do."""
    section = session.config.tag_weighting
    figures = figures_now(session) if section.changes_weights else None
    if figures is not None:
        session.progress.message(f"tag_weighting: {'; '.join(weight_lines(figures, section))}")


def _arithmetic(session: Session, first_step: int) -> str:
    """Say the step arithmetic in plain words."""
    training, schedule = session.config.training, session.dataset.schedule
    return (
        f"{len(session.dataset.plan.records)} pictures, {schedule.images_per_epoch} images an epoch with repeats; "
        f"{arithmetic(session.config, schedule, session.group.world_size)}; {schedule.steps_per_epoch:.1f} steps an "
        "epoch; "
        f"{training.max_steps} steps = {schedule.epoch_of(training.max_steps):.1f} epochs"
        + (f"; going on at step {first_step}, epoch {schedule.epoch_of(first_step):.2f}" if first_step else "")
    )


def check_base(session: Session) -> None:
    """Refuse to train a base model to predict what it was not trained to predict, unless that is wanted."""
    run = session.run
    fit = measure_fit(session.sdxl.unet, run.objective, session.first_batches(PICTURES_TO_JUDGE_BY), run.precision)
    session.progress.message(judge(fit, session.config.training.objective.accept_mismatch))


def rehearse(session: Session) -> None:
    """Do at once what would otherwise fail hours later: the largest bucket, a save, a preview. Learns nothing."""
    weights = sum(parameter.numel() * 4 for parameter in session.run.update.parameters.values())
    copies_of_weights = 3 + bool(session.run.update.average.state())  # weights, two moments, average
    keep_last = session.config.global_config.checkpoints.keep_last
    if session.group.is_main:
        require_space(session.folder.path, weights * copies_of_weights, keep_last)
    heaviest = session.largest_batch()
    session.park_encoders()  # as in training: else more memory would seem to be needed than is
    add_gradients(session.run, heaviest)
    session.run.update.optimizer.zero_grad(set_to_none=True)
    session.run.objective.level_draw.forget()
    session.run.watch.forget()
    save(session, 0)
    draw_preview(session, 0, Trackers())


def _try_updates(session: Session) -> None:
    """Make two updates that nobody keeps: only the second one has the optimizer's state beside the gradients."""
    for step in range(2):
        stats = train_step(session.run, step, session.largest_batch())
        if not session.group.sum(stats.loss).isfinite():
            raise UserError(
                f"dry run: the loss of step {step + 1} is not finite. Use training.precision: bf16 or fp32, or lower "
                "training.optimizer.learning_rate."
            )


def save(session: Session, steps_done: int) -> None:
    """Write a checkpoint and delete those that are no longer kept; other ranks wait at the next update."""
    if not session.group.is_main:
        return
    with session.meter.paused():
        state = snapshot(
            session.run, session.tags, session.sdxl, session.config, steps_done, session.dataset.fingerprint
        )
        save_checkpoint(session.folder.checkpoints, state)
        prune_checkpoints(session.folder.checkpoints, session.config.global_config.checkpoints.keep_last, steps_done)


def draw_preview(session: Session, steps_done: int, trackers: Trackers) -> None:
    """Draw the preview grid with the averaged weights; running out of memory is said, not fatal."""
    previews = session.config.global_config.previews
    if not (session.group.is_main and previews.every_steps and previews.prompts):
        return
    run, sdxl, side = session.run, session.sdxl, session.config.data.resolution
    painter = build_painter(session.config, sdxl, sdxl.unet, run.objective, run.precision, session.group.device)
    path = session.folder.sample(steps_done)
    with session.meter.paused(), run.update.average.swapped_in():
        try:
            pictures = painter.paint(previews.prompts, (side, side), sampling_of(previews))
        except (torch.OutOfMemoryError, UnusablePictureError) as error:
            session.progress.message(f"step {steps_done}: no preview: {str(error).splitlines()[0]}")
            return
    if any(not picture.any() for picture in pictures):
        session.progress.message(f"step {steps_done}: a preview is all black; look at {path}")
    temporary = path.with_suffix(".tmp")
    try:
        make_grid(pictures, previews.prompts).save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        session.progress.message(f"step {steps_done}: {path} cannot be written: {error.strerror or error}")
        return
    trackers.picture(steps_done, "samples", path)


def _run_to_the_end(session: Session, first_step: int, stop: StopRequest) -> None:
    config, group = session.config, session.group
    tracking, checkpoints = config.global_config.tracking, config.global_config.checkpoints
    names = ["tensorboard"] if tracking.tensorboard else []
    session.meter = Meter()  # what was rehearsed does not count
    trackers = open_trackers(names, session.folder.path, first_step) if group.is_main else Trackers()
    with closing(trackers), session.progress.training(first_step, session.last_step, checkpoints.every_steps) as show:
        log = _step_log(session, trackers, show)

        def write_and_save(steps_done: int) -> None:
            log.write()
            save(session, steps_done)
            _write_report(session, steps_done, "running")

        actions: Sequence[Action] = (
            log,
            *tag_actions(session, trackers),
            Every(checkpoints.every_steps, write_and_save),
            Every(config.global_config.previews.every_steps, lambda step: draw_preview(session, step, trackers), False),
        )
        steps_done = make_updates(
            session.run, session.batches(first_step), first_step, session.last_step, actions, stop
        )
    finished = steps_done == session.last_step
    _write_report(session, steps_done, "finished" if finished else "stopped")
    session.progress.message(_closing_words(session, steps_done, stop))


def _step_log(session: Session, trackers: Trackers, show: Update) -> StepLog:
    schedule, update, records = session.dataset.schedule, session.run.update, session.dataset.plan.records

    def facts(steps_done: int) -> dict[str, float]:
        return {
            "images": schedule.images_before(steps_done),
            "epoch": schedule.epoch_of(steps_done),
            "lr": update.learning_rate_at(steps_done - 1),
        }

    return StepLog(
        every_steps=session.config.global_config.tracking.log_every_steps,
        images_before=schedule.images_before,
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
    """Write quarantine.jsonl and the report; all ranks call it at once."""
    session.share_quarantine()
    if not session.group.is_main:
        return
    figures = figures_now(session)
    facts = ReportFacts(
        run_name=session.config.global_config.run_name,
        state=state,
        total_steps=session.last_step,
        seconds=time.monotonic() - session.started,
        prompts=session.config.global_config.previews.prompts,
        data=session.data_page,
        tags="" if figures is None else sections_as_html(sections_of_run(figures, session.config.tag_weighting)),
        quarantined={entry.path: entry.reason for entry in session.quarantined()},
        environment=_environment(session.group.device),
    )
    try:
        write_report(session.folder.path, facts)
    except OSError as error:
        session.progress.message(f"step {steps_done}: the report cannot be written: {error.strerror or error}")


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


def resume_command(arguments: Sequence[str], processes: int) -> str:
    """Return the command line that goes on with a run started by `arguments`: the same, resuming from the newest.

    Another --resume would be refused now that there are later checkpoints.
    """
    words = list(arguments)
    for place in [i for i, word in enumerate(words) if word == "--resume"][::-1]:
        del words[place : place + 2]
    words = [word for word in words if not word.startswith("--resume=")]
    python = Path(sys.executable)
    launcher = [str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else str(python)]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', processes)}"]
    return shlex.join([*launcher, *words])


def _closing_words(session: Session, steps_done: int, stop: StopRequest) -> str:
    folder = session.folder
    lines = [f"{steps_done} of {session.last_step} updates are done."]
    if steps_done < session.last_step:
        lines = [
            f"stopped by {stop.signal_name or 'another process of the run'} after {steps_done} updates; everything is "
            "saved.",
            f"go on with: {resume_command(sys.argv, session.group.world_size)}",
        ]
    elif folder.sample(steps_done).exists():
        lines.append(f"pictures:   {folder.sample(steps_done)}")
    lines.append(f"report:     {folder.path / 'report.html'}")
    lines.append(f"checkpoint: {folder.checkpoints / f'step-{steps_done:06d}'}")
    return "\n".join(lines)
