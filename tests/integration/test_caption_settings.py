"""Every caption setting arrives where it counts: in training, previews, rehearsal, checkpoint and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_training.assemble.captions import MEASURED, check_captions
from sdxl_training.assemble.drawing import build_painter, export, sampling_of
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.config.schema import Config, Previews
from sdxl_training.model.text import caption_tokenizer, encode_text
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Draw, ImageRecord, UserError
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.training.step import loss_per_sample
from tests.integration.conftest import Trainer
from tests.tiny_sdxl import LENGTH

CPU = torch.device("cpu")
ROOM = LENGTH - 2
SHORT, LONG = "a (fox:1.5)", "red fur, a, blue sky, x"  # 4 and 18 tokens, of which a chunk holds 10
FOUR = {"captions": {"kind": "prose", "alternatives": "lines", "max_tokens": 150, "weights": True}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures")


def write_pictures(folder: Path, captions: tuple[str, ...] = (SHORT, LONG)) -> Path:
    """Six pictures, the captions in turns."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(captions[number % len(captions)])
    return folder


@dataclass
class Heard(SilentProgress):
    """Remembers what was said."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def session_of(pictures: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Session]:
    """Open a session over the six pictures with these settings of the data section."""

    def open_one(folder: Path = pictures, **data: Any) -> Session:
        config = Config.model_validate(
            {
                "global_config": {"output_dir": str(tmp_path), "device": "cpu"},
                "model": {"source": str(tiny_model)},
                "training": {
                    "batch_size": 2,
                    "accumulation": 2,
                    "precision": "fp32",
                    "memory": {"gradient_checkpointing": False},
                },
                "data": {
                    "sources": [{"path": str(folder)}],
                    "resolution": 64,
                    "buckets": {"step_px": 16, "min_side_px": 32, "max_side_px": 128},
                    "workers": 0,
                    **data,
                },
            }
        )
        run = RunFolder(tmp_path / "run")
        run.make()
        return open_session(config, run, Group(0, 1, CPU), Heard(), None)

    return open_one


def number_of(session: Session, name: str) -> int:
    return next(i for i, record in enumerate(session.dataset.plan.records) if Path(record.path).name == name)


def batch_of(session: Session, *records: int) -> Batch:
    raw = session.micro_batches.collect([Draw(record, 0) for record in records], range(len(records)), len(records))
    return session.to_device(raw)


def losses(session: Session, batch: Batch) -> Tensor:
    with torch.no_grad():
        return loss_per_sample(session.run.model, session.run.objective, batch, seed=0)


# A run


RUN = (
    "data.captions={kind: prose, alternatives: lines, templates: ['{caption}', 'oil. {caption}'], weights: true, "
    "max_tokens: 150, null_mode: empty_string, caption_dropout: 0.2, keep_first: 1, tag_dropout: 0.0}",
    "data.sources.0.add_tags.front=[photo]",
    "training.max_steps=2",
    "global_config.previews={every_steps: 2, steps: 2, prompts: ['a (fox:1.4), red fur, blue sky', b]}",
)


def test_a_run_with_everything_trains_draws_exports_and_knows_its_captions(trainer: Trainer, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "own", (f"{SHORT}\n{LONG} and some more", "(b:0.5)"))
    settings = [word for setting in (*RUN, f"data.sources.0.path={folder}") for word in ("--set", setting)]
    said = trainer.run(*settings)
    assert [np.isfinite(row["loss"]) for row in trainer.metrics()] == [True] * 2
    with Image.open(trainer.run_dir / "samples" / "step-000002.png") as grid:
        assert np.asarray(grid).std() > 0
    # Three pictures with two captions and three with one, in two templates each; three times two are too long.
    assert "data.captions.max_tokens = 150: 6 of 18 captions are longer than 20 tokens;" in " ".join(said.split())
    export(trainer.run_dir, None, True, "diffusers", tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False

    caption = folder / "4.txt"
    caption.write_text(caption.read_text() + "!")
    refused = trainer.run(*settings, "--set", "training.max_steps=4", status=2)
    refusal = refused[refused.index("the data of this run changed") :]
    assert "where it was: captions." in " ".join(refusal.split())


# What a picture is told


def test_what_a_picture_is_told_does_not_depend_on_its_neighbours(session_of: Callable[..., Session]) -> None:
    """Loss by loss, with captions of one and of two chunks side by side, weights, and a dropped caption."""
    session = session_of(captions={**FOUR["captions"], "caption_dropout": 0.0})
    short, long = number_of(session, "0.png"), number_of(session, "1.png")
    together = batch_of(session, short, long)
    assert together.conditioning.text_BLD.shape[1] == 2 * LENGTH
    alone = [batch_of(session, record) for record in (short, long)]
    assert [batch.conditioning.text_BLD.shape[1] for batch in alone] == [LENGTH, 2 * LENGTH]
    expected_B = torch.cat([losses(session, batch) for batch in alone])
    torch.testing.assert_close(losses(session, together), expected_B, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        together.conditioning.pooled_BP,
        torch.cat([batch.conditioning.pooled_BP for batch in alone]),
        rtol=1e-4,
        atol=1e-5,
    )
    swapped_B = losses(session, batch_of(session, long, short)).flip(0)
    torch.testing.assert_close(swapped_B, expected_B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "changes_short", "changes_long"),
    [
        ({"weights": False}, True, False),
        ({"max_tokens": 75}, False, True),
        ({"templates": ["oil. {caption}"]}, True, True),
        ({"caption_dropout": 1.0}, True, True),
    ],
)
def test_a_setting_changes_what_pictures_are_told(
    session_of: Callable[..., Session], setting: dict[str, Any], changes_short: bool, changes_long: bool
) -> None:
    captions = {**FOUR["captions"], "caption_dropout": 0.0}
    told = []
    for given in (captions, {**captions, **setting}):
        session = session_of(captions=given)
        told.append([losses(session, batch_of(session, number_of(session, name))) for name in ("0.png", "1.png")])
    same = [torch.allclose(one, other, rtol=1e-6) for one, other in zip(*told, strict=True)]
    assert same == [not changes_short, not changes_long]


def test_each_source_adds_its_own_tags(session_of: Callable[..., Session], pictures: Path) -> None:
    sources = [{"path": str(pictures)}, {"path": str(pictures), "add_tags": {"front": ["photo"], "back": ["grain"]}}]
    session = session_of(sources=sources, captions={"kind": "prose", "caption_dropout": 0.0, "max_tokens": 225})
    first, second = (i for i, one in enumerate(session.dataset.plan.records) if one.path.endswith("1.png"))
    assert_told(batch_of(session, first, second), session, [LONG, f"photo, {LONG}, grain"])


def test_captions_are_told_with_their_weights_and_chunks(session_of: Callable[..., Session]) -> None:
    session = session_of(captions={**FOUR["captions"], "caption_dropout": 0.0})
    batch = batch_of(session, number_of(session, "0.png"), number_of(session, "1.png"))
    assert_told(batch, session, [SHORT, LONG])
    plain = caption_tokenizer(session.sdxl, 2)([SHORT.replace("(", "").replace(":1.5)", ""), LONG])
    assert not torch.allclose(batch.conditioning.text_BLD, encode_text(session.sdxl, *plain)[0], rtol=1e-3)


def assert_told(batch: Batch, session: Session, captions: list[str]) -> None:
    chunks, read = session.config.data.captions.max_tokens // 75, session.tokenizer.read
    tokens = caption_tokenizer(session.sdxl, chunks, read=read).with_weights(captions)
    text_BLD, pooled_BP = encode_text(session.sdxl, *tokens)
    torch.testing.assert_close(batch.conditioning.text_BLD, text_BLD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.conditioning.pooled_BP, pooled_BP, rtol=1e-5, atol=1e-6)


def test_a_dropped_caption_is_the_empty_string_where_asked(session_of: Callable[..., Session]) -> None:
    session = session_of(captions={"null_mode": "empty_string", "caption_dropout": 1.0})
    told = batch_of(session, 0, 1).conditioning
    empty_BLD, empty_BP = encode_text(session.sdxl, *session.tokenizer([""]))
    torch.testing.assert_close(told.text_BLD, empty_BLD.expand_as(told.text_BLD), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(told.pooled_BP, empty_BP.expand_as(told.pooled_BP), rtol=1e-5, atol=1e-6)


# Previews


@pytest.mark.parametrize("null_mode", ["zeros", "empty_string"])
def test_prompts_are_read_like_captions_and_guided_away_from_the_null_of_training(
    session_of: Callable[..., Session], null_mode: str
) -> None:
    """The network is replaced by one that remembers what both sides were told."""
    session = session_of(captions={**FOUR["captions"], "null_mode": null_mode, "caption_dropout": 1.0})
    told: list[tuple[Tensor, Tensor]] = []

    class Network(torch.nn.Module):
        def forward(self, x_BCHW: Tensor, *_: Any, encoder_hidden_states: Tensor, **extra: Any) -> tuple[Tensor]:
            told.append((encoder_hidden_states, extra["added_cond_kwargs"]["text_embeds"]))
            return (torch.zeros_like(x_BCHW),)

    run = session.run
    painter = build_painter(session.config, session.sdxl, Network(), run.objective, run.precision, CPU)
    painter.paint([SHORT, LONG], (64, 64), sampling_of(Previews(steps=1, guidance=3.0, seed=0)))
    text_BLD, pooled_BP = told[0]
    expected_BLD, expected_BP = encode_text(session.sdxl, *session.tokenizer.with_weights([SHORT, LONG]))
    assert text_BLD.shape[1] == 2 * LENGTH
    torch.testing.assert_close(text_BLD[2:], expected_BLD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled_BP[2:], expected_BP, rtol=1e-5, atol=1e-6)
    null = batch_of(session, 0, 1).conditioning  # every caption is dropped
    torch.testing.assert_close(text_BLD[:2, :LENGTH], null.text_BLD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text_BLD[:2, LENGTH:], null.text_BLD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled_BP[:2], null.pooled_BP, rtol=1e-5, atol=1e-6)
    assert bool(text_BLD[:2].any()) is (null_mode == "empty_string")


# The first minute


@pytest.mark.parametrize(("max_tokens", "states"), [(75, 1), (150, 2), (225, 6)])
def test_the_rehearsal_has_captions_of_full_length(
    session_of: Callable[..., Session], max_tokens: int, states: int
) -> None:
    for weights in (False, True):
        session = session_of(captions={"kind": "prose", "max_tokens": max_tokens, "weights": weights})
        batches = session.largest_batch()
        assert [batch.conditioning.text_BLD.shape[:2] for batch in batches] == [(2, states * LENGTH)] * 2


def test_long_captions_are_counted_with_their_tokens(session_of: Callable[..., Session]) -> None:
    def said(**captions: Any) -> list[str]:
        progress = session_of(captions={"kind": "prose", "weights": True, **captions}).progress
        return [text for text in progress.said if "max_tokens" in text]

    lost = [
        f"data.captions.max_tokens = 75: 3 of 6 captions are longer than {ROOM} tokens; "
        "their last 24 tokens, up to 8 of one caption, are never seen by the model"
    ]
    assert said() == lost
    assert said(max_tokens=150) == []
    (more,) = said(max_tokens=150, templates=["{caption}", "{caption} abc"])
    assert "3 of 12 captions" in more
    assert "their last 6 tokens, up to 2 of one" in more


def test_added_tags_count_too(session_of: Callable[..., Session], pictures: Path) -> None:
    sources = [{"path": str(pictures)}, {"path": str(pictures), "add_tags": {"front": ["abcdef"]}}]
    (said,) = session_of(sources=sources, captions={"kind": "prose", "max_tokens": 150}).progress.said[-1:]
    assert "3 of 12 captions are longer than 20 tokens; their last 24 tokens, up to 8 of one" in said


def test_of_very_many_pictures_an_even_selection_is_measured(session_of: Callable[..., Session]) -> None:
    session, progress = session_of(captions={"kind": "prose"}), Heard()
    records = [ImageRecord(i, f"{i}.png", (64, 64), ("a" * (9 + (i % 6)),), ()) for i in range(2 * MEASURED + 1)]
    check_captions(session.config, session.tokenizer, records, progress)
    (said,) = progress.said
    # One picture in three, whose captions have 9 and 12 letters in turns.
    assert "667 of 1334 captions (those of one picture in 3) are longer than 10 tokens; their last 1334 tokens" in said


def test_weights_that_are_none_are_refused_with_the_pictures_names(
    session_of: Callable[..., Session], tmp_path: Path
) -> None:
    folder = write_pictures(tmp_path / "years", ("(year:2023)", "a"))
    session_of(folder)
    with pytest.raises(UserError) as caught:
        session_of(folder, captions={"weights": True})
    lines = str(caught.value).splitlines()
    assert [line.split(": caption '(year:2023)': a weight of 2023;")[0] for line in lines] == [
        str(folder / f"{number}.png") for number in (0, 2, 4)
    ]
