"""The section tag_weighting: ends of every knob, rules that refuse, notes that warn, maps from tags to values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from sdxl_training.config import load_config, notes, write_resolved
from sdxl_training.config.tags import DynamicWeights, StaticWeights, TagWeighting, Trust
from tests.unit.test_config_objective import load, the_problem

PLACE = "tag_weighting"
FREQUENCY = f"{PLACE}.static={{type: frequency}}"
RESIDUAL = f"{PLACE}.dynamic={{type: residual_loss}}"
META = f"{PLACE}.dynamic={{type: meta}}"
PROBE = f"{PLACE}.trust={{type: null_probe}}"
TYPES = {"frequency": FREQUENCY, "residual_loss": RESIDUAL, "meta": META, "null_probe": PROBE}

# place, with which type, what is still accepted, what is not.
KNOBS: list[tuple[str, str | None, list[Any], list[Any]]] = [
    ("static.strength", "frequency", [0, 1], [-0.01, 1.01]),
    ("static.smoothing", "frequency", [0, 1000], [-0.5]),
    ("static.max_factor", "frequency", [1.01, 100], [1, 0.5, 101]),
    ("static.min_count", "frequency", [0, 1000], [-1, 2.5]),
    ("static.overrides.dragon", "frequency", [0.01, 100], [0, 0.001, 101]),
    ("dynamic.strength", "residual_loss", [-2, 2], [-2.1, 2.1]),
    ("dynamic.max_factor", "residual_loss", [1.01, 100], [1, 101]),
    ("dynamic.warmup_steps", "residual_loss", [0, 10**6], [-1]),
    ("dynamic.learning_rate", "meta", [1e-6, 10], [0, -1]),
    ("dynamic.max_factor", "meta", [1.01, 100], [1, 101]),
    ("dynamic.probe_steps", "meta", [1, 1000], [0]),
    ("dynamic.warmup_steps", "meta", [0, 10**6], [-1]),
    ("trust.least", "null_probe", [0.01, 1], [0, 1.1]),
    ("trust.quantile", "null_probe", [0.01, 0.99], [0, 1]),
    ("trust.width", "null_probe", [1e-6, 10], [0]),
    ("trust.min_probed", "null_probe", [2, 10**6], [1]),
    ("trust.probe_steps", "null_probe", [1, 1000], [0]),
    ("bounds.least", None, [0.001, 1], [0, 1.1]),
    ("bounds.most", None, [1, 1000], [0.9, 1001]),
    ("categories.shares.meta", None, [0, 1000], [-0.1]),
    ("emphasis", None, [0, 20], [-0.1, 20.1]),
    ("refresh_steps", None, [1, 10**6], [0, 0.5]),
    ("statistics.half_life", None, [0.1, 1e6], [0, -1]),
    ("statistics.shrinkage", None, [0, 1e6], [-1]),
    ("statistics.every_steps", None, [1, 10**6], [0]),
    ("statistics.tracked", None, [0, 1000], [-1]),
]


def cases(column: int) -> Iterator[Any]:
    for place, kind, *values in KNOBS:
        for value in values[column]:
            yield pytest.param(place, kind, value, id=f"{place}={value}")


@pytest.mark.parametrize(("place", "kind", "value"), cases(0))
def test_the_ends_are_accepted(tmp_path, place, kind, value):
    config = load(tmp_path, *([TYPES[kind]] if kind else []), f"{PLACE}.{place}={value}").config
    found: Any = config.tag_weighting
    for part in place.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(("place", "kind", "value"), cases(1))
def test_what_lies_beyond_is_refused_with_its_place(tmp_path, place, kind, value):
    problem = the_problem(tmp_path, *([TYPES[kind]] if kind else []), f"{PLACE}.{place}={value}")
    assert problem.place == f"{PLACE}.{place}"
    assert "must be" in problem.text


def test_every_number_is_in_the_table_above():
    """A knob that is added later has ends, too."""

    def numbers(section: Any, place: str, kind: str | None) -> Iterator[tuple[str, str | None]]:
        for name, field in section.model_fields.items():
            for part in get_args(field.annotation) or (field.annotation,):
                if hasattr(part, "model_fields"):
                    own = part.model_fields["type"].default if "type" in part.model_fields else None
                    yield from numbers(part, f"{place}{name}.", own)
            if field.annotation in (int, float):
                yield f"{place}{name}", kind

    known = {(place, kind) for place, kind, _, _ in KNOBS}
    assert set(numbers(TagWeighting, "", None)) <= known


def test_by_default_nothing_is_weighed_and_losses_are_followed(tmp_path):
    section = load(tmp_path).config.tag_weighting
    assert not section.changes_weights
    assert section.statistics.enabled
    for family in (StaticWeights, DynamicWeights, Trust):
        assert get_args(family)[0].model_fields["type"].default == "none"
    for setting in (FREQUENCY, RESIDUAL, META, PROBE):
        assert load(tmp_path, setting).config.tag_weighting.changes_weights


def test_tags_are_keys_that_need_no_quotes_and_survive_being_written(tmp_path):
    """Colons, blanks, numbers, a bracket: what YAML would read otherwise is quoted when it is written."""
    text = (
        "data: {sources: [{path: pictures}]}\n"
        "tag_weighting:\n"
        "  static: {type: frequency, overrides: {blue sky: 2.5, 're:zero': 0.5, '1': 3.0, ':d': 1.5, '(a)': 1.0}}\n"
        "  categories: {tags: {smile: face, 'no': word}, shares: {face: 0, word: 2}}\n"
    )
    loaded = load(tmp_path, text=text)
    assert loaded.config.tag_weighting.static.overrides == {
        "blue sky": 2.5,
        "re:zero": 0.5,
        "1": 3.0,
        ":d": 1.5,
        "(a)": 1.0,
    }
    write_resolved(loaded, tmp_path / "config.resolved.yaml")
    assert load_config(tmp_path / "config.resolved.yaml").config == loaded.config


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("categories.tags={smile: ''}", "categories.tags.smile"),
        ("categories.tags={smile: 3}", "categories.tags.smile"),
        ("categories.file=", "categories.file"),
        ("static.overrides={dragon: much}", "static.overrides.dragon"),
        ("static.type=rarity", "static.type"),
        ("dynamic.type=loss", "dynamic.type"),
        ("trust.type=probe", "trust.type"),
    ],
)
def test_what_is_no_value_is_refused_with_its_place(tmp_path, setting, place):
    if setting == "categories.file=":
        assert load(tmp_path, f"{PLACE}.{setting}").config.tag_weighting.categories.file is None
        setting = "categories.file=''"
    problem = the_problem(tmp_path, FREQUENCY, f"{PLACE}.{setting}")
    assert problem.place == f"{PLACE}.{place}"


# --- rules and notes -------------------------------------------------------------------------------------------------


def test_weights_that_follow_losses_need_them_to_be_noted(tmp_path):
    off = f"{PLACE}.statistics.enabled=false"
    problem = the_problem(tmp_path, RESIDUAL, off)
    assert problem.place == f"{PLACE}.dynamic.type"
    assert "needs tag_weighting.statistics.enabled: true" in problem.text
    for other in (FREQUENCY, META, PROBE):
        load(tmp_path, other, off)


@pytest.mark.parametrize(
    ("setting", "knob"),
    [
        ("bounds.most=2", "bounds"),
        ("bounds.least=0.5", "bounds"),
        ("emphasis=1", "emphasis"),
        ("categories.shares={meta: 0}", "categories.shares"),
        ("refresh_steps=10", "refresh_steps"),
    ],
)
def test_what_has_no_effect_without_weights_is_noted(tmp_path, setting, knob):
    (note,) = notes(load(tmp_path, f"{PLACE}.{setting}").config)
    assert note == f"tag_weighting.{knob} has no effect: static, dynamic and trust are all of type none."
    for how in (RESIDUAL, META, PROBE):
        assert notes(load(tmp_path, how, f"{PLACE}.{setting}").config) == []
    static = notes(load(tmp_path, FREQUENCY, f"{PLACE}.{setting}").config)
    expected = "tag_weighting.refresh_steps has no effect: dynamic and trust are of type none."
    assert static == ([expected] if knob == "refresh_steps" else [])


@pytest.mark.parametrize("how", ["residual_loss", "meta"])
@pytest.mark.parametrize(
    ("warmup", "words"), [(50, None), (51, "so they never do"), (99, "so they never do"), (100, "so they never begin")]
)
def test_weights_that_come_too_late_are_noted(tmp_path, how, warmup, words):
    overrides = ("training.max_steps=100", "training.schedule.warmup_steps=0")
    dynamic = f"{PLACE}.dynamic={{type: {how}, warmup_steps: {warmup}}}"
    found = notes(load(tmp_path, *overrides, dynamic).config)
    if words is None:
        assert found == []
        return
    (note,) = found
    assert f"warmup_steps = {warmup}: its weights begin at step {warmup}" in note
    assert f"count fully from step {2 * warmup}; the run ends at step 100, {words}." in note
