"""`tags` as a user starts it: what it prints, draws and writes; and the curves and lists of tags of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_training.config.schema import Config
from sdxl_training.data.contact_sheet import SIDE_PX
from sdxl_training.parallel.group import Group
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.tracking.tracker import Trackers
from sdxl_training.training.checkpoint import Checkpoint
from sdxl_training.training.stop import StopRequest
from sdxl_training.training.trainer import train
from tests.integration.conftest import Trainer, environment, make_trainer
from tests.integration.starting import Started
from tests.integration.tag_run import make_updates, open_for, tag_actions
from tests.integration.test_tag_weighting import settings

ALONE = Group(0, 1, torch.device("cpu"))
CAPTIONS = ["large, red"] * 8 + ["large, gold"] * 3 + ["small"] * 2
WEIGHED = ("tag_weighting.static.type=frequency", "tag_weighting.static.min_count=3")
OVERRIDDEN = (*WEIGHED, "tag_weighting.static.overrides={gold: 2.5}")


def draw(folder: Path, captions: list[str]) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, caption in enumerate(captions):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption)
    return folder


@pytest.fixture
def tagged(tmp_path: Path, tiny_model: Path) -> Trainer:
    """A trainer of thirteen pictures with four tags."""
    return make_trainer(tmp_path, draw(tmp_path / "tagged", CAPTIONS), tiny_model)


def run(trainer: Trainer, *arguments: str, settings: tuple[str, ...] = (), status: int = 0) -> tuple[str, str]:
    words = [word for one in settings for word in ("--set", one)]
    process = Started(trainer.program, ["tags", *trainer.arguments(*words, *arguments)], environment())
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in out + err
    return out, err


# --- the command -----------------------------------------------------------------------------------------------------


def test_tags_as_json(tagged: Trainer) -> None:
    said = json.loads(run(tagged, "--json", settings=OVERRIDDEN)[0])
    assert (said["pictures"], said["tags"]) == (13, 4)
    assert said["weights"]["mean"] == pytest.approx(1)
    assert [row["tag"] for row in said["most_frequent"]] == ["large", "red", "gold", "small"]
    assert [row["tag"] for row in said["rarest"]] == ["small", "gold", "red", "large"]
    factor = {row["tag"]: row["static_factor"] for row in said["rarest"]}
    assert factor["gold"] == 2.5, "what an override says"
    assert factor["small"] == 1.0, "on fewer than min_count pictures"
    assert factor["large"] < factor["red"]
    least, most = said["smallest_weights"], said["largest_weights"]
    assert [set(row["tags"]) for row in least][:8] == [{"large", "red"}] * 8
    assert [set(row["tags"]) for row in most] == [{"large", "gold"}] * 3
    assert said["weights"]["least"] == pytest.approx(least[0]["weight"], abs=1e-4)
    assert said["weights"]["most"] == pytest.approx(most[0]["weight"], abs=1e-4)
    assert least[-1]["weight"] < 1 < most[-1]["weight"]
    assert not {row["path"] for row in least} & {row["path"] for row in most}


def test_tags_as_text_sheet_and_page(tagged: Trainer, tmp_path: Path) -> None:
    sheet, page = tmp_path / "sheet.png", tmp_path / "page.html"
    said, _ = run(tagged, "--sheet", str(sheet), "--page", str(page), settings=OVERRIDDEN)
    wanted = ("4 tags on 13 pictures", "own factor", "Pictures that count least", "Pictures that count most", "2.500")
    for words in (*wanted, "what is left of N pictures when some count more than others"):
        assert words in said, words
    least, most = said[said.index("count least") :].split("Pictures that count most")
    assert "large, red" in least
    assert "gold" not in least
    assert "gold" in most
    assert "large, red" not in most
    with Image.open(sheet) as drawn:
        assert drawn.height > 3 * SIDE_PX, "two rows of one end, one of the other"
        assert drawn.width > 5 * SIDE_PX
        shown = np.asarray(drawn.convert("L"), np.float64)
    headings = [row for row in range(1, len(shown)) if shown[row, -1] < 250 <= shown[row - 1, -1]]
    assert len(headings) == 1, "a band parts the ends; the first one is at the very top"
    assert shown[0, -1] < 250
    html = page.read_text(encoding="utf-8")
    for words in ("own factor", "2.500", "Pictures that count least and most", "data:image/jpeg;base64"):
        assert words in html, words


@pytest.mark.parametrize("captions", [CAPTIONS, ["alone"]], ids=["weights off", "one picture"])
def test_where_all_count_the_same_there_are_no_ends(captions: list[str], tmp_path: Path, tiny_model: Path) -> None:
    trainer = make_trainer(tmp_path, draw(tmp_path / "same", captions), tiny_model)
    sheet, page = tmp_path / "sheet.png", tmp_path / "page.html"
    weights = () if len(captions) > 1 else WEIGHED
    said, _ = run(trainer, "--sheet", str(sheet), "--page", str(page), settings=weights)
    assert "all pictures count the same, so there is no contact sheet" in said
    assert "count least" not in said
    assert not sheet.exists()
    assert "count most" not in page.read_text(encoding="utf-8")
    stated = json.loads(run(trainer, "--json", settings=weights)[0])
    assert stated["smallest_weights"] == stated["largest_weights"] == []


def test_what_cannot_be_said_or_written_is_refused_in_a_sentence(
    tagged: Trainer, tiny_model: Path, tmp_path: Path
) -> None:
    for option in ("--sheet", "--page"):
        assert f"{option} = .: names no file" in run(tagged, option, "", status=2)[1]
        assert "cannot be written" in run(tagged, option, str(tmp_path / "none" / "x"), settings=WEIGHED, status=2)[1]
    untagged = make_trainer(tmp_path, draw(tmp_path / "untagged", [" , "] * 2), tiny_model)
    assert "none of the 2 pictures has a tag" in run(untagged, status=2)[1]


# --- a run -----------------------------------------------------------------------------------------------------------


class Recorder:
    """A tracker that keeps what is put beside the numbers of every step."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, float]] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        self.kept[step] = dict(values)

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


