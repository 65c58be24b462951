"""Checkpoints that are either whole or not there.

A checkpoint is a folder `checkpoints/step-000500` of safetensors and JSON files and a manifest with their sizes and
BLAKE2b digests. It is written under a temporary name, every file is flushed to the disk, the manifest comes last, and the
folder is renamed into place; so a folder with a manifest that verifies is complete, whatever happened since.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint cannot be written or cannot be used; the message names folder and remedy."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands beyond its tensors. `plan` fingerprints everything that decides which sample comes when."""

    step: int
    plan: str
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by part (`unet`, `optimizer`, `average`, `loss_scale`) and name, and the run's state."""

    state: RunState
    parts: Mapping[str, Mapping[str, Tensor]]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step: sorts by step."""
    return f"step-{step:06d}"


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
        if final.exists():  # only an unusable one: resuming never repeats a step whose checkpoint verifies
            os.replace(final, folder / f".replaced-{final.name}-{os.getpid()}")
        temporary.rename(final)
        _flush_folder(folder)
        _remove(folder / f".replaced-{final.name}-{os.getpid()}")
    except OSError as error:
        _remove(temporary)
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
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
    (folder / "state.json").write_text(json.dumps(asdict(checkpoint.state), indent=2))
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
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["blake2b"]:
                return f"{name} does not match its digest"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders below `folder`, oldest first, whether they verify or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a sentence for each newer one that does not."""
    rejected = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            return path, rejected
        rejected.append(f"{path}: left out, {problem}")
    return None, rejected


def load_checkpoint(folder: Path, device: torch.device) -> Checkpoint:
    """Read a checkpoint whole; raises CheckpointError if it is missing, damaged or of another format."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder. Name one below <run>/checkpoints.")
    problem = find_damage(folder)
    if problem:
        raise CheckpointError(f"{folder}: this checkpoint is unusable: {problem}. Resume from another one.")
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: has format {state['format']}; this version reads format {FORMAT}.")
    try:
        parts = {path.stem: load_file(path, device=str(device)) for path in sorted(folder.glob("*.safetensors"))}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{folder}: {error}. Resume from another checkpoint.") from error
    return Checkpoint(RunState(**state), parts)


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what an interrupted save left behind."""
    for path in list_checkpoints(folder)[:-keep_last]:
        _remove(path)
    for leftover in folder.glob(".writing-*"):
        _remove(leftover)


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
    """Put flattened state back, types untouched: `load_state_dict` would cast fp32 state to a parameter's type."""
    for flat_name, value in tensors.items():
        quantity, name = flat_name.split("/", 1)
        optimizer.state[parameters[name]][quantity] = value


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
