"""TensorBoard back end: event files in <run>/tensorboard under the same names as metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard.writer import SummaryWriter

FOLDER_NAME = "tensorboard"


class TensorBoard:
    """Tracker that writes event files; at most 30 seconds are lost to a kill."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open a writer for a run that stands at `step`; TensorBoard hides what a run that died wrote after it."""
        self._writer = SummaryWriter(log_dir=str(run_dir / FOLDER_NAME), purge_step=step + 1, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value under its own name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value under its own name."""
        self.scalars(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Write the picture at `path`."""
        with Image.open(path) as image:
            pixels_HW3 = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels_HW3, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still in memory and close the event file."""
        self._writer.close()
