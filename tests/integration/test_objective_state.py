"""Whatever the objective learns or remembers beside the network: the same after a restart, and in two processes."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdxl_training.assemble.objective import build_objective
from sdxl_training.assemble.parts import build_update
from sdxl_training.assemble.resume import restore, snapshot
from sdxl_training.assemble.weighting import TagParts
from sdxl_training.config.schema import Config
from sdxl_training.parallel.group import Group
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.training.checkpoint import load_checkpoint, save_checkpoint
from sdxl_training.training.step import Run
from tests.integration.conftest import Trainer, make_trainer

FIRST, LAST = 5, 12
EVERYTHING = (
    "training.level_density={type: adaptive, base: {type: logit_normal}, bins: 3, warmup_samples: 2, every_steps: 2}",
    "training.loss_weight={type: learned, learning_rate: 0.05}",
    "training.loss_shape={type: pseudo_huber, threshold: 0.5}",
    "training.coupling={type: optimal_transport}",
    "training.stratified_levels=true",
    "data.cache.mode=first",
    "training.noise={offset: 0.05, pyramid: 0.3, input_perturbation: 0.1}",
    f"training.max_steps={LAST}",
)
SETTINGS = tuple(word for setting in EVERYTHING for word in ("--set", setting))
SGD = ("--set", "training.optimizer={type: sgd, learning_rate: 0.02}", "--set", "training.max_steps=6")
TIMELESS = ("step", "images", "epoch", "loss", "lr", "grad_norm")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, pictures: Path, tiny_model: Path) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("uninterrupted"), pictures, tiny_model)
    trainer.run(*SETTINGS, "--set", "global_config.checkpoints.keep_last=9")
    return trainer


def digests(trainer: Trainer, step: int) -> dict[str, str]:
    """Return the digest of every file of a checkpoint."""
    manifest = trainer.run_dir / "checkpoints" / f"step-{step:06d}" / "manifest.json"
    return {name: entry["blake2b"] for name, entry in json.loads(manifest.read_text())["files"].items()}


def interrupted_after(trainer: Trainer, step: int, elsewhere: Path) -> Trainer:
    """Return the run as it was when update `step` had been saved: later checkpoints are gone."""
    other = replace(trainer, output=elsewhere)
    shutil.copytree(trainer.run_dir, other.run_dir)
    for folder in (other.run_dir / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return other


def test_everything_is_learnt_saved_and_kept_apart_from_the_model(uninterrupted: Trainer) -> None:
    start, end = uninterrupted.checkpoint(0), uninterrupted.checkpoint(LAST)
    assert start["uncertainty:weight_F"].eq(0).all()
    assert end["uncertainty:weight_F"].ne(0).all()
    assert end["levels:probability"].sum().item() == pytest.approx(1)
    assert end["levels:probability"].sub(1 / 3).abs().max() > 0.02
    assert end["levels:count"].sum().item() == 4 * LAST, "what the rehearsal saw is forgotten"
    assert "optimizer:exp_avg_sq/uncertainty.weight_F" in end
    in_the_model = {name for name in end if name.split(":")[0] in ("unet", "average")}
    assert in_the_model == {name for name in start if name.split(":")[0] in ("unet", "average")}
    assert not any("uncertainty" in name or "weight_F" in name for name in in_the_model)
    assert not any("skipped" in row for row in uninterrupted.metrics())


def test_resumed_it_is_the_uninterrupted_run_bit_for_bit(uninterrupted: Trainer, tmp_path: Path) -> None:
    resumed = interrupted_after(uninterrupted, FIRST, tmp_path / "resumed")
    said = resumed.run(*SETTINGS, "--set", "global_config.checkpoints.keep_last=9")
    assert f"{FIRST} updates are done" in said
    assert digests(resumed, LAST) == digests(uninterrupted, LAST)
    assert {"levels.safetensors", "uncertainty.safetensors", "optimizer.safetensors"} <= digests(resumed, LAST).keys()
    rows = [[{key: row[key] for key in TIMELESS} for row in run.metrics()] for run in (uninterrupted, resumed)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == LAST


def test_two_processes_train_like_one_and_resume(trainer: Trainer, tmp_path: Path) -> None:
    """SGD, since Adam turns a rounding difference into a step."""
    two = replace(trainer, output=tmp_path / "two")
    keep = ("--set", "global_config.checkpoints.keep_last=9")
    trainer.run(*SETTINGS, *SGD, "--set", "training.batch_size=4", "--set", "training.accumulation=1")
    split = (*SETTINGS, *SGD, *keep, "--set", "training.batch_size=1", "--set", "training.accumulation=2")
    two.run(*split, processes=2)
    for one_row, two_row in zip(trainer.metrics(), two.metrics(), strict=True):
        assert two_row["loss"] == pytest.approx(one_row["loss"], rel=2e-5)
        assert two_row["grad_norm"] == pytest.approx(one_row["grad_norm"], rel=2e-4)
    one, other = trainer.checkpoint(6), two.checkpoint(6)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=2e-4, atol=2e-6, msg=name)
    assert one["levels:probability"].sub(1 / 3).abs().max() > 0.02
    assert one["uncertainty:weight_F"].abs().max() > 1e-3
    resumed = interrupted_after(two, 5, tmp_path / "two_resumed")
    resumed.run(*split, processes=2)
    assert digests(resumed, 6) == digests(two, 6)


# --- a checkpoint of another objective -------------------------------------------------------------------------------

CPU = torch.device("cpu")
ADAPTIVE, OTHER_BINS = ({"type": "adaptive", "bins": bins, "warmup_samples": 1, "every_steps": 1} for bins in (3, 4))
PLAIN = {"type": "uniform"}


@dataclass
class Said(SilentProgress):
    """Keeps what is said."""

    sentences: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.sentences.append(text)


def make_config(density: dict[str, object], learned: bool) -> Config:
    weight = {"type": "learned"} if learned else {"type": "none"}
    training = {"level_density": density, "loss_weight": weight, "ema": {"type": "none"}}
    return Config.model_validate({"data": {"sources": [{"path": "pictures"}]}, "training": training})


def make_run(config: Config) -> tuple[Run, SimpleNamespace]:
    """Return a run of a network of one number, and what stands for the model that is saved."""
    torch.manual_seed(0)
    model, objective = torch.nn.Linear(1, 1), build_objective(config, CPU)
    update = build_update(config, model, objective.uncertainty, CPU)
    return Run(model, objective, update, nullcontext(), Group(0, 1, CPU), 0), SimpleNamespace(unet=model)


def make_updates(run: Run) -> None:
    """Let network, log-variance and levels each move."""
    uniform_B = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    for step in range(3):
        losses_B = run.model(torch.ones(4, 1)).square()[:, 0] * torch.tensor([1.0, 2.0, 3.0, 9.0])
        run.objective.level_draw.see(uniform_B, losses_B)
        run.objective.uncertainty(losses_B, torch.linspace(-1, 1, 4)).mean().backward()
        run.update(step)
        run.objective.level_draw.after_update(step, run.group.sum)


@pytest.mark.parametrize(
    ("before", "after", "begins_here"),
    [
        ((ADAPTIVE, True), (ADAPTIVE, True), []),
        ((PLAIN, False), (PLAIN, False), []),
        ((PLAIN, False), (ADAPTIVE, True), ["training.loss_weight", "training.level_density"]),
        ((ADAPTIVE, True), (PLAIN, False), []),
        ((ADAPTIVE, True), (OTHER_BINS, True), ["training.level_density"]),
        ((ADAPTIVE, False), (ADAPTIVE, True), ["training.loss_weight"]),
    ],
)
def test_what_a_checkpoint_has_is_taken_up_and_what_it_lacks_begins_here(
    tmp_path: Path,
    before: tuple[dict[str, object], bool],
    after: tuple[dict[str, object], bool],
    begins_here: list[str],
) -> None:
    run, sdxl = make_run(make_config(*before))
    make_updates(run)
    saved = load_checkpoint(save_checkpoint(tmp_path, snapshot(run, TagParts(), sdxl, make_config(*before), 3, {})))
    (resumed, _), (fresh, _) = make_run(make_config(*after)), make_run(make_config(*after))
    said = Said()
    restore(resumed, TagParts(), saved, said)
    assert [sentence.partition(":")[0] for sentence in said.sentences] == begins_here
    levels = (fresh if "training.level_density" in begins_here else run).objective.level_draw.state()
    for name, value in resumed.objective.level_draw.state().items():
        assert torch.equal(value, levels[name]), name
    learned = (fresh if "training.loss_weight" in begins_here else run).objective.uncertainty.state_dict()
    for name, value in resumed.objective.uncertainty.state_dict().items():
        assert torch.equal(value, learned[name]), name
    for name, parameter in resumed.update.parameters.items():
        moments = run.update.optimizer.state[run.update.parameters[name]]
        for quantity, value in resumed.update.optimizer.state[parameter].items():
            assert torch.equal(value, moments[quantity]), (name, quantity)
    make_updates(resumed)  # and it goes on
