"""From the section tag_weighting to what a run has of tags, and what a checkpoint brings back of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_training.assemble.dataset import find_pictures
from sdxl_training.assemble.tag_actions import _chosen
from sdxl_training.assemble.weighting import TagParts, build_tags, count_tags
from sdxl_training.config.schema import Config
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.training.checkpoint import Checkpoint, RunState
from sdxl_training.weighting.margins import MarginRule
from sdxl_training.weighting.normaliser import Bounds
from sdxl_training.weighting.picture_weights import EQUAL_WEIGHTS, PictureWeights
from sdxl_training.weighting.residuals import ResidualRule
from sdxl_training.weighting.trust import TrustRule
from sdxl_training.weighting.watch import NO_WATCH, TagWatch
from tests.pictures import RAMP, encoded

CPU = torch.device("cpu")
CAPTIONS = {
    "one": ["artist:ann, red", "artist:ann, blue", "red", "red, meta:new"],
    "two": ["red", "green", "x"],
}
STATIC = {"type": "frequency", "min_count": 0}
MOVING = {"static": STATIC, "dynamic": {"type": "residual_loss", "warmup_steps": 0}, "trust": {"type": "null_probe"}}


@dataclass
class Heard(SilentProgress):
    """Remembers what was said."""

    said: list[str] = field(default_factory=list)

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    """Two folders: one drawn three times an epoch, the other at half the weight, its last picture too small."""
    for name, captions in CAPTIONS.items():
        (tmp_path / name).mkdir()
        for number, caption in enumerate(captions):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(np.resize(RAMP, (64, 64, 3))))
            (tmp_path / name / f"{number}.txt").write_text(caption)
    (tmp_path / "two" / "2.png").write_bytes(encoded(np.resize(RAMP, (8, 8, 3))))

    def make(weighting: dict[str, Any], **captions: Any) -> Config:
        sources = [
            {"path": str(tmp_path / "one"), "repeats": 3},
            {"path": str(tmp_path / "two"), "weight": 0.5, "add_tags": {"front": ["Two"]}},
        ]
        return Config.model_validate(
            {
                "global_config": {"output_dir": str(tmp_path / "runs"), "device": "cpu"},
                "data": {
                    "sources": sources,
                    "resolution": 64,
                    "buckets": {"step_px": 16, "min_side_px": 32, "max_side_px": 128, "small_pictures": "leave_out"},
                    "captions": captions,
                },
                "tag_weighting": weighting,
            }
        )

    return make


def built(config: Config) -> TagParts:
    return build_tags(config, find_pictures(config, SilentProgress()), CPU)


# --- counting --------------------------------------------------------------------------------------------------------


def test_counts_shares_and_categories(config_of):
    config = config_of({"static": STATIC, "categories": {"tags": {"Red": "colour"}, "shares": {"meta": 0}}})
    counts = count_tags(config, find_pictures(config, SilentProgress()))
    lists = counts.lists
    assert list(lists.names_K) == ["artist:ann", "blue", "green", "meta:new", "red", "two", "x"]
    category = dict(zip(lists.names_K, (lists.categories[c] for c in lists.category_K), strict=True))
    assert category == {
        "artist:ann": "artist",
        "blue": "general",
        "green": "general",
        "meta:new": "meta",
        "red": "colour",
        "two": "general",
        "x": "general",
    }
    assert dict(zip(lists.categories, lists.share_C, strict=True)) == {
        "artist": 1,
        "colour": 1,
        "general": 1,
        "meta": 0,
    }
    assert dict(zip(lists.names_K, counts.pictures_K, strict=True))["red"] == 4
    assert counts.pictures_K.tolist() == [2, 1, 1, 1, 4, 2, 0], "the small picture is left out"
    assert counts.images_K.tolist() == [6, 3, 1, 3, 10, 2, 0], "of an epoch, repeats counted"
    np.testing.assert_allclose(counts.share_P / counts.share_P[0], [1, 1, 1, 1, 1 / 6, 1 / 6, 0], rtol=1e-6)
    weights = built(config).weights.all_of(len(lists))
    assert np.average(weights, weights=counts.share_P) == pytest.approx(1, abs=1e-7)


def test_the_mean_weight_of_an_epoch_s_images_is_1_with_source_weights(config_of):
    """What a sample's loss is multiplied by is the product of both."""
    config = config_of({"static": {**STATIC, "strength": 1.0}})
    found = find_pictures(config, SilentProgress())
    weights, plan = built(config).weights.all_of(len(found.pictures)), found.plan
    product_N = found.pictures.weights(plan) * weights[plan.picture_N]
    assert np.average(product_N, weights=plan.repeats) == pytest.approx(1, abs=1e-6)
    assert product_N.std() > 0.05


