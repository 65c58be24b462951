"""Tag weights in real runs: the same on all ranks, bit-equal when resumed, and at the losses of their own samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdxl_training.assemble import tag_actions as tag_actions_module
from sdxl_training.assemble.tag_actions import (
    CaptionProbe,
    MarginProbe,
    _probe,
    probe_batch,
    rehearse_probes,
    tag_actions,
)
from sdxl_training.config.schema import Config
from sdxl_training.data.loader import MicroBatches, RawBatch
from sdxl_training.model.text import encode_text
from sdxl_training.parallel.group import Group
from sdxl_training.records import Draw, StepStats, UserError
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.tracking.tracker import Trackers
from sdxl_training.training.checkpoint import load_checkpoint, save_checkpoint
from sdxl_training.training.probes import inner_products
from sdxl_training.training.step import add_gradients, loss_per_sample
from sdxl_training.weighting.margins import TagMargins
from sdxl_training.weighting.picture_weights import PictureWeights
from sdxl_training.weighting.trust import TrustRule
from tests.integration.conftest import Trainer
from tests.integration.tag_run import flat, make_updates, open_for
from tests.unit.test_probes import exact_products

ALONE = Group(0, 1, torch.device("cpu"))
STEPS = 8
STATIC = {"type": "frequency", "min_count": 2}
TRUST = {"type": "null_probe", "probe_steps": 2, "min_probed": 2, "quantile": 0.5, "width": 0.2}
OFTEN: dict[str, Any] = {"static": STATIC, "refresh_steps": 3, "statistics": {"half_life": 20.0, "shrinkage": 1.0}}
WEIGHTING: dict[str, dict[str, Any]] = {
    "residual": {**OFTEN, "dynamic": {"type": "residual_loss", "strength": 1.0, "warmup_steps": 3}, "trust": TRUST},
    "meta": {**OFTEN, "dynamic": {"type": "meta", "probe_steps": 2, "warmup_steps": 1}, "trust": TRUST},
}
"""Everything that moves weights moves them within a few updates, and more slowly than it is measured."""
PARTS = {
    "residual": {"tag_residuals", "picture_weights", "caption_gains"},
    "meta": {"tag_residuals", "picture_weights", "caption_gains", "tag_margins"},
}


def settings(pictures: Path, model: Path, output: Path, weighting: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "global_config": {"output_dir": str(output), "device": "cpu", "seed": 3},
        "model": {"source": str(model)},
        "training": {
            "batch_size": 4,
            "precision": "fp32",
            "max_steps": STEPS,
            "optimizer": {"type": "sgd", "learning_rate": 0.02},
            "schedule": {"type": "constant", "warmup_steps": 0},
            **training,
        },
        "data": {
            "sources": [{"path": str(pictures), "repeats": 2}],
            "resolution": 64,
            "buckets": {"step_px": 16, "min_side_px": 32, "max_side_px": 128},
            "workers": 0,
        },
        "tag_weighting": weighting,
    }


@pytest.fixture
def config_of(pictures: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Config]:
    return lambda weighting, **training: Config.model_validate(
        settings(pictures, tiny_model, tmp_path, weighting, **training)
    )


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_two_ranks_hold_the_same_and_what_one_process_holds(
    config_of: Callable[..., Config], pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    described = {name: settings(pictures, tiny_model, tmp_path, WEIGHTING[name], batch_size=2) for name in WEIGHTING}
    (tmp_path / "settings.json").write_text(json.dumps(described))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    program = [str(Path(__file__).with_name("tag_run.py")), str(tmp_path / "settings.json"), str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, *launch, *program],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    for name, parts in PARTS.items():
        first, second = (load_file(tmp_path / f"{name}.rank{rank}.safetensors") for rank in range(2))
        assert {key.split(":")[0] for key in first} >= parts
        for key, value in first.items():
            if key.split(":")[0] in parts:
                assert torch.equal(second[key], value), (name, key)
        alone = flat(make_updates(config_of(WEIGHTING[name]), tmp_path / "alone", ALONE, STEPS))
        assert alone.keys() == first.keys()
        assert float(alone["tag_residuals:seen"].sum()) > 30
        for key, value in alone.items():
            torch.testing.assert_close(
                first[key], value, rtol=1e-3, atol=1e-4, msg=lambda said, at=(name, key): f"{at}: {said}"
            )


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stopped_at"), [("residual", 5), ("meta", 3)])
def test_a_resumed_run_is_the_uninterrupted_one(
    config_of: Callable[..., Config], tmp_path: Path, name: str, stopped_at: int
) -> None:
    """Stopped between two changes of the weights, or right after one; everything saved is equal to the last bit."""
    config = config_of(WEIGHTING[name])
    whole = flat(make_updates(config, tmp_path / "whole", ALONE, STEPS))
    half = make_updates(config, tmp_path / "half", ALONE, stopped_at)
    saved = load_checkpoint(save_checkpoint(tmp_path / "half", half))
    resumed = flat(make_updates(config, tmp_path / "half", ALONE, STEPS, saved))
    assert {key.split(":")[0] for key in whole} >= PARTS[name]
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    half_way = flat(half)
    weights = "picture_weights:weight"
    assert not torch.equal(whole[weights], half_way[weights]), "the weights have moved since"
    assert whole[weights].std() > 1e-3


# --- probes ----------------------------------------------------------------------------------------------------------

NO_STATS = StepStats(*torch.zeros(3))
META = {"type": "meta", "warmup_steps": 0, "parameters": ["up_blocks.2.*", "conv_out.*"]}


@pytest.fixture
def two_sources(pictures: Path, long_tailed: Path, tiny_model: Path, tmp_path: Path) -> Callable[..., Config]:
    """Configurations with a source that counts a tenth of the other, and captions that are never dropped."""

    def config(weighting: dict[str, Any], **training: Any) -> Config:
        described = settings(pictures, tiny_model, tmp_path, weighting, **training)
        described["data"]["sources"] = [
            {"path": str(pictures), "weight": 0.1},
            {"path": str(long_tailed), "repeats": 3},
        ]
        described["data"]["captions"] = {"caption_dropout": 0.0}
        return Config.model_validate(described)

    return config


def test_margins_descend_by_what_exact_gradients_say(two_sources: Callable[..., Config], tmp_path: Path) -> None:
    """Of the ordinary batch's samples and the balanced one, each sample at all that its loss is multiplied by."""
    with closing(open_for(two_sources({"static": STATIC, "dynamic": META}), tmp_path / "run", ALONE)) as session:
        margins, probe = session.tags.margins, _probe(session)
        assert margins is not None
        learn = MarginProbe(session, margins, META["parameters"], 3)
        parameters = [
            each for name, each in session.sdxl.unet.named_parameters() if name.startswith(("up_blocks.2", "conv_out"))
        ]
        twin = TagMargins(margins.lists, margins.rule)
        sources = set()
        for number in range(1, 5):
            raw = probe_batch(session, 3, number)
            batch, meta = session.to_device(raw), session.to_device(learn.meta_batch(number))
            exact_B = exact_products(
                parameters, lambda of=batch: probe.losses(of), lambda of=meta: probe.losses(of).mean()
            )
            weight_B = raw.weight_B * session.tags.weights.of(raw.pictures)
            told_B = np.array(raw.tagged) >= 0
            twin.learn(np.array(raw.pictures)[told_B], weight_B.numpy()[told_B], exact_B.double().numpy()[told_B])
            learn(number)
            sources |= set(raw.weight_B.tolist())
        assert len(sources) == 2
        descended_K, expected_K = (each.state()["moments"][0] for each in (margins, twin))
        assert np.abs(expected_K).max() > 0
        np.testing.assert_allclose(descended_K, expected_K, atol=0.03 * np.abs(expected_K).max())


