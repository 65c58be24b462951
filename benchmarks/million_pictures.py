"""How long a million pictures take before training begins: indexed for the first time, again, planned, put in order.

    python benchmarks/million_pictures.py                 # 10,000 and 1,000,000; about 9 GB of disk for a while
    python benchmarks/million_pictures.py --pictures 10000 100000
    python benchmarks/million_pictures.py --in-a-folder 1000000                  # all in one folder

Every stage runs in a process of its own, so that its memory is its own. Files are warm: they were just written. What
the first index is compared with is a walk that does nothing but list the folders, open every picture and read the bytes
that hold its header, with as many processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

IN_A_FOLDER = 1000
HEADER_BYTES = 4096


def write_folder(folder: Path, first: int, count: int) -> None:
    """Write small JPEGs of forty sizes, each with a caption."""
    import io

    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    kinds = []
    for _ in range(40):
        height, width = generator.integers(64, 192, 2).tolist()
        memory = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(memory, "JPEG", quality=10)
        kinds.append(memory.getvalue())
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        (folder / f"{number:07d}.jpg").write_bytes(kinds[number % len(kinds)])
        (folder / f"{number:07d}.txt").write_text(f"a picture, number {number % 1000}, kind {number % len(kinds)}")


def make_pictures(root: Path, pictures: int, in_a_folder: int) -> None:
    starts = range(0, pictures, in_a_folder)
    with ProcessPoolExecutor() as pool:
        folders = [root / f"{start // in_a_folder:04d}" for start in starts]
        list(pool.map(write_folder, folders, starts, [min(in_a_folder, pictures - start) for start in starts]))


def read_headers(folder: str) -> int:
    read = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".jpg"):
                entry.stat()
                with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123 - nothing but the bare calls
                    read += len(file.read(HEADER_BYTES)) > 0
    return read


def stage_bare_walk(root: Path, cache: Path) -> dict[str, float]:
    folders = [entry.path for entry in os.scandir(root)]
    with ProcessPoolExecutor() as pool:
        return {"pictures": sum(pool.map(read_headers, folders, chunksize=4))}


def stat_files(folder: str) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        names = os.listdir(descriptor)  # noqa: PTH208 - nothing but the bare calls
        for name in names:
            os.stat(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    return len(names) // 2  # each picture has a caption


def stage_bare_listing(root: Path, cache: Path) -> dict[str, float]:
    """What sizes and times of all files cost by themselves: without these no start knows what has changed."""
    folders = [entry.path for entry in os.scandir(root)]
    with ProcessPoolExecutor() as pool:
        return {"pictures": sum(pool.map(stat_files, folders, chunksize=4))}


def config_of(root: Path, cache: Path):
    from sdxl_training.config.schema import Config

    data = {
        "sources": [{"path": str(root)}],
        "resolution": 64,
        "buckets": {"step_px": 16, "min_side_px": 32, "max_side_px": 128, "small_pictures": "upscale"},
        "cache": {"path": str(cache)},
    }
    return Config.model_validate({"model": {"source": "miniature"}, "training": {"batch_size": 8}, "data": data})


def stage_index(root: Path, cache: Path) -> dict[str, float]:
    from sdxl_training.assemble.sources import open_pictures
    from sdxl_training.tracking.progress import SilentProgress

    pictures, _ = open_pictures(config_of(root, cache), SilentProgress())
    return {"pictures": len(pictures)}


def stage_start(root: Path, cache: Path) -> dict[str, float]:
    """All that lies between a command and the first batch of samples, but for the model: list, compare, plan, order."""
    from sdxl_training.assemble.dataset import build_schedule, find_pictures
    from sdxl_training.tracking.progress import SilentProgress

    config = config_of(root, cache)
    began = time.perf_counter()
    found = find_pictures(config, SilentProgress())
    planned = time.perf_counter()
    schedule = build_schedule(config, found.plan, 1)
    opened = time.perf_counter()
    epoch = 3
    first, end = schedule.steps_before_epoch(epoch), schedule.steps_before_epoch(epoch + 1)
    schedule.order_of_epoch(epoch)
    ordered = time.perf_counter()
    far = schedule.steps_before_epoch(1000) + (end - first) // 2
    _, draws = schedule.batch_at(far)
    sought = time.perf_counter()
    records = [found.plan.records[draw.record] for draw in draws]
    return {
        "pictures": len(found.pictures),
        "find and plan, s": planned - began,
        "open the schedule, s": opened - planned,
        "order of an epoch, s": ordered - opened,
        "seek to epoch 1000, s": sought - ordered,
        "records of a batch, s": time.perf_counter() - sought,
        "samples of the batch": len(records),
    }


def stage_crops(root: Path, cache: Path) -> dict[str, float]:
    """What a report says of the cache where each picture decides how it is cut, and all have been read before.

    In processor time, of which it is one thread's, so that other programs do not count.
    """
    import numpy as np

    from sdxl_training.assemble.dataset import find_pictures
    from sdxl_training.data.cache import LatentCache
    from sdxl_training.data.crops import Cut
    from sdxl_training.tracking.progress import SilentProgress

    found = find_pictures(config_of(root, cache), SilentProgress())
    latents, random = LatentCache(cache / "latents", "vae"), np.random.default_rng(0)
    pictures, records = len(found.pictures), len(found.plan.records)
    boxes_P4 = random.uniform(0.01, 0.5, (pictures, 4))
    contents_N2, known_N = random.integers(0, 2**63, (records, 2), np.uint64), np.ones(records, bool)
    facts: dict[str, float] = {"pictures": pictures}
    for name, cut in {"random": Cut("random", 2, flip=True), "focus": Cut("focus", flip=True)}.items():
        plan = replace(found.plan, cut=cut, columns=replace(found.plan.columns, make_boxes=lambda: boxes_P4))
        began = time.process_time()
        plan.latents()
        latents.count(contents_N2, known_N, plan)
        facts[f"{name}, s"] = time.process_time() - began
    return facts


def stage_first_update(root: Path, cache: Path) -> dict[str, float]:
    """A run of the miniature as a user starts it, on the indexed set, until its first update is in the metrics."""
    import yaml

    settings = config_of(root, cache).model_dump(mode="json", exclude_unset=True)
    settings["global_config"] = {
        "run_name": "first-update",
        "output_dir": str(cache / "runs"),
        "device": "cpu",
        "previews": {"every_steps": 0},
        "tracking": {"log_every_steps": 1},
    }
    settings["training"] |= {"max_steps": 1, "precision": "fp32", "schedule": {"warmup_steps": 0}}
    config, run = cache / "first_update.yaml", cache / "runs" / "first-update"
    shutil.rmtree(run, ignore_errors=True)
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(Path(__file__).parents[1] / "src" / "main.py"), "--config", str(config)]
    began = time.perf_counter()
    with (cache / "first_update.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        metrics = run / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.wait():
            raise SystemExit((cache / "first_update.log").read_text())
    pictures = int(re.search(r"([\d,]+) pictures,", (run / "run.log").read_text())[1].replace(",", ""))
    return {"pictures": pictures, "until the first update, s": seconds}


STAGES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "bare walk": stage_bare_walk,
    "first index": stage_index,
    "bare listing": stage_bare_listing,
    "second start": stage_start,
    "crops": stage_crops,
    "first update": stage_first_update,
}


def run_stage(name: str, root: Path, cache: Path) -> dict[str, float]:
    """Run a stage in a process of its own; seconds without the start of Python and its imports."""
    command = [sys.executable, __file__, "--stage", name, "--root", str(root), "--cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def be_stage(name: str, root: Path, cache: Path) -> None:
    import sdxl_training.assemble  # noqa: F401 - imported before the clock starts

    began = time.perf_counter()
    facts = STAGES[name](root, cache)
    facts["seconds"] = time.perf_counter() - began
    own, children = (
        resource.getrusage(who).ru_maxrss / 2**10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({**facts, "peak MiB": own, "peak MiB of a helper process": children}))


def measure(pictures: int, in_a_folder: int, folder: Path) -> dict[str, dict[str, float]]:
    name = f"{pictures}-by-{in_a_folder}"
    root, cache = folder / f"pictures-{name}", folder / f"cache-{name}"
    if not root.is_dir():
        make_pictures(root, pictures, in_a_folder)
    shutil.rmtree(cache, ignore_errors=True)
    time.sleep(3)  # files younger than that are looked at again
    results = {name: run_stage(name, root, cache) for name in STAGES}
    for name, facts in results.items():
        if facts["pictures"] != pictures:
            raise SystemExit(f"{name} saw {facts['pictures']} of {pictures} pictures")
    return results


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    return {count: measure(count, arguments.in_a_folder, folder) for count in arguments.pictures}


def report(results: dict[int, dict[str, dict[str, float]]]) -> str:
    counts = list(results)
    lines = [
        "# A million pictures before the first step",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}; load average {os.getloadavg()[0]:.1f}. Command: "
        f"`python {' '.join(sys.argv)}`.",
        "",
        "| | " + " | ".join(f"{count:,} pictures" for count in counts) + " | goal |",
        "|---|" + "---|" * (len(counts) + 1),
    ]

    def row(title: str, value: Callable[[dict[str, dict[str, float]]], str], goal: str = "") -> None:
        lines.append(f"| {title} | " + " | ".join(value(results[count]) for count in counts) + f" | {goal} |")

    row("bare walk that opens and reads each header, s", lambda r: f"{r['bare walk']['seconds']:.2f}")
    row("first index (headers and captions), s", lambda r: f"{r['first index']['seconds']:.2f}")
    row(
        "first index, files a second (pictures and captions)",
        lambda r: f"{2 * r['first index']['pictures'] / r['first index']['seconds']:,.0f}",
    )
    row("first index / bare walk", lambda r: f"{r['first index']['seconds'] / r['bare walk']['seconds']:.2f}")
    row("second start: list, compare, plan, s", lambda r: f"{r['second start']['find and plan, s']:.2f}", "5 s")
    row("bare listing: size and time of each file, s", lambda r: f"{r['bare listing']['seconds']:.2f}")
    row(
        "second start / bare listing",
        lambda r: f"{r['second start']['find and plan, s'] / r['bare listing']['seconds']:.2f}",
    )
    row("open the schedule, s", lambda r: f"{r['second start']['open the schedule, s']:.3f}")
    row("order of an epoch, s", lambda r: f"{r['second start']['order of an epoch, s']:.3f}", "1 s")
    row("seek to the middle of epoch 1000, s", lambda r: f"{r['second start']['seek to epoch 1000, s']:.4f}", "at once")
    row("records of that batch of 8, s", lambda r: f"{r['second start']['records of a batch, s']:.4f}")
    for name, crops in {"random": "two random crops of each, mirrored", "focus": "a box in each, mirrored"}.items():
        title = f"what the cache lacks: {crops}, processor s"
        row(title, lambda r, name=name: f"{r['crops'][f'{name}, s']:.2f}", "3 s")
    row(
        "a run of the miniature (mode ahead, indexed before): command to first update logged, s",
        lambda r: f"{r['first update']['until the first update, s']:.1f}",
        "60 s",
    )
    row("peak memory of that run, MiB", lambda r: f"{r['first update']['peak MiB of a helper process']:.0f}", "1,536")
    row("peak memory of the first index, MiB", lambda r: f"{r['first index']['peak MiB']:.0f}", "1,536")
    row(
        "peak memory of one of its helper processes, MiB",
        lambda r: f"{r['first index']['peak MiB of a helper process']:.0f}",
    )
    row("peak memory of the second start, MiB", lambda r: f"{r['second start']['peak MiB']:.0f}", "1,536")
    row("peak memory of what the cache lacks, MiB", lambda r: f"{r['crops']['peak MiB']:.0f}", "1,536")
    row("the same without any picture (imports), MiB", lambda r: f"{r['bare walk']['peak MiB']:.0f}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--in-a-folder", type=int, default=IN_A_FOLDER, help="pictures in each folder, at most")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder, deleted afterwards")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        be_stage(arguments.stage, arguments.root, arguments.cache)
    elif arguments.folder:
        print(report(measure_all(arguments, arguments.folder)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(report(measure_all(arguments, Path(folder))))


if __name__ == "__main__":
    main()
