"""What the commands pass on, and how the process ends."""

import sys
from types import SimpleNamespace

import pytest

from sdxl_training import cli
from sdxl_training.config import load_config, write_resolved
from sdxl_training.records import UserError

GOOD = "data:\n  sources:\n    - path: pictures\nglobal_config: {previews: {steps: 9, guidance: 2.5, seed: 4}}\n"


@pytest.fixture
def calls(monkeypatch):
    """Stand in for `assemble`, so that no torch is needed; records (function, arguments)."""
    seen = []

    def recorder(name):
        return lambda *args, **kwargs: seen.append((name, args, kwargs))

    names = ("train", "plan", "sample", "export", "write_demo_data")
    monkeypatch.setitem(
        sys.modules, "sdxl_training.assemble", SimpleNamespace(**{name: recorder(name) for name in names})
    )
    return seen


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(GOOD, encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    write_resolved(load_config(path), folder / "config.resolved.yaml")
    return folder


def status(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_train_passes_the_checked_configuration_on(calls, run_dir):
    config = run_dir / "config.resolved.yaml"
    assert status("--config", config, "--set", "training.max_steps=777", "--resume", "never", "--dry-run") == 0
    ((name, (loaded,), options),) = calls
    assert (name, options) == ("train", {"resume": "never", "dry_run": True})
    assert loaded.config.training.max_steps == 777


def test_check_does_not_train(calls, run_dir, capsys):
    assert status("--config", run_dir / "config.resolved.yaml", "--check") == 0
    assert calls == []
    assert "no problems" in capsys.readouterr().out


def test_sample_takes_what_is_not_given_from_the_run(calls, run_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("two\n\n three \n", encoding="utf-8")
    assert (
        status("sample", "--run", run_dir, "--prompt", "one", "--prompts-file", prompts, "--out", "x.png", "--seed", 0)
        == 0
    )
    options = calls[0][2]
    assert options["prompts"] == ["one", "two", "three"]
    previews = options["previews"]
    assert (previews.steps, previews.guidance, previews.seed) == (9, 2.5, 0)
    assert (previews.sampler, previews.grid) == ("euler", "auto")
    assert (options["use_ema"], options["checkpoint"]) == (True, None)
    assert (
        status("sample", "--run", run_dir, "--prompt", "one", "--out", "x.png", "--raw-weights", "--checkpoint", 5) == 0
    )
    asked = ["--sampler", "heun", "--grid", "linear", "--shift", 2, "--guidance-rescale", 0.5, "--steps", 3]
    assert status("sample", "--run", run_dir, "--prompt", "one", "--out", "x.png", *asked) == 0
    previews = calls[2][2]["previews"]
    assert (previews.sampler, previews.grid, previews.shift, previews.guidance_rescale) == ("heun", "linear", 2, 0.5)
    assert previews.steps == 3
    assert (calls[1][2]["use_ema"], calls[1][2]["checkpoint"]) == (False, 5)


def test_sample_without_prompts_says_what_to_give(calls, run_dir, capsys):
    assert status("sample", "--run", run_dir, "--out", "x.png") == 2
    assert "--prompt TEXT" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(("flags", "use_ema"), [([], True), (["--ema"], True), (["--raw"], False)])
def test_export_passes_its_choices_on(calls, run_dir, flags, use_ema):
    assert status("export", "--run", run_dir, "--format", "single_file", "--to", "x.safetensors", *flags) == 0
    options = calls[0][2]
    assert (options["format"], options["use_ema"], str(options["to"])) == ("single_file", use_ema, "x.safetensors")


def test_averaged_weights_are_refused_where_there_are_none(run_dir):
    loaded = load_config(run_dir / "config.resolved.yaml", ["training.ema={type: none}"])
    assert cli.choose_ema(loaded, None) is False
    with pytest.raises(UserError, match="keeps no averaged weights"):
        cli.choose_ema(loaded, True)


@pytest.mark.parametrize(("raised", "code"), [(UserError("broken"), 2), (KeyboardInterrupt(), 130)])
def test_endings(monkeypatch, run_dir, capsys, raised, code):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setitem(sys.modules, "sdxl_training.assemble", SimpleNamespace(train=fail))
    assert status("--config", run_dir / "config.resolved.yaml") == code
    assert "Traceback" not in capsys.readouterr().err


def test_programming_errors_stay_loud(monkeypatch, run_dir):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "sdxl_training.assemble", SimpleNamespace(train=fail))
    with pytest.raises(ZeroDivisionError):
        cli.main(["--config", str(run_dir / "config.resolved.yaml")])


def test_an_interrupt_is_a_sentence(calls, run_dir, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sdxl_training.assemble"], "train", interrupted)
    assert status("--config", run_dir / "config.resolved.yaml") == 130
    assert "interrupted; what was saved" in capsys.readouterr().err
