"""What does a picture cost in CPU time and on the wall clock: Pillow in a loop, the CPU backend, and DALI?

    OMP_NUM_THREADS=1 python benchmarks/preprocessing.py --threads 2       # under a minute

The generated pictures of `picture_decoding.py` (JPEG of 1536 x 1024) are decoded, resized to 1248 x 832 and cut to 1216
x 832, a batch at a time. CPU time is the process's own (user and system, all threads); wall time depends on what else
runs. The turns of all take turns, and the best of each is kept. DALI is measured where it is installed: its CPU
operators, and nvJPEG with --device 0. Pictures a second of GPU time are not measured.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import cv2
import PIL
import torch

from picture_decoding import PLAN, Options, by_pillow, encode
from sdxl_training.data import dali
from sdxl_training.data.images import RESAMPLING
from sdxl_training.data.preparing import CpuPreparer, Job, Preparer

CASES: dict[str, tuple[str, float, Options]] = {
    "JPEG 92": ("JPEG", 2.0, {"quality": 92}),
    "JPEG 92, progressive": ("JPEG", 2.0, {"quality": 92, "progressive": True}),
    "PNG": ("PNG", 2.0, {}),
}
Work = Callable[[list[Job]], object]


def in_a_loop(jobs: list[Job]) -> object:
    return [by_pillow(job.data) for job in jobs]


def best_seconds(works: list[Work], jobs: list[Job], turns: int) -> list[tuple[float, float]]:
    """Return the least CPU seconds and the least wall seconds of each."""
    best = [(float("inf"), float("inf"))] * len(works)
    for _ in range(turns):
        for number, work in enumerate(works):
            cpu, wall = time.process_time(), time.perf_counter()
            work(jobs)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            best[number] = min(best[number][0], cpu), min(best[number][1], wall)
    return best


def preparers(threads: int, device: int | None, batch: int) -> dict[str, Preparer]:
    found: dict[str, Preparer] = {f"CPU backend, {threads} threads": CpuPreparer(threads)}
    if threads != 1:
        found["CPU backend, 1 thread"] = CpuPreparer(1)
    if dali.dali is not None:
        found[f"DALI's CPU operators, {threads} threads"] = dali.open_dali(None, batch, threads)
        if device is not None:
            found[f"DALI with nvJPEG, {threads} threads"] = dali.open_dali(device, batch, threads)
    return found


def compare(name: str, works: dict[str, Work], batch: int, turns: int) -> list[str]:
    jobs = [Job(encode(*CASES[name]), name, (PLAN,))] * batch
    best = best_seconds(list(works.values()), jobs, turns)
    lines = []
    for way, (cpu, wall) in zip(works, best, strict=True):
        figures = f"{1000 * cpu / batch:.1f} | {batch / cpu:.1f} | {best[0][0] / cpu:.2f} | {batch / wall:.1f}"
        lines.append(f"| {name} | {way} | {figures} | {best[0][1] / wall:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--device", type=int, help="a CUDA device for DALI")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = preparers(options.threads, options.device, options.batch)
    works: dict[str, Work] = {"Pillow in a loop": in_a_loop, **ways}
    version = dali.dali.__version__ if dali.dali is not None else "absent"
    print(
        f"torch {torch.__version__} ({RESAMPLING}), Pillow {PIL.__version__}, OpenCV {cv2.__version__}, DALI {version}"
    )
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    print("| picture | by | CPU ms a picture | pictures per CPU s | ratio | pictures per wall s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in CASES:
        print("\n".join(compare(name, works, options.batch, options.turns)), flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")
    for preparer in ways.values():
        preparer.close()


if __name__ == "__main__":
    main()
