"""Text states on disk: what is read is what was encoded, who shares an entry, what visits show, and a run with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from sdxl_training.assemble import session as session_module
from sdxl_training.assemble import texts as texts_module
from sdxl_training.assemble import training as training_module
from sdxl_training.assemble.captions import build_tokenizer, caption_rules
from sdxl_training.assemble.dataset import find_pictures
from sdxl_training.assemble.drawing import build_painter, sampling_of
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.planning import cache_state, text_bytes
from sdxl_training.assemble.session import Session, open_session
from sdxl_training.assemble.texts import encode_captions, move_encoders, open_texts, text_folder, text_shape
from sdxl_training.assemble.training import train
from sdxl_training.config.load import load_config
from sdxl_training.config.schema import Config
from sdxl_training.data.captions import CaptionRules, draw_caption
from sdxl_training.data.claims import Claims
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.text_states import (
    TextCache,
    TextShape,
    caption_of_visit,
    captions_to_keep,
    fill_texts,
    projected_bytes,
    same_length,
)
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import caption_tokenizer, encode_text, text_fingerprint
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Draw, ImageRecord, UserError
from sdxl_training.rng import Stream, numpy_generator
from sdxl_training.tracking.progress import SilentProgress
from tests.latents import Silent
from tests.tiny_sdxl import LENGTH, POOLED, WIDTH_1, WIDTH_2, tiny_pipeline

SHAPE = TextShape(chunk=3, width=4, pooled=2)
SEED = 7
SHUFFLED = CaptionRules(shuffle=True, tag_dropout=0.2, caption_dropout=0.3)
PLAIN = CaptionRules(caption_dropout=0.0)


def record(number: int, caption: str = "a, b, c, d, e, f, g", *more: str) -> ImageRecord:
    return ImageRecord(1000 + number, f"/p/{number}.png", (64, 64), (caption, *more), (), picture=number)


class Encoders:
    """Stand for the text encoders: states tell the caption; one chunk for each word. Remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        self.asked += captions
        return [states_of(caption) for caption in captions]


def states_of(caption: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int.from_bytes(caption.encode()[-7:], "little"))
    length = SHAPE.chunk * max(1, len(caption.split()))
    return torch.randn(length, SHAPE.width, generator=generator), torch.randn(SHAPE.pooled, generator=generator)


def open_cache(folder: Path, settings: str = "encoders", variants: int = 1) -> TextCache:
    return TextCache(folder, settings, SHAPE, variants)


def fill(cache: TextCache, texts: Sequence[str]) -> list[str]:
    """Fill the cache and return what had to be encoded."""
    encoders, progress, claims = Encoders(), Silent(), Claims(cache.store.folder / "claims")
    with StoreWriter(cache.store.folder) as writer:
        assert fill_texts(cache, texts, len(texts), encoders, writer, claims, progress) == len(encoders.asked)
    assert progress.done == len(texts)
    return encoders.asked


# Entries


def test_what_is_read_is_what_was_encoded_rounded_to_half(tmp_path: Path) -> None:
    texts = ["", "one", "two words", "three words here", "日本語"]
    cache = open_cache(tmp_path)
    assert fill(cache, texts) == texts
    for reader in (cache, open_cache(tmp_path)):
        for text in texts:
            read, made = reader.read(text), states_of(text)
            assert read is not None
            for one, other in zip(read, made, strict=True):
                assert one.dtype == torch.float32
                assert torch.equal(one, other.half().float())
    assert not cache.has("another")
    assert cache.read("another") is None


