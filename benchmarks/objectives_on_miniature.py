"""Which objective and which loss weight learn the demo pictures best, at equal steps and equal seeds?

    python benchmarks/objectives_on_miniature.py --work runs/objectives    # hours on two cores; goes on where it was

Trains the miniature for each row of ROWS and each seed, everything else as in examples/miniature.yaml; draws the 72
prompts of demo_quality.py with each, reads colours and shapes back from the pixels, and measures the error of the clean
latent on held-out pictures at six noise levels. Writes a Markdown table and a plot of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from sdxl_training.data.demo_set import write_demo_set

ROOT = Path(__file__).parents[1]
UNIFORM, LOGIT_NORMAL = "{type: uniform}", "{type: logit_normal, mean: 0.0, std: 1.0}"
EDM_LEVELS = "{type: log_normal_sigma, mean: -1.2, std: 1.2}"
NONE, MIN_SNR = "{type: none}", "{type: min_snr, gamma: 5.0}"
V_ZT = "{type: v_prediction, zero_terminal_snr: true}"
FLOW_RAW, FLOW_VP = "{type: flow_matching, mode: raw}", "{type: flow_matching, mode: preconditioned}"
# name -> objective, level density, loss weight
ROWS = {
    "epsilon": ("{type: epsilon}", UNIFORM, NONE),
    "epsilon, min_snr 5": ("{type: epsilon}", UNIFORM, MIN_SNR),
    "v + ZTSNR": (V_ZT, UNIFORM, NONE),
    "v + ZTSNR, min_snr 5 plus_one": (V_ZT, UNIFORM, MIN_SNR),
    "x0": ("{type: x0}", UNIFORM, NONE),
    "x0, min_snr 5": ("{type: x0}", UNIFORM, MIN_SNR),
    "flow raw": (FLOW_RAW, LOGIT_NORMAL, NONE),
    "flow raw, min_snr 5 plus_one": (FLOW_RAW, LOGIT_NORMAL, MIN_SNR),
    "flow preconditioned": (FLOW_VP, LOGIT_NORMAL, NONE),
    "flow preconditioned, min_snr 5 plus_one": (FLOW_VP, LOGIT_NORMAL, MIN_SNR),
    "edm": ("{type: edm}", EDM_LEVELS, NONE),
    "edm, learned log-variance": ("{type: edm}", EDM_LEVELS, "{type: learned}"),
}
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
MEASURES = {"object_colour": "object colour", "shape": "shape", "background_colour": "background"}


def run_name(row: str, seed: int) -> str:
    """Return the folder name of a run."""
    return "".join(letter if letter.isalnum() else "_" for letter in row) + f"_seed{seed}"


def make_pictures(work: Path) -> None:
    """Write the pictures that are learnt and those that are held out."""
    for name, (seed, count) in {"pictures": (0, 720), "held_out": (1, 96)}.items():
        write_demo_set(work / name, seed, count)


def train(work: Path, row: str, seed: int, steps: int) -> None:
    """Train one row with one seed; a finished run is left as it is."""
    objective, density, weight = ROWS[row]
    settings = {
        "global_config.output_dir": work,
        "global_config.run_name": run_name(row, seed),
        "global_config.seed": seed,
        "global_config.previews.every_steps": 0,
        "global_config.checkpoints": f"{{every_steps: {steps}, keep_last: 1}}",
        "data.sources": f"[{{path: {work / 'pictures'}}}]",
        "data.cache.path": work / "cache",
        "training.max_steps": steps,
        "training.objective": objective,
        "training.level_density": density,
        "training.loss_weight": weight,
    }
    command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(ROOT / "examples" / "miniature.yaml")]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def score(work: Path, row: str, seed: int) -> dict[str, float]:
    """Return one run's accuracies and its held-out errors; kept beside the run."""
    run = work / run_name(row, seed)
    kept = run / "scores.json"
    if not kept.exists():
        command = [sys.executable, __file__, "--work", str(work), "--score", str(run)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        kept.write_bytes(done.stdout)
    return dict(json.loads(kept.read_text()))


def score_run(run: Path, held_out: Path) -> dict[str, float]:
    """Draw, read back and measure; in this process."""
    import numpy
    from PIL import Image

    from demo_quality import accuracies, picture_grid, prompts
    from held_out import held_out_batches, relative_errors_by_level
    from sdxl_training.assemble import draw_prompts
    from sdxl_training.assemble.drawing import sampling_of
    from sdxl_training.config.schema import Previews

    texts, wanted = zip(*prompts(), strict=True)
    sampling = sampling_of(Previews(steps=25, guidance=4.0, seed=0))
    pictures = draw_prompts(run, list(texts), sampling)
    Image.fromarray(numpy.asarray(picture_grid(pictures))).save(run / "drawn.png")
    by_level = relative_errors_by_level(run, held_out_batches(run, held_out), SIGMAS)
    return {**accuracies(pictures, wanted), **{f"sigma {sigma:g}": error for sigma, error in by_level.items()}}


def held_out_error(scores: dict[str, float]) -> float:
    """Return the geometric mean over the noise levels of the error relative to a linear filter's."""
    return statistics.geometric_mean(value for name, value in scores.items() if name.startswith("sigma "))


def table(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Yield the Markdown table: mean and range over the seeds."""
    yield "| objective, weight | object colour % | shape % | background % | held-out error |"
    yield "|---|---|---|---|---|"
    for row, runs in results.items():
        cells = [_cell([100 * scores[measure] for scores in runs], 1) for measure in MEASURES]
        yield f"| {row} | {' | '.join(cells)} | {_cell([held_out_error(scores) for scores in runs], 3)} |"


def _cell(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(results: dict[str, list[dict[str, float]]], to: Path) -> None:
    """Draw accuracies and held-out errors of every run: one dot a seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 0.34 * len(results) + 1.2), sharey=True)
    rows = list(results)[::-1]
    columns = {**{MEASURES[m]: lambda s, m=m: 100 * s[m] for m in MEASURES}, "held-out error": held_out_error}
    for axis, (title, value) in zip(axes, columns.items(), strict=True):
        for height, row in enumerate(rows):
            values = [value(scores) for scores in results[row]]
            axis.plot(values, [height] * len(values), "o", color="C0", alpha=0.6, markersize=5)
            axis.plot([statistics.mean(values)], [height], "|", color="black", markersize=13)
        axis.set_title(title + ("" if "error" in title else " right, %"), fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(range(len(rows)), rows)
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and runs")
    parser.add_argument("--steps", type=int, default=600, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--score", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.score:
        print(json.dumps(score_run(arguments.score, work / "held_out")))
        return

    make_pictures(work)
    jobs = [(row, seed) for seed in range(arguments.seeds) for row in ROWS]
    train(work, *jobs[0], arguments.steps)  # alone, so that the latent cache is filled once

    def train_and_score(job: tuple[str, int]) -> dict[str, float]:
        train(work, *job, arguments.steps)
        return score(work, *job)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = dict(zip(jobs, pool.map(train_and_score, jobs), strict=True))
    results = {row: [scores[row, seed] for seed in range(arguments.seeds)] for row in ROWS}
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread a run; {arguments.steps} steps of")
    print(f"32 pictures, {arguments.seeds} seeds; mean (least to most)\n")
    print("\n".join(table(results)))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
