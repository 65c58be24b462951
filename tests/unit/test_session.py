"""What a session knows of pictures that cannot be used: everything that any rank found, written down and named once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.session import Session
from sdxl_training.config.schema import Config
from sdxl_training.parallel.group import Group, Item
from sdxl_training.records import Quarantined, UserError
from sdxl_training.tracking.progress import SilentProgress

DAMAGED, GONE, DARK = (Quarantined(f"/p/{name}.png", f"it is {name}") for name in ("damaged", "gone", "dark"))


class Files:
    """What processes write into files as they find it."""

    def __init__(self) -> None:
        self.written: list[Quarantined] = []
        self.read: list[Quarantined] = []

    def refresh(self) -> bool:
        self.read = [*self.written]
        return True


class Ranks(Group):
    """Rank 0 of two; the other one has always found the same."""

    def gather(self, items: Sequence[Item]) -> list[Any]:
        return [*items, DARK]


class Said(SilentProgress):
    """Remembers its messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def open_session(folder: Path, files: Files, max_bad_fraction: float = 0.1) -> Session:
    data = {"sources": [{"path": "p"}], "max_bad_fraction": max_bad_fraction}
    found = SimpleNamespace(contents=files, quarantined=lambda: [*files.read], pictures=SimpleNamespace(found=100))
    unused: Any = None
    return Session(
        config=Config.model_validate({"data": data}),
        folder=RunFolder(folder),
        group=Ranks(0, 2, torch.device("cpu")),
        progress=Said(),
        sdxl=unused,
        dataset=SimpleNamespace(found=found),  # type: ignore[arg-type]
        encoder=unused,
        writer=unused,
        tokenizer=unused,
        micro_batches=unused,
        run=unused,
    )


def written(folder: Path) -> list[str]:
    return [json.loads(line)["path"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_what_any_rank_found_is_written_and_named_once(tmp_path: Path) -> None:
    files = Files()
    session = open_session(tmp_path, files)
    session.quarantine([DAMAGED])
    files.written += [DAMAGED, GONE]  # one of them by the other rank's workers
    for _ in range(2):
        session.share_quarantine()
        assert sorted(written(tmp_path)) == sorted(one.path for one in (DAMAGED, GONE, DARK))
    assert isinstance(session.progress, Said)
    assert sorted(session.progress.messages) == sorted(
        f"quarantined: {one.path}: {one.reason}" for one in (DAMAGED, GONE, DARK)
    )


def test_too_many_end_the_run_after_they_are_written_down(tmp_path: Path) -> None:
    session = open_session(tmp_path, Files(), max_bad_fraction=0.015)
    session.quarantine([DAMAGED])
    with pytest.raises(UserError, match="2 of 100 pictures cannot be used"):
        session.share_quarantine()
    assert written(tmp_path) == [DAMAGED.path, DARK.path]
