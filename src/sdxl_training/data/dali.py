"""Pictures prepared by NVIDIA DALI: decoded by nvJPEG and resized on the GPU, or by DALI's CPU operators without one.

The plans are those of the CPU backend, and so are the results, to a level or two on the CPU. DALI is given what it
decodes to the same picture: plain 8-bit grey or RGB in JPEG, PNG or simple WebP files. All else falls through to the
CPU backend and is counted, as is what DALI refuses.

DALI only decodes and resizes, in one pipeline. Turning upright, cutting and mirroring is ours for both backends: these
commute with a symmetric filter, and DALI's reading of EXIF is not the scan's.

Shape legend: H x W pixel rows and columns, C = 3 colour channels.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin
from torch import Tensor

from sdxl_training.data.colour import RGB, WHITE, is_srgb
from sdxl_training.data.decoding import SIDEWAYS, TURNS, PictureHeader, UnreadablePicture, read_header
from sdxl_training.data.preparing import CpuPreparer, Job, Prepared, Preparer, cut, prepare
from sdxl_training.records import Bucket, CropPlan, SizeHW, UserError

try:
    import nvidia.dali as dali  # type: ignore[import-not-found, unused-ignore]
    from nvidia.dali import fn, types

    WHY_ABSENT = ""
except ImportError as error:
    dali, WHY_ABSENT = None, str(error)

Pixels = NDArray[np.uint8]
# Files and the sizes wanted -> for each the size as stored, and its pixels (H, W, C) in the size wanted. Raises
# RuntimeError where any of the files cannot be decoded.
DecodeAndResize = Callable[[Sequence[bytes], Sequence[SizeHW]], list[tuple[SizeHW, Pixels]]]

LEAST_AGREEMENT_DB = 36.0  # of the two backends on a smooth picture
MAX_BATCH_PIXELS = 2**26  # decoded at once, 0.2 GB of RGB; a larger picture goes alone
DALI_COULD_NOT = "DALI could not decode it"

log = logging.getLogger(__name__)


def choose_backend(
    name: Literal["auto", "cpu", "dali"],
    cuda_device: int | None,
    *,
    batch_size: int,
    threads: int | None = None,
    background: RGB = WHITE,
) -> Preparer:
    """Return the backend of this name; `auto` is DALI where it is installed and has a GPU, else the CPU's.

    cuda_device: this rank's device, None where there is none. batch_size: the most pictures DALI decodes at once.
    Raises UserError where `dali` is asked for and cannot be had.
    """
    if name == "cpu" or (name == "auto" and (dali is None or cuda_device is None)):
        return CpuPreparer(threads, background)
    try:
        preparer = open_dali(cuda_device, batch_size, threads, background)
    except UserError as error:
        if name == "dali":
            raise
        log.warning("%s Pictures are prepared on the CPU.", error)
        return CpuPreparer(threads, background)
    if cuda_device is None:
        log.warning(
            "data.preprocessing.backend = dali: there is no CUDA device, so DALI's CPU operators are used. They are "
            "slower than backend cpu."
        )
    return preparer


def open_dali(
    device_id: int | None, batch_size: int, threads: int | None = None, background: RGB = WHITE
) -> DaliPreparer:
    """Return a preparer with a pipeline of its own, after a picture has shown that it works.

    device_id: the CUDA device; None for DALI's CPU operators. threads: of DALI, and as many of the CPU path. Raises
    UserError where DALI is not installed, does not run here, or makes another picture of it than the CPU backend.
    """
    if dali is None:
        raise UserError(
            f"data.preprocessing.backend = dali: NVIDIA DALI cannot be imported ({WHY_ABSENT}). Install it with `pip "
            f"install {_package()}` (Linux only), or set backend to cpu."
        )
    recipe = "dali-cpu" if device_id is None else "dali-gpu"
    decode = DaliPipeline(device_id, batch_size, threads)
    try:
        agreement = agreement_db(decode)
    except RuntimeError as error:
        raise UserError(
            f"data.preprocessing.backend = dali: DALI {dali.__version__} does not run here: {error} Set backend to cpu."
        ) from error
    if agreement < LEAST_AGREEMENT_DB:
        raise UserError(
            f"data.preprocessing.backend = dali: DALI {dali.__version__} makes another picture of a JPEG than the CPU "
            f"backend ({agreement:.1f} dB; at least {LEAST_AGREEMENT_DB:.0f} are needed). Set backend to cpu."
        )
    return DaliPreparer(decode, recipe, batch_size, CpuPreparer(threads, background))


def _package() -> str:
    """Return the DALI package for torch's CUDA: drivers that run CUDA 12 need not run CUDA 13."""
    return "nvidia-dali-cuda120" if (torch.version.cuda or "13").startswith("12") else "nvidia-dali-cuda130"


