"""Do tag weights help rare concepts, and what do they cost the common ones?

    python benchmarks/tag_weighting_on_miniature.py --work runs/tag_weighting    # 90 minutes; goes on where it was

Draws a set of 960 pictures in which one object colour (cyan) and one shape (triangle) are on 12 pictures each (1.25 %),
and trains the miniature on it with every row of ROWS and every seed, everything else equal. It measures, for captions
with the rare colour, with the rare shape and with common ones only,

* at three checkpoints of each run, how often a drawn picture has colour, shape and background of its caption, all of
  them, read back from the pixels (earlier, so little is drawn well that the reading means nothing),
* at five, the error of the clean latent on pictures that no run has seen, at fixed noise and levels.

Twelve pictures show a rare concept with some colours and backgrounds and not with others, so captions that were learnt
are told from new ones. Runs of one seed see the same pictures in the same order with the same noise: rows are compared
seed by seed. Writes Markdown tables, a plot and a sheet of the pictures drawn by the first seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rare_concepts import (
    CATEGORIES,
    GROUPS,
    HELD_OUT,
    PARTS,
    PROMPTS,
    RARE_COLOUR,
    RARE_SHAPE,
    file_name,
    learnt_captions,
    prompts,
    write_pictures,
)

ROOT = Path(__file__).parents[1]
SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0)
CHECKPOINTS, MEASURED, DRAWN = 6, 5, 3  # of a run; of these, the last ones
WARM = "warmup_steps: 150"
ROWS = {
    "off": {},
    "static": {"static": "{type: frequency}"},
    "static, strength 1, factor 10": {"static": "{type: frequency, strength: 1.0, max_factor: 10.0}"},
    "static, both overridden by 64": {
        "static": f"{{type: frequency, overrides: {{{RARE_COLOUR}: 64, {RARE_SHAPE}: 64}}}}"
    },
    "dynamic": {"dynamic": f"{{type: residual_loss, {WARM}}}"},
    "static and dynamic": {"static": "{type: frequency}", "dynamic": f"{{type: residual_loss, {WARM}}}"},
    "meta": {"dynamic": f"{{type: meta, {WARM}}}"},
}
RIGHT = {  # which drawn pictures are counted: group, and whether the caption was learnt (None: either)
    "rare colour": ("rare colour", None),
    "rare shape, learnt captions": ("rare shape", True),
    "rare shape, new captions": ("rare shape", False),
    "common": ("common", None),
}
Scores = Mapping[str, Mapping[str, float]]  # checkpoint's step -> measure -> value


def run_name(row: str, seed: int, steps: int) -> str:
    """Return the folder name of a run."""
    return f"{file_name(row)}_seed{seed}_steps{steps}"


def train(work: Path, row: str, seed: int, steps: int) -> None:
    """Train one row with one seed; a finished run is left as it is."""
    settings = {
        "global_config.output_dir": work,
        "global_config.run_name": run_name(row, seed, steps),
        "global_config.seed": seed,
        "global_config.previews.every_steps": 0,
        "global_config.checkpoints": f"{{every_steps: {steps // CHECKPOINTS}, keep_last: {CHECKPOINTS}}}",
        "data.sources": f"[{{path: {work / 'pictures'}}}]",
        "data.cache.path": work / "cache",
        "data.captions.keep_first": 3,
        "training.max_steps": steps,
        "training.schedule.warmup_steps": steps // CHECKPOINTS,
        "tag_weighting.categories.tags": json.dumps(CATEGORIES),
        "tag_weighting.refresh_steps": 50,
        "tag_weighting.statistics.every_steps": 100,
        **{f"tag_weighting.{name}": value for name, value in ROWS[row].items()},
    }
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(ROOT / "examples" / "miniature.yaml")]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def score(work: Path, row: str, seed: int, steps: int) -> Scores:
    """Return what one run reached at its checkpoints; kept beside the run."""
    run = work / run_name(row, seed, steps)
    kept = run / "scores.json"
    if not kept.exists():
        command = [sys.executable, __file__, "--work", str(work), "--steps", str(steps), "--score", str(run)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        unfinished = kept.with_suffix(".unfinished")
        unfinished.write_bytes(done.stdout)
        unfinished.rename(kept)
    return dict(json.loads(kept.read_text()))


def last_steps(steps: int, count: int) -> list[int]:
    """Return the steps of the last checkpoints of a run."""
    return [steps // CHECKPOINTS * number for number in range(CHECKPOINTS - count + 1, CHECKPOINTS + 1)]


def score_run(work: Path, run: Path, steps: int) -> Scores:
    """Draw, read back and measure held-out pictures, in this process."""
    from held_out import held_out_batches, relative_errors_by_level

    held_out = {part: held_out_batches(run, work / "held_out" / file_name(part)) for part in PARTS}
    scores = {}
    for step in last_steps(steps, MEASURED):
        found = _shares_right(run, step) if step in last_steps(steps, DRAWN) else {}
        for part, batches in held_out.items():
            errors = relative_errors_by_level(run, batches, SIGMAS, checkpoint=step)
            found[f"{part}: error"] = statistics.geometric_mean(errors.values())
        scores[str(step)] = found
    return scores


def _shares_right(run: Path, step: int) -> dict[str, float]:
    """Return the shares of pictures that show all that their captions say."""
    from demo_quality import judge_picture

    asked = [(group, *prompt) for group in GROUPS for prompt in prompts(group)]
    read = [judge_picture(pixels) for pixels in _drawn(run, step, [text for _, text, _ in asked])]
    shares = {}
    for name, (group, learnt) in RIGHT.items():
        shares[name] = statistics.mean(
            got == want
            for got, (its_group, text, want) in zip(read, asked, strict=True)
            if its_group == group and learnt in (None, text in learnt_captions())
        )
    return shares


def _drawn(run: Path, step: int, texts: list[str]) -> list[NDArray[numpy.uint8]]:
    """Return the pictures that a checkpoint draws; they are kept beside the run, 20 a row."""
    from demo_quality import picture_grid
    from sdxl_training.assemble import draw_prompts
    from sdxl_training.assemble.drawing import sampling_of
    from sdxl_training.config.schema import Previews

    kept = run / f"drawn_{step}.png"
    if not kept.exists():
        pictures = draw_prompts(run, texts, sampling_of(Previews(steps=20, guidance=4.0, seed=0)), checkpoint=step)
        unfinished = kept.with_suffix(".unfinished")
        Image.fromarray(numpy.asarray(picture_grid(pictures, 20))).save(unfinished, "PNG")
        unfinished.rename(kept)
    grid = numpy.asarray(Image.open(kept))
    return [tile for row in numpy.split(grid, len(grid) // 64) for tile in numpy.split(row, 20, axis=1)]


Results = Mapping[str, Mapping[int, Scores]]  # row -> seed -> scores


def over_checkpoints(scores: Scores, measure: str) -> float:
    """Return the mean of a measure over a run's checkpoints: high where it is learnt early and stays."""
    return statistics.mean(found[measure] for found in scores.values() if measure in found)


