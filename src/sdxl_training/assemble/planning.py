"""What a run would do, before it does anything; and the demo's pictures."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from sdxl_training.assemble.dataset import arithmetic, build_schedule, find_pictures
from sdxl_training.config.load import LoadedConfig
from sdxl_training.config.schema import cache_folder
from sdxl_training.data.cache import projected_bytes
from sdxl_training.data.demo_set import write_demo_set
from sdxl_training.tracking.progress import ConsoleProgress


def plan(loaded: LoadedConfig) -> None:
    """Print images, buckets, crops, steps and cache size; reads headers and captions only."""
    config, console = loaded.config, Console()
    found = find_pictures(config, ConsoleProgress(console))
    training, pictures = config.training, found.plan
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    schedule = build_schedule(config, pictures, processes)
    cache_mib = projected_bytes(pictures, config.data.cache.posterior) / 2**20
    lines = [
        pictures.describe(),
        f"unreadable: {len(found.quarantined())}",
        f"{arithmetic(config, schedule, processes)}, all of one bucket",
        f"{schedule.images_per_epoch} images an epoch = {schedule.steps_per_epoch:.1f} steps an epoch; what does not "
        "fill a batch is carried over",
        f"{training.max_steps} steps = {schedule.epoch_of(training.max_steps):.2f} epochs",
        f"latent cache in {cache_folder(config)}: {cache_mib:,.1f} MiB when full",
    ]
    said = "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def write_demo_data(to: Path, seed: int, pictures: int) -> None:
    """Write the demo's picture set and say what was written."""
    summary = write_demo_set(to, seed, pictures)
    done = "already there" if summary.already_there else "written"
    print(f"{summary.folder}: {summary.pictures} pictures with captions and {summary.broken} broken files, {done}")
