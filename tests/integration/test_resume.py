"""An interrupted and resumed run is the uninterrupted one, bit for bit: weights, optimizer, average, tags, metrics."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import Trainer, make_trainer

LAST = 24
TIMELESS = ("step", "images", "epoch", "loss", "lr", "grad_norm")
TAGS = """
tag_weighting:
  static: {type: frequency, min_count: 2}
  dynamic: {type: meta, probe_steps: 6, warmup_steps: 3}
  trust: {type: null_probe, probe_steps: 6, min_probed: 2, quantile: 0.5, width: 0.2}
  refresh_steps: 4
"""
"""Weights that follow the training, measured and changed at other steps than those that are saved."""


def with_tags(trainer: Trainer) -> Trainer:
    trainer.config.write_text(trainer.config.read_text() + TAGS)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_model: Path) -> Trainer:
    other = with_tags(make_trainer(tmp_path_factory.mktemp("uninterrupted"), pictures, tiny_model))
    other.run()
    return other


@pytest.fixture(name="trainer")
def trainer_with_tags(trainer: Trainer) -> Trainer:
    return with_tags(trainer)


def assert_same_run(one: Trainer, other: Trainer) -> None:
    first, second = one.checkpoint(LAST), other.checkpoint(LAST)
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer:exp_avg_sq/") for name in first)
    assert any(name.startswith("average:") for name in first)
    assert float(first["tag_margins:measured"].sum()) > 0
    assert float(first["caption_gains:gain_moments"][0].sum()) > 0
    assert float(first["tag_residuals:seen"].sum()) > LAST
    assert float(first["picture_weights:weight"].std()) > 0.01
    differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert differing == []
    rows = [[{key: row[key] for key in TIMELESS} for row in run.metrics()] for run in (one, other)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, LAST + 1))


def test_killed_in_the_middle_of_an_epoch_and_resumed(uninterrupted: Trainer, trainer: Trainer) -> None:
    process = trainer.start()
    trainer.wait_for(process, trainer.run_dir / "checkpoints" / "step-000005")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    said = trainer.run()
    assert "resum" in said.lower()
    assert_same_run(uninterrupted, trainer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_saves_and_resumes(uninterrupted: Trainer, trainer: Trainer, number: signal.Signals) -> None:
    process = trainer.start()
    trainer.wait_for(process, trainer.run_dir / "checkpoints" / "step-000005")
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    stopped_at = trainer.metrics()[-1]["step"]
    assert 5 <= stopped_at < LAST
    assert (trainer.run_dir / "checkpoints" / f"step-{int(stopped_at):06d}" / "manifest.json").exists()
    assert f"--config {trainer.config}" in said  # the command that goes on
    trainer.run("--resume", "auto")
    assert_same_run(uninterrupted, trainer)


def test_resume_takes_the_newest_checkpoint_that_verifies(uninterrupted: Trainer, trainer: Trainer) -> None:
    trainer.run()
    damaged = trainer.run_dir / "checkpoints" / f"step-{LAST:06d}" / "unet.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    said = trainer.run()
    assert "step-000024" in said
    assert "unet.safetensors" in said
    assert_same_run(uninterrupted, trainer)


def test_a_finished_run_is_left_alone(trainer: Trainer) -> None:
    trainer.run("--set", "training.max_steps=2")
    before = (trainer.run_dir / "metrics.jsonl").read_bytes()
    said = trainer.run("--set", "training.max_steps=2")
    assert "finished" in said
    assert (trainer.run_dir / "metrics.jsonl").read_bytes() == before


def test_keep_last_keeps_the_newest(trainer: Trainer) -> None:
    trainer.run()
    names = sorted(path.name for path in (trainer.run_dir / "checkpoints").iterdir())
    assert names == ["step-000020", "step-000024"]


def test_another_data_set_is_refused_on_resume(trainer: Trainer) -> None:
    trainer.run("--set", "training.max_steps=5")
    said = trainer.run("--set", "data.sources.0.repeats=3", status=2)
    refusal = said[said.index("the data of this run changed") :]
    assert "repeats" in refusal
    assert "captions" not in refusal  # only what changed is named
    assert "run_name" in refusal  # the remedy


def test_never_does_not_overwrite(trainer: Trainer) -> None:
    trainer.run("--set", "training.max_steps=5")
    said = trainer.run("--resume", "never", status=2)
    assert "run_name" in said
