"""The real process: exit status, messages, and what is not imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numpy", "diffusers", "transformers", "rich"}
GOOD = "data:\n  sources:\n    - path: pictures\n"
BAD = "training:\n  gradient_clip: 1\n  batch_size: many\ndata:\n  sources:\n    - path: pictures\n  resolution: 1000\n"


def run(*arguments, python=(), **environment):
    return subprocess.run(
        [sys.executable, *python, str(ROOT / "src" / "main.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def imported(ended):
    """Top-level and full names of all modules in the output of -X importtime."""
    names = {line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    return names | {name.split(".")[0] for name in names}


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_wrong_file_ends_with_all_problems_and_without_torch(config):
    ended = run("--config", config(BAD), "--set", "data.worker=3", python=["-X", "importtime"])
    assert ended.returncode == 2
    assert ended.stdout == ""
    for words in (
        "4 problems",
        "line 2  training.gradient_clip",
        "did you mean training.max_grad_norm?",
        "line 3  training.batch_size = many",
        "line 7  data.resolution = 1000",
        "--set   data.worker",
        "did you mean data.workers?",
    ):
        assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "sdxl_training.config.load" in imported(ended), "the probe sees imports"
    assert not imported(ended) & HEAVY


@pytest.mark.parametrize("command", ["plan", "train"])
def test_no_command_imports_torch_before_the_check(config, command):
    ended = run(command, "--config", config(BAD), python=["-X", "importtime"])
    assert ended.returncode == 2
    assert not imported(ended) & HEAVY


def test_check_prints_the_sum_of_a_step(config):
    ended = run("--config", config(GOOD), "--check", "--set", "training.accumulation=3", WORLD_SIZE="2")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "my.yaml: no problems" in ended.stdout
    assert "batch_size 4 x accumulation 3 x processes 2 = 24" in ended.stdout


def test_train_is_the_command_where_none_is_named(config):
    path = config(GOOD)
    assert run("train", "--config", path, "--check").stdout == run("--config", path, "--check").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--check"], "Missing option '--config'"),
        (["plan", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            ["sample", "--run", "nowhere", "--prompt", "x", "--out", "x.png"],
            "--run = nowhere: holds no config.resolved",
        ),
        (["export", "--run", "nowhere", "--to", "x"], "--run = nowhere: holds no config.resolved"),
        (["export", "--run", "nowhere", "--to", "x", "--format", "zip"], "single_file"),
        (["demo-data", "--pictures", "0"], "--pictures"),
        (["trian"], "trian"),
    ],
)
def test_other_mistakes_are_sentences(arguments, words):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_checkpoint_that_is_not_there_is_refused_first(config):
    ended = run("--config", config(GOOD), "--check", "--resume", "gone/step-000500")
    assert ended.returncode == 2
    assert "--resume = gone/step-000500: no such folder; use auto, never" in ended.stderr


def test_help_names_all_commands():
    ended = run("--help")
    assert ended.returncode == 0
    for command in ("train", "plan", "sample", "export", "demo-data", "doctor"):
        assert f"  {command} " in ended.stdout
