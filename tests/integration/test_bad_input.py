"""What people's folders and disks do to a trainer: one run over all of it, and what became of each."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from sdxl_training.data.store import Store
from tests.integration.conftest import CONFIG, Trainer
from tests.integration.test_data_commands import run

SOUND = [f"{number}.png" for number in range(10)]
NEWLINE, EMOJI, DAMAGED = "two\nlines.png", "fox 🦊.png", "cut\nshort 🦊.png"
LATIN, VANISHES, COPY = "latin.png", "vanishes.png", "copy of 3.png"
PLANNED = [*SOUND, NEWLINE, EMOJI, DAMAGED, VANISHES, COPY, "other.png"]  # a header tells nothing of damage behind it
STEPS = 6

# The trainer on a disk that is full for a while, in a folder from which a file vanishes once it was listed.
PROGRAM = f"""
import errno, os
from pathlib import Path
from sdxl_training.assemble import session
from sdxl_training.cli import main
from sdxl_training.data import store_writer

prepare, write, refusals = session.prepare_dataset, os.pwrite, []

def prepare_then_lose(*given):
    dataset = prepare(*given)
    Path(os.environ["FOLDER"], {VANISHES!r}).unlink()
    refusals.extend([errno.ENOSPC] * 3)
    return dataset

def write_when_there_is_room(*given):
    if refusals:
        raise OSError(refusals.pop(), "No space left on device")
    return write(*given)

session.prepare_dataset, os.pwrite, store_writer.RETRY_SECONDS = prepare_then_lose, write_when_there_is_room, 0.01
main()
"""


def picture(seed: int) -> bytes:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return cv2.imencode(".png", pixels_HWC)[1].tobytes()


@dataclass
class Messy(Trainer):
    """A run over two folders, and what it said."""

    folders: tuple[Path, Path]
    said: str = ""

    @property
    def program(self) -> Path:
        return self.config.with_name("program.py")

    def planned(self) -> int:
        return int(re.search(r"(\d+) pictures, \d+ images an epoch", self.said)[1])

    def quarantined(self) -> dict[str, str]:
        lines = (self.run_dir / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
        return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Messy:
    folder = tmp_path_factory.mktemp("messy")
    one, two = folder / "one", folder / "two"
    for place, names in ((one, [*SOUND, NEWLINE, EMOJI, DAMAGED, LATIN, VANISHES]), (two, [COPY, "other.png"])):
        place.mkdir()
        for number, name in enumerate(names):
            (place / name).write_bytes(picture(number + 100 * (place == two)))
            (place / name).with_suffix(".txt").write_text(f"picture, {number}")
    (two / COPY).write_bytes((one / "3.png").read_bytes())
    (one / DAMAGED).write_bytes(picture(50)[:-400])
    (one / LATIN).with_suffix(".txt").write_bytes("café".encode("latin-1"))
    for name in ("._3.png", "._3.txt"):  # what macOS leaves on other file systems
        (one / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    (one / "below").mkdir()
    (one / "below" / "loop").symlink_to(one)
    (folder / "program.py").write_text(PROGRAM)
    config = folder / "config.yaml"
    sources = f"{{path: {one}}}, {{path: {two}}}"
    config.write_text(CONFIG.format(model=tiny_model, pictures=one).replace(f"{{path: {one}, repeats: 2}}", sources))
    trainer = Messy(config, folder / "runs", (one, two))
    settings = (
        f"training.max_steps={STEPS}",
        "data.cache.mode=first",
        "data.duplicates=warn",
        "data.max_bad_fraction=0.5",
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FOLDER", str(one))
        trainer.said = trainer.run(*(word for setting in settings for word in ("--set", setting)))
    assert "Traceback" not in trainer.said
    assert trainer.metrics()[-1]["step"] == STEPS, "whatever there was, it trained to the end"
    return trainer


def test_two_sources_with_the_same_picture_are_named_and_share_a_latent(messy: Messy) -> None:
    one, two = messy.folders
    (line,) = (messy.run_dir / "duplicates.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"kind": "same bytes", "kept": [str(one / "3.png"), str(two / COPY)], "left_out": []}
    assert "2 pictures in 1 group have the same bytes" in " ".join(messy.said.split())
    # The sound ones, the two odd names, and the other folder's own; the copy is none of its own.
    assert len(Store(messy.output / "cache" / "latents")) == len(SOUND) + 2 + 1


def test_a_caption_in_latin_1_is_quarantined_with_the_byte_and_the_remedy(messy: Messy) -> None:
    reason = messy.quarantined()[str(messy.folders[0] / LATIN)]
    assert reason == "its caption latin.txt is not UTF-8 text (byte 3); save it as UTF-8"


def test_names_with_newlines_and_emoji_are_names_like_others(messy: Messy) -> None:
    """Two are trained, as the number of latents says; one is damaged, and its line of the quarantine is one line."""
    assert "damaged" in messy.quarantined()[str(messy.folders[0] / DAMAGED)]
    assert messy.planned() == len(PLANNED)


def test_leavings_of_macos_are_no_pictures(messy: Messy) -> None:
    assert not any("/._" in path for path in messy.quarantined())
    assert len(messy.quarantined()) == len([DAMAGED, LATIN, VANISHES])
    assert messy.planned() == len(PLANNED)


def test_a_loop_of_links_shows_every_picture_once(messy: Messy) -> None:
    assert not any("loop" in path for path in messy.quarantined())
    assert messy.planned() == len(PLANNED)


def test_a_file_that_vanishes_after_it_was_listed_is_quarantined_and_replaced(messy: Messy) -> None:
    path = messy.folders[0] / VANISHES
    assert not path.exists()
    assert messy.quarantined()[str(path)].startswith("the file cannot be read: No such file or directory")
    assert f"quarantined:{path}" in "".join(messy.said.split())


def test_a_disk_that_fills_is_waited_for_and_said(messy: Messy) -> None:
    said = " ".join(messy.said.split())
    assert said.count("No space left on device. The run waits; free some space and it goes on") == 1


def test_a_cache_made_with_another_vae_is_made_again_and_the_reason_said(messy: Messy, tmp_path: Path) -> None:
    model = re.search(r"model: \{source: (.*)\}", messy.config.read_text())[1]
    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight"] *= 1.01
    save_file(tensors, weights)
    before = len(Store(messy.output / "cache" / "latents"))
    settings = (f"model.source={other}", "data.max_bad_fraction=0.5")
    planned = json.loads(run(messy, "plan", "--json", settings=settings).out)["cache"]["to_encode"]
    assert planned["VAE changed"] == before
    said = " ".join(run(messy, "cache", settings=settings).out.split())
    assert f"0 latents reused, {before} encoded: {before} VAE changed" in said
    assert len(Store(messy.output / "cache" / "latents")) == 2 * before, "those of the first VAE are kept"
