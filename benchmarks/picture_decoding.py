"""What does a picture cost from file to bucket, and how close is it to exact resampling?

    OMP_NUM_THREADS=1 python benchmarks/picture_decoding.py        # about two minutes

Generated pictures of 1536 x 1024 pixels (1/f noise, discs, grain) are decoded, resized to 1248 x 832 and cut to 1216 x
832: by Pillow alone (open, Lanczos, crop) and by this project. Time is the process's own (user and system), one thread,
the turns of both taken alternately and the best of all kept, so that other programs disturb little. PSNR is measured
against Lanczos in float64 of the same decoded pixels. Then: what reading a header costs, from a file on disk.

Shape legend: H x W pixel rows and columns, C = 3 colour channels.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from sdxl_training.data.images import RESAMPLING, decode_pixels, look_at, resize_and_crop
from sdxl_training.records import Bucket, CropPlan

PLAN = CropPlan((1024, 1536), (832, 1248), (0, 16), Bucket((832, 1216)))
Options = dict[str, Any]
Pixels = NDArray[Any]
CASES: dict[str, tuple[str, float, Options]] = {
    "JPEG 92, little grain": ("JPEG", 1.0, {"quality": 92}),
    "JPEG 92, much grain": ("JPEG", 4.0, {"quality": 92}),
    "JPEG 92, 4:4:4": ("JPEG", 2.0, {"quality": 92, "subsampling": 0}),
    "JPEG 92, progressive": ("JPEG", 2.0, {"quality": 92, "progressive": True}),
    "PNG": ("PNG", 2.0, {}),
    "PNG with alpha": ("PNG", 2.0, {"alpha": True}),
    "WebP 90": ("WEBP", 2.0, {"quality": 90}),
    "AVIF 80": ("AVIF", 2.0, {"quality": 80}),
}


def draw(grain: float, seed: int = 0) -> Pixels:
    """Return a picture (H, W, 3): noise whose amplitude falls as 1/f, discs with sharp edges, and grain."""
    height, width = PLAN.original_hw
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    phases = np.exp(2j * np.pi * random.random((4, *frequency.shape)))
    fields = np.fft.irfft2(phases / np.maximum(frequency, 1 / width), s=(height, width))
    fields /= fields.std((1, 2), keepdims=True)
    pixels_HWC = 128 + 40 * (fields[0, ..., None] + 0.3 * fields[1:].transpose(1, 2, 0))
    y, x = np.mgrid[:height, :width]
    for _ in range(12):
        radius, top, left = random.integers(20, 200), random.integers(height), random.integers(width)
        pixels_HWC[(y - top) ** 2 + (x - left) ** 2 < radius**2] = random.integers(0, 256, 3)
    return (pixels_HWC + random.normal(0, grain, pixels_HWC.shape)).clip(0, 255).astype(np.uint8)


def encode(kind: str, grain: float, options: Options) -> bytes:
    image = Image.fromarray(draw(grain))
    if options.get("alpha"):
        image.putalpha(image.getchannel("R"))
    sink = io.BytesIO()
    image.save(sink, kind, **{name: value for name, value in options.items() if name != "alpha"})
    return sink.getvalue()


def by_pillow(data: bytes) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    (top, left), (height, width) = PLAN.crop_tl, PLAN.bucket.size_hw
    resized = image.convert("RGB").resize(PLAN.resized_hw[::-1], Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + width, top + height))


def by_us(data: bytes) -> torch.Tensor:
    return resize_and_crop(decode_pixels(data, "picture"), PLAN)


def lanczos(length: int, wanted: int) -> Pixels:
    """Return the matrix that resamples `length` samples to `wanted`: three lobes, stretched to the coarser grid."""
    scale = length / wanted
    distance = (np.arange(length)[None] + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / max(scale, 1.0)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    normalised: Pixels = weights / weights.sum(1, keepdims=True)
    return normalised


def exactly(pixels_HWC: Pixels) -> Pixels:
    rows, columns = (lanczos(*lengths) for lengths in zip(PLAN.original_hw, PLAN.resized_hw, strict=True))
    resized: Pixels = np.einsum("ij,jkc,lk->ilc", rows, pixels_HWC.astype(float), columns, optimize=True).clip(0, 255)
    (top, left), (height, width) = PLAN.crop_tl, PLAN.bucket.size_hw
    return resized[top : top + height, left : left + width]


def decibels(ours: Pixels, exact: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.square(ours - exact).mean()))


def best_ms(works: list[Callable[[], object]], turns: int) -> list[float]:
    """Return the least own time of each, in ms; they take turns, so that a busy moment hits all alike."""
    best = [float("inf")] * len(works)
    for _ in range(turns):
        for number, work in enumerate(works):
            start = time.process_time_ns()
            work()
            best[number] = min(best[number], (time.process_time_ns() - start) / 1e6)
    return best


def compare(name: str, turns: int) -> str:
    data = encode(*CASES[name])
    pixels_HWC = decode_pixels(data, name)
    works: list[Callable[[bytes], object]] = [by_pillow, by_us, partial(decode_pixels, path=name)]
    pillow_ms, our_ms, decode_ms = best_ms([partial(work, data) for work in works], turns)
    exact = exactly(pixels_HWC.numpy())
    quality = decibels(by_us(data).numpy(), exact), decibels(np.asarray(by_pillow(data)), exact)
    figures = f"{pillow_ms:.1f} | {our_ms:.1f} | {decode_ms:.1f} | {our_ms - decode_ms:.1f} | {pillow_ms / our_ms:.2f}"
    return f"| {name} | {len(data) / 1000:.0f} | {figures} | {quality[0]:.1f} | {quality[1]:.1f} |"


def compare_headers(folder: Path, turns: int) -> list[str]:
    lines = []
    for kind in ("JPEG", "PNG", "WEBP"):
        path = folder / kind
        path.write_bytes(encode(kind, 2.0, {"quality": 92}))

        def by_pillow(path: Path = path) -> object:
            with Image.open(path) as image:
                return image.size, Image.Image.getexif(image).get(274)

        header, opened, everything = best_ms([partial(look_at, str(path)), by_pillow, path.read_bytes], turns * 20)
        lines.append(f"| {kind} | {1000 * header:.0f} | {1000 * opened:.0f} | {1000 * everything:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=25)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(f"torch {torch.__version__} ({RESAMPLING}), Pillow {PIL.__version__}, OpenCV {cv2.__version__}\n")
    print("| picture | kB | Pillow, ms | ours, ms | of it decoding | and resizing | ratio | PSNR, dB | Pillow's |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in CASES:
        print(compare(name, turns), flush=True)
    print("\n| header | ours, us | Pillow's open, us | reading the file, us |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(compare_headers(Path(folder), turns)))


if __name__ == "__main__":
    main()
