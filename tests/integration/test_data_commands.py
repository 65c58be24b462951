"""`plan` and `cache` as a user starts them: what they print, write and share."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_training.data.store import Store
from tests.integration.conftest import Trainer, environment
from tests.integration.starting import Started

FIRST = "data.cache.mode=first"
USABLE, FOUND = 36, 39


@dataclass(frozen=True)
class Ended:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str


def start(trainer: Trainer, command: str, *arguments: str, settings: tuple[str, ...] = ()) -> Started:
    words = [word for one in settings for word in ("--set", one)]
    return Started(trainer.program, [command, *trainer.arguments(*words, *arguments)], environment())


def ended(process: Started, status: int = 0) -> Ended:
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, out + err
    assert "Traceback" not in out + err
    return Ended(process.returncode, out, err)


def run(trainer: Trainer, command: str, *arguments: str, settings: tuple[str, ...] = (), status: int = 0) -> Ended:
    return ended(start(trainer, command, *arguments, settings=settings), status)


def report(trainer: Trainer, *settings: str) -> dict[str, Any]:
    """Return what `plan --json` prints on its standard output, and nothing else."""
    return json.loads(run(trainer, "plan", "--json", settings=settings).out)


def latents_of(trainer: Trainer) -> Store:
    return Store(trainer.output / "cache" / "latents")


# plan


def test_plan_as_json_states_the_run(trainer: Trainer) -> None:
    stated = report(trainer)
    assert stated["pictures"] == stated["records"] == sum(row["pictures"] for row in stated["buckets"])
    # The file that is cut short has a header like any other: it is planned until somebody decodes it.
    assert stated["pictures"] == USABLE + 1
    assert len(stated["quarantined"]) == 2
    (source,) = stated["sources"]
    assert (source["found"], source["planned"], source["repeats"]) == (FOUND, USABLE + 1, 2)
    assert stated["cache"]["there"] == 0
    assert stated["cache"]["to_encode"] == {"not read yet": USABLE + 1}
    assert not (trainer.output / "run").exists()
    assert not list((trainer.output / "cache").glob("latents/*")), "a plan encodes nothing"


def test_plan_agrees_with_the_run_it_announces(trainer: Trainer) -> None:
    stated = report(trainer, "training.max_steps=4")
    said = trainer.run("--set", "training.max_steps=4")
    assert f"{stated['pictures']} pictures, {stated['steps']['images']} images an epoch" in " ".join(said.split())
    later = report(trainer, "training.max_steps=4")["cache"]
    stored = len(latents_of(trainer))
    assert later["there"] == stored > 0
    assert sum(later["to_encode"].values()) == later["latents"] - stored


def test_plan_as_text_and_sheet(trainer: Trainer, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    said = run(trainer, "plan", "--sheet", str(sheet))
    for words in (
        "Pictures",
        "Quarantined",
        "Buckets",
        "Captions",
        "Latent cache",
        "broken-empty.png: the file is empty",
    ):
        assert words in said.out, words
    assert str(sheet) in said.out.replace("\n", "")
    with Image.open(sheet) as drawn:
        assert np.asarray(drawn).std() > 0
    nowhere = run(trainer, "plan", "--sheet", str(trainer.config / "sheet.png"), status=2)
    assert "sheet.png" in nowhere.err


def test_plan_writes_a_line_for_every_picture(trainer: Trainer, tmp_path: Path) -> None:
    file = tmp_path / "crops.jsonl"
    planned = json.loads(run(trainer, "plan", "--json", "--crops", str(file)).out)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == planned["records"]
    assert all(line["scale"] <= 1 and 0 <= line["cropped"] < 1 and Path(line["path"]).is_file() for line in lines)
    nowhere = run(trainer, "plan", "--crops", str(tmp_path / "absent" / "x.jsonl"), status=2)
    assert "cannot be written" in nowhere.err


def test_duplicates_are_listed_by_plan_and_by_a_run(trainer: Trainer, pictures: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(pictures, tmp_path / "own"))
    first, *others = sorted(path for path in own.glob("*.png") if not path.name.startswith("broken"))
    for copy in (own / "zz-copy-1.png", own / "zz-copy-2.png"):
        shutil.copy(first, copy)
        shutil.copy(first.with_suffix(".txt"), copy.with_suffix(".txt"))
    with Image.open(others[0]) as picture:
        picture.save(own / "zz-other.png", compress_level=1)
    shutil.copy(first.with_suffix(".txt"), own / "zz-other.txt")
    settings = (f"data.sources.0.path={own}", "data.duplicates=drop", "data.near_duplicates=warn")
    file = tmp_path / "duplicates.jsonl"
    planned = run(trainer, "plan", "--json", "--duplicates", str(file), settings=settings)
    assert json.loads(planned.out)["pictures"] == USABLE + 2, "the cut one and the other file of the same look"
    copies, alike = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert copies == {
        "kind": "same bytes",
        "kept": [str(first)],
        "left_out": [str(own / "zz-copy-1.png"), str(own / "zz-copy-2.png")],
    }
    assert alike == {"kind": "same look", "kept": [str(others[0]), str(own / "zz-other.png")], "left_out": []}
    trainer.run(*(word for one in (*settings, "training.max_steps=2") for word in ("--set", one)))
    assert (trainer.run_dir / "duplicates.jsonl").read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    nothing = run(trainer, "plan", "--duplicates", str(file), status=2)
    assert "none are looked for" in nothing.err


def test_plan_reads_a_changed_folder_again(trainer: Trainer, pictures: Path, tmp_path: Path) -> None:
    """The index is no memory of what was: a filter, and a picture that is gone."""
    own = Path(shutil.copytree(pictures, tmp_path / "own"))
    source = f"data.sources.0.path={own}"
    assert report(trainer, source)["pictures"] == USABLE + 1
    picture = next(path for path in sorted(own.glob("*.png")) if not path.name.startswith("broken"))
    picture.unlink()
    assert report(trainer, source)["pictures"] == USABLE
    only = report(trainer, source, f"data.sources.0.only.except_names=['{picture.stem[:-1]}*']")
    assert only["pictures"] < USABLE
    assert only["sources"][0]["filtered"] == USABLE - only["pictures"]


# cache


def test_cache_encodes_all_once(trainer: Trainer) -> None:
    said = run(trainer, "cache").out
    assert len(latents_of(trainer)) == USABLE
    assert "broken-truncated" in said
    assert report(trainer)["cache"]["to_encode"] == {}
    before = {path: path.stat().st_size for path in (trainer.output / "cache" / "latents").rglob("*.*")}
    again = run(trainer, "cache").out
    assert f"{USABLE} " in again
    assert {path: path.stat().st_size for path in before} == before
    assert not (trainer.output / "run").exists()


def test_a_run_takes_what_cache_has_made(trainer: Trainer, tmp_path: Path) -> None:
    settings = ("--set", "training.max_steps=4")
    run(trainer, "cache")
    stored = len(latents_of(trainer))
    trainer.run(*settings)
    assert len(latents_of(trainer)) == stored
    filled, trainer.output = trainer.metrics(), tmp_path / "none"
    trainer.run(*settings, "--set", "data.cache.mode=none")
    assert [row["loss"] for row in filled] == [row["loss"] for row in trainer.metrics()]


def texts_of(trainer: Trainer) -> Store:
    return Store(trainer.output / "cache" / "texts")


def test_cache_encodes_captions_too_where_their_states_are_kept(trainer: Trainer) -> None:
    settings = (FIRST, "data.cache.text_variants=2")
    processes = [start(trainer, "cache", settings=settings) for _ in range(2)]
    # A process that begins when the other one has made all draws no caption and encodes none.
    found = [re.search(r"(\d+) captions encoded|all captions are encoded already", ended(one).out) for one in processes]
    encoded = [int(one[1] or 0) for one in found]
    texts = texts_of(trainer)
    assert sum(encoded) == len(texts) == len(np.unique(texts.origins()[0], axis=0)) > USABLE
    assert texts.verify() == ()
    assert "all captions are encoded already" in run(trainer, "cache", settings=settings).out
    said = trainer.run("--set", settings[0], "--set", settings[1], "--set", "training.max_steps=2")
    assert "all captions are encoded already" in " ".join(said.split())
    verified = run(trainer, "cache", "--verify", settings=settings)
    assert f"{len(texts)} text states are whole; none is damaged" in verified.out


def test_two_processes_at_once_share_the_work(trainer: Trainer) -> None:
    """Started by hand, without torchrun; both end when everything is there, and nothing is there twice."""
    processes = [start(trainer, "cache") for _ in range(2)]
    for process in processes:
        ended(process)
    store = latents_of(trainer)
    assert len(store) == USABLE
    assert store.verify() == ()
    assert report(trainer)["cache"]["to_encode"] == {}


def test_verify_names_a_damaged_latent_and_it_is_made_again(trainer: Trainer) -> None:
    run(trainer, "cache")
    assert f"{USABLE} latents are whole; none is damaged" in run(trainer, "cache", "--verify").out
    folder = trainer.output / "cache" / "latents"
    shard = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))
    said = run(trainer, "cache", "--verify").out.replace("\n", "")
    assert shard.name in said
    assert f"{USABLE - 1} latents are whole" in said
    assert f"{USABLE} latents are whole; none is damaged" in run(trainer, "cache", "--verify").out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data.cache.mode=none",), "data.cache.mode = none: nothing is kept"),
        (("data.sources.0.path=nowhere",), "data.sources.0.path = nowhere"),
        (("data.max_bad_fraction=0.0",), "data.max_bad_fraction = 0: 2 of 39 pictures cannot be used"),
        (("data.max_bad_fraction=0.06",), "data.max_bad_fraction = 0.06: 3 of 39 pictures cannot be used"),
    ],
)
def test_what_cannot_be_cached_is_said_in_a_sentence(trainer: Trainer, settings: tuple[str, ...], words: str) -> None:
    said = run(trainer, "cache", settings=settings, status=2)
    assert words in " ".join((said.out + said.err).split())