@pytest.fixture
def rare_gold(tmp_path: Path) -> Path:
    """Thirty pictures of one kind and six of another, in three shapes: two of the rare ones in each."""
    folder = tmp_path / "rare_gold"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, caption in enumerate([COMMON] * 30 + [RARE] * 6):
        shape = [(64, 64), (48, 96), (96, 48)][number % 3]
        Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_the_meta_batch_is_balanced_across_buckets(rare_gold: Path, tiny_model: Path, tmp_path: Path) -> None:
    """A third of the draws are of "gold", a third of "red"; of "large" each kind has its share."""
    described = settings(rare_gold, tiny_model, tmp_path, {"dynamic": META})
    described["data"]["captions"] = {"caption_dropout": 0.0}
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        assert session.tags.margins is not None
        assert len(session.dataset.schedule.buckets) == 3
        lists, learn = session.tags.margins.lists, MarginProbe(session, session.tags.margins, ["conv_out.*"], 3)
        batches = [learn.meta_batch(number) for number in range(1, 101)]
        drawn = [lists.names_K[lists.of_picture(p).min()] for raw in batches for p in raw.pictures]
        assert len(drawn) == 400
        assert drawn.count("gold") / 400 == pytest.approx(1 / 3 + 6 / 36 / 3, abs=0.1)


