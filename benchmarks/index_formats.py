"""In which file format is the index of pictures kept? Size, and how long writing and reading take.

    python benchmarks/index_formats.py    # two minutes

Rows as a booru data set gives them: paths, stamps, sizes, captions of 25 tags, content hashes. Every format holds the
same table in the same schema; each is read back as a start reads it, each column in one piece, in turns, files warm.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from sdxl_training.data.index_files import INDEX

TAGS, TAGS_EACH = 20_000, 25
IN_A_PIECE = 2**16  # rows, as they are written


def make_rows(count: int) -> pa.Table:
    """Return rows of the index: what is random in life is random here, what repeats itself repeats itself."""
    random = np.random.default_rng(0)
    tags = np.array([f"tag_{number:x}_{'x' * (number % 9)}" for number in range(TAGS)])
    # Frequencies fall as 1/rank, as those of words and tags do.
    drawn = np.minimum(np.exp(random.uniform(0, np.log(TAGS), (count, TAGS_EACH))).astype(np.int64), TAGS) - 1
    names = [b"%04d/%016x.jpg" % (number // 1000, number * 0x9E3779B97F4A7C15 % 2**64) for number in range(count)]
    none = pa.nulls(count)
    columns = {
        "file": names,
        "name": names,
        "bytes": random.integers(50_000, 5_000_000, count),
        "mtime_ns": random.integers(10**18, 2 * 10**18, count),
        "caption_bytes": random.integers(100, 500, count),
        "caption_mtime_ns": random.integers(10**18, 2 * 10**18, count),
        "start": np.zeros(count, np.int64),
        "length": random.integers(50_000, 5_000_000, count),
        "height": random.integers(512, 4096, count, np.int32),
        "width": random.integers(512, 4096, count, np.int32),
        "orientation": np.ones(count, np.int8),
        "mode": ["RGB"] * count,
        "format": ["JPEG"] * count,
        "captions": [[", ".join(tags[row])] for row in drawn],
        "tags": none,
        "focus": none,
        "reason": none,
        "content_hash": [random.bytes(16) for _ in range(count)],
    }
    arrays = [pa.array(columns[field.name], field.type) if columns[field.name] is not none else none.cast(field.type)
              for field in INDEX]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=INDEX)


def parquet(compression: str) -> tuple[Callable[[pa.Table, Path], None], Callable[[Path], pa.Table]]:
    """Return how Parquet is written and read, as `index_files` does."""

    def write(table: pa.Table, path: Path) -> None:
        settings = {"compression": compression, "use_dictionary": ["mode", "format"], "write_statistics": False}
        with pq.ParquetWriter(path, table.schema, **settings) as writer:
            for batch in table.to_batches(IN_A_PIECE):
                writer.write_table(pa.Table.from_batches([batch]))

    def read(path: Path) -> pa.Table:
        return pq.ParquetFile(path).read(use_threads=False).combine_chunks()

    return write, read


def arrow(compression: str | None) -> tuple[Callable[[pa.Table, Path], None], Callable[[Path], pa.Table]]:
    """Return how an Arrow file is written and read; without compression it is mapped, which costs nothing at first."""

    def write(table: pa.Table, path: Path) -> None:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table, IN_A_PIECE)

    def read(path: Path) -> pa.Table:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all().combine_chunks()

    return write, read


FORMATS = {
    "Parquet, zstd (what the index is)": parquet("zstd"),
    "Parquet, snappy": parquet("snappy"),
    "Parquet, not compressed": parquet("none"),
    "Arrow, zstd": arrow("zstd"),
    "Arrow, lz4": arrow("lz4"),
    "Arrow, not compressed": arrow(None),
}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    table = make_rows(arguments.pictures)
    written: dict[str, list[float]] = {name: [] for name in FORMATS}
    taken: dict[str, list[float]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / str(number) for number, name in enumerate(FORMATS)}
        for _ in range(arguments.repeats):
            for name, (write, _read) in FORMATS.items():
                written[name].append(timed(lambda write=write, name=name: write(table, paths[name])))
        if any(not read(paths[name]).equals(table) for name, (_write, read) in FORMATS.items()):
            raise SystemExit("what is read is not what was written")
        for _ in range(arguments.repeats):
            for name, (_write, read) in FORMATS.items():
                taken[name].append(timed(lambda read=read, name=name: read(paths[name])))
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    print("# In which format the index is kept\n")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, pyarrow {pa.__version__}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}, load average {os.getloadavg()[0]:.1f}; {arguments.pictures:,} "
        f"pictures with {TAGS_EACH} tags each; medians of {arguments.repeats}. "
        "Command: `python benchmarks/index_formats.py`.\n"
    )
    print("| format | MiB | write, s | read, s |\n|---|---|---|---|")
    for name in FORMATS:
        times = (statistics.median(each[name]) for each in (written, taken))
        print(f"| {name} | {sizes[name] / 2**20:.0f} | " + " | ".join(f"{seconds:.2f}" for seconds in times) + " |")


if __name__ == "__main__":
    main()
