"""What a run leaves behind, and what it says to a newcomer who makes mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests.integration.conftest import Trainer

SHORT = ("--set", "training.max_steps=4", "--set", "global_config.previews={every_steps: 2, steps: 2}")


def test_a_run_leaves_what_the_surface_promises(trainer: Trainer) -> None:
    process = trainer.launch(*SHORT, "--set", "global_config.tracking.tensorboard=true")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    run = trainer.run_dir
    for name in ("config.resolved.yaml", "run.log", "metrics.jsonl", "quarantine.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step-000000.png",
        "step-000002.png",
        "step-000004.png",
    ]
    assert (run / "checkpoints" / "step-000004" / "manifest.json").exists()
    keys = ["step", "images", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait_fraction"]
    assert [list(row) for row in trainer.metrics()] == [[*keys, "peak_memory_gib"]] * 4
    assert [row["images"] for row in trainer.metrics()] == [4, 8, 12, 16]
    for place in ("samples/step-000004.png", "report.html", "checkpoints/step-000004"):
        assert str(run / place) in said
    assert "batch_size 2 x accumulation 2 x processes 1 = 4 images a step" in said
    assert "latents: 0 there already, 37 to encode (not read yet 37)" in said


# A header does not tell that a file is cut short: that is found when the picture is decoded, in an epoch at the latest.
@pytest.mark.parametrize("settings", [("data.cache.mode=first", *SHORT[1::2]), ("data.cache.mode=ahead",)])
def test_broken_pictures_are_quarantined_by_name_and_reason(trainer: Trainer, settings: tuple[str, ...]) -> None:
    said = trainer.run(*(word for setting in settings for word in ("--set", setting)))
    entries = [json.loads(line) for line in (trainer.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert len(entries) == 3
    assert all(Path(entry["path"]).is_file() and entry["reason"] for entry in entries)
    report = (trainer.run_dir / "report.html").read_text()
    assert all(Path(entry["path"]).name in report for entry in entries)
    assert all(said.count(f"quarantined: {entry['path']}") == 1 for entry in entries), "each is named once"


def test_until_it_is_drawn_a_picture_that_is_cut_short_is_not_missed(trainer: Trainer) -> None:
    trainer.run("--set", "training.max_steps=2", "--set", "training.accumulation=1", "--set", "training.batch_size=1")
    entries = [json.loads(line) for line in (trainer.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(entry["path"]).name for entry in entries} >= {"broken-empty.png", "broken-text.png"}
    assert len(entries) <= 3


def test_workers_do_not_change_the_numbers(trainer: Trainer, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 2):
        trainer.output = tmp_path / f"workers{workers}"
        trainer.run(*SHORT, "--set", f"data.workers={workers}")
        losses.append([row["loss"] for row in trainer.metrics()])
    assert losses[0] == losses[1]


def test_dry_run_proves_the_first_minute_and_leaves_the_run_alone(trainer: Trainer) -> None:
    said = trainer.run("--dry-run", "--set", "global_config.previews.every_steps=5")
    assert "dry run" in said
    assert not trainer.run_dir.exists()


def test_sample_draws_from_the_finished_run(trainer: Trainer, tmp_path: Path) -> None:
    from sdxl_training.assemble import draw_prompts, sample
    from sdxl_training.assemble.drawing import sampling_of
    from sdxl_training.config.schema import Previews

    previews = Previews(steps=2, guidance=3.0, seed=1)
    trainer.run(*SHORT)
    pictures = draw_prompts(trainer.run_dir, ["red circle", "blue square"], sampling_of(previews))
    again = draw_prompts(trainer.run_dir, ["red circle", "blue square"], sampling_of(previews))
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 2
    assert all(numpy.array_equal(one, other) for one, other in zip(pictures, again, strict=True))
    raw = draw_prompts(trainer.run_dir, ["red circle"], sampling_of(previews), use_ema=False)
    assert not numpy.array_equal(raw[0], pictures[0])
    out = tmp_path / "new" / "one.png"
    sample(trainer.run_dir, ["red circle"], previews, out, None, use_ema=True)
    # Drawn alone or with another: the same picture but for the rounding of differently batched products.
    difference = numpy.asarray(Image.open(out)).astype(int) - pictures[0]
    assert numpy.abs(difference).max() <= 2


def test_mistakes_end_in_a_sentence_with_a_remedy(trainer: Trainer, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    captionless = tmp_path / "captionless"
    captionless.mkdir()
    picture = next(path for path in sorted(pictures.iterdir()) if path.suffix == ".png" and path.stat().st_size > 500)
    shutil.copy(picture, captionless)
    (tmp_path / "file").touch()
    mistakes = {
        "data.sources.0.path=nowhere": ("nowhere", "no such folder"),
        f"data.sources.0.path={tmp_path / 'empty'}": ("empty", "Pictures end in"),
        f"data.sources.0.path={captionless}": (picture.name, "data.captions.missing"),
        f"global_config.output_dir={tmp_path / 'file' / 'runs'}": ("output_dir", "cannot be written"),
        "model.source=no/such/folder/anywhere": ("model.source", "diffusers"),
        "training.optimiser.learning_rate=1": ("training.optimizer", "did you mean"),
    }
    for mistake, words in mistakes.items():
        said = trainer.run("--set", mistake, status=2)
        assert "Traceback" not in said
        assert all(word in said for word in words), f"{mistake}: {said}"


def test_an_unreadable_checkpoint_is_named(trainer: Trainer) -> None:
    trainer.run("--set", "training.max_steps=5")
    weights = trainer.run_dir / "checkpoints" / "step-000005" / "unet.safetensors"
    weights.write_bytes(b"nonsense")
    for resume in (str(weights.parent), "auto"):
        said = trainer.run("--resume", resume, status=2 if resume != "auto" else 0)
        assert "unet.safetensors" in said
        assert "Traceback" not in said


def test_a_folder_belongs_to_one_run_at_a_time(trainer: Trainer) -> None:
    process = trainer.start("--set", "training.max_steps=100000")
    trainer.wait_for(process, trainer.run_dir / "checkpoints")
    said = trainer.run(status=2)
    process.kill()
    process.communicate()
    assert "another process is training in this folder" in said


def test_every_precision_trains(trainer: Trainer, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        trainer.output = tmp_path / precision
        trainer.run("--set", "training.max_steps=3", "--set", f"training.precision={precision}")
        losses[precision] = [row["loss"] for row in trainer.metrics()]
        assert not any("skipped" in row for row in trainer.metrics())
    assert numpy.allclose(losses["bf16"], losses["fp32"], rtol=0.05)
    assert numpy.allclose(losses["fp16"], losses["fp32"], rtol=0.01)
    assert losses["fp16"] != losses["bf16"] != losses["fp32"]
