"""Files that cannot be read for a while: what a run trains on does not depend on when that was."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sdxl_training.assemble.dataset import build_schedule, find_pictures
from sdxl_training.config.load import load_config
from sdxl_training.tracking.progress import SilentProgress
from tests.integration.conftest import Trainer

LAST = 12
EVERY = 4
TIMELESS = ("step", "images", "epoch", "loss", "lr", "grad_norm")

# The trainer on a disk that fails: for names in the file FAILING, and for all as soon as the path in DOWN exists.
PROGRAM = """
import errno, os, sys
from pathlib import Path
from sdxl_training.cli import main
from sdxl_training.data import images

failing, down = Path(os.environ["FAILING"]), Path(os.environ["DOWN"])
read_bytes = Path.read_bytes

def read(path):
    if path.suffix in (".png", ".jpg", ".webp") and (down.exists() or path.name in failing.read_text().split()):
        raise OSError(errno.EIO, "Input/output error", str(path))
    return read_bytes(path)

Path.read_bytes, images.RETRY_SECONDS = read, (0.0, 0.0)
main()
"""


@dataclass
class FaultyTrainer(Trainer):
    """Starts the trainer on a disk that fails."""

    @property
    def program(self) -> Path:
        return self.config.with_name("faulty.py")


@pytest.fixture
def faulty(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyTrainer:
    (tmp_path / "faulty.py").write_text(PROGRAM)
    (tmp_path / "failing").touch()
    monkeypatch.setenv("FAILING", str(tmp_path / "failing"))
    monkeypatch.setenv("DOWN", str(tmp_path / "never"))
    return FaultyTrainer(trainer.config, tmp_path / "faulty")


def steps(last: int = LAST) -> list[str]:
    """Return settings for so many steps without a cache, so that every visit reads, and encodes in its own batch."""
    settings = (
        f"training.max_steps={last}",
        f"global_config.checkpoints.every_steps={EVERY}",
        "training.schedule={type: constant, warmup_steps: 0}",
        "data.cache.mode=none",
    )
    return [word for one in settings for word in ("--set", one)]


def assert_same_run(one: Trainer, other: Trainer) -> None:
    first, second = one.checkpoint(LAST), other.checkpoint(LAST)
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    rows = [[{key: row[key] for key in TIMELESS} for row in run.metrics()] for run in (one, other)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == LAST


def quarantined(trainer: Trainer) -> dict[str, str]:
    lines = (trainer.run_dir / "quarantine.jsonl").read_text().splitlines()
    return {Path(entry["path"]).name: entry["reason"] for entry in map(json.loads, lines)}


def seen_before_and_after(trainer: Trainer, output: Path) -> str:
    """Return the name of a picture that is drawn before the first checkpoint and again after the second."""
    config = load_config(trainer.config, [f"global_config.output_dir={output}"]).config
    plan = find_pictures(config, SilentProgress()).plan
    schedule = build_schedule(config, plan, processes=1)
    early, late = (
        {draw.record for step in steps for draw in schedule.batch_at(step)[1]}
        for steps in (range(EVERY), range(2 * EVERY, LAST))
    )
    whole = (Path(plan.records[number].path).name for number in sorted(early & late))
    return next(name for name in whole if not name.startswith("broken"))


def test_a_file_that_fails_alone_is_replaced_also_after_a_resume_that_could_read_it(
    faulty: FaultyTrainer, tmp_path: Path
) -> None:
    failing = seen_before_and_after(faulty, tmp_path / "plan")
    (tmp_path / "failing").write_text(failing)
    whole = replace(faulty, output=tmp_path / "whole")
    settings = ("--set", "data.max_bad_fraction=0.3")
    whole.run(*steps(), *settings)
    faulty.run(*steps(2 * EVERY), *settings)
    (tmp_path / "failing").write_text("")
    assert "resuming" in faulty.run(*steps(), *settings)
    for run in (whole, faulty):
        assert "Input/output error" in quarantined(run)[failing]
    assert_same_run(whole, faulty)


def test_a_disk_that_fails_ends_the_run_which_resumes_as_if_nothing_had_been(
    faulty: FaultyTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(faulty, output=tmp_path / "whole")
    whole.run(*steps())
    monkeypatch.setenv("DOWN", str(faulty.run_dir / "checkpoints" / f"step-{EVERY:06d}" / "manifest.json"))
    said = " ".join(faulty.run(*steps(), status=2).split())
    assert "Traceback" not in said
    assert "Input/output error; nor can 8 others of its pictures be read" in said
    assert faulty.metrics()[-1]["step"] < LAST
    assert not any("output error" in reason for reason in quarantined(faulty).values())
    monkeypatch.setenv("DOWN", str(tmp_path / "never"))
    assert "resuming" in faulty.run(*steps())
    assert_same_run(whole, faulty)