def test_categories_come_from_a_file(config_of, tmp_path):
    (tmp_path / "categories.csv").write_text("red,colour\nblue,colour\n")
    config = config_of({"categories": {"file": str(tmp_path / "categories.csv"), "tags": {"blue": "mood"}}})
    lists = count_tags(config, find_pictures(config, SilentProgress())).lists
    category = dict(zip(lists.names_K, (lists.categories[c] for c in lists.category_K), strict=True))
    assert (category["red"], category["blue"], category["green"]) == ("colour", "mood", "general")


def test_a_share_of_no_category_is_named(config_of):
    config = config_of({"categories": {"shares": {"colour": 0, "general": 2}}})
    with pytest.raises(UserError, match="no tag is of category colour; there are artist, general, meta"):
        built(config)


def test_an_override_of_no_tag_is_named_with_the_nearest(config_of):
    with pytest.raises(UserError, match=r"no picture has the tag artist:anna; did you mean artist:ann\?"):
        built(config_of({"static": {**STATIC, "overrides": {"artist:anna": 2.0}}}))


@pytest.mark.parametrize("how", ["static", "dynamic", "trust"])
def test_weights_without_any_tag_are_refused(config_of, tmp_path, how):
    kind = {"static": "frequency", "dynamic": "residual_loss", "trust": "null_probe"}[how]
    config = config_of({how: {"type": kind}}, kind="prose")
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": config.data.sources[:1]})})
    with pytest.raises(UserError, match=r"none of the 4 pictures has a tag.*data\.captions\.kind: tags"):
        built(config)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_by_default_losses_are_followed_and_all_weigh_the_same(config_of):
    parts = built(config_of({}))
    assert isinstance(parts.watch, TagWatch)
    assert parts.weights is EQUAL_WEIGHTS
    off = built(config_of({"statistics": {"enabled": False}}))
    assert off == TagParts()
    assert off.watch is NO_WATCH


def test_static_weights_alone_do_not_move(config_of):
    parts = built(config_of({"static": STATIC, "statistics": {"enabled": False}}))
    assert isinstance(parts.weights, PictureWeights)
    assert not parts.weights.moves
    assert parts.watch is NO_WATCH
    assert not any(parts.state().values())


def named(parts: TagParts) -> list[str]:
    """Return which parts have a state."""
    return sorted(name for name, state in parts.state().items() if state)


def test_each_type_brings_its_part(config_of):
    residual, meta = built(config_of(MOVING)), built(config_of({"dynamic": {"type": "meta"}}))
    assert residual.gains is not None
    assert residual.margins is None
    assert meta.margins is not None
    assert meta.gains is None
    assert {name for name, state in residual.state().items() if state} == {
        "tag_residuals",
        "picture_weights",
        "caption_gains",
    }
    assert {name for name, state in meta.state().items() if state} == {
        "tag_residuals",
        "picture_weights",
        "tag_margins",
    }