def agreement_db(decode: DecodeAndResize) -> float:
    """Return the PSNR between what DALI and the CPU backend make of a smooth picture of many colours."""
    y, x = np.mgrid[:192, :256] / 256
    wave_HWC = np.stack([np.sin(5 * x + 3 * y), np.sin(7 * y - 2 * x), np.cos(4 * x + 6 * y)], -1)
    sink = io.BytesIO()
    Image.fromarray((128 + 100 * wave_HWC).astype(np.uint8)).save(sink, "JPEG", quality=95)
    size_hw = (96, 128)
    plan = CropPlan((192, 256), size_hw, (0, 0), Bucket(size_hw))
    [(_, theirs_HWC)] = decode([sink.getvalue()], [size_hw])
    ours = prepare(Job(sink.getvalue(), "a picture of waves", (plan,)))
    assert not isinstance(ours, UnreadablePicture)
    return psnr_db(ours[0], torch.from_numpy(theirs_HWC))


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Return the peak signal to noise ratio of two uint8 tensors of one shape; infinite where they are equal."""
    error = (a.double() - b.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


class DaliPreparer:
    """Carries out jobs by DALI, and by its twin on the CPU what DALI cannot decode.

    decode: how DALI decodes, a DaliPipeline. recipe: see Preparer. batch_size: the most files `decode` takes. Raises
    ValueError for a batch size below 1.
    """

    def __init__(self, decode: DecodeAndResize, recipe: str, batch_size: int, twin: CpuPreparer):
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1")
        self.recipe = recipe
        self.prepared = 0
        self.fallen_through: Counter[str] = Counter()
        """Pictures the CPU path was given, by reason."""
        self._decode = decode
        self._batch_size = batch_size
        self._twin = twin

    def __call__(self, jobs: Sequence[Job]) -> list[Prepared]:
        """Carry out the jobs and return their results in order; see Preparer."""
        reasons: dict[int, str] = {}
        tasks: list[Task] = []
        for number, job in enumerate(jobs):
            try:
                orientation = orientation_of_plain(job)
            except NotForDali as error:
                reasons[number] = str(error)
            else:
                tasks += [Task(number, job, size, orientation) for size in job.resized_hws]
        resized: dict[int, dict[SizeHW, Tensor]] = {}
        for batch in batches(tasks, self._batch_size):
            for task, result in zip(batch, self._carry_out(batch), strict=True):
                if isinstance(result, str):
                    reasons[task.number] = result
                else:
                    resized.setdefault(task.number, {})[task.resized_hw] = result
        self.prepared += len(jobs) - len(reasons)
        self.fallen_through.update(reasons.values())
        by_twin = dict(zip(reasons, self._twin([jobs[number] for number in reasons]), strict=True))
        return [
            by_twin[number] if number in by_twin else cut(resized[number], job.plans) for number, job in enumerate(jobs)
        ]

    def _carry_out(self, tasks: Sequence[Task]) -> list[Tensor | str]:
        """Return each picture resized and upright, or why the CPU must have it.

        One bad file fails the whole batch. Then each is decoded alone, so that its neighbours stay with DALI: what a
        picture becomes must not depend on them.
        """
        try:
            decoded = self._decode([task.job.data for task in tasks], [task.stored_resized_hw for task in tasks])
        except RuntimeError as error:
            if len(tasks) == 1:
                # Said loudly once: a GPU that fails for good must not look like a folder of bad pictures.
                seen = self.fallen_through[DALI_COULD_NOT] > 0
                log.log(
                    logging.DEBUG if seen else logging.WARNING, "%s: %s: %s", tasks[0].job.path, DALI_COULD_NOT, error
                )
                return [DALI_COULD_NOT]
            return [result for task in tasks for result in self._carry_out([task])]
        return [task.upright(*result) for task, result in zip(tasks, decoded, strict=True)]

    def describe(self) -> str:
        """Return a sentence such as "DALI prepared 98 pictures, the CPU 2: 1 of mode CMYK, 1 transparent"."""
        sentence = f"DALI prepared {self.prepared} pictures, the CPU {self.fallen_through.total()}"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.fallen_through.most_common())
        return f"{sentence}: {reasons}" if reasons else sentence

    def close(self) -> None:
        """Give DALI's memory and all threads back."""
        self._decode = _closed
        self._twin.close()


def _closed(_files: Sequence[bytes], _sizes_hw: Sequence[SizeHW]) -> list[tuple[SizeHW, Pixels]]:
    raise ValueError("this preparer was closed")


@dataclass(frozen=True, slots=True)
class Task:
    """A picture to be resized to one size; `number` is its job's. Sizes are as shown unless their name says stored."""

    number: int
    job: Job
    resized_hw: SizeHW
    orientation: int

    @property
    def stored_resized_hw(self) -> SizeHW:
        """The size wanted, of the picture as it is stored."""
        return self._stored(self.resized_hw)

    def upright(self, decoded_hw: SizeHW, pixels_HWC: Pixels) -> Tensor | str:
        """Return the stored pixels as shown; or that the decoder saw another size than the header gave."""
        if decoded_hw != self._stored(self.job.original_hw):
            return "decoded to another size than its header's"
        turn = TURNS.get(self.orientation)
        return torch.from_numpy(pixels_HWC if turn is None else turn(pixels_HWC))

    def _stored(self, size_hw: SizeHW) -> SizeHW:
        return (size_hw[1], size_hw[0]) if self.orientation in SIDEWAYS else size_hw


