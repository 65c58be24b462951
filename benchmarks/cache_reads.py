"""What does it cost to read a cached latent at random, and what does lossless compression cost and gain?

    OMP_NUM_THREADS=1 python benchmarks/cache_reads.py        # half a minute, 2 GB in a temporary folder

Latents of 4 x 128 x 128 in half precision (128 KiB; smooth fields and noise, drawn here) are read in random order by
one process: as rows of one NumPy memory map copied out, from a file each, and from the store, plain and lossless. All
files lie in the page cache, so what is timed is the format and not the disk. Time is the process's own (user and
system), the readers take turns, and the median of all turns counts. Then: the codec by itself, and how fast keys are
found among a million.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdxl_training.data import store_writer
from sdxl_training.data.compression import pack, unpack
from sdxl_training.data.store import Store
from sdxl_training.data.store_format import ORIGIN
from sdxl_training.data.store_writer import Compression, StoreWriter

SHAPE = (4, 128, 128)
DISTINCT = 64  # latents drawn; the others repeat them
DTYPES = (torch.float16, torch.bfloat16)
Read = Callable[[int], Tensor]


def draw(dtype: torch.dtype) -> list[Tensor]:
    """Return latents: two smooth fields and noise, of standard deviation about 1."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn((DISTINCT, 4, side, side), generator=generator) for side in (32, 64, 128)]
    fields = [torch.nn.functional.interpolate(part, size=SHAPE[1:], mode="bicubic") for part in parts]
    return list((0.7 * fields[0] + 0.4 * fields[1] + 0.25 * fields[2]).to(dtype))


def by_memory_map(folder: Path, latents: list[Tensor], count: int) -> Read:
    path = folder / "all.bin"
    with path.open("wb") as file:
        for i in range(count):
            file.write(latents[i % DISTINCT].view(torch.int16).numpy().tobytes())
    rows = np.memmap(path, np.int16, "r", shape=(count, *SHAPE))
    return lambda i: torch.from_numpy(rows[i].copy()).view(latents[0].dtype)


def by_file(folder: Path, latents: list[Tensor], count: int) -> Read:
    for i in range(count):
        latents[i % DISTINCT].view(torch.int16).numpy().tofile(folder / f"{i}.bin")
    dtype = latents[0].dtype
    return lambda i: torch.from_numpy(np.fromfile(folder / f"{i}.bin", np.int16)).view(dtype).view(SHAPE)


def by_store(folder: Path, latents: list[Tensor], count: int, compression: Compression) -> Read:
    keys = np.arange(2 * count, dtype=np.uint64).reshape(-1, 2)
    with StoreWriter(folder / compression, compression) as writer:
        for start in range(0, count, DISTINCT):
            some = keys[start : start + DISTINCT]
            writer.append(some, np.zeros(len(some), ORIGIN), latents[: len(some)])
    store = Store(folder / compression)
    rows = store.find(keys)
    return lambda i: store.read(rows[i])


def time_reads(readers: dict[str, Read], count: int, turns: int) -> dict[str, float]:
    """Return the median microseconds a read."""
    order = np.random.default_rng(0).permutation(count).tolist()
    times: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns + 1):
        for name, read in readers.items():
            started = time.process_time()
            for i in order:
                read(i)
            if turn:  # the first turn fills page cache and page tables
                times[name].append((time.process_time() - started) / count * 1e6)
    return {name: statistics.median(some) for name, some in times.items()}


def compare_reads(count: int, turns: int) -> None:
    print("| latents | memory map, us | store | ratio | lossless | ratio | file each | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in DTYPES:
        latents = draw(dtype)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            readers = {
                "map": by_memory_map(folder, latents, count),
                "store": by_store(folder, latents, count, "none"),
                "lossless": by_store(folder, latents, count, "lossless"),
                "file": by_file(folder, latents, count),
            }
            assert all(torch.equal(read(count - 1), latents[(count - 1) % DISTINCT]) for read in readers.values())
            micro = time_reads(readers, count, turns)
        others = " | ".join(f"{micro[name]:.1f} | {micro[name] / micro['map']:.2f}" for name in list(micro)[1:])
        print(f"| {str(dtype).removeprefix('torch.')} | {micro['map']:.1f} | {others} |")


def median_of(work: Callable[[], object], turns: int) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(turns):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def measure_codec(turns: int) -> None:
    print("\n| latents | raw / stored | packing, GB/s raw | unpacking, GB/s raw |\n|---|---|---|---|")
    for dtype in DTYPES:
        plain = [latent.reshape(-1).view(torch.uint8).numpy() for latent in draw(dtype)]
        size = plain[0].size
        packed = [np.frombuffer(pack(payload, 2) or b"", np.uint8) for payload in plain]
        packing = median_of(lambda plain=plain: [pack(payload, 2) for payload in plain], turns)
        unpacking = median_of(lambda packed=packed, size=size: [unpack(some, size, 2) for some in packed], turns)
        ratio = size * DISTINCT / sum(some.size for some in packed)
        speeds = " | ".join(f"{size * DISTINCT / seconds / 1e9:.2f}" for seconds in (packing, unpacking))
        print(f"| {str(dtype).removeprefix('torch.')} | {ratio:.2f} | {speeds} |")


def measure_keys(million: int = 10**6) -> None:
    store_writer._to_disk = lambda file: None  # what is timed is not the disk
    keys = np.random.default_rng(0).integers(0, 2**64, (million, 2), dtype=np.uint64)
    with tempfile.TemporaryDirectory() as name:
        with StoreWriter(Path(name)) as writer:
            for some in np.split(keys, 100):
                writer.append(some, np.zeros(len(some), ORIGIN), [torch.zeros(1)] * len(some))
        opening = median_of(lambda: Store(Path(name)), 3)
        store = Store(Path(name))
        shuffled = np.random.default_rng(1).permutation(keys)
        finding = median_of(lambda: store.find(shuffled), 3)
        refreshing = median_of(store.refresh, 100)
    print("\n| a million entries | |\n|---|---|")
    print(f"| open, s | {opening:.2f} |")
    print(f"| find all, s | {finding:.2f} |")
    print(f"| refresh, nothing new, us | {refreshing * 1e6:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4096, help="latents; each takes 0.5 MB in all forms together")
    parser.add_argument("--turns", type=int, default=7, help="readings of all of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_reads(arguments.count, arguments.turns)
    measure_codec(10 * arguments.turns)
    measure_keys()


if __name__ == "__main__":
    main()