def test_equal_captions_share_an_entry_and_nothing_is_encoded_twice(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert fill(cache, ["a", "b", "a", "b", "a"]) == ["a", "b"]
    # More than are looked up at once, so that equal ones are met in different rounds.
    assert sorted(fill(cache, ["a", *(f"c{n % 40}" for n in range(3000)), "b"])) == sorted(f"c{n}" for n in range(40))
    assert len(cache.store) == 42
    assert fill(open_cache(tmp_path), ["b", "a", "c7"]) == []


def test_other_encoders_have_other_entries(tmp_path: Path) -> None:
    fill(open_cache(tmp_path), ["a"])
    assert fill(open_cache(tmp_path, "other encoders"), ["a"]) == ["a"]
    assert not TextCache(tmp_path, "encoders", TextShape(3, 2, 2)).has("a")


def test_states_beyond_sixteen_bits_are_refused_by_caption(tmp_path: Path) -> None:
    huge = torch.full((SHAPE.chunk, SHAPE.width), 70000.0)
    with StoreWriter(tmp_path) as writer, pytest.raises(UserError, match="'a fox' are not finite in 16 bit"):
        open_cache(tmp_path).append(writer, ["a fox"], [(huge, torch.zeros(SHAPE.pooled))])
    cut = torch.zeros(SHAPE.chunk - 1, SHAPE.width)
    with StoreWriter(tmp_path) as writer, pytest.raises(ValueError, match="are not of TextShape"):
        open_cache(tmp_path).append(writer, ["a fox"], [(cut, torch.zeros(SHAPE.pooled))])
    assert not open_cache(tmp_path).has("a fox")


def test_a_damaged_entry_is_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = open_cache(tmp_path)
    fill(cache, ["a"])
    (shard,) = tmp_path.glob("*/*.blobs")
    shard.write_bytes(shard.read_bytes()[:8])
    assert cache.read("a") is None
    for _ in range(2):
        assert cache.read_batch(["a"], ["/p/1.png"]) is None
    lost = [text for text in caplog.messages if "/p/1.png: the text states of its caption are no longer" in text]
    assert len(lost) == 1, "said once"
    assert fill(open_cache(tmp_path), ["a"]) == ["a"]


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 2), (2, 2), (1, 3), (3, 2, 1)])
def test_captions_of_a_batch_are_repeated_to_one_length(lengths: tuple[int, ...]) -> None:
    texts = [torch.randn(n * 3, 4) for n in lengths]
    joined = same_length(texts, chunk=3)
    assert joined.shape == (len(lengths), 3 * {1: 1, 2: 2, 3: 6}[max(lengths)], 4)
    for own, shown in zip(texts, joined, strict=True):
        assert all(torch.equal(part, own) for part in shown.split(len(own)))


def test_captions_whose_claims_have_one_number_are_both_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextCache, "claim", lambda *_: 7)
    assert sorted(fill(open_cache(tmp_path), ["a", "b", "c"])) == ["a", "b", "c"]