def accuracy_table(results: Results) -> Iterator[str]:
    """Yield the shares that are right, mean over checkpoints and seeds, with the range over the seeds."""
    yield f"| weights | {' | '.join(f'{name} %' for name in RIGHT)} |"
    yield "|---" * (1 + len(RIGHT)) + "|"
    for row, runs in results.items():
        cells = [_range([100 * over_checkpoints(scores, name) for scores in runs.values()]) for name in RIGHT]
        yield f"| {row} | {' | '.join(cells)} |"


def change_table(
    results: Results, measures: Iterable[str], change: Callable[[Scores, Scores, str], float]
) -> Iterator[str]:
    """Yield how measures differ from those of the first row, seed by seed: mean, standard error, range.

    change: of a run's scores against the first row's, of one measure.
    """
    names = list(measures)
    yield f"| weights | {' | '.join(names)} |"
    yield "|---" * (1 + len(names)) + "|"
    base, *others = results
    for row in others:
        pairs = [(scores, results[base][seed]) for seed, scores in results[row].items()]
        yield f"| {row} | {' | '.join(_change([change(*pair, name) for pair in pairs]) for name in names)} |"


def points_gained(scores: Scores, base: Scores, name: str) -> float:
    """Return how many points more pictures are right."""
    return 100 * (over_checkpoints(scores, name) - over_checkpoints(base, name))


def error_added(scores: Scores, base: Scores, part: str) -> float:
    """Return by how many per cent the held-out error is larger."""
    return 100 * (_mean_error(scores, part) / _mean_error(base, part) - 1)


def _mean_error(scores: Scores, part: str) -> float:
    return statistics.geometric_mean(found[f"{part}: error"] for found in scores.values())


def weight_lines(work: Path, results: Results, steps: int) -> Iterator[str]:
    """Yield the mean weight of pictures with a rare tag at the end of the runs of each row."""
    for row, runs in results.items():
        weights = [
            tag["weight"]
            for seed in runs
            for tag in json.loads((work / run_name(row, seed, steps) / "tags.json").read_text())["tags"]
            if tag["tag"] in (RARE_COLOUR, RARE_SHAPE)
        ]
        yield f"* {row}: {statistics.mean(weights):.2f} ({min(weights):.2f} to {max(weights):.2f})"


