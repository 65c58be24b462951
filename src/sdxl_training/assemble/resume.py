"""Where a run begins, and the way of its state to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.weighting import TagParts
from sdxl_training.config.schema import Config
from sdxl_training.model.sdxl import SDXL
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import Progress
from sdxl_training.training.checkpoint import (
    Checkpoint,
    RunState,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from sdxl_training.training.step import Run


def find_start(folder: RunFolder, resume: str, progress: Progress) -> Checkpoint | None:
    """Return the checkpoint to go on from, None for a new run.

    resume: auto, never, or a checkpoint's path. Raises UserError where going on would lose later checkpoints, or a new
    run would be mixed with an old one.
    """
    there = list_checkpoints(folder.checkpoints)
    if resume == "never":
        if there:
            raise UserError(
                f"--resume never: {folder.path} already holds a run with {len(there)} checkpoints. Choose another "
                "global_config.run_name, or move that folder away."
            )
        return None
    chosen = Path(resume)
    if resume == "auto":
        newest, rejected = newest_checkpoint(folder.checkpoints)
        for sentence in rejected:
            progress.message(sentence)
        if newest is None and rejected:
            raise UserError(
                f"{folder.checkpoints}: none of its {len(there)} checkpoints is usable. Move the folder {folder.path} "
                "away to start anew, or give another checkpoint with --resume PATH."
            )
        if newest is None or checkpoint_step(newest) == 0:  # before the first update nothing is lost by starting anew
            return None
        chosen = newest
    checkpoint = load_checkpoint(chosen)
    later = [path.name for path in there if resume != "auto" and checkpoint_step(path) > checkpoint.state.step]
    if later:
        raise UserError(
            f"--resume {resume}: this run has later checkpoints ({', '.join(later)}), which going on from here would "
            "replace. Move them away, or choose another global_config.run_name."
        )
    progress.message(f"resuming from {chosen}: {checkpoint.state.step} updates are done")
    return checkpoint


def load_weights(sdxl: SDXL, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's U-Net into `sdxl`; raises UserError where it is another model's."""
    try:
        sdxl.unet.load_state_dict(checkpoint.parts["unet"])
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"the checkpoint's U-Net does not fit model.source = {sdxl.source} ({str(error).splitlines()[0]}). "
            "Resume with the model.source the run began with."
        ) from error


def check_fits(checkpoint: Checkpoint, config: Config, plan: dict[str, str]) -> None:
    """Raise UserError unless `checkpoint` continues with the same sequence of samples and the same optimizer."""
    before = checkpoint.state.plan
    changed = [name for name in plan.keys() | before.keys() if plan.get(name) != before.get(name)]
    if changed:
        raise UserError(
            "the data of this run changed since its checkpoint, so it cannot go on where it was: "
            f"{', '.join(sorted(changed))}. "
            "Undo the change; or export the run's model and begin a new run from it under another "
            "global_config.run_name."
        )
    if checkpoint.state.optimizer != config.training.optimizer.type:
        raise UserError(
            f"training.optimizer.type = {config.training.optimizer.type}: the checkpoint holds the state of "
            f"{checkpoint.state.optimizer}. Use that, or begin a new run under another global_config.run_name."
        )


def restore(run: Run, tags: TagParts, checkpoint: Checkpoint, progress: Progress) -> None:
    """Put back what is remembered: optimizer, averaged weights, loss scale, levels, what is known of tags."""
    tags.restore(checkpoint, progress)
    update, parts = run.update, checkpoint.parts
    parameters = {**update.parameters, **update.beside}
    states = parts.get("optimizer", {})
    restore_optimizer(
        update.optimizer, parameters, {name: states[name] for name in states if name.split("/", 1)[1] in parameters}
    )
    _restore_objective(run, checkpoint, progress)
    if update.average.state():
        if "average" in parts:
            update.average.load(parts["average"])
        else:
            progress.message("training.ema: the checkpoint has no averaged weights; the average begins here")
    if update.loss_scale.state() and "loss_scale" in parts:
        update.loss_scale.load(dict(parts["loss_scale"]))


def _restore_objective(run: Run, checkpoint: Checkpoint, progress: Progress) -> None:
    """Put back what the objective has learnt or remembers; what is new or has another size begins here."""
    objective, parts = run.objective, checkpoint.parts
    if list(objective.uncertainty.parameters()):
        if "uncertainty" in parts:
            objective.uncertainty.load_state_dict(dict(parts["uncertainty"]))
        else:
            progress.message("training.loss_weight: the checkpoint has no learned log-variance; it begins here")
    remembered = objective.level_draw.state()
    if {name: value.shape for name, value in parts.get("levels", {}).items()} == {
        name: value.shape for name, value in remembered.items()
    }:
        objective.level_draw.load(parts.get("levels", {}))
    elif remembered:
        progress.message("training.level_density: the checkpoint has no such bins; adaptive levels begin here")


def snapshot(run: Run, tags: TagParts, sdxl: SDXL, config: Config, step: int, plan: dict[str, str]) -> Checkpoint:
    """Return everything that has to be saved after `step` updates."""
    update = run.update
    parts = {
        "unet": sdxl.unet.state_dict(),
        "optimizer": optimizer_tensors(update.optimizer, {**update.parameters, **update.beside}),
        "uncertainty": run.objective.uncertainty.state_dict(),
        "levels": run.objective.level_draw.state(),
        "average": update.average.state(),
        "loss_scale": update.loss_scale.state(),
        **tags.state(),
    }
    return Checkpoint(RunState(step, plan, config.training.optimizer.type), parts)