def test_the_projection_is_what_the_longest_captions_take(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    fill(cache, [f"{n} x" for n in range(6)])
    stored = sum(int(cache.store.read(row).nbytes) for row in range(6))
    assert stored == 6 * SHAPE.entry_bytes(2)
    assert projected_bytes(3, 2, 2, SHAPE) == stored + SHAPE.entry_bytes(2)  # and the empty caption


# What visits show


def test_the_variants_come_in_turns_and_are_all_kept() -> None:
    one = record(1)
    kept = list(captions_to_keep([one], [SHUFFLED], SEED, 3))
    assert kept[0] == ""
    assert len(set(kept)) == 4
    shown = [caption_of_visit(one, SHUFFLED, SEED, visit, 3) for visit in range(60)]
    assert all(caption in (None, kept[1 + visit % 3]) for visit, caption in enumerate(shown))
    assert {caption for caption in shown if caption} == set(kept[1:])


def test_the_first_visits_show_what_they_would_without_a_cache() -> None:
    for number in range(40):
        for visit in range(4):
            generator = numpy_generator(SEED, Stream.CAPTION, visit, 1000 + number)
            drawn = draw_caption(record(number).captions, SHUFFLED, generator)
            assert caption_of_visit(record(number), SHUFFLED, SEED, visit, 4) == drawn


@pytest.mark.parametrize(("null_mode", "nothing"), [("zeros", None), ("empty_string", "")])
def test_captions_drop_out_as_often_as_is_said_whatever_the_variant(null_mode: Any, nothing: str | None) -> None:
    rules = replace(SHUFFLED, null_mode=null_mode, tag_dropout=0.0)
    drops = np.array(
        [[caption_of_visit(record(n), rules, SEED, v, 2) == nothing for v in range(200)] for n in range(20)]
    )
    assert drops.mean() == pytest.approx(0.3, abs=0.03)  # four standard deviations
    # Of each picture, and of each of its variants: none is always dropped and none never.
    by_variant = drops.reshape(20, 100, 2).mean(axis=1)
    assert by_variant.min() > 0.1
    assert by_variant.max() < 0.5


@pytest.mark.parametrize(
    ("one", "rules", "captions"),
    [
        (record(1), PLAIN, 1),
        (record(1), replace(PLAIN, templates=("{caption}.",)), 1),
        (record(1), replace(PLAIN, shuffle=True), 8),
        (record(1), replace(PLAIN, tag_dropout=0.4), 8),
        (record(1), replace(PLAIN, templates=("{caption}.", "see {caption}")), 2),
        (record(1, "a", "b"), PLAIN, 2),
    ],
)
def test_as_many_captions_are_kept_as_there_are_different_ones(
    one: ImageRecord, rules: CaptionRules, captions: int
) -> None:
    kept = list(captions_to_keep([one], [rules], SEED, 8))
    shown = {caption_of_visit(one, rules, SEED, visit, 8) for visit in range(8)}
    assert shown == set(kept[1:])
    # Where nothing varies the caption is not drawn again and again.
    assert len(kept) == 1 + (8 if captions > 1 else 1)
    assert 0.7 * captions <= len(shown) <= captions


# The encoders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture
def sdxl(model: Path) -> SDXL:
    return load_sdxl(str(model), 0, torch.device("cpu"))


def test_captions_of_a_batch_read_as_when_encoded_together(sdxl: SDXL, tmp_path: Path) -> None:
    """Captions of one to three chunks, and none."""
    tokenizer = caption_tokenizer(sdxl, chunks=3)
    captions = ["abc", "abcdefgh, ijklmnop", "", "abcdefgh, ijklmnop, qrstuvwx"]
    cache = TextCache(tmp_path, "", text_shape(sdxl))
    assert cache.shape == TextShape(LENGTH, WIDTH_1 + WIDTH_2, POOLED)
    with StoreWriter(tmp_path) as writer:
        cache.append(writer, captions, encode_captions(sdxl, tokenizer, captions))
    cache.refresh()
    lengths = [len(read[0]) // LENGTH for caption in captions if (read := cache.read(caption))]
    assert lengths == [1, 2, 1, 3]
    for some in (captions, captions[:2], captions[:1], captions[::2]):
        text_BLD, pooled_BP = encode_text(sdxl, *tokenizer.with_weights(some))
        for read, encoded in zip(cache.read_batch(some, some), (text_BLD, pooled_BP), strict=True):
            assert read.shape == encoded.shape
            torch.testing.assert_close(read.float(), encoded, rtol=1e-3, atol=1e-4)


def scale_weight(sdxl: SDXL) -> SDXL:
    with torch.no_grad():
        next(sdxl.text_encoder_2.parameters())[0, 0] += 1e-3
    return sdxl


def change_epsilon(sdxl: SDXL) -> SDXL:
    sdxl.text_encoder.config.layer_norm_eps = 1e-4
    return sdxl


def change_padding(sdxl: SDXL) -> SDXL:
    sdxl.tokenizer_2.pad_token = "a</w>"
    return sdxl


@pytest.mark.parametrize("change", [scale_weight, change_epsilon, change_padding])
def test_the_fingerprint_is_of_all_that_decides_the_states(
    sdxl: SDXL, model: Path, change: Callable[[SDXL], SDXL]
) -> None:
    before = text_fingerprint(sdxl)
    assert text_fingerprint(load_sdxl(str(model), 1, torch.device("cpu"))) == before
    assert text_fingerprint(change(sdxl)) != before


def test_captions_read_otherwise_are_other_entries(sdxl: SDXL, model: Path, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"max_tokens": 150}, {"weights": True}, {"separator": ";"}]
    keys = {
        open_texts(Config.model_validate(settings_of(tmp_path, model, tmp_path, captions=captions)), sdxl).key("a")
        for captions in settings
    }
    assert len(keys) == len(settings)
    shuffled = Config.model_validate(settings_of(tmp_path, model, tmp_path, captions={"shuffle": False}))
    assert open_texts(shuffled, sdxl).key("a") in keys


# Runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        # The first two are equal; the last one is of two chunks.
        caption = ["a, fox", "a, fox", "b, red", "c, d", "x, (y:1.3)", "red fur, a, blue sky, x"][number]
        (folder / f"{number}.txt").write_text(caption)
    return folder


def settings_of(out: Path, model: Path, pictures: Path, variants: int = 0, **data: Any) -> dict[str, Any]:
    return {
        "global_config": {
            "output_dir": str(out),
            "run_name": f"run{variants}",
            "device": "cpu",
            "seed": SEED,
            "previews": {"every_steps": 2, "steps": 1, "prompts": ["a fox"]},
            "checkpoints": {"every_steps": 3},
            "tracking": {"log_every_steps": 1, "tensorboard": False},
        },
        "model": {"source": str(model)},
        "training": {
            "batch_size": 2,
            "precision": "fp32",
            "max_steps": 3,
            "schedule": {"type": "constant", "warmup_steps": 0},
            "optimizer": {"type": "adamw", "learning_rate": 1e-3},
            "memory": {"gradient_checkpointing": False},
            "objective": {"type": "flow_matching"},
        },
        "data": {
            "sources": [{"path": str(pictures)}],
            "resolution": 64,
            "buckets": {"step_px": 16, "min_side_px": 32, "max_side_px": 128},
            "cache": {"mode": "first", "text_variants": variants},
            "preprocessing": {"backend": "cpu"},
            "workers": 0,
        }
        | data,
    }


@pytest.fixture
def session_of(tmp_path: Path, model: Path, pictures: Path) -> Callable[..., Session]:
    def open_one(variants: int, **captions: Any) -> Session:
        captions = {"max_tokens": 150, "caption_dropout": 0.0, "shuffle": False} | captions
        config = Config.model_validate(settings_of(tmp_path, model, pictures, variants, captions=captions))
        folder = RunFolder(tmp_path / f"run{variants}")
        folder.make()
        return open_session(config, folder, Group(0, 1, torch.device("cpu")), SilentProgress(), None)

    return open_one


@pytest.mark.parametrize("null_mode", ["zeros", "empty_string"])
@pytest.mark.parametrize("weights", [False, True])
def test_batches_are_those_of_a_run_that_encodes_as_it_goes(
    session_of: Callable[..., Session], null_mode: str, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropped captions, but nothing else that varies, so that one variant is all there is."""
    settings = {"null_mode": null_mode, "weights": weights, "caption_dropout": 0.4}
    plain, cached = session_of(0, **settings), session_of(1, **settings)
    plain.fill()
    cached.fill()
    dropped = 0
    # From here on nothing may be encoded.
    encoders = (cached.sdxl.text_encoder, cached.sdxl.text_encoder_2)
    for one in encoders:
        monkeypatch.setattr(one, "forward", lambda *_, **__: pytest.fail("encoded again"))
    for visit in range(6):
        draws = [Draw(number, visit) for number in range(6)]
        expected, got = (
            session.to_device(session.micro_batches.collect(draws, range(6), 6)) for session in (plain, cached)
        )
        assert torch.equal(expected.latents_BCHW, got.latents_BCHW)
        assert torch.equal(expected.noise_BCHW, got.noise_BCHW)
        for name in ("text_BLD", "pooled_BP"):
            one, other = getattr(expected.conditioning, name), getattr(got.conditioning, name)
            assert one.dtype == other.dtype == torch.float32
            assert torch.equal(one.abs().flatten(1).sum(1) == 0, other.abs().flatten(1).sum(1) == 0)
            # Captions are not repeated to the same length where the longest one is dropped as the empty string.
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
        dropped += int((expected.conditioning.pooled_BP.abs().sum(1) == 0).sum())
    assert (dropped > 0) == (null_mode == "zeros")
    plain.close()
    cached.close()


def test_compression_reaches_text_states(tmp_path: Path, model: Path, pictures: Path) -> None:
    sizes, states = {}, {}
    for compression in ("none", "lossless"):
        settings = settings_of(tmp_path / compression, model, pictures, 1)
        settings["data"]["cache"]["compression"] = compression
        config = Config.model_validate(settings)
        folder = RunFolder(tmp_path / compression / "run")
        folder.make()
        session = open_session(config, folder, Group(0, 1, torch.device("cpu")), SilentProgress(), None)
        session.fill()
        session.close()
        sizes[compression] = sum(path.stat().st_size for path in text_folder(config).rglob("*.blobs"))
        states[compression] = session.micro_batches.texts.read("")
    assert sizes["lossless"] < sizes["none"]
    assert all(torch.equal(*pair) for pair in zip(states["none"], states["lossless"], strict=True))


def test_text_states_lost_during_a_run_are_made_in_passing_and_stored_again_by_the_next_start(
    session_of: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, draws = session_of(2, caption_dropout=0.4), [Draw(number, 1) for number in range(6)]
    session.fill()

    def batch(session: Session) -> Batch:
        return session.to_device(session.micro_batches.collect(draws, range(6), 6))

    whole = batch(session)
    for shard in text_folder(session.config).glob("*/*.blobs"):
        os.truncate(shard, shard.stat().st_size // 2)
    made = batch(session)
    session.close()
    assert any(text is None for text in map(session.micro_batches.texts.read, ("", *kept_captions(session))))
    again = session_of(2, caption_dropout=0.4)
    again.fill()
    monkeypatch.setattr(again.sdxl.text_encoder, "forward", lambda *_, **__: pytest.fail("encoded again"))
    for one in (made, batch(again)):
        assert torch.equal(one.latents_BCHW, whole.latents_BCHW)
        torch.testing.assert_close(one.conditioning.text_BLD, whole.conditioning.text_BLD, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.conditioning.pooled_BP, whole.conditioning.pooled_BP, rtol=1e-3, atol=1e-3)
        assert torch.equal(one.conditioning.text_BLD, one.conditioning.text_BLD.half().float()), "rounded as it is kept"
    again.close()


def kept_captions(session: Session) -> list[str]:
    records, seed = session.dataset.plan.records, session.config.global_config.seed
    return list(captions_to_keep(records, caption_rules(session.config), seed, 2))


def test_a_picture_is_drawn_with_encoders_on_another_device(session_of: Callable[..., Session]) -> None:
    """There is no second device here: states say where they were moved."""
    session = session_of(0)
    move_encoders(session.sdxl, "cpu")
    objective, device = session.run.objective, torch.device("meta")
    painter = build_painter(session.config, session.sdxl, session.sdxl.unet, objective, session.run.precision, device)
    assert [states.device.type for states in painter.encode_prompts(["a fox"])] == ["meta"] * 2
    previews = session.config.global_config.previews
    here = session.group.device
    painter = build_painter(session.config, session.sdxl, session.sdxl.unet, objective, session.run.precision, here)
    assert len(painter.paint(previews.prompts, (64, 64), sampling_of(previews))) == 1
    session.close()


def run(folder: Path, settings: dict[str, Any], name: str) -> list[dict[str, float]]:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    train(load_config(config), "never", dry_run=False)
    metrics = Path(settings["global_config"]["output_dir"]) / settings["global_config"]["run_name"] / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_a_run_with_one_caption_each_learns_what_a_run_without_does(
    tmp_path: Path, model: Path, pictures: Path
) -> None:
    still = {"caption_dropout": 0.0, "shuffle": False, "max_tokens": 150}
    losses = [
        [row["loss"] for row in run(tmp_path, settings_of(tmp_path, model, pictures, k, captions=still), f"{k}")]
        for k in (0, 1)
    ]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != losses[0]  # rounded: the states did come from the disk


@pytest.mark.parametrize("variants", [0, 1])
def test_the_encoders_are_off_the_gpu_whenever_gradients_are_made_or_pictures_drawn(
    tmp_path: Path, model: Path, pictures: Path, variants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the rehearsal, so that a dry run tells how much memory the run needs."""
    happened: list[str] = []

    def note(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            happened.append(name)
            return work(*given)

        return noting

    monkeypatch.setattr(session_module, "move_encoders", lambda _, device: happened.append(f"encoders to {device}"))
    monkeypatch.setattr(session_module, "fill_text_cache", note("captions", session_module.fill_text_cache))
    for name in ("add_gradients", "draw_preview", "make_updates"):
        monkeypatch.setattr(training_module, name, note(name, getattr(training_module, name)))
    run(tmp_path, settings_of(tmp_path, model, pictures, variants), "run")
    away, back = (["encoders to cpu"], ["encoders to cpu", "captions"]) if variants else ([], [])
    assert happened[: happened.index("make_updates")] == [
        *away,
        "add_gradients",
        "draw_preview",
        *back,  # the device of this run is the CPU
        *away,
    ]


def test_captions_are_encoded_where_the_encoders_are_and_brought_to_the_device(
    session_of: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no second device here: a stand-in for states says where they were moved."""
    session, moved = session_of(0), []

    class Elsewhere:
        def __init__(self, states: Tensor) -> None:
            self.states = states

        def to(self, device: torch.device) -> Tensor:
            moved.append(device)
            return self.states

    def encode_elsewhere(*given: Any) -> tuple[Elsewhere, ...]:
        return tuple(map(Elsewhere, encode_text(*given)))

    monkeypatch.setattr(session_module, "encode_text", encode_elsewhere)
    assert session.largest_batch()
    assert moved == [session.group.device] * 2
    session.close()


def test_a_run_with_two_variants_trains_with_workers_and_goes_on_without_encoding(
    tmp_path: Path, model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, model, pictures, 2, captions={"keep_first": 0, "max_tokens": 150}, workers=1)
    asked: list[str] = []
    encode = encode_captions

    def listening(sdxl: SDXL, tokenizer: Any, captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        asked.extend(captions)
        return encode(sdxl, tokenizer, captions)

    monkeypatch.setattr(texts_module, "encode_captions", listening)
    rows = run(tmp_path, settings, "two")
    assert [np.isfinite(row["loss"]) for row in rows] == [True] * 3
    assert (tmp_path / "run2" / "samples").is_dir()
    assert len(asked) == len(set(asked))
    assert "" in asked
    assert 6 <= len(asked) <= 13  # of 12 and the empty one, two pictures have the same two tags
    asked.clear()
    settings["global_config"]["run_name"] = "again"
    monkeypatch.setattr(texts_module, "fill_texts", lambda *_: pytest.fail("drawn again"))
    again = run(tmp_path, settings, "again")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert asked == []


@pytest.mark.parametrize("mode", ["ahead", "none"])
def test_texts_are_kept_only_where_all_is_encoded_first(tmp_path: Path, model: Path, pictures: Path, mode: str) -> None:
    settings = settings_of(tmp_path, model, pictures, 2)
    settings["data"]["cache"]["mode"] = mode
    settings["data"]["preprocessing"] = {}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"(?s)text_variants.*needs data\.cache\.mode: first"):
        load_config(config)


def test_previews_and_captions_are_read_alike(sdxl: SDXL, tmp_path: Path, model: Path) -> None:
    config = Config.model_validate(settings_of(tmp_path, model, tmp_path, captions={"weights": True}))
    tokenizer = build_tokenizer(config, sdxl)
    (plain, _), (heavy, _) = encode_captions(sdxl, tokenizer, ["a fox", "a (fox:1.5)"])
    assert not torch.allclose(plain, heavy)


def test_a_plan_counts_what_text_states_take(tmp_path: Path, model: Path, pictures: Path, sdxl: SDXL) -> None:
    values = settings_of(tmp_path, model, pictures, 2, captions={"max_tokens": 150})
    config = Config.model_validate(values)
    assert text_bytes(config, 6) == projected_bytes(6, 2, 2, text_shape(sdxl))
    state = cache_state(config, find_pictures(config, SilentProgress()))
    assert state is not None
    assert (state.text_bytes, state.text_bytes_there) == (text_bytes(config, 6), 0)
    values["model"] = {"source": "owner/not-here"}
    assert text_bytes(Config.model_validate(values), 6) == 13 * 2 * (2 * 77 * 2048 + 1280)
    values["data"]["cache"]["text_variants"] = 0
    assert text_bytes(Config.model_validate(values), 6) == 0
