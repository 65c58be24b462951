"""Checkpoints are whole or not there: bit-exact, every damage named, nothing lost by a crash while writing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sdxl_training.training import checkpoint as module
from sdxl_training.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunState,
    checkpoint_name,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
)

FILES = ["unet.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def make_checkpoint(step: int, size: int = 50) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "conv.weight": torch.randn(size, 4, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "transposed": torch.randn(3, 5, generator=generator).t(),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42]),
    }
    optimizer = {"step/conv.weight": torch.tensor(float(step)), "exp_avg/conv.weight": torch.full((size, 4), 0.1)}
    return Checkpoint(
        RunState(step, {"captions": f"plan {step}"}, "adamw"), {"unet": weights, "optimizer": optimizer, "average": {}}
    )


def as_bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(loaded: Checkpoint, saved: Checkpoint) -> None:
    assert loaded.state == saved.state
    full = {part: tensors for part, tensors in saved.parts.items() if tensors}
    assert set(loaded.parts) == set(full)
    for part, tensors in full.items():
        assert set(loaded.parts[part]) == set(tensors)
        for name, tensor in tensors.items():
            read = loaded.parts[part][name]
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert as_bits(read) == as_bits(tensor), name


def test_load_gives_back_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    saved = make_checkpoint(7)
    path = save_checkpoint(tmp_path / "checkpoints", saved)
    assert path == tmp_path / "checkpoints" / "step-000007"
    assert find_damage(path) is None
    assert_same(load_checkpoint(path), saved)
    assert [entry.name for entry in path.parent.iterdir()] == ["step-000007"], "no temporary folder is left"


def test_saving_the_same_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    saved = make_checkpoint(7)
    one, other = save_checkpoint(tmp_path / "a", saved), save_checkpoint(tmp_path / "b", saved)
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_manifest_covers_every_other_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(1))
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(FILES) - {"manifest.json"}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("intact"), make_checkpoint(3, size=5))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [truncate, flip_a_byte, empty, Path.unlink])
def test_every_kind_of_damage_is_found_and_named(
    intact: Path, tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(intact, tmp_path / "step-000003"))
    harm(copy / name)
    problem = find_damage(copy)
    assert problem is not None
    assert name in problem
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(copy)
    assert str(copy) in str(caught.value)
    assert newest_checkpoint(tmp_path) == (None, [f"{copy}: left out, {problem}"])


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"files": 3}', '{"files": []}', '{"files": {}}', '{"files": {"state.json": 1}}']
)
def test_a_garbled_manifest_is_damage(intact: Path, tmp_path: Path, text: str) -> None:
    copy = Path(shutil.copytree(intact, tmp_path / "copy"))
    (copy / "manifest.json").write_text(text)
    assert find_damage(copy) == "manifest.json is damaged"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_gets_through(intact: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A bit that changes is found, or (white space of the manifest) does not change what is loaded."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(intact, copy)
    path = copy / data.draw(st.sampled_from(FILES))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if find_damage(copy) is None:
        assert path.name == "manifest.json"
        assert_same(load_checkpoint(copy), load_checkpoint(intact))


def test_a_missing_folder_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-000001")
    later = Checkpoint(RunState(1, {}, "adamw", format=99), {"unet": {"w": torch.zeros(1)}})
    with pytest.raises(CheckpointError, match=r"format 99.*reads format 1"):
        load_checkpoint(save_checkpoint(tmp_path, later))


def test_newest_checkpoint_skips_damaged_ones_and_says_so(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path, make_checkpoint(step)) for step in (10, 20, 30, 40)]
    truncate(paths[3] / "unet.safetensors")
    (paths[2] / "manifest.json").unlink()
    newest, rejected = newest_checkpoint(tmp_path)
    assert newest == paths[1]
    assert len(rejected) == 2
    assert "step-000040" in rejected[0]
    assert "bytes instead of" in rejected[0]
    assert "step-000030" in rejected[1]
    assert newest_checkpoint(tmp_path / "absent") == (None, [])


def test_checkpoints_are_ordered_by_step_not_by_spelling(tmp_path: Path) -> None:
    steps = [999_999, 1_000_000, 5, 10_000_000]
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
    assert list_checkpoints(tmp_path) == [tmp_path / checkpoint_name(step) for step in sorted(steps)]


def test_a_users_own_folders_are_neither_listed_nor_pruned(tmp_path: Path) -> None:
    for name in ("step-000001-good", "step-best", "step-1", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000009").write_text("a file")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_checkpoint(step))
    prune_checkpoints(tmp_path, keep_last=1, newest_step=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003"]
    left = {"step-000001-good", "step-best", "step-1", "notes", "step-000009", "step-000003"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_prune_keeps_the_newest_and_clears_interrupted_saves(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, make_checkpoint(step))
    (tmp_path / ".writing-step-000006-123").mkdir()
    (tmp_path / ".replaced-step-000004-123").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, newest_step=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]
    prune_checkpoints(tmp_path, keep_last=9, newest_step=5)
    assert len(list_checkpoints(tmp_path)) == 2


def test_prune_never_deletes_what_was_just_saved(tmp_path: Path) -> None:
    """Resumed at 20 past two damaged folders: counted with the others, they would push the new one out."""
    for step in (10, 20, 25, 30, 40):
        save_checkpoint(tmp_path, make_checkpoint(step))
    for step in (30, 40):
        truncate(tmp_path / checkpoint_name(step) / "unet.safetensors")
    prune_checkpoints(tmp_path, keep_last=2, newest_step=25)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (20, 25, 30, 40)]


def test_an_unusable_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make_checkpoint(5))
    truncate(path / "unet.safetensors")
    (path / "stray.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, make_checkpoint(5))
    assert_same(load_checkpoint(path), make_checkpoint(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000005"]


def in_another_process(work: Callable[[], None]) -> int | None:
    """Run `work` in a forked process, so that it can be killed; return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("moment", ["first tensors", "second tensors", "manifest", "rename"])
