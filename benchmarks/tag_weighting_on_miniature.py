"""Do tag weights help rare concepts, and what do they cost the common ones?

    python benchmarks/tag_weighting_on_miniature.py --work runs/tag_weighting    # an hour; goes on where it was

Draws a set of 960 pictures in which one object colour (cyan) and one shape (triangle) are on 12 pictures each (1.25 %),
and trains the miniature on it with every row of ROWS and every seed, everything else equal. It measures, for captions
with the rare colour, with the rare shape and with common ones only,

* at three checkpoints of each run, how often a drawn picture has the colour or the shape of its caption, read back from
  the pixels (before that, so little is drawn well that the reading means nothing),
* at five, the error of the clean latent on pictures that no run has seen, at fixed noise and levels.

Runs of one seed see the same pictures in the same order with the same noise, so rows are compared seed by seed. Writes
Markdown tables, a plot and a sheet of the pictures drawn by the first seed.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from sdxl_training.data.demo_set import PALETTE, SHAPES, PictureSpec, draw_picture

ROOT = Path(__file__).parents[1]
RARE_COLOUR, RARE_SHAPE, RARE = "cyan", "triangle", 12
PICTURES, HELD_OUT = 960, 48  # held out: of each group
PROMPTS = 40  # of each group; where there are fewer captions each is drawn several times, from other noise
SIGMAS = (0.5, 1.0, 2.0, 4.0, 8.0)
CHECKPOINTS, MEASURED, DRAWN = 6, 5, 3  # of a run; of these, the last ones
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
    "overrides, to the bound of 4": {
        "static": f"{{type: frequency, overrides: {{{RARE_COLOUR}: 64, {RARE_SHAPE}: 64}}}}"
    },
    "dynamic": {"dynamic": f"{{type: residual_loss, {WARM}}}"},
    "static and dynamic": {"static": "{type: frequency}", "dynamic": f"{{type: residual_loss, {WARM}}}"},
    "meta": {"dynamic": f"{{type: meta, {WARM}}}"},
}
GROUPS = ("rare colour", "rare shape", "common")
RIGHT = {  # what is read back: its group, and whether the object's colour (0) or its shape (2)
    "rare colour": ("rare colour", 0),
    "rare shape": ("rare shape", 2),
    "common colours": ("common", 0),
    "common shapes": ("common", 2),
}
Scores = Mapping[str, Mapping[str, float]]  # checkpoint's step -> measure -> value


def write_pictures(folder: Path) -> None:
    """Write the set that is learnt, and apart from it what is held out, a folder for each group."""
    learnt, held_out = random.Random("tag weighting 2"), random.Random("held out")
    _write(folder / "pictures", [_spec(learnt, _group_of(number)) for number in range(PICTURES)])
    for group in GROUPS:
        _write(folder / "held_out" / _file_name(group), [_spec(held_out, group) for _ in range(HELD_OUT)])


def _group_of(number: int) -> str:
    return "rare colour" if number < RARE else "rare shape" if number < 2 * RARE else "common"


def _spec(choose: random.Random, group: str) -> PictureSpec:
    colour = RARE_COLOUR if group == "rare colour" else choose.choice(COLOURS)
    shape = RARE_SHAPE if group == "rare shape" else choose.choice(COMMON_SHAPES)
    background = choose.choice([other for other in COLOURS if other != colour])
    offset = (choose.uniform(-0.03, 0.03), choose.uniform(-0.03, 0.03))
    return PictureSpec(colour, shape, background, radius=choose.uniform(0.34, 0.38), offset_yx=offset)


def _write(folder: Path, specs: Sequence[PictureSpec]) -> None:
    if folder.is_dir():
        return
    from PIL import Image

    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number, spec in enumerate(specs):
        Image.fromarray(draw_picture(spec, (64, 64))).save(unfinished / f"{number:04d}.png")
        text = caption(spec.colour, spec.shape, spec.background)
        (unfinished / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    unfinished.rename(folder)


def caption(colour: str, shape: str, background: str) -> str:
    """Return the three tags of a picture, apart from each other: "cyan, circle, red background"."""
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


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def run_name(row: str, seed: int, steps: int) -> str:
    """Return the folder name of a run."""
    return f"{_file_name(row)}_seed{seed}_steps{steps}"


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
        kept.write_bytes(done.stdout)
    return dict(json.loads(kept.read_text()))


def last_steps(steps: int, count: int) -> list[int]:
    """Return the steps of the last checkpoints of a run."""
    return [steps // CHECKPOINTS * number for number in range(CHECKPOINTS - count + 1, CHECKPOINTS + 1)]


def score_run(work: Path, run: Path, steps: int) -> Scores:
    """Draw, read back and measure held-out pictures, in this process."""
    from held_out import held_out_batches, relative_errors_by_level

    held_out = {group: held_out_batches(run, work / "held_out" / _file_name(group)) for group in GROUPS}
    scores = {}
    for step in last_steps(steps, MEASURED):
        found = _shares_right(run, step) if step in last_steps(steps, DRAWN) else {}
        for group, batches in held_out.items():
            errors = relative_errors_by_level(run, batches, SIGMAS, checkpoint=step)
            found[f"{group}: error"] = statistics.geometric_mean(errors.values())
        scores[str(step)] = found
    return scores


def _shares_right(run: Path, step: int) -> dict[str, float]:
    """Return the shares of pictures with the right colour or shape; the pictures are kept beside the run."""
    import numpy
    from PIL import Image

    from demo_quality import judge_picture, picture_grid
    from sdxl_training.assemble import draw_prompts
    from sdxl_training.assemble.drawing import sampling_of
    from sdxl_training.config.schema import Previews

    sampling = sampling_of(Previews(steps=20, guidance=4.0, seed=0))
    texts, wanted = zip(*(prompt for group in GROUPS for prompt in prompts(group)), strict=True)
    pictures = draw_prompts(run, list(texts), sampling, checkpoint=step)
    Image.fromarray(numpy.asarray(picture_grid(pictures, 20))).save(run / f"drawn_{step}.png")
    right = [numpy.equal(judge_picture(pixels), want) for pixels, want in zip(pictures, wanted, strict=True)]
    of_group = {group: right[PROMPTS * number : PROMPTS * (number + 1)] for number, group in enumerate(GROUPS)}
    return {
        name: statistics.mean(bool(one[which]) for one in of_group[group]) for name, (group, which) in RIGHT.items()
    }


Results = Mapping[str, Mapping[int, Scores]]  # row -> seed -> scores


def over_checkpoints(scores: Scores, measure: str) -> float:
    """Return the mean of a measure over a run's checkpoints: high where it is learnt early and stays."""
    return statistics.mean(found[measure] for found in scores.values() if measure in found)


