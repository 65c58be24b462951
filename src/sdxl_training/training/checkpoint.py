"""Checkpoints that are either whole or not there.

A checkpoint is a folder `checkpoints/step-000500` of safetensors and JSON files and a manifest with their sizes and
BLAKE2b digests. It is written under a temporary name, every file is flushed to the disk, the manifest comes last, and
the folder is renamed into place; so a folder with a manifest that verifies is complete, whatever happened since.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_training.records import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint cannot be written or cannot be used; the message names folder and remedy."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands beyond its tensors.

    `plan` fingerprints, by the name a user knows it by, everything that decides which sample comes when; `optimizer` is
    the type whose state is saved.
    """

    step: int
    plan: dict[str, str]
    optimizer: str
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by part (`unet`, `optimizer`, `average`, `loss_scale`) and name, and the run's state."""

    state: RunState
    parts: Mapping[str, Mapping[str, Tensor]]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """Return the step a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `folder` and return its path once it verifies.

    Raises CheckpointError when the disk is full or not writable; what was there before stays.
    """
    final = folder / checkpoint_name(checkpoint.state.step)
    temporary = folder / f".writing-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        _write_files(temporary, checkpoint)
        if final.exists():  # an unusable one, or step 0 of a run that starts anew
            final.rename(folder / f".replaced-{final.name}-{os.getpid()}")
        temporary.rename(final)
        _flush_folder(folder)
        _remove(folder / f".replaced-{final.name}-{os.getpid()}")
    except (OSError, safetensors.SafetensorError) as error:  # safetensors wraps what the disk says in its own class
        _remove(temporary)
        reason = "the disk is full" if os.strerror(errno.ENOSPC) in str(error) else str(error)
        raise CheckpointError(
            f"{final}: this checkpoint could not be written: {reason}. Earlier checkpoints are untouched; "
            "free space or mend the folder's permissions, then start the same command again to resume."
        ) from error
    problem = find_damage(final)
    if problem:
        raise CheckpointError(f"{final}: was written but does not read back: {problem}. Check the disk.")
    return final


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    for part, tensors in checkpoint.parts.items():
        if tensors:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, folder / f"{part}.safetensors")
            (folder / f"{part}.safetensors").chmod(0o644)  # safetensors writes 0600, whatever the umask
    (folder / STATE).write_text(json.dumps(asdict(checkpoint.state), indent=2))
    files = {path.name: {"bytes": path.stat().st_size, "blake2b": _digest(path)} for path in sorted(folder.iterdir())}
    for path in folder.iterdir():
        _flush(path)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
    _flush(folder / MANIFEST)
    _flush_folder(folder)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder in words, or None if its manifest verifies."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        if STATE not in files:
            return f"{MANIFEST} is damaged"
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["blake2b"]:
                return f"{name} does not match its digest"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, not text, or not of our making
        return f"{MANIFEST} is damaged"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, oldest first, whether they verify or not.

    A folder with any other name, such as a user's own copy `step-000500-good`, is none of ours.
    """
    ours = (path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(ours, key=checkpoint_step)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a sentence for each newer one that does not."""
    rejected: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return path, rejected
        rejected.append(f"{path}: left out, {problem}")
    return None, rejected


def load_checkpoint(folder: Path) -> Checkpoint:
    """Map a checkpoint's tensors into memory, on the CPU: with optimizer and average they are four models' worth.

    Raises CheckpointError if it is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder. Name one below <run>/checkpoints.")
    problem = find_damage(folder)
    if problem:
        raise CheckpointError(
            f"{folder}: this checkpoint is unusable: {problem}. Resume from another one below <run>/checkpoints."
        )
    state = json.loads((folder / STATE).read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: has format {state['format']}; this version reads format {FORMAT}.")
    try:
        parts = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder}: {error}. Resume from another checkpoint.") from error
    return Checkpoint(RunState(**state), parts)


def prune_checkpoints(folder: Path, keep_last: int, newest_step: int) -> None:
    """Delete all but the newest `keep_last` checkpoints up to `newest_step`, and what an interrupted save left behind.

    Folders of later steps are not of this run's making (a damaged one was resumed past) and do not count.
    """
    ours = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= newest_step]
    for path in ours[:-keep_last]:
        _remove(path)
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".replaced-*")):
        _remove(leftover)


def require_space(folder: Path, checkpoint_bytes: int, copies: int) -> None:
    """Raise CheckpointError unless `copies` checkpoints and one being written fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    needed = checkpoint_bytes * (copies + 1)
    if free < needed:
        raise CheckpointError(
            f"{folder}: {free / 2**30:.1f} GiB are free, but {copies} kept checkpoints and the one being written take "
            f"{needed / 2**30:.1f} GiB. Free space, lower global_config.checkpoints.keep_last, or choose another "
            "global_config.output_dir."
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flatten an optimizer's state to `<quantity>/<parameter name>`."""
    return {
        f"{quantity}/{name}": value
        for name, parameter in parameters.items()
        for quantity, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Copy flattened state to its parameter's device, types untouched: `load_state_dict` would cast fp32 state."""
    for flat_name, value in tensors.items():
        quantity, name = flat_name.split("/", 1)
        optimizer.state[parameters[name]][quantity] = value.to(parameters[name].device, copy=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