def test_no_two_samples_of_probes_share_their_noise(
    rare_gold: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do a picture's variants, which take turns from visit to visit, stand still between probes."""
    drawn: list[Draw] = []
    collect = MicroBatches.collect

    def note(batches: MicroBatches, draws: list[Draw], *rest: Any, **named: Any) -> RawBatch:
        drawn.extend(draws)
        return collect(batches, draws, *rest, **named)

    monkeypatch.setattr(MicroBatches, "collect", note)
    described = settings(rare_gold, tiny_model, tmp_path, {"dynamic": {**META, "probe_steps": 10}})
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        actions = tag_actions(session, Trackers())
        drawn.clear()
        for steps_done in range(1, 31):
            for action in actions:
                action.after_step(steps_done, NO_STATS)
    visits = [draw.visit for draw in drawn]
    assert len(visits) == len(set(visits)) == 3 * (4 + 4)
    assert {visit % 10 for visit in visits} == set(range(10))
    assert min(visits) > 2**39


@pytest.mark.parametrize("null_mode", ["zeros", "empty_string"])
def test_the_caption_probe_compares_with_no_caption(
    rare_gold: Path, tiny_model: Path, tmp_path: Path, null_mode: str
) -> None:
    described = settings(rare_gold, tiny_model, tmp_path, {"trust": TRUST})
    described["data"]["captions"] = {"caption_dropout": 0.0, "null_mode": null_mode}
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        raw = probe_batch(session, 3, 1)
        told, untold = (session.to_device(each) for each in (raw, session.without_captions(raw)))
        assert torch.equal(untold.latents_BCHW, told.latents_BCHW)
        assert torch.equal(untold.conditioning.time_ids_B6, told.conditioning.time_ids_B6)
        text_BLD, pooled_BP = encode_text(session.sdxl, *session.tokenizer.with_weights([""] * 4))
        kept = float(null_mode == "empty_string")
        torch.testing.assert_close(untold.conditioning.text_BLD, text_BLD * kept)
        torch.testing.assert_close(untold.conditioning.pooled_BP, pooled_BP * kept)

        gains = session.tags.gains
        assert gains is not None
        CaptionProbe(session, gains, 3)(1)
        null = replace(told, conditioning=untold.conditioning)
        with torch.no_grad():
            with_B, without_B = (
                loss_per_sample(session.run.model, session.run.objective, each, 3) for each in (told, null)
            )
        found = gains.state()["gain_moments"]
        assert found[1].sum() == pytest.approx(float((without_B.log() - with_B.log()).sum()), rel=1e-3)
        assert found[2].sum() > 0


def test_pictures_without_a_finite_latent_say_nothing_of_their_tags(
    rare_gold: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """What stands in for their latents is noise, for which captions, tags and weights can do nothing."""
    described = settings(rare_gold, tiny_model, tmp_path, {"dynamic": META, "trust": TRUST}, batch_size=12)
    described["data"]["captions"] = {"caption_dropout": 0.0}
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        margins, gains, encoder = session.tags.margins, session.tags.gains, session.encoder
        assert margins is not None
        assert gains is not None

        def lose(*lost: int) -> None:
            session.encoder = Mock(
                wraps=encoder,
                side_effect=lambda found: [None if one.picture in lost else encoder([one])[0] for one in found],
            )

        lose(*range(36))
        MarginProbe(session, margins, META["parameters"], 3)(1)
        assert not margins.state()["measured"].any()
        raw = probe_batch(session, 3, 1)
        lose(raw.pictures[5])
        expected = tuple(-1 if picture == raw.pictures[5] else picture for picture in raw.pictures)
        assert session.to_device(raw).tagged == expected
        CaptionProbe(session, gains, 3)(1)
        assert gains.state()["gain_moments"][0].sum() == 12 - expected.count(-1)


def test_what_is_configured_is_what_probes_do(
    rare_gold: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Any] = []

    def note(probe: Any, parameters: Any, *rest: Any) -> torch.Tensor:
        compared.append(parameters)
        return inner_products(probe, parameters, *rest)

    monkeypatch.setattr(tag_actions_module, "inner_products", note)
    learned = {"learning_rate": 0.3, "max_factor": 1.7, "probe_steps": 3, "warmup_steps": 4}
    weighting = {
        "dynamic": {"type": "meta", **learned, "parameters": ["conv_out.*"]},
        "trust": {**TRUST, "least": 0.4, "min_probed": 7, "probe_steps": 5},
    }
    described = settings(rare_gold, tiny_model, tmp_path, weighting, batch_size=12)
    described["data"]["captions"] = {"caption_dropout": 0.0}
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        margins, gains, weights = session.tags.margins, session.tags.gains, session.tags.weights
        assert margins is not None
        assert gains is not None
        assert isinstance(weights, PictureWeights)
        assert gains.rule == TrustRule(least=0.4, quantile=0.5, width=0.2, min_probed=7)
        actions, measured, probed = tag_actions(session, Trackers()), [], []
        for steps_done in range(1, 6):
            for action in actions:
                action.after_step(steps_done, NO_STATS)
            measured.append(margins.state()["measured"].max())
            probed.append(gains.state()["gain_moments"][0].sum())
        assert measured == [0, 0, 1, 1, 1]
        assert probed == [0, 0, 0, 0, 12]
        assert [list(each) for each in compared] == [list(session.sdxl.unet.conv_out.parameters())]

        theta_K = margins.state()["theta"]
        moved = np.abs(theta_K) > 1e-3
        assert moved.sum() >= 2
        np.testing.assert_allclose(np.abs(theta_K[moved]), 0.3, rtol=1e-3)
        np.testing.assert_allclose(margins.log_weights(), np.log(1.7) * np.tanh(theta_K))
        for steps_done, share in ((4, 0.0), (6, 0.5), (8, 1.0)):
            weights.refresh(steps_done)
            rest_P = np.log(weights.all_of(36)) - share * margins.lists.spread(margins.log_weights())
            np.testing.assert_allclose(rest_P, rest_P[0], atol=1e-6)


# --- one run ---------------------------------------------------------------------------------------------------------

COMMON, RARE = "large, red", "large, gold"


@pytest.fixture
def long_tailed(tmp_path: Path) -> Path:
    """Eight pictures of one kind, two of another, one without a caption's tags."""
    folder = tmp_path / "long_tailed"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, caption in enumerate([COMMON] * 8 + [RARE] * 2 + [" , "]):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_weights_reach_the_losses_of_their_own_samples(
    config_of: Callable[..., Config], long_tailed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """An earlier implementation multiplied the mean loss of the batch by the mean weight of the batch."""
    static = {**STATIC, "strength": 1.0, "smoothing": 0.0, "max_factor": 100.0}
    described = settings(long_tailed, tiny_model, tmp_path, {"static": static})
    described["data"]["captions"] = {"caption_dropout": 0.0}
    with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
        record_of = {Path(record.path).stem: number for number, record in enumerate(session.dataset.plan.records)}
        draws = [Draw(record_of[name], 0) for name in ("0", "9", "10")]
        batch = session.to_device(session.micro_batches.collect(draws, range(3), 3))
        common, rare, untagged = batch.weight_B.tolist()
        assert rare / common == pytest.approx(2.0), "a quarter as frequent, by half of the picture's tags"
        assert common < untagged < rare
        mean = (8 * common + 2 * rare + untagged) / 11
        assert mean == pytest.approx(1, abs=1e-6)

        run, gradients = session.run, []
        parameters = [parameter for parameter in session.sdxl.unet.parameters() if parameter.requires_grad]
        for sample in range(3):
            alone = session.to_device(session.micro_batches.collect(draws[sample : sample + 1], [0], 1))
            loss_B = loss_per_sample(run.model, run.objective, alone, run.seed)
            gradients.append(torch.autograd.grad(loss_B.sum(), parameters))
        add_gradients(run, [batch])
        scale = max(float(parameter.grad.abs().max()) for parameter in parameters)
        for number, parameter in enumerate(parameters):
            expected = sum(w * own[number] for w, own in zip((common, rare, untagged), gradients, strict=True)) / 3
            assert float((parameter.grad - expected).abs().max()) < 1e-5 * scale


def test_dropped_captions_say_nothing_of_tags(long_tailed: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Their losses are those of no caption; the picture's weight stays its own."""
    described = settings(long_tailed, tiny_model, tmp_path, {"static": STATIC})
    for dropout in (0.0, 1.0):
        described["data"]["captions"] = {"caption_dropout": dropout}
        with closing(open_for(Config.model_validate(described), tmp_path / "run", ALONE)) as session:
            numbers = [number for number, record in enumerate(session.dataset.plan.records) if record.tags]
            raw = session.micro_batches.collect([Draw(number, 0) for number in numbers], range(10), 10)
            assert set(raw.tagged) == ({-1} if dropout else set(raw.pictures))
            batch = session.to_device(raw)
            assert torch.equal(batch.weight_B, session.tags.weights.of(raw.pictures))


def test_weights_without_any_tag_are_refused_by_name(tiny_model: Path, long_tailed: Path, tmp_path: Path) -> None:
    described = settings(long_tailed, tiny_model, tmp_path, {"static": STATIC})
    described["data"]["captions"] = {"kind": "prose"}
    with pytest.raises(UserError, match=r"tag_weighting: none of the 11 pictures has a tag.*kind: tags"):
        open_for(Config.model_validate(described), tmp_path / "run", ALONE)


def test_a_run_without_tags_or_weights_trains(tiny_model: Path, long_tailed: Path, tmp_path: Path) -> None:
    """Statistics are on by default; where there are no tags there are none."""
    described = settings(long_tailed, tiny_model, tmp_path, {})
    described["data"]["captions"] = {"kind": "prose"}
    state = make_updates(Config.model_validate(described), tmp_path / "run", ALONE, 1)
    assert not any(state.parts[part] for part in PARTS["meta"])
    assert not (tmp_path / "run" / "tags.json").exists()


def test_what_is_written_of_tags(tiny_model: Path, long_tailed: Path, tmp_path: Path) -> None:
    weighting = {"static": STATIC, "statistics": {"every_steps": 5, "tracked": 2}}
    described = settings(long_tailed, tiny_model, tmp_path, weighting)
    make_updates(Config.model_validate(described), tmp_path / "run", ALONE, STEPS)
    said = json.loads((tmp_path / "run" / "tags.json").read_text())
    assert (said["step"], said["tags_in_all"]) == (STEPS, 3)
    assert [(row["tag"], row["pictures"], row["images"]) for row in said["tags"]] == [
        ("large", 10, 20),
        ("red", 8, 16),
        ("gold", 2, 4),
    ]
    by_tag = {row["tag"]: row for row in said["tags"]}
    assert by_tag["gold"]["weight"] > 1 > by_tag["red"]["weight"]
    assert by_tag["large"]["seen"] == by_tag["red"]["seen"] + by_tag["gold"]["seen"] > 0


def test_a_run_goes_on_where_tags_json_cannot_be_written(tiny_model: Path, long_tailed: Path, tmp_path: Path) -> None:
    """And says where and why, each time."""

    class Heard(SilentProgress):
        def message(self, text: str) -> None:
            heard.append(text)

    heard: list[str] = []
    in_its_place = tmp_path / "run" / "tags.json"
    in_its_place.mkdir(parents=True)
    described = settings(long_tailed, tiny_model, tmp_path, {"statistics": {"every_steps": 2}})
    state = make_updates(Config.model_validate(described), tmp_path / "run", ALONE, 4, progress=Heard())
    assert state.state.step == 4
    assert [text for text in heard if "tags.json" in text] == [
        f"step {step}: {in_its_place} cannot be written: Is a directory" for step in (2, 4)
    ]


# --- before training -------------------------------------------------------------------------------------------------


def test_what_a_rehearsal_measures_is_forgotten(
    two_sources: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_sources({"static": STATIC, "dynamic": META, "trust": TRUST})
    with closing(open_for(config, tmp_path / "run", ALONE)) as session:
        gains, margins = session.tags.gains, session.tags.margins
        assert gains is not None
        assert margins is not None
        measured: list[str] = []
        monkeypatch.setattr(gains, "see", lambda *_: measured.append("trust"))
        monkeypatch.setattr(margins, "learn", lambda *_: measured.append("margins"))
        rehearse_probes(session)
        assert measured == ["trust", "margins"]
        monkeypatch.undo()
        before = {name: value.copy() for each in (gains, margins) for name, value in each.state().items()}
        gradients = [parameter.grad for parameter in session.sdxl.unet.parameters()]
        rehearse_probes(session)
        after = {name: value for each in (gains, margins) for name, value in each.state().items()}
        assert before.keys() == after.keys()
        assert all(np.array_equal(value, after[name]) for name, value in before.items())
        assert [parameter.grad for parameter in session.sdxl.unet.parameters()] == gradients == [None] * len(gradients)


def test_parameters_that_nothing_is_called_end_a_dry_run(trainer: Trainer) -> None:
    said = trainer.run(
        "--dry-run", "--set", "tag_weighting.dynamic={type: meta, parameters: [nonsense.*], warmup_steps: 2}", status=2
    )
    assert "tag_weighting.dynamic.parameters: no parameter of the U-Net is called nonsense.*" in said
    assert "tag_weighting: all pictures count the same; weights follow the training" in said
