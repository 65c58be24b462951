"""When pictures are encoded changes no number: first, ahead and none train the same, alone, resumed and together."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_training.data.store import Store
from tests.integration.conftest import Trainer

LAST = 6
SHORT = ("--set", f"training.max_steps={LAST}", "--set", "global_config.checkpoints.every_steps=3")
TIMELESS = ("step", "images", "epoch", "loss", "lr", "grad_norm")


def elsewhere(trainer: Trainer, output: Path) -> Trainer:
    return replace(trainer, output=output)


def setting(*settings: str) -> tuple[str, ...]:
    return tuple(word for one in settings for word in ("--set", one))


def latents_of(trainer: Trainer) -> int:
    return len(Store(trainer.output / "cache" / "latents"))


def assert_same_run(one: Trainer, other: Trainer, last: int = LAST) -> None:
    """Weights, optimizer and averages are equal bit for bit, and so are the numbers of every step."""
    first, second = one.checkpoint(last), other.checkpoint(last)
    assert first.keys() == second.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, second[name])] == []
    rows = [[{key: row[key] for key in TIMELESS} for row in run.metrics()] for run in (one, other)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == last


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_the_three_modes_train_the_same(trainer: Trainer, tmp_path: Path, posterior: str) -> None:
    runs = {}
    for mode in ("first", "ahead", "none"):
        runs[mode] = elsewhere(trainer, tmp_path / mode)
        runs[mode].run(*SHORT, *setting(f"data.cache={{mode: {mode}, posterior: {posterior}}}"))
    assert_same_run(runs["first"], runs["ahead"])
    assert_same_run(runs["first"], runs["none"])
    assert latents_of(runs["first"]) == 36, "all but the broken ones"
    assert 0 < latents_of(runs["ahead"]) < 36, "those that were drawn"
    assert not (runs["none"].output / "cache" / "latents").exists()


def test_the_posterior_matters(trainer: Trainer, tmp_path: Path) -> None:
    """Else the test above would compare the same thing twice."""
    losses = []
    for posterior in ("mean", "sample"):
        run = elsewhere(trainer, tmp_path / posterior)
        run.run(*SHORT, *setting(f"data.cache.posterior={posterior}"))
        losses.append([row["loss"] for row in run.metrics()])
    assert losses[0] != losses[1]


def test_a_second_run_on_the_same_cache_encodes_nothing_and_is_the_same(trainer: Trainer, tmp_path: Path) -> None:
    cache = setting(f"data.cache.path={tmp_path / 'shared'}")
    first, second = elsewhere(trainer, tmp_path / "first"), elsewhere(trainer, tmp_path / "second")
    first.run(*SHORT, *cache)
    latents = tmp_path / "shared" / "latents"
    before = {path: path.stat().st_size for path in latents.rglob("*") if path.is_file()}
    stored = len(Store(latents))
    assert stored > 0
    second.run(*SHORT, *cache)
    assert_same_run(first, second)
    assert len(Store(latents)) == stored
    assert sum(path.stat().st_size for path in latents.rglob("*") if path.is_file()) == sum(before.values())

    third = elsewhere(trainer, tmp_path / "third")
    said = third.run(*SHORT, *cache, *setting("data.cache.mode=first"))
    assert f"{stored} " in next(line for line in said.splitlines() if "latent" in line and "encoded" in line)
    assert_same_run(first, third)
    again = elsewhere(trainer, tmp_path / "fourth")
    again.run(*SHORT, *cache, *setting("data.cache.mode=first"))
    assert len(Store(latents)) == 36
    assert_same_run(first, again)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_while_latents_are_made_and_resumed(
    trainer: Trainer, tmp_path: Path, number: signal.Signals
) -> None:
    """The cache is what the interrupted run left of it; a half-written one after SIGKILL."""
    whole = elsewhere(trainer, tmp_path / "whole")
    steps = setting("training.max_steps=14", "global_config.checkpoints.every_steps=3", "data.cache.posterior=sample")
    whole.run(*steps)
    process = trainer.start(*steps)
    trainer.wait_for(process, trainer.run_dir / "checkpoints" / "step-000003")
    process.send_signal(number)
    process.communicate(timeout=120)
    made = latents_of(trainer)
    assert "resuming" in trainer.run(*steps)
    assert latents_of(trainer) >= made
    assert_same_run(whole, trainer, 14)


def test_workers_change_nothing_while_latents_are_made(trainer: Trainer, tmp_path: Path) -> None:
    """Also not what takes the place of the picture that is cut short."""
    runs = [elsewhere(trainer, tmp_path / f"{workers}") for workers in (0, 3)]
    for workers, run in zip((0, 3), runs, strict=True):
        run.run(
            *setting("training.max_steps=20", f"data.workers={workers}", "global_config.checkpoints.every_steps=20")
        )
        quarantined = (run.run_dir / "quarantine.jsonl").read_text()
        assert "broken-truncated" in quarantined
    assert_same_run(*runs, last=20)


# What is refused


@pytest.fixture
def own_pictures(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "own"))


def whole_picture(folder: Path) -> Path:
    return next(path for path in sorted(folder.glob("*.png")) if not path.name.startswith("broken"))


@pytest.mark.parametrize(
    ("what", "named", "others"),
    [
        ("caption", "captions", ("which pictures", "content")),
        ("one less", "which pictures there are", ("seed",)),
        ("bytes", "the pictures' content", ("which pictures", "captions,", "repeats")),
    ],
)
def test_changed_data_is_refused_on_resume_by_name(
    trainer: Trainer, own_pictures: Path, what: str, named: str, others: tuple[str, ...]
) -> None:
    source = setting(f"data.sources.0.path={own_pictures}")
    trainer.run(*SHORT, *source)
    picture = whole_picture(own_pictures)
    if what == "caption":
        picture.with_suffix(".txt").write_text("something else entirely")
    elif what == "one less":
        picture.unlink()
        picture.with_suffix(".txt").unlink()
    else:
        picture.write_bytes(picture.read_bytes() + b"\0" * 7)  # after the end: the same pixels, another file
    said = trainer.run(*source, *setting("training.max_steps=9"), status=2)
    refusal = " ".join(said[said.index("the data of this run changed") :].split())
    assert named in refusal
    assert not any(word in refusal for word in others)
    assert "run_name" in refusal


def test_too_many_bad_pictures_end_a_run_when_they_are_found(trainer: Trainer, own_pictures: Path) -> None:
    """One by one, in workers: 12 of 39 are cut short, and with the 3 that were broken before they are too many."""
    whole = [path for path in sorted(own_pictures.glob("*.png")) if not path.name.startswith("broken")]
    for path in whole[::3]:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    source = setting(f"data.sources.0.path={own_pictures}", "data.max_bad_fraction=0.25")
    said = " ".join(trainer.run(*source, status=2).split())
    assert "data.max_bad_fraction = 0.25: 10 of 39 pictures cannot be used" in said
    assert "raise data.max_bad_fraction" in said
    assert sum(str(path) in said for path in whole[::3]) >= 7
    assert "Traceback" not in said
    filled = elsewhere(trainer, trainer.output / "first")
    said = " ".join(filled.run(*source, *setting("data.cache.mode=first"), status=2).split())
    assert int(re.search(r"(\d+) of 39 pictures cannot be used", said)[1]) >= 10


# Two processes


def test_two_processes_share_the_work_and_the_cache(trainer: Trainer, tmp_path: Path) -> None:
    """Whatever mode: what two processes encoded together trains like what one did. SGD, since Adam turns a rounding
    difference into a step."""
    sgd = setting("training.optimizer={type: sgd, learning_rate: 0.05}", "training.accumulation=1")
    one = elsewhere(trainer, tmp_path / "one")
    one.run(*SHORT, *sgd, *setting("training.batch_size=4"))
    losses = [row["loss"] for row in one.metrics()]
    for mode in ("first", "ahead"):
        two = elsewhere(trainer, tmp_path / mode)
        two.run(*SHORT, *sgd, *setting("training.batch_size=2", f"data.cache.mode={mode}"), processes=2)
        assert [row["loss"] for row in two.metrics()] == pytest.approx(losses, rel=2e-5)
        assert latents_of(two) == (36 if mode == "first" else latents_of(one))
        entries = [json.loads(line) for line in (two.run_dir / "quarantine.jsonl").read_text().splitlines()]
        assert len(entries) == len({entry["path"] for entry in entries})
