"""How many samples a second come out of the loader when everything is in the cache, and what of that is the cache.

    OMP_NUM_THREADS=1 python benchmarks/loader_speed.py    # a minute

A cache of random latents (128 KiB each) is written to a temporary folder, with a caption for each. Batches are made as
in training: latent, noise, a shuffled caption as token ids of the miniature, sizes. Once in place, counted in the
seconds of the process's own time, times two cores; once by two worker processes that hand them to a third through
shared memory, by the clock and by the processor time of all three, times two cores, which is what the clock says at
best, and which other programs disturb less. Beside it, in the same run, the plainest alternative in both forms: one
NumPy memory map and as much noise, handed over by torch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from sdxl_training.data.cache import LATENT_CHANNELS, LATENT_FACTOR, LatentCache, Posterior
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.crops import centre_crop
from sdxl_training.data.fetching import Stored
from sdxl_training.data.loader import MicroBatches
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.workers import open_loader
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.text import caption_tokenizer
from sdxl_training.objectives.noise import Noise
from sdxl_training.records import Bucket, CropPlan, ImageRecord

PLAIN = "made in place, plain: memory map and noise"
SIDE = 1024
BATCH = 8
WORKERS = 2
BUCKET = Bucket((SIDE, SIDE))
SHAPE = (LATENT_CHANNELS, SIDE // LATENT_FACTOR, SIDE // LATENT_FACTOR)
PLAN = centre_crop((SIDE, SIDE), BUCKET)
VOCABULARY = [f"tag {number}" for number in range(500)]


def content_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Cached:
    """Fetches a latent that is known to be there."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache = cache

    def __call__(self, record: ImageRecord, plan: CropPlan) -> Stored:
        """Return the latent of a record."""
        found = self.cache.read(content_of(record.picture), plan)
        if found is None:
            raise LookupError(record.path)
        return Stored(*found)


def write_cache(folder: Path, latents: int, posterior: Posterior, compression: str) -> LatentCache:
    cache = LatentCache(folder, "vae", posterior)
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(folder, compression) as writer:
        for number in range(latents):
            mean_CHW, std_CHW = torch.randn((2, *SHAPE), generator=generator).to(torch.float16)
            content = content_of(number)
            keys, origins = cache.key(content, PLAN)[None], cache.origin(number, content, PLAN)[None]
            writer.append(keys, origins, [cache.moments(mean_CHW, std_CHW.abs() * 0.01)])
    cache.refresh()
    return cache


def micro_batches(cache: LatentCache, latents: int, posterior: Posterior) -> MicroBatches:
    random = np.random.default_rng(0)
    records = []
    for number in range(latents):
        tags = tuple(random.choice(VOCABULARY, 12, replace=False).tolist())
        record = ImageRecord(number, f"{number}.png", (SIDE, SIDE), (", ".join(tags),), tags, picture=number)
        records.append(record)
    return MicroBatches(
        schedule=BatchSchedule({BUCKET: range(latents)}, [1] * latents, 0, BATCH),
        records=records,
        variants=[(PLAN,)] * latents,
        weights=[1.0] * latents,
        fetch=Cached(cache),
        draw_noise=Noise(),
        tokenize=caption_tokenizer(load_sdxl("miniature", 0, "cpu")).with_weights,
        rules=[CaptionRules(shuffle=True, keep_first=1, tag_dropout=0.1, caption_dropout=0.1)],
        seed=0,
        posterior=posterior,
    )


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """The plainest thing that feeds a trainer: latents of one memory map, and noise."""

    def __init__(self, path: Path, latents: int) -> None:
        self.latents_NCHW = np.memmap(path, np.float16, "r", shape=(latents, *SHAPE))

    def __len__(self) -> int:
        return len(self.latents_NCHW)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.latents_NCHW[number].astype(np.float32)), torch.randn(SHAPE)


def plain_loader(folder: Path, latents: int) -> Iterable[object]:
    path = folder / "latents.bin"
    if not path.exists():
        written = np.memmap(path, np.float16, "w+", shape=(latents, *SHAPE))
        written[:] = np.random.default_rng(0).standard_normal(written.shape, np.float32)
        written.flush()
    return DataLoader(
        Plain(path, latents),
        BATCH,
        sampler=RandomSampler(range(latents), replacement=True, num_samples=10**8),
        num_workers=WORKERS,
        prefetch_factor=2,
    )


def samples_a_cpu_second(batch_at: Callable[[int], object], steps: int) -> float:
    """Return how many samples one process makes in a second of its own time, other programs notwithstanding."""
    for step in range(20):
        batch_at(step)
    began = time.process_time()
    for step in range(20, 20 + steps):
        batch_at(step)
    return steps * BATCH / (time.process_time() - began)


def processor_seconds() -> float:
    """Return the processor time of this process and its children."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def samples_a_second(batches: Iterable[object], steps: int) -> tuple[float, float]:
    """Return the rate by the clock and by processor time on two cores, without the start of the processes."""
    iterator = iter(batches)
    for _ in range(20):
        next(iterator)
    began, used = time.perf_counter(), processor_seconds()
    for _ in range(steps):
        next(iterator)
    samples = steps * BATCH
    return samples / (time.perf_counter() - began), 2 * samples / (processor_seconds() - used)


def note_workers(rates: dict[str, list[float]], title: str, batches: Iterable[object], steps: int) -> None:
    by_clock, by_processor = samples_a_second(batches, steps)
    rates.setdefault(f"two workers, by the clock, {title}", []).append(by_clock)
    rates.setdefault(f"two workers, by processor time, {title}", []).append(by_processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cases: list[tuple[str, Posterior, str]] = [
        ("posterior mean, compression none", "mean", "none"),
        ("posterior mean, compression lossless", "mean", "lossless"),
        ("posterior sample, compression none", "sample", "none"),
        ("posterior sample, compression lossless", "sample", "lossless"),
    ]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {
            title: (write_cache(folder / str(i), arguments.latents, posterior, compression), posterior)
            for i, (title, posterior, compression) in enumerate(cases)
        }
        for _ in range(arguments.repeats):
            note_workers(rates, "plain: memory map and noise", plain_loader(folder, arguments.latents), arguments.steps)
            plain_data = Plain(folder / "latents.bin", arguments.latents)

            def plain_batch(step: int, data: Plain = plain_data) -> list[Tensor]:
                samples = [data[(step * BATCH + i) % len(data)] for i in range(BATCH)]
                return [torch.stack(parts) for parts in zip(*samples, strict=True)]

            rates.setdefault(PLAIN, []).append(2 * samples_a_cpu_second(plain_batch, arguments.steps))
            for title, (cache, posterior) in caches.items():
                data = micro_batches(cache, arguments.latents, posterior)
                rates.setdefault(f"made in place, {title}", []).append(
                    2 * samples_a_cpu_second(data.__getitem__, arguments.steps)
                )
                with closing(open_loader(data, 0, 10**6, WORKERS, pin=False)) as loader:
                    note_workers(rates, title, loader, arguments.steps)
    reference = statistics.median(rates[PLAIN])
    print("# The loader when everything is cached\n")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}, load average {os.getloadavg()[0]:.1f}; {WORKERS} workers, batches of "
        f"{BATCH}, latents of {SIDE} x {SIDE} pictures (128 KiB a mean). Median of {arguments.repeats}.\n"
    )
    print("| what | samples/s on two cores | to plain, made in place |\n|---|---|---|")
    for title, measured in sorted(rates.items()):
        print(f"| {title} | {statistics.median(measured):,.0f} | {statistics.median(measured) / reference:.2f} |")


if __name__ == "__main__":
    main()