def _range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _change(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.1f} ± {error:.1f} ({min(values):+.1f} to {max(values):+.1f})"


def plot(results: Results, to: Path) -> None:
    """Draw the curves: mean over the seeds of each row, and faintly each seed."""
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    errors = [part for part in PARTS if part != "rare colour, learnt captions"]
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.8), sharex=True)
    base = next(iter(results.values()))
    for number, (row, runs) in enumerate(results.items()):

        def draw(
            axis: Axes, steps: list[str], curves: list[list[float]], colour: str = f"C{number}", row: str = row
        ) -> None:
            at = [int(step) for step in steps]
            for curve in curves:
                axis.plot(at, curve, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(at, [statistics.mean(values) for values in zip(*curves, strict=True)], color=colour, label=row)

        for axis, name in zip(axes[0], RIGHT, strict=True):
            steps = [step for step, found in next(iter(runs.values())).items() if name in found]
            draw(axis, steps, [[100 * scores[step][name] for step in steps] for scores in runs.values()])
            axis.set_title(f"{name}: right, %", fontsize=10)
        for axis, part in zip(axes[1], errors, strict=True):
            of = f"{part}: error"
            steps = list(next(iter(runs.values())))
            draw(axis, steps, [[runs[seed][step][of] / base[seed][step][of] for step in steps] for seed in runs])
            axis.set_title(f"{part}: error to {next(iter(results))}", fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.supxlabel("updates", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=100)


def sheet(work: Path, rows: Sequence[str], seeds: Sequence[int], steps: int, to: Path) -> None:
    """Lay out what each row's runs drew at the end for the rare shape."""
    last = last_steps(steps, 1)[0]
    line, margin, side = GROUPS.index("rare shape") * PROMPTS // 20, 190, 64
    picture = Image.new("RGB", (margin + len(seeds) * (10 * side + 8), 20 + (side + 2) * len(rows)), "white")
    write = ImageDraw.Draw(picture)
    for column, seed in enumerate(seeds):
        left = margin + column * (10 * side + 8)
        write.text((left, 4), f"seed {seed}, after {last} updates", fill="black")
        for number, row in enumerate(rows):
            drawn = Image.open(work / run_name(row, seed, steps) / f"drawn_{last}.png")
            picture.paste(drawn.crop((0, line * side, 10 * side, (line + 1) * side)), (left, 20 + number * (side + 2)))
    for number, row in enumerate(rows):
        write.text((4, 20 + number * (side + 2) + side // 2), row, fill="black")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(to, optimize=True)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--plot", type=Path, help="where to draw the plot (PNG)")
    parser.add_argument("--sheet", type=Path, help="where to lay out drawn pictures of the rare shape (PNG)")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, steps = arguments.work.resolve(), arguments.steps
    if steps % CHECKPOINTS:
        parser.error(f"--steps {steps}: must be a multiple of {CHECKPOINTS}, the checkpoints of a run")
    if arguments.score:
        print(json.dumps(score_run(work, arguments.score, steps)))
        return
    write_pictures(work)

    def both(task: tuple[str, int]) -> Scores:
        train(work, *task, steps)
        return score(work, *task, steps)

    tasks = [(row, seed) for seed in arguments.seeds for row in arguments.rows]
    train(work, *tasks[0], steps)  # fills the cache for the others
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = dict(zip(tasks, pool.map(both, tasks), strict=True))
    results = {row: {seed: scores[row, seed] for seed in arguments.seeds} for row in arguments.rows}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {date.today()}; {steps} updates of 32, "
        f"seeds {_listed(arguments.seeds)}; {PROMPTS} drawn pictures a group and {HELD_OUT} held-out ones a part; mean "
        f"over checkpoints and seeds (range over the seeds).\n"
    )
    print(f"Right after {_listed(last_steps(steps, DRAWN))} updates:\n")
    print("\n".join(accuracy_table(results)))
    print(f"\nPoints above {arguments.rows[0]}, seed by seed, mean ± standard error (range):\n")
    print("\n".join(change_table(results, RIGHT, points_gained)))
    print(f"\nHeld-out error after {_listed(last_steps(steps, MEASURED))} updates, % above {arguments.rows[0]}:\n")
    print("\n".join(change_table(results, PARTS, error_added)))
    print("\nWeight of a picture with a rare tag at the end, mean (range):\n")
    print("\n".join(weight_lines(work, results, steps)))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.sheet:
        sheet(work, arguments.rows, arguments.seeds[:2], steps, arguments.sheet)


if __name__ == "__main__":
    main()