def test_every_number_arrives(config_of):
    weighting = {
        "static": {"type": "frequency", "min_count": 0, "strength": 0.25},
        "dynamic": {"type": "meta", "learning_rate": 0.01, "max_factor": 2.0, "warmup_steps": 7},
        "trust": {"type": "null_probe", "least": 0.5, "quantile": 0.9, "width": 0.01, "min_probed": 3},
        "bounds": {"least": 0.5, "most": 1.5},
        "emphasis": 3.0,
        "categories": {"shares": {"meta": 2.0}},
        "statistics": {"half_life": 50.0, "shrinkage": 3.0},
    }
    parts = built(config_of(weighting))
    assert isinstance(parts.weights, PictureWeights)
    assert isinstance(parts.watch, TagWatch)
    assert parts.counts is not None
    assert parts.margins is not None
    assert parts.gains is not None
    assert parts.watch.residuals().rule == ResidualRule(50.0, 3.0)
    assert parts.margins.rule == MarginRule(0.01, 2.0)
    assert parts.gains.rule == TrustRule(0.5, 0.9, 0.01, 3)
    assert parts.weights.bounds == Bounds(0.5, 1.5)
    lists = parts.counts.lists
    assert lists.emphasis == 3.0
    assert dict(zip(lists.categories, lists.share_C, strict=True))["meta"] == 2.0
    half = built(config_of({"static": {"type": "frequency", "min_count": 0, "strength": 0.5}}))
    assert half.counts is not None
    np.testing.assert_allclose(2 * parts.counts.static_K, half.counts.static_K)


def fed(config: Config) -> TagParts:
    """Let the picture with blue (number 1) lose more than others at each level, and its caption help less."""
    parts = built(config)
    for level in np.tile(np.arange(4), 50).tolist():
        picture_G, level_G = np.arange(6), np.full(6, level)
        hurts_G = np.where(picture_G == 1, 1.0, 0.0)
        if isinstance(parts.watch, TagWatch):
            parts.watch.residuals().see(picture_G, level_G, np.exp(level + hurts_G))
        if parts.gains is not None:
            parts.gains.see(picture_G, level_G, level - hurts_G + 1e-3 * np.arange(6))
    return parts


@pytest.mark.parametrize(("strength", "sign"), [(1.0, 1), (-1.0, -1), (0.0, 0)])
def test_what_loses_more_weighs_more_once_the_warm_up_is_over(config_of, strength, sign):
    parts = fed(config_of({"dynamic": {"type": "residual_loss", "strength": strength, "warmup_steps": 10}}))
    parts.weights.refresh(10)
    np.testing.assert_allclose(parts.weights.all_of(7)[:6], 1.0, rtol=1e-6)
    parts.weights.refresh(20)
    weight_P = parts.weights.all_of(7)
    assert np.sign(np.log(weight_P[1] / weight_P[3]).round(3)) == sign


def test_a_caption_that_does_not_help_costs_weight(config_of):
    trust = {"type": "null_probe", "least": 0.5, "quantile": 0.6, "width": 0.01, "min_probed": 2}
    parts = fed(config_of({"trust": trust}))
    parts.weights.refresh(1)
    weight_P = parts.weights.all_of(7)
    assert weight_P[1] / weight_P[3] == pytest.approx(0.5, rel=0.01)


def test_what_helps_weighs_more(config_of):
    parts = built(config_of({"dynamic": {"type": "meta", "warmup_steps": 0}}))
    assert parts.margins is not None
    for _ in range(20):
        parts.margins.learn(np.arange(4), np.ones(4), np.array([0.0, 1.0, 0.0, 0.0]))
    parts.weights.refresh(1)
    assert parts.weights.all_of(7)[1] > 1.2


# --- checkpoints -----------------------------------------------------------------------------------------------------


