"""Where a run begins, what its folder remembers, and the words it ends with."""

from __future__ import annotations

import errno
import shlex
import sys
from pathlib import Path

import pytest
import torch

from sdxl_training.assemble.drawing import export, sample
from sdxl_training.assemble.folder import RunFolder, run_folder
from sdxl_training.assemble.resume import find_start
from sdxl_training.assemble.training import _what_ran_out, resume_command
from sdxl_training.config.load import load_config
from sdxl_training.config.schema import Previews, cache_folder
from sdxl_training.parallel.group import process_group
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.training.checkpoint import Checkpoint, RunState, save_checkpoint


def save(folder: RunFolder, step: int) -> Path:
    parts = {"unet": {"weight": torch.full((3,), float(step))}}
    return save_checkpoint(folder.checkpoints, Checkpoint(RunState(step, {"captions": "plan"}, "adamw"), parts))


def test_a_run_without_an_update_starts_anew(tmp_path: Path) -> None:
    """Only the rehearsal's checkpoint is there: pictures or seed may have been changed since, and nothing is lost."""
    folder = RunFolder(tmp_path)
    save(folder, 0)
    assert find_start(folder, "auto", SilentProgress()) is None
    save(folder, 5)
    start = find_start(folder, "auto", SilentProgress())
    assert start is not None
    assert start.state.step == 5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("src/main.py --config a.yaml", "src/main.py --config a.yaml"),
        ("main.py --resume never --config a.yaml", "main.py --config a.yaml"),
        ("main.py --config a.yaml --resume runs/x/checkpoints/step-000005", "main.py --config a.yaml"),
        (
            "main.py --resume=never --config a.yaml --set 'a.b={type: sgd}'",
            "main.py --config a.yaml --set 'a.b={type: sgd}'",
        ),
    ],
)
def test_the_resume_command_never_names_an_old_checkpoint(given: str, expected: str) -> None:
    command = resume_command(shlex.split(given), processes=1)
    assert shlex.split(command)[1:] == shlex.split(expected)
    assert Path(shlex.split(command)[0]).resolve() == Path(sys.executable).resolve()


def test_the_resume_command_of_several_processes_starts_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    words = shlex.split(resume_command(["src/main.py", "--config", "a.yaml"], processes=2))
    assert words[1:4] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def test_a_damaged_configuration_of_the_earlier_run_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {sources: [{path: pictures}]}")
    loaded = load_config(tmp_path / "config.yaml")
    folder = RunFolder(tmp_path)
    folder.resolved.write_text("global_config: {seed: [")
    assert folder.write_config(loaded) == []
    assert load_config(folder.resolved).config == loaded.config


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("data: {sources: [{path: pictures}]}\nglobal_config: {output_dir: ~/runs}")
    config = load_config(tmp_path / "config.yaml").config
    assert run_folder(config).path == tmp_path / "runs" / "my_run"
    assert cache_folder(config) == str(tmp_path / "runs" / "cache")


@pytest.mark.parametrize("device", ["cuda", "cuda:99"])
def test_a_gpu_that_is_not_there_is_a_sentence(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f"global_config.device = {device}: "), process_group(device):
        pass


def test_what_runs_out_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory is full.*training\.batch_size"), _what_ran_out(RunFolder(tmp_path)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"), _what_ran_out(RunFolder(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    with pytest.raises(PermissionError), _what_ran_out(RunFolder(tmp_path)):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_names_that_mislead_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.png"):
        sample(tmp_path, ["x"], Previews(), tmp_path / "x.jpg", None, use_ema=True)
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        export(tmp_path, None, True, "single_file", tmp_path / "model")
