"""Two gloo processes and one train the same model. SGD, since Adam turns a rounding difference into a step."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from sdxl_training.assemble.dataset import build_schedule, find_pictures
from sdxl_training.config.load import load_config
from sdxl_training.tracking.progress import SilentProgress
from tests.integration.conftest import Trainer

SGD = ("--set", "training.optimizer={type: sgd, learning_rate: 0.05}", "--set", "training.max_steps=6")


def test_same_losses_and_weights_as_one(trainer: Trainer, tmp_path: Path) -> None:
    two = replace(trainer, output=tmp_path / "two")
    trainer.run(*SGD, "--set", "training.batch_size=4", "--set", "training.accumulation=1")
    two.run(*SGD, "--set", "training.batch_size=1", "--set", "training.accumulation=2", processes=2)
    for one_row, two_row in zip(trainer.metrics(), two.metrics(), strict=True):
        assert abs(one_row["loss"] - two_row["loss"]) <= 2e-6 * abs(one_row["loss"])
        assert abs(one_row["grad_norm"] - two_row["grad_norm"]) <= 2e-5 * abs(one_row["grad_norm"])
    start, one, other = trainer.checkpoint(5), trainer.checkpoint(6), two.checkpoint(6)
    for name, tensor in one.items():
        if name.startswith("unet:"):
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[name], one[name]) for name in one if name.startswith("unet:"))


def test_two_processes_stop_together_and_resume(trainer: Trainer) -> None:
    import signal

    process = trainer.launch(processes=2)
    trainer.wait_for(process, trainer.run_dir / "checkpoints" / "step-000005")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    last = trainer.metrics()[-1]["step"]
    assert (trainer.run_dir / "checkpoints" / f"step-{int(last):06d}" / "manifest.json").exists(), said
    trainer.run(processes=2)
    assert trainer.metrics()[-1]["step"] == 24


def drawn_by_the_second_alone(trainer: Trainer, settings: list[str], output: Path) -> Path:
    """Return a picture that only rank 1 of two draws, and only after the first update."""
    config = load_config(trainer.config, [f"global_config.output_dir={output}", *settings]).config
    found = find_pictures(config, SilentProgress())
    schedule = build_schedule(config, found.plan, processes=2)
    updates = [[draw.record for draw in schedule.batch_at(step)[1]] for step in range(config.training.max_steps)]
    half = config.training.batch_size
    first = {record for update in updates for record in update[:half]}
    numbers = {record for update in updates for record in update} - first - set(updates[0])
    paths = [Path(found.plan.records[number].path) for number in sorted(numbers)]
    return next(path for path in paths if not path.name.startswith("broken"))


def test_what_another_process_finds_is_named_and_written_down(trainer: Trainer, pictures: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(pictures, tmp_path / "own"))
    settings = [f"data.sources.0.path={own}", "training.max_steps=6", "training.accumulation=1", "data.workers=1"]
    settings.append("data.max_bad_fraction=0.3")
    damaged = drawn_by_the_second_alone(trainer, settings, tmp_path / "plan")
    damaged.write_bytes(damaged.read_bytes()[:-300])
    said = trainer.run(*(word for setting in settings for word in ("--set", setting)), processes=2)
    entries = [json.loads(line) for line in (trainer.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert str(damaged) in [entry["path"] for entry in entries]
    assert "".join(said.split()).count(f"quarantined:{damaged}") == 1
    assert damaged.name in (trainer.run_dir / "report.html").read_text()