def trained(parts: TagParts) -> TagParts:
    """Feed everything that learns, and change the weights."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        picture_G, level_G = generator.integers(0, 6, 8), generator.integers(0, 4, 8)
        if isinstance(parts.watch, TagWatch):
            parts.watch.residuals().see(picture_G, level_G, np.exp(generator.standard_normal(8)))
        if parts.gains is not None:
            parts.gains.see(picture_G, level_G, generator.standard_normal(8))
        if parts.margins is not None:
            parts.margins.learn(picture_G, np.ones(8), generator.standard_normal(8))
    parts.weights.refresh(10)
    return parts


def checkpoint_of(parts: TagParts) -> Checkpoint:
    return Checkpoint(RunState(20, {}, "adamw"), {name: state for name, state in parts.state().items() if state})


@pytest.mark.parametrize("weighting", [MOVING, {"dynamic": {"type": "meta"}}, {}])
def test_the_same_tags_go_on_where_they_were(config_of, weighting):
    before, progress = trained(built(config_of(weighting))), Heard()
    after = built(config_of(weighting))
    after.restore(checkpoint_of(before), progress)
    assert progress.said == []
    for name, state in before.state().items():
        assert state.keys() == after.state()[name].keys()
        for key, value in state.items():
            assert torch.equal(after.state()[name][key], value), (name, key)
    np.testing.assert_array_equal(after.weights.all_of(7), before.weights.all_of(7))


def test_other_tags_begin_anew_and_that_is_said(config_of, tmp_path):
    saved = checkpoint_of(trained(built(config_of(MOVING))))
    (tmp_path / "one" / "0.txt").write_text("artist:ben, red")  # as many tags as before
    fresh, other, progress = built(config_of(MOVING)), built(config_of(MOVING)), Heard()
    other.restore(saved, progress)
    (said,) = progress.said
    assert said == (
        "tag_weighting: the checkpoint has no tag_residuals and no picture_weights and no caption_gains of these tags; "
        "new ones begin"
    )
    for name, state in fresh.state().items():
        for key, value in state.items():
            assert torch.equal(other.state()[name][key], value) or key == "begun"
    assert other.state()["picture_weights"]["begun"].item() == 20, "and so does the warm-up"


def test_what_is_new_begins_beside_what_was_there(config_of):
    """A run that begins to weigh its pictures half way keeps what it knows of its tags."""
    watched, progress = trained(built(config_of({}))), Heard()
    weighing = built(config_of({"dynamic": {"type": "meta"}}))
    weighing.restore(checkpoint_of(watched), progress)
    (said,) = progress.said
    assert "no picture_weights and no tag_margins of these tags" in said
    for key, value in watched.state()["tag_residuals"].items():
        assert torch.equal(weighing.state()["tag_residuals"][key], value)


def test_a_checkpoint_from_before_tags_were_followed(config_of):
    progress = Heard()
    built(config_of({})).restore(Checkpoint(RunState(5, {}, "adamw"), {"unet": {}}), progress)
    assert "no tag_residuals of these tags" in progress.said[0]
    quiet = Heard()
    built(config_of({"static": STATIC, "statistics": {"enabled": False}})).restore(
        Checkpoint(RunState(5, {}, "adamw"), {}), quiet
    )
    assert quiet.said == []


def test_a_saved_state_stays_as_it_was_saved(config_of):
    parts = trained(built(config_of(MOVING)))
    saved = {name: {key: value.clone() for key, value in state.items()} for name, state in parts.state().items()}
    kept = parts.state()
    trained(parts)
    assert all(torch.equal(kept[name][key], value) for name, state in saved.items() for key, value in state.items())
    assert not torch.equal(kept["tag_residuals"]["sum"], parts.state()["tag_residuals"]["sum"])


# --- the parameters that are compared --------------------------------------------------------------------------------


def test_patterns_choose_parameters_that_are_trained(make_tiny_unet):
    unet = make_tiny_unet()
    chosen = _chosen(unet, ["conv_out.*", "up_blocks.1.*", "conv_out.bias"])
    expected = [value for name, value in unet.named_parameters() if name.startswith(("conv_out", "up_blocks.1"))]
    assert list(map(id, chosen)) == list(map(id, expected))
    unet.conv_out.requires_grad_(False)
    with pytest.raises(UserError, match=r"no parameter of the U-Net is called conv_out\.\* or mid; names begin with"):
        _chosen(unet, ["conv_out.*", "up_blocks.1.*", "mid"])
