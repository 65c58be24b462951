"""Two gloo processes and one train the same model. SGD, since Adam turns a rounding difference into a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

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

    process = trainer.start(processes=2)
    trainer.wait_for(process, trainer.run_dir / "checkpoints" / "step-000005")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    last = trainer.metrics()[-1]["step"]
    assert (trainer.run_dir / "checkpoints" / f"step-{int(last):06d}" / "manifest.json").exists(), said
    trainer.run(processes=2)
    assert trainer.metrics()[-1]["step"] == 24
