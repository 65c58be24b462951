"""What does each mode of flow matching cost at the start: from a v-prediction base, an epsilon base, from scratch?

    python benchmarks/flow_start.py --work runs/objectives    # the folder of objectives_on_miniature.py, or a new one

Takes two trained miniatures as bases (v-prediction with zero terminal SNR and epsilon, trained if they are not there),
trains each on as a raw and as a preconditioned flow, and both from scratch, and follows the error of the clean latent
on held-out pictures over the first updates. Prints a Markdown table and draws a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from objectives_on_miniature import FLOW_RAW, FLOW_VP, LOGIT_NORMAL, NONE, ROOT, SIGMAS, make_pictures, run_name, train

STEPS, EVERY = 300, 25
SHOWN = (0, 25, 50, 100, 200, 300)
BASES = {"v-prediction + ZTSNR": "v + ZTSNR", "epsilon": "epsilon", "scratch": None}
MODES = {"preconditioned": FLOW_VP, "raw": FLOW_RAW}


def export_base(work: Path, row: str, steps: int) -> Path:
    """Return the folder of a base model in diffusers' layout, trained and exported if it is not there."""
    folder = work / f"base_{run_name(row, 0)}"
    if not folder.exists():
        train(work, row, 0, steps)
        command = [sys.executable, str(ROOT / "src" / "main.py"), "export", "--run", str(work / run_name(row, 0))]
        subprocess.run([*command, "--to", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def follow(work: Path, base: str, mode: str, seed: int) -> dict[int, float]:
    """Train one flow from a base and return its held-out error by step."""
    run = work / f"start_{'_'.join((base, mode)).replace(' ', '')}_seed{seed}"
    kept = run / "errors.json"
    if not kept.exists():
        row = BASES[base]
        settings = {
            "global_config.output_dir": work,
            "global_config.run_name": run.name,
            "global_config.seed": seed,
            "global_config.previews.every_steps": 0,
            "global_config.checkpoints": f"{{every_steps: {EVERY}, keep_last: {STEPS // EVERY + 1}}}",
            "model.source": "miniature" if row is None else work / f"base_{run_name(row, 0)}",
            "data.sources": f"[{{path: {work / 'pictures'}}}]",
            "data.cache.path": work / "cache",
            "training.max_steps": STEPS,
            "training.objective": MODES[mode][:-1] + ", accept_mismatch: true}",
            "training.level_density": LOGIT_NORMAL,
            "training.loss_weight": NONE,
            "training.optimizer.learning_rate": 5e-4,
            "training.schedule": "{type: constant, warmup_steps: 20}",
        }
        command = [sys.executable, str(ROOT / "src" / "main.py"), "--config", str(ROOT / "examples" / "miniature.yaml")]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        measure = [sys.executable, __file__, "--work", str(work), "--measure", str(run)]
        kept.write_bytes(subprocess.run(measure, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    return {int(step): error for step, error in json.loads(kept.read_text()).items()}


def measure_run(run: Path, held_out: Path) -> dict[int, float]:
    """Return the held-out error (geometric mean over noise levels) of each checkpoint; in this process."""
    from held_out import held_out_batches, relative_errors_by_level

    batches = held_out_batches(run, held_out)
    errors = {}
    for step in range(0, STEPS + 1, EVERY):
        by_level = relative_errors_by_level(run, batches, SIGMAS, checkpoint=step, use_ema=False)
        errors[step] = statistics.geometric_mean(by_level.values())
    return errors


def plot(results: dict[tuple[str, str], list[dict[int, float]]], to: Path) -> None:
    """Draw each start's error over the steps: the mean over seeds, and their range as a band."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(BASES), figsize=(11, 3.4), sharey=True)
    for axis, base in zip(axes, BASES, strict=True):
        for mode, colour in zip(MODES, ("C0", "C3"), strict=True):
            runs = results[base, mode]
            steps = list(runs[0])
            columns = [[errors[step] for errors in runs] for step in steps]
            axis.plot(steps, [statistics.mean(column) for column in columns], color=colour, label=mode)
            axis.fill_between(steps, [*map(min, columns)], [*map(max, columns)], color=colour, alpha=0.2)
        axis.set_title(f"from {base}", fontsize=10)
        axis.set_xlabel("updates")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("held-out error, linear filter = 1")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and runs")
    parser.add_argument("--base-steps", type=int, default=600, help="updates of a base that is not there yet")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each start")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.measure:
        print(json.dumps(measure_run(arguments.measure, work / "held_out")))
        return

    make_pictures(work)
    for row in filter(None, BASES.values()):
        export_base(work, row, arguments.base_steps)
    jobs = [(base, mode, seed) for seed in range(arguments.seeds) for base in BASES for mode in MODES]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        errors = dict(zip(jobs, pool.map(lambda job: follow(work, *job), jobs), strict=True))
    results = {
        (base, mode): [errors[base, mode, seed] for seed in range(arguments.seeds)] for base in BASES for mode in MODES
    }
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread a run; {arguments.seeds} seeds;")
    print("error of the clean latent on held-out pictures, 1 is what a linear filter leaves\n")
    print(f"| from | mode | {' | '.join(f'step {step}' for step in SHOWN)} |")
    print(f"|---|---|{'---|' * len(SHOWN)}")
    for (base, mode), runs in results.items():
        print(f"| {base} | {mode} | {' | '.join(f'{statistics.mean(e[s] for e in runs):.3f}' for s in SHOWN)} |")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