@pytest.mark.parametrize("death", ["kill", "exit"])
def test_a_process_that_dies_while_saving_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, death: str
) -> None:
    earlier = save_checkpoint(tmp_path, make_checkpoint(1))

    def die() -> None:
        if death == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(9)

    real_save, saved = module.save_file, []

    def dying_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if moment == "first tensors":
            path.write_bytes(b"half a fi")
            die()
        saved.append(path)
        real_save(tensors, path)
        if moment == "second tensors" and len(saved) == 2:
            die()

    def dying_flush(path: Path) -> None:
        if moment == "manifest" and path.name == "manifest.json":
            die()

    def dying_rename(path: Path, target: Path) -> None:
        die()

    monkeypatch.setattr(module, "save_file", dying_save)
    monkeypatch.setattr(module, "_flush", dying_flush)
    if moment == "rename":
        monkeypatch.setattr(Path, "rename", dying_rename)
    assert in_another_process(lambda: save_checkpoint(tmp_path, make_checkpoint(2)) and None) in (-9, 9)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [earlier]
    assert newest_checkpoint(tmp_path) == (earlier, [])
    assert len(list(tmp_path.iterdir())) == 2, "the half-written folder is there, under a name that is never read"
    save_checkpoint(tmp_path, make_checkpoint(2))
    prune_checkpoints(tmp_path, keep_last=5, newest_step=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_an_error_while_saving_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = save_checkpoint(tmp_path, make_checkpoint(1))

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"step-000002.*the disk is full.*free space") as caught:
        save_checkpoint(tmp_path, make_checkpoint(2))
    assert "Earlier checkpoints are untouched" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name]
    assert find_damage(earlier) is None


def save_with_small_files_only(folder: Path) -> None:
    """Let the system itself refuse the write: files may not grow beyond 4 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(CheckpointError, match=r"could not be written.*File too large"):
        save_checkpoint(folder, make_checkpoint(2, size=5000))
    os._exit(42)


def test_a_write_that_the_system_refuses_is_a_sentence(tmp_path: Path) -> None:
    """safetensors raises its own class here, not OSError."""
    earlier = save_checkpoint(tmp_path, make_checkpoint(1))
    assert in_another_process(lambda: save_with_small_files_only(tmp_path)) == 42
    assert [path.name for path in tmp_path.iterdir()] == [earlier.name]


def test_an_impossible_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))


def train_one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    model(inputs.to(next(model.parameters()).dtype)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_restored_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(3):
        train_one_step(model, optimizer, step)
    parts = {
        "unet": model.state_dict(),
        "optimizer": optimizer_tensors(optimizer, dict(model.named_parameters())),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, Checkpoint(RunState(3, {}, "adamw"), parts)))
    resumed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    resumed.load_state_dict(dict(loaded.parts["unet"]))
    restored = torch.optim.AdamW(resumed.parameters(), lr=0.1, fused=True)
    restore_optimizer(restored, dict(resumed.named_parameters()), loaded.parts["optimizer"])
    for step in range(3, 6):
        train_one_step(model, optimizer, step)
        train_one_step(resumed, restored, step)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


def test_restored_state_keeps_its_own_type() -> None:
    """load_state_dict casts a bf16 parameter's fp32 moments to bf16; this must not."""
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    moments = torch.tensor([1.0001, 2.0002, 3.0003])
    restore_optimizer(optimizer, {"a/b.w": parameter}, {"exp_avg/a/b.w": moments, "step/a/b.w": torch.tensor(4.0)})
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moments)
    assert optimizer_tensors(optimizer, {"a/b.w": parameter}).keys() == {"exp_avg/a/b.w", "step/a/b.w"}
