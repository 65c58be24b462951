"""A tiny SDXL folder, a handful of pictures and a way to start the trainer as a user does: as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_training.data.demo_set import write_demo_set
from tests.integration.starting import Started
from tests.tiny_sdxl import tiny_pipeline

MAIN = Path(__file__).resolve().parents[2] / "src" / "main.py"


def environment() -> dict[str, str]:
    """What processes of tests get: one thread each, no network, wide lines."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 demo pictures in several shapes, and the deliberately broken files."""
    folder = tmp_path_factory.mktemp("pictures") / "pictures"
    write_demo_set(folder, seed=3, pictures=36)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of an SDXL with a few ten thousand parameters."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(folder)
    return folder


@dataclass
class Trainer:
    """Starts `src/main.py` with a configuration and reads what it leaves behind."""

    config: Path
    output: Path

    @property
    def run_dir(self) -> Path:
        return self.output / "run"

    @property
    def program(self) -> Path:
        return MAIN

    def arguments(self, *more: str) -> list[str]:
        return ["--config", str(self.config), "--set", f"global_config.output_dir={self.output}", *more]

    def start(self, *arguments: str) -> Started:
        return Started(self.program, self.arguments(*arguments), environment(), together=True)

    def launch(self, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
        """Start the program as a user does: by its file, or by torchrun."""
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        program = [*(torchrun if processes > 1 else []), str(self.program), *self.arguments(*arguments)]
        return subprocess.Popen(
            [sys.executable, *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    def run(self, *arguments: str, processes: int = 1, status: int = 0) -> str:
        process = self.launch(*arguments, processes=processes) if processes > 1 else self.start(*arguments)
        said, _ = process.communicate(timeout=240)
        assert process.returncode == status, said
        return said

    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self, step: int) -> dict[str, torch.Tensor]:
        """Return all tensors of a checkpoint by file and name."""
        folder = self.run_dir / "checkpoints" / f"step-{step:06d}"
        return {
            f"{path.stem}:{name}": tensor
            for path in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def wait_for(self, process: Started | subprocess.Popen[str], path: Path) -> None:
        """Wait until the running trainer has made `path`."""
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{path} did not appear"
            time.sleep(0.005)


CONFIG = """
global_config: {{run_name: run, seed: 5, device: cpu, checkpoints: {{every_steps: 5, keep_last: 2}},
  previews: {{every_steps: 0}}, tracking: {{log_every_steps: 2, tensorboard: false}}}}
model: {{source: {model}}}
training:
  objective: {{type: flow_matching}}
  level_density: {{type: logit_normal}}
  loss_weight: {{type: none}}
  optimizer: {{type: adamw, learning_rate: 1e-3}}
  schedule: {{type: cosine, warmup_steps: 2}}
  batch_size: 2
  accumulation: 2
  max_steps: 24
  precision: fp32
  ema: {{type: exponential, decay: 0.9}}
  memory: {{gradient_checkpointing: false}}
data:
  sources: [{{path: {pictures}, repeats: 2}}]
  resolution: 64
  buckets: {{step_px: 16, min_side_px: 32, max_side_px: 128}}
  captions: {{keep_first: 2, tag_dropout: 0.1}}
  workers: 2
"""


def make_trainer(folder: Path, pictures: Path, tiny_model: Path) -> Trainer:
    """A trainer with its own output folder: 24 steps over 36 pictures twice, workers, accumulation, averages."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(model=tiny_model, pictures=pictures))
    return Trainer(config, folder / "runs")


@pytest.fixture
def trainer(tmp_path: Path, pictures: Path, tiny_model: Path) -> Trainer:
    return make_trainer(tmp_path, pictures, tiny_model)