def batches(tasks: Sequence[Task], batch_size: int) -> Iterator[list[Task]]:
    """Yield the tasks in order, at most `batch_size` and MAX_BATCH_PIXELS at once."""
    batch: list[Task] = []
    pixels = 0
    for task in tasks:
        more = task.job.original_hw[0] * task.job.original_hw[1]
        if batch and (len(batch) == batch_size or pixels + more > MAX_BATCH_PIXELS):
            yield batch
            batch, pixels = [], 0
        batch.append(task)
        pixels += more
    if batch:
        yield batch


# What DALI is given


class NotForDali(Exception):  # noqa: N818 - a decision
    """The picture is one for the CPU; says why in a few words, to be counted."""


def orientation_of_plain(job: Job) -> int:
    """Return the EXIF orientation of a picture that DALI decodes as we do; raises NotForDali for any other."""
    try:
        header = read_header(io.BytesIO(job.data), job.path)
    except UnreadablePicture as error:
        raise NotForDali("without a readable header") from error
    if header.format not in ("JPEG", "PNG", "WebP"):
        raise NotForDali(f"in {header.format} format")
    if header.mode not in ("L", "RGB"):
        raise NotForDali(f"of mode {header.mode}")
    if header.size_hw != job.original_hw:
        raise NotForDali("of another size than planned")
    if header.format == "WebP":
        _check_webp(job.data)
    else:
        _check_jpeg(job.data, header) if header.format == "JPEG" else _check_png(job.data, header)
    return header.orientation


def _check_webp(data: bytes) -> None:
    if data[12:16] == b"VP8X":  # DALI reads the simple format only
        raise NotForDali("in extended WebP (metadata, profile or animation)")


def _check_jpeg(data: bytes, header: PictureHeader) -> None:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))  # it has read the same header once already
    if not is_srgb(image.info.get("icc_profile"), header.mode):
        raise NotForDali("with a colour profile")
    components = bytes(layer[0] for layer in image.layer)
    if header.mode == "RGB" and (image.info.get("adobe_transform") == 0 or components == b"RGB"):
        raise NotForDali("in JPEG of RGB instead of YCbCr")
    # Whether nvJPEG refuses a file cut short or leaves its end grey is not documented.
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise NotForDali("in JPEG that does not end where the file does")


def _check_png(data: bytes, header: PictureHeader) -> None:
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    if data[12:16] != b"IHDR" or data[24] != 8:
        raise NotForDali("of another depth than 8 bits")
    if image.has_transparency_data:
        raise NotForDali("transparent")
    if image.is_animated:
        raise NotForDali("animated")
    if not is_srgb(image.info.get("icc_profile"), header.mode):
        raise NotForDali("with a colour profile")


# DALI itself


class DaliPipeline:
    """A pipeline that decodes files and resizes them by antialiased Lanczos; see DecodeAndResize.

    After an error DALI calls its pipeline invalid, so the next call builds another.
    """

    def __init__(self, device_id: int | None, batch_size: int, threads: int | None = None):
        self._device_id = device_id
        self._batch_size = batch_size
        self._threads = threads or torch.get_num_threads()
        self._pipeline: Any = None

    def __call__(self, files: Sequence[bytes], sizes_hw: Sequence[SizeHW]) -> list[tuple[SizeHW, Pixels]]:
        """Return each file's size as stored, and its pixels in the size wanted, in memory and the caller's own."""
        pipeline, self._pipeline = self._pipeline or self._build(), None
        pixels, shapes = pipeline.run(
            files=[np.frombuffer(data, np.uint8) for data in files],
            sizes_hw=[np.array(size, np.float32) for size in sizes_hw],
        )
        self._pipeline = pipeline
        pixels, shapes = pixels.as_cpu(), shapes.as_cpu()
        # Copied: the pipeline may use the memory again.
        return [
            ((int(height), int(width)), np.array(pixels.at(i)))
            for i, (height, width, _) in enumerate(shapes.at(i) for i in range(len(files)))
        ]

    def _build(self) -> Any:
        on_gpu = self._device_id is not None
        pipeline = dali.Pipeline(self._batch_size, self._threads, self._device_id, prefetch_queue_depth=1)
        with pipeline:
            pixels_HWC = fn.decoders.image(
                fn.external_source(name="files"),
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg does; nvJPEG's own way is coarser
                hw_decoder_load=0.0,  # the share would depend on the batch, and the pixels with it
            )
            resized_HWC = fn.resize(
                pixels_HWC,
                device="gpu" if on_gpu else "cpu",
                size=fn.external_source(name="sizes_hw"),
                interp_type=types.INTERP_LANCZOS3,
                antialias=True,
            )
            pipeline.set_outputs(resized_HWC, pixels_HWC.shape())
        pipeline.build()
        return pipeline
