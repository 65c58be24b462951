"""Updates with tag weights as a run makes them, without its files; as a program, one rank of several.

    torchrun ... tag_run.py SETTINGS.json OUT

SETTINGS.json maps names to configurations. Of each, OUT/NAME.rankN.safetensors is what rank N holds after it.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.resume import snapshot
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.assemble.tag_actions import tag_actions
from sdxl_training.config.schema import Config
from sdxl_training.parallel.group import Group, process_group
from sdxl_training.tracking.progress import Progress, SilentProgress
from sdxl_training.tracking.tracker import Trackers
from sdxl_training.training.checkpoint import Checkpoint
from sdxl_training.training.stop import StopRequest
from sdxl_training.training.trainer import train


def open_for(
    config: Config, folder: Path, group: Group, checkpoint: Checkpoint | None = None, progress: Progress | None = None
) -> Session:
    """Return the session of a run in this folder."""
    run = RunFolder(folder)
    run.make()
    return open_session(config, run, group, progress or SilentProgress(), checkpoint)


def make_updates(
    config: Config,
    folder: Path,
    group: Group,
    last: int,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Make the updates up to number `last`, with all that is done about tags between them; return what is saved."""
    first = 0 if checkpoint is None else checkpoint.state.step
    with closing(open_for(config, folder, group, checkpoint, progress)) as session:
        train(session.run, session.batches(first), first, last, tag_actions(session, Trackers()), StopRequest())
        state = snapshot(session.run, session.tags, session.sdxl, config, last, session.dataset.fingerprint)
    return Checkpoint(state.state, {part: copied(tensors) for part, tensors in state.parts.items()})


def copied(tensors: Any) -> dict[str, Tensor]:
    """Return tensors that stay as they are while training goes on."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def flat(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return all tensors by part and name."""
    return {f"{part}:{name}": tensor for part, own in checkpoint.parts.items() for name, tensor in own.items()}


def main(settings: Path, out: Path) -> None:
    """Be one rank."""
    with process_group("cpu") as group:
        for name, described in json.loads(settings.read_text()).items():
            config = Config.model_validate(described)
            state = make_updates(config, out / f"run{group.rank}", group, config.training.max_steps)
            save_file(flat(state), out / f"{name}.rank{group.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