def test_curves_of_tracked_tags_reach_the_trackers(tiny_model: Path, tmp_path: Path) -> None:
    pictures = draw(tmp_path / "tagged", CAPTIONS)
    section: dict[str, Any] = {"static": {"type": "frequency", "min_count": 3}}
    section["statistics"] = {"every_steps": 4, "tracked": 3, "shrinkage": 1.0}
    described = settings(pictures, tiny_model, tmp_path, section, max_steps=8)
    recorder = Recorder()
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        actions = tag_actions(session, Trackers((recorder,)))
        train(session.run, session.batches(0), 0, 8, actions, StopRequest())
    assert sorted(recorder.kept) == [4, 8]
    tags, curves = ("large", "red", "small"), recorder.kept[8]
    assert curves.keys() == {f"tag_{what}/{tag}" for what in ("relative_loss", "trend", "weight") for tag in tags}
    rows = {row["tag"]: row for row in json.loads((tmp_path / "run" / "tags.json").read_text())["tags"]}
    for tag in tags:
        for what in ("relative_loss", "trend", "weight"):
            assert curves[f"tag_{what}/{tag}"] == rows[tag][what]
    assert rows["large"]["standard_errors"] != 0
    assert curves["tag_relative_loss/large"] != 1


def test_a_checkpoint_without_variances_of_losses_is_gone_on_from_with_a_word(tiny_model: Path, tmp_path: Path) -> None:
    """As those of earlier versions are: what is known of tags begins anew."""
    pictures = draw(tmp_path / "tagged", CAPTIONS)
    config = Config.model_validate(settings(pictures, tiny_model, tmp_path, {}, max_steps=12))
    half = make_updates(config, tmp_path / "run", ALONE, 6)
    known = {name: value for name, value in half.parts["tag_residuals"].items() if not name.startswith("squared_")}
    older = Checkpoint(half.state, {**half.parts, "tag_residuals": known})
    said: list[str] = []

    class Listening(SilentProgress):
        def message(self, text: str) -> None:
            said.append(text)

    state = make_updates(config, tmp_path / "run", ALONE, 12, older, Listening())
    assert any("the checkpoint has no tag_residuals of these tags; new ones begin" in text for text in said)
    assert 0 < float(state.parts["tag_residuals"]["seen"].sum()) < 2 * float(half.parts["tag_residuals"]["seen"].sum())


def test_the_report_of_a_run_lists_concepts(tagged: Trainer) -> None:
    tagged.run("--set", "training.max_steps=24", *(word for one in WEIGHED for word in ("--set", one)))
    html = (tagged.run_dir / "report.html").read_text(encoding="utf-8")
    for words in ("Concepts not yet learned", "Concepts already learned", "seen 20 times or more"):
        assert words in html, words
