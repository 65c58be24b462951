"""Two real processes over buckets that no batch divides: equally many updates, together the schedule's draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_training.assemble.dataset import build_schedule, find_pictures
from sdxl_training.config.schema import Config
from sdxl_training.tracking.progress import SilentProgress

EPOCHS = 6
SIZES_HW = [(64, 64)] * 7 + [(48, 80)] * 5 + [(80, 48)]

RANK = """
import json, os, sys
from contextlib import closing
from pathlib import Path
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.session import open_session
from sdxl_training.config.schema import Config
from sdxl_training.parallel.group import process_group
from sdxl_training.tracking.progress import SilentProgress

config = Config.model_validate(json.loads(Path(sys.argv[1]).read_text()))
with process_group("cpu") as group:
    folder = RunFolder(Path(sys.argv[2]) / f"run{group.rank}")
    folder.make()
    with closing(open_session(config, folder, group, SilentProgress(), None)) as session:
        session.fill()
        rows = [
            [[*row] for batch in update for row in zip(batch.sample_ids, batch.visits, batch.slots)] + [update[0].step]
            for update in session.batches(0)
        ]
Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Buckets of 7, 5 and 1 pictures."""
    folder = tmp_path_factory.mktemp("ragged")
    generator = np.random.default_rng(0)
    for number, size_hw in enumerate(SIZES_HW):
        Image.fromarray(generator.integers(0, 256, (*size_hw, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture, {number}")
    return folder


def settings(pictures: Path, model: Path, output: Path, mode: str, steps: int) -> dict[str, Any]:
    return {
        "global_config": {"output_dir": str(output), "device": "cpu", "seed": 3},
        "model": {"source": str(model)},
        "training": {"batch_size": 1, "accumulation": 2, "precision": "fp32", "max_steps": steps},
        "data": {
            "sources": [{"path": str(pictures)}],
            "resolution": 64,
            "buckets": {"generator": "list", "sizes": [[64, 64], [48, 80], [80, 48]]},
            "cache": {"mode": mode},
            "workers": 1,
        },
    }


@pytest.mark.parametrize("mode", ["ahead", "first"])
def test_every_picture_is_drawn_once_an_epoch_by_one_of_them(
    tmp_path: Path, ragged: Path, tiny_model: Path, mode: str
) -> None:
    found = find_pictures(Config.model_validate(settings(ragged, tiny_model, tmp_path, mode, 1)), SilentProgress())
    config = Config.model_validate(settings(ragged, tiny_model, tmp_path, mode, 1))
    schedule = build_schedule(config, found.plan, processes=2)
    assert schedule.global_batch == 4
    assert all(len(schedule.members(bucket)) % 4 for bucket in schedule.buckets), "no bucket is a number of batches"
    steps = schedule.steps_before_epoch(EPOCHS)
    (tmp_path / "config.json").write_text(json.dumps(settings(ragged, tiny_model, tmp_path, mode, steps)))
    (tmp_path / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    ended = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "rank.py"), str(tmp_path / "config.json"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    assert [len(updates) for updates in ranks] == [steps, steps]
    seen: Counter[int] = Counter()
    everything = set()
    for step, updates in enumerate(zip(*ranks, strict=True)):
        assert [update.pop() for update in updates] == [step, step]
        assert [len(update) for update in updates] == [2, 2]
        slots = {slot: (sample, visit) for update in updates for sample, visit, slot in update}
        _, draws = schedule.batch_at(step)
        assert slots == {
            slot: (found.plan.records[draw.record].sample_id, draw.visit) for slot, draw in enumerate(draws)
        }
        everything |= set(slots.values())
        seen.update(sample for sample, _ in slots.values())
    assert len(everything) == 4 * steps, "no visit is seen twice"
    for bucket in schedule.buckets:
        drawn = [seen[found.plan.records[record].sample_id] for record in schedule.members(bucket).tolist()]
        assert EPOCHS * len(drawn) - 4 < sum(drawn) <= EPOCHS * len(drawn)
        assert max(drawn) - min(drawn) <= 1 if len(drawn) >= 4 else max(drawn) <= EPOCHS
    assert torch.tensor(list(seen.values())).sum() == 4 * steps
