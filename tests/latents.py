"""Stand-ins for what the latent cache meets: pictures on disk, what is known of their bytes, and a VAE.

Shape legend: B pictures, C channels, H x W rows and columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch

from sdxl_training.data.buckets import Fitting
from sdxl_training.data.crops import Cut
from sdxl_training.data.images import digest_content, read_file
from sdxl_training.data.picture_plan import CENTRE, PicturePlan, plan_resolutions
from sdxl_training.records import Bucket, ImageRecord, SizeHW

BUCKETS = (Bucket((16, 16)), Bucket((16, 32)))


class Folder:
    """Pictures as files, by number; `opened` are the numbers of those that were read."""

    def __init__(self, path: Path, sizes: Sequence[SizeHW] = ()):
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.opened: list[int] = []
        self.records = [self.add(number, size_hw) for number, size_hw in enumerate(sizes)]

    def file(self, number: int) -> Path:
        return self.path / f"{number}.png"

    def add(self, number: int, size_hw: SizeHW, seed: int | None = None) -> ImageRecord:
        """Write a picture of noise and return its record; equal seeds and sizes give equal files."""
        generator = np.random.default_rng(number if seed is None else 1000 + seed)
        pixels_HWC = generator.integers(0, 256, (*size_hw, 3), np.uint8)
        self.file(number).write_bytes(cv2.imencode(".png", pixels_HWC)[1].tobytes())
        return ImageRecord(100 + number, str(self.file(number)), size_hw, ("",), (), picture=number)

    def read(self, number: int) -> bytes:
        self.opened.append(number)
        return read_file(str(self.file(number)))

    def digest(self, number: int) -> bytes:
        return digest_content(self.file(number).read_bytes())


class Known:
    """What one process knows of the pictures' bytes."""

    def __init__(self, count: int):
        self.digests = np.zeros((count, 2), np.uint64)
        self.is_known = np.zeros(count, bool)
        self.reasons: dict[int, str] = {}

    def known(self, picture: int) -> bytes | None:
        return self.digests[picture].tobytes() if self.is_known[picture] else None

    def learn(self, picture: int, content: bytes) -> None:
        self.digests[picture] = np.frombuffer(content, np.uint64)
        self.is_known[picture] = True

    def failure(self, picture: int) -> str | None:
        return self.reasons.get(picture)

    def fail(self, picture: int, reason: str) -> None:
        self.reasons[picture] = reason

    def columns(self):
        failed = np.zeros(len(self.is_known), bool)
        failed[list(self.reasons)] = True
        return self.digests, self.is_known, failed

    def refresh(self) -> bool:
        return False


class SharedKnown(Known):
    """The same for several processes: a line of a file for everything learnt."""

    def __init__(self, count: int, path: Path):
        super().__init__(count)
        self.path, self.end = path, 0
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def learn(self, picture: int, content: bytes) -> None:
        os.write(self.file, json.dumps([picture, content.hex(), ""]).encode() + b"\n")
        super().learn(picture, content)

    def fail(self, picture: int, reason: str) -> None:
        os.write(self.file, json.dumps([picture, "", reason]).encode() + b"\n")
        super().fail(picture, reason)

    def refresh(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(self.end)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self.end += sum(map(len, whole))
        for picture, content, reason in map(json.loads, whole):
            if content:
                super().learn(picture, bytes.fromhex(content))
            else:
                super().fail(picture, reason)
        return bool(whole)


class Vae:
    """Stands for a VAE of four channels: 8x8 blocks averaged; remembers the shapes of the batches it got."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels_BCHW.dtype == torch.float32
        assert pixels_BCHW.abs().max() <= 1
        self.shapes.append(tuple(pixels_BCHW.shape))
        means_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8) * self.scale
        mean_BCHW = torch.cat([means_BCHW, means_BCHW.mean(1, keepdim=True)], 1)
        return mean_BCHW, mean_BCHW.abs() * 0.1 + 0.01


class Silent:
    """Progress that nobody sees, counted."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def track(self, description: str, total: int) -> Iterator:
        self.total += total

        def advance(count: int) -> None:
            self.done += count

        yield advance


def plan_of(records: Sequence[ImageRecord], cut: Cut = CENTRE) -> PicturePlan:
    return plan_resolutions(records, [BUCKETS], Fitting(), cut)
