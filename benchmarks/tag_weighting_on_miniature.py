"""Do tag weights help rare concepts, and what do they cost the common ones?

    python benchmarks/tag_weighting_on_miniature.py --work runs/tag_weighting    # an hour; goes on where it was

Draws a set of 960 pictures in which one object colour (cyan) and one shape (triangle) are on 12 pictures each (1.25 %),
trains the miniature on it with every row of ROWS and every seed, everything else equal, and reads back from the
pixels how often a drawn picture has the colour and the shape of its caption: for captions with the rare colour, with
the rare shape, and with common ones only. Writes a Markdown table and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from sdxl_training.data.demo_set import PALETTE, SHAPES, PictureSpec, draw_picture

ROOT = Path(__file__).parents[1]
RARE_COLOUR, RARE_SHAPE, RARE = "cyan", "triangle", 12
PICTURES = 960
PROMPTS = 40  # of each group; where there are fewer captions each is drawn several times, from other noise
COLOURS = [colour for colour in PALETTE if colour != RARE_COLOUR]
COMMON_SHAPES = [shape for shape in SHAPES if shape != RARE_SHAPE]
CATEGORIES = {
    **dict.fromkeys(PALETTE, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **{f"{colour} background": "background" for colour in PALETTE},
}
WARM = "warmup_steps: 150"
ROWS = {
    "off": {},
    "static": {"static": "{type: frequency}"},
    "static, strength 1, factor 10": {"static": "{type: frequency, strength: 1.0, max_factor: 10.0}"},
    "dynamic": {"dynamic": f"{{type: residual_loss, {WARM}}}"},
    "static and dynamic": {"static": "{type: frequency}", "dynamic": f"{{type: residual_loss, {WARM}}}"},
    "meta": {"dynamic": f"{{type: meta, {WARM}}}"},
}
GROUPS = ("rare colour", "rare shape", "common")


def write_pictures(folder: Path) -> None:
    """Write the set, tags apart from each other: "cyan, circle, red background"."""
    if folder.is_dir():
        return
    from PIL import Image

    choose = random.Random("tag weighting 2")
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number in range(PICTURES):
        colour = RARE_COLOUR if number < RARE else choose.choice(COLOURS)
        shape = RARE_SHAPE if RARE <= number < 2 * RARE else choose.choice(COMMON_SHAPES)
        background = choose.choice([other for other in COLOURS if other != colour])
        offset = (choose.uniform(-0.03, 0.03), choose.uniform(-0.03, 0.03))
        spec = PictureSpec(colour, shape, background, radius=choose.uniform(0.34, 0.38), offset_yx=offset)
        Image.fromarray(draw_picture(spec, (64, 64))).save(unfinished / f"{number:04d}.png")
        (unfinished / f"{number:04d}.txt").write_text(caption(colour, shape, background), encoding="utf-8")
    unfinished.rename(folder)


def caption(colour: str, shape: str, background: str) -> str:
    """Return the three tags of a picture."""
    return f"{colour}, {shape}, {background} background"


def prompts(group: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Return prompts of a group with (object colour, background colour, shape) that the picture should show."""
    colours = [RARE_COLOUR] if group == "rare colour" else COLOURS
    shapes = [RARE_SHAPE] if group == "rare shape" else COMMON_SHAPES
    wanted = [
        (colour, background, shape)
        for colour in colours
        for shape in shapes
        for background in COLOURS
        if background != colour
    ]
    repeats = -(-PROMPTS // len(wanted))
    return [(caption(c, s, b), (c, b, s)) for c, b, s in (wanted * repeats)[:PROMPTS]]


def run_name(row: str, seed: int, steps: int) -> str:
    """Return the folder name of a run."""
    return "".join(letter if letter.isalnum() else "_" for letter in row) + f"_seed{seed}_steps{steps}"


def train(work: Path, row: str, seed: int, steps: int) -> None:
    """Train one row with one seed; a finished run is left as it is."""
    settings = {
        "global_config.output_dir": work,
        "global_config.run_name": run_name(row, seed, steps),
        "global_config.seed": seed,
        "global_config.previews.every_steps": 0,
        "global_config.checkpoints": f"{{every_steps: {steps}, keep_last: 1}}",
        "data.sources": f"[{{path: {work / 'pictures'}}}]",
        "data.cache.path": work / "cache",
        "data.captions.keep_first": 3,
        "training.max_steps": steps,
        "tag_weighting.categories.tags": json.dumps(CATEGORIES),
        "tag_weighting.refresh_steps": 50,
        "tag_weighting.statistics.every_steps": 100,
        **{f"tag_weighting.{name}": value for name, value in ROWS[row].items()},
    }
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(ROOT / "examples" / "miniature.yaml")]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def score(work: Path, row: str, seed: int, steps: int) -> dict[str, float]:
    """Return one run's accuracies; kept beside the run."""
    run = work / run_name(row, seed, steps)
    kept = run / "scores.json"
    if not kept.exists():
        command = [sys.executable, __file__, "--work", str(work), "--score", str(run)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        kept.write_bytes(done.stdout)
    return dict(json.loads(kept.read_text()))


def score_run(run: Path) -> dict[str, float]:
    """Draw and read back, in this process: of each group the share with the concept in question right."""
    import numpy
    from PIL import Image

    from demo_quality import judge_picture, picture_grid
    from sdxl_training.assemble import draw_prompts
    from sdxl_training.assemble.drawing import sampling_of
    from sdxl_training.config.schema import Previews

    scores = {}
    for group in GROUPS:
        texts, wanted = zip(*prompts(group), strict=True)
        pictures = draw_prompts(run, list(texts), sampling_of(Previews(steps=20, guidance=4.0, seed=0)))
        Image.fromarray(numpy.asarray(picture_grid(pictures, 10))).save(run / f"{group.replace(' ', '_')}.png")
        read = [judge_picture(pixels) for pixels in pictures]
        colour = statistics.mean(got[0] == want[0] for got, want in zip(read, wanted, strict=True))
        shape = statistics.mean(got[2] == want[2] for got, want in zip(read, wanted, strict=True))
        scores |= {f"{group}: colour": colour, f"{group}: shape": shape}
    return scores


MEASURES = {
    "rare colour": lambda s: s["rare colour: colour"],
    "rare shape": lambda s: s["rare shape: shape"],
    "common colours": lambda s: s["common: colour"],
    "common shapes": lambda s: s["common: shape"],
}


def table(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Yield the Markdown table: mean and range over the seeds."""
    yield f"| weights | {' | '.join(f'{title} %' for title in MEASURES)} |"
    yield "|---" * (1 + len(MEASURES)) + "|"
    for row, runs in results.items():
        yield f"| {row} | {' | '.join(_cell([100 * of(scores) for scores in runs]) for of in MEASURES.values())} |"


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def plot(results: dict[str, list[dict[str, float]]], to: Path) -> None:
    """Draw every run: one dot a seed, a bar for the mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 0.45 * len(results) + 1.2), sharey=True)
    rows = list(results)[::-1]
    for axis, (title, of) in zip(axes, MEASURES.items(), strict=True):
        for height, row in enumerate(rows):
            values = [100 * of(scores) for scores in results[row]]
            axis.barh(height, statistics.mean(values), color="#9ecae1")
            axis.plot(values, [height] * len(values), "o", color="#08519c", markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 102)
    axes[0].set_yticks(range(len(rows)), rows)
    figure.supxlabel("right, %", fontsize=9)
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--plot", type=Path, help="where to draw the plot (PNG)")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.score:
        print(json.dumps(score_run(arguments.score)))
        return
    write_pictures(arguments.work / "pictures")

    def both(task: tuple[str, int]) -> tuple[str, int, dict[str, float]]:
        train(arguments.work, *task, arguments.steps)
        return (*task, score(arguments.work, *task, arguments.steps))

    tasks = [(row, seed) for seed in arguments.seeds for row in arguments.rows]
    results: dict[str, list[dict[str, float]]] = {row: [] for row in arguments.rows}
    both(tasks[0])  # fills the cache for the others
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row, _, scores in pool.map(both, tasks):
            results[row].append(scores)
    seeds = ", ".join(map(str, arguments.seeds))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}; "
        f"{arguments.steps} updates of 32, seeds {seeds}; 40 pictures a group; mean (range)."
    )
    print("\n".join(["", *table(results)]))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
