"""What do tag weights and their statistics cost an update?

    OMP_NUM_THREADS=1 python benchmarks/tag_weighting_cost.py

Opens one run of the miniature for each row in one process and lets them make updates in turns, so that whatever else
the machine does slows all of them alike. The first row has neither weights nor statistics. All times are the
processor's. Updates of two rows differ by more from one moment to the next than by what tags add to them, so that is
measured by itself: the time spent in looking weights up, in noting losses and in what is done about tags between
updates. Probes, of which there is one in `probe_steps` updates, are timed apart.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.assemble.tag_actions import tag_actions, tag_probes
from sdxl_training.config import load_config
from sdxl_training.data.demo_set import write_demo_set
from sdxl_training.parallel.group import Group
from sdxl_training.records import StepStats
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.tracking.tracker import Trackers, open_trackers
from sdxl_training.training.step import train_step
from sdxl_training.weighting.picture_weights import EQUAL_WEIGHTS
from sdxl_training.weighting.watch import NO_WATCH, TagWatch

ROOT = Path(__file__).parents[1]
EVERY = 50  # updates between two entries of statistics, and two changes of weights: a tenth of the default
Parameters, Result = ParamSpec("Parameters"), TypeVar("Result")
STATIC = "tag_weighting.static={type: frequency}"
ROWS = {
    "neither weights nor statistics": ["tag_weighting.statistics.enabled=false"],
    "statistics": [],
    "static": ["tag_weighting.statistics.enabled=false", STATIC],
    "static and statistics": [STATIC],
    "dynamic": ["tag_weighting.dynamic={type: residual_loss, warmup_steps: 0}"],
    "trust": ["tag_weighting.trust={type: null_probe}"],
    "meta": ["tag_weighting.dynamic={type: meta, warmup_steps: 0}"],
}


def open_row(overrides: list[str], pictures: Path, work: Path, name: str) -> Session:
    """Open the run of a row."""
    own = [
        f"global_config.output_dir={work}",
        f"global_config.run_name={name}",
        f"data.sources=[{{path: {pictures}}}]",
        f"data.cache.path={work / 'cache'}",
        "global_config.previews.every_steps=0",
        f"tag_weighting.statistics.every_steps={EVERY}",
        f"tag_weighting.refresh_steps={EVERY}",
        *overrides,
    ]
    config = load_config(ROOT / "examples" / "miniature.yaml", own).config
    folder = RunFolder(work / name)
    folder.make()
    session = open_session(config, folder, Group(0, 1, torch.device("cpu")), SilentProgress(), None)
    session.fill()
    return session


class Timed:
    """A run that makes updates, its actions included, and knows how long they, their part for tags and probes took."""

    def __init__(self, session: Session, trackers: Trackers) -> None:
        self._session, self._batches, self._step = session, session.batches(0), 0
        self._probes = [probe for _, probe in tag_probes(session)]
        self._actions = tag_actions(session, trackers)[len(self._probes) :]
        self.updates: list[float] = []
        self.probes: list[float] = []
        self.for_tags = 0.0
        tags = session.tags
        metered = {tags.weights: ["of"], tags.watch: ["see", "after_update"]}
        for part, methods in metered.items():
            if part not in (EQUAL_WEIGHTS, NO_WATCH):  # those do nothing, and all runs share them
                for method in methods:
                    setattr(part, method, self._metered(getattr(part, method)))

    def _metered(self, does: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        def metered(*positional: Parameters.args, **named: Parameters.kwargs) -> Result:
            began = time.process_time()
            result = does(*positional, **named)
            self.for_tags += time.process_time() - began
            return result

        return metered

    def update(self) -> None:
        """Make one update."""
        began = time.process_time()
        stats = train_step(self._session.run, self._step, next(self._batches))
        self._step += 1
        self._metered(self._act)(stats)
        self.updates.append(time.process_time() - began)

    def _act(self, stats: StepStats) -> None:
        for action in self._actions:
            action.after_step(self._step, stats)

    def probe(self) -> None:
        """Make one measurement, where this run has any."""
        for one in self._probes:
            began = time.process_time()
            one(self._step)
            self.probes.append(time.process_time() - began)

    def settle(self) -> None:
        """Do what the updates so far have put off: losses are gathered by tag many updates at a time."""
        if isinstance(self._session.tags.watch, TagWatch):
            self._metered(self._session.tags.watch.residuals)()

    def forget(self) -> None:
        """Leave out what was measured so far."""
        self.settle()
        self.updates.clear()
        self.for_tags = 0.0


def lines(rows: dict[str, Timed], block: int) -> Iterator[str]:
    """Yield the table."""
    yield "| | an update, ms | to neither | of it for tags, ms | % | a probe, in updates | one in ten updates adds, % |"
    yield "|---|---|---|---|---|---|---|"
    base = next(iter(rows.values()))
    for name, timed in rows.items():
        # Rounds are compared one by one: within one, the machine is about as busy for all.
        pairs = list(zip(_rounds(timed.updates, block), _rounds(base.updates, block), strict=True))
        ratio = statistics.median(own / other for own, other in pairs)
        update = statistics.mean(timed.updates)
        for_tags = timed.for_tags / len(timed.updates)
        probes = " | "
        if timed.probes:  # one follows each round
            rounds = zip(timed.probes, _rounds(timed.updates, block), strict=True)
            probe = statistics.median(block * one / whole for one, whole in rounds)
            probes = f"{probe:.2f} | {10 * probe:.0f}"
        yield (
            f"| {name} | {1000 * update:.1f} | {ratio:.3f} | {1000 * for_tags:.3f} | {100 * for_tags / update:.2f} "
            f"| {probes} |"
        )


def _rounds(seconds: list[float], block: int) -> list[float]:
    return [sum(seconds[first : first + block]) for first in range(0, len(seconds), block)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=10, help="updates of each run in a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_demo_set(work / "pictures", 0, 720)
        sessions = {
            name: open_row(overrides, work / "pictures", work, f"row{number}")
            for number, (name, overrides) in enumerate(ROWS.items())
        }
        rows = {
            name: Timed(session, open_trackers(["jsonl", "tensorboard"], session.folder.path, 0))
            for name, session in sessions.items()
        }
        for timed in rows.values():
            timed.update()
            timed.forget()
        for number in range(arguments.rounds):
            order = list(rows.values())
            for timed in order[number % len(order) :] + order[: number % len(order)]:
                for _ in range(arguments.block):
                    timed.update()
                timed.probe()
        for timed in rows.values():
            timed.settle()
        print(
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}, {date.today()}, load average {os.getloadavg()[0]:.1f}; "
            f"{arguments.rounds} rounds of {arguments.block} updates each.\n"
        )
        print("\n".join(lines(rows, arguments.block)))
        for session in sessions.values():
            with closing(session):
                pass


if __name__ == "__main__":
    main()
