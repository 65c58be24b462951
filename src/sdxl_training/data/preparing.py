"""Files of pictures turned into pixels as planned, many at once: what each backend does, and the backend on the CPU.

The other backend is in `dali`. A picture is decoded once, however many plans it comes with.

Shape legend: H x W pixel rows and columns, C = 3 colour channels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from torch import Tensor

from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.decoding import read_header
from sdxl_training.data.images import RESAMPLING, UnreadablePicture, decode_pixels, resize_and_crop
from sdxl_training.records import Bucket, CropPlan, SizeHW

Prepared = tuple[Tensor, ...] | UnreadablePicture
"""One uint8 tensor (H, W, C) in memory for each plan, of its bucket's size; or why the picture cannot be used."""


@dataclass(frozen=True, slots=True)
class Job:
    """A picture's file and what is wanted of it: one tensor a plan (crops, mirrored twins).

    data: the whole file. path: its name in messages. Raises ValueError where there is no plan, or where the plans are
    of pictures of different sizes.
    """

    data: bytes
    path: str
    plans: tuple[CropPlan, ...]

    def __post_init__(self) -> None:
        sizes = {plan.original_hw for plan in self.plans}
        if len(sizes) != 1:
            raise ValueError(f"{self.path}: plans of one picture must be for one size, not {sorted(sizes)}")

    @property
    def original_hw(self) -> SizeHW:
        """The picture's size as shown, for which it was planned."""
        return self.plans[0].original_hw

    @property
    def resized_hws(self) -> tuple[SizeHW, ...]:
        """The sizes to which the picture is resized, each once: crops and twins share one."""
        return tuple(dict.fromkeys(plan.resized_hw for plan in self.plans))


class Preparer(Protocol):
    """A way to carry out jobs. A picture's pixels are a function of its job alone, never of the jobs beside it."""

    @property
    def recipe(self) -> str:
        """What the pixels depend on beside the job, in a word: whatever keeps their latents must know it."""
        ...

    def __call__(self, jobs: Sequence[Job]) -> list[Prepared]:
        """Carry out the jobs and return their results in order.

        A picture that is not of the size it was planned for cannot be used: it has changed.
        """
        ...

    def close(self) -> None:
        """Give threads and device memory back."""
        ...


class CpuPreparer:
    """OpenCV's and Pillow's decoders and torch's antialiased resampling, a picture a thread.

    threads: how many at once; as many as the machine suggests where None. background: RGB below transparent parts.
    """

    recipe = RESAMPLING

    def __init__(self, threads: int | None = None, background: RGB = WHITE):
        self._prepare = partial(prepare, background=background)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")

    def __call__(self, jobs: Sequence[Job]) -> list[Prepared]:
        """Carry out the jobs and return their results in order; see Preparer."""
        return list(self._pool.map(self._prepare, jobs))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def prepare(job: Job, background: RGB = WHITE) -> Prepared:
    """Carry out one job in this thread."""
    try:
        pixels_HWC = decode_pixels(job.data, job.path, background)
    except UnreadablePicture as error:
        return error
    height, width = pixels_HWC.shape[:2]
    if (height, width) != job.original_hw:
        return UnreadablePicture(job.path, _why_of_another_size(job, (height, width)))
    return cut({size: _resize(pixels_HWC, job.original_hw, size) for size in job.resized_hws}, job.plans)


def _why_of_another_size(job: Job, decoded_hw: SizeHW) -> str:
    """Say why a picture is not of the size it was planned for: another file by now, or a header that is not true."""
    planned, decoded = ("x".join(map(str, size_hw)) for size_hw in (job.original_hw, decoded_hw))
    if read_header(io.BytesIO(job.data), job.path).size_hw == job.original_hw:
        return f"its header says {planned} (height x width), its pixels are {decoded}; save it anew, by another program"
    return f"it is no longer {planned} as when it was indexed; start again"


def cut(resized: dict[SizeHW, Tensor], plans: Sequence[CropPlan]) -> tuple[Tensor, ...]:
    """Cut each plan's bucket out of the picture that was resized for it, mirrored where the plan says so.

    resized: uint8 (H, W, C) by size.
    """
    return tuple(
        resize_and_crop(resized[plan.resized_hw], replace(plan, original_hw=plan.resized_hw)) for plan in plans
    )


def _resize(pixels_HWC: Tensor, original_hw: SizeHW, size_hw: SizeHW) -> Tensor:
    return resize_and_crop(pixels_HWC, CropPlan(original_hw, size_hw, (0, 0), Bucket(size_hw)))