def accuracy_table(results: Results) -> Iterator[str]:
    """Yield the shares that are right, mean over checkpoints and seeds, with the range over the seeds."""
    yield f"| weights | {' | '.join(f'{name} %' for name in RIGHT)} |"
    yield "|---" * (1 + len(RIGHT)) + "|"
    for row, runs in results.items():
        cells = [_cell([100 * over_checkpoints(scores, name) for scores in runs.values()]) for name in RIGHT]
        yield f"| {row} | {' | '.join(cells)} |"


def error_table(results: Results) -> Iterator[str]:
    """Yield by how many per cent the error on held-out pictures is above that of the first row, seed by seed."""
    yield f"| weights | {' | '.join(f'{group}, %' for group in GROUPS)} |"
    yield "|---" * (1 + len(GROUPS)) + "|"
    base, *others = results
    for row in others:
        cells = [
            _cell([100 * (_mean_error(results[row][seed], group) / _mean_error(results[base][seed], group) - 1)
                   for seed in results[row]], "+")
            for group in GROUPS
        ]  # fmt: skip
        yield f"| {row} | {' | '.join(cells)} |"


def _mean_error(scores: Scores, group: str) -> float:
    return statistics.geometric_mean(found[f"{group}: error"] for found in scores.values())


def _cell(values: Sequence[float], sign: str = "") -> str:
    low, mean, high = (f"{value:{sign}.1f}" for value in (min(values), statistics.mean(values), max(values)))
    return f"{mean} ({low} to {high})"


def plot(results: Results, to: Path) -> None:
    """Draw the curves: mean over the seeds of each row, and faintly each seed."""
    import matplotlib.pyplot as plt

    above = {name: f"{name} right, %" for name in ("rare colour", "rare shape", "common shapes")}
    below = {f"{group}: error": f"{group}: held-out error" for group in GROUPS}
    figure, axes = plt.subplots(2, len(GROUPS), figsize=(12, 6.4), sharex=True)
    for axis, (measure, title) in zip(axes.flat, (above | below).items(), strict=True):
        scale = 1 if "error" in measure else 100
        for number, (row, runs) in enumerate(results.items()):
            steps = [step for step, found in next(iter(runs.values())).items() if measure in found]
            curves = [[scale * scores[step][measure] for step in steps] for scores in runs.values()]
            at = [int(step) for step in steps]
            for curve in curves:
                axis.plot(at, curve, color=f"C{number}", alpha=0.2, linewidth=0.8)
            axis.plot(at, [statistics.mean(all_) for all_ in zip(*curves, strict=True)], color=f"C{number}", label=row)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    figure.supxlabel("updates", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)


def sheet(work: Path, rows: Sequence[str], seed: int, steps: int, to: Path) -> None:
    """Lay out what each row drew for the rare shape half-way and at the end."""
    from PIL import Image, ImageDraw

    line, margin, side = GROUPS.index("rare shape") * PROMPTS // 20, 190, 64
    columns = [last_steps(steps, DRAWN)[0], steps]
    drawn = [[Image.open(work / run_name(row, seed, steps) / f"drawn_{step}.png") for step in columns] for row in rows]
    picture = Image.new("RGB", (margin + 2 * 10 * side + 8, 20 + (side + 2) * len(rows)), "white")
    write = ImageDraw.Draw(picture)
    for column, step in enumerate(columns):
        left = margin + column * (10 * side + 8)
        write.text((left, 4), f"after {step} updates", fill="black")
        for number, of_row in enumerate(drawn):
            strip = of_row[column].crop((0, line * side, 10 * side, (line + 1) * side))
            picture.paste(strip, (left, 20 + number * (side + 2)))
    for number, row in enumerate(rows):
        write.text((4, 20 + number * (side + 2) + side // 2), row, fill="black")
    picture.save(to)


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
        f"seeds {_listed(arguments.seeds)}; {PROMPTS} drawn and {HELD_OUT} held-out pictures a group; mean "
        f"over checkpoints and seeds (range over the seeds).\n"
    )
    print(f"Right after {_listed(last_steps(steps, DRAWN))} updates:\n")
    print("\n".join(accuracy_table(results)))
    print(
        f"\nHeld-out error after {_listed(last_steps(steps, MEASURED))} updates, above that of {arguments.rows[0]}:\n"
    )
    print("\n".join(error_table(results)))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.sheet:
        sheet(work, arguments.rows, arguments.seeds[0], steps, arguments.sheet)


if __name__ == "__main__":
    main()
