"""Weights by frequency: the worked example to the last digit, and what holds whatever the tags are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.records import UserError
from sdxl_training.weighting import static
from sdxl_training.weighting.normaliser import Bounds, log_normaliser, weights_of
from sdxl_training.weighting.static import FrequencyRule, frequency_log_weights, static_log_weights, tags_that_matter
from tests.tags import lists_of

UNBOUNDED = 1e300
counts = st.lists(st.tuples(st.integers(1, 10**6), st.integers(0, 2)), min_size=1, max_size=20)
smoothings = st.sampled_from([0.0, 1.0, 10.0])


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return images_K and category_K of (images, category) pairs."""
    return np.array([images for images, _ in pairs], np.float64), np.array([category for _, category in pairs])


def by_name(rule: FrequencyRule, **pictures: int) -> dict[str, float]:
    """Return the factor of each tag, all of one category, given how many pictures have it."""
    images_K = np.array(list(pictures.values()), np.float64)
    names = [name.replace("_", " ") for name in pictures]
    log_K = static_log_weights(names, images_K, images_K, np.zeros(len(names), np.int64), rule)
    return dict(zip(pictures, np.exp(log_K), strict=True))


def test_the_worked_example(oracles: dict[str, Any]) -> None:
    """Six images, four tags, two categories, computed by a program that shares no code with this one."""
    example = oracles["tag_example"]
    lists = lists_of(example["images"], example["category"])
    images_K = lists.count()
    assert dict(zip(lists.names_K, images_K, strict=True)) == example["counts"]
    rule = FrequencyRule(strength=example["exponent"], smoothing=example["kappa"], min_count=0)
    log_K = static_log_weights(lists.names_K, images_K, images_K, lists.category_K, rule)
    assert dict(zip(lists.names_K, log_K, strict=True)) == pytest.approx(example["tag_logw"], abs=1e-12)
    log_P = lists.spread(log_K)
    np.testing.assert_allclose(log_P, example["image_logw"], atol=1e-12)
    bounds, share_P = Bounds(*example["clamp"]), np.ones(6)
    assert log_normaliser(log_P, share_P, bounds) == pytest.approx(example["logZ"], abs=1e-9)
    np.testing.assert_allclose(weights_of(log_P, share_P, bounds), example["weights"], atol=1e-9)


@given(pairs=counts, strength=st.floats(0, 1), smoothing=smoothings)
def test_the_mean_over_appearances_is_zero_in_each_category(pairs, strength, smoothing):
    images_K, category_K = columns(pairs)
    log_K = frequency_log_weights(images_K, category_K, strength, smoothing, UNBOUNDED)
    for category in set(category_K.tolist()):
        own = category_K == category
        assert abs(np.average(log_K[own], weights=images_K[own])) < 1e-9


@given(pairs=counts, strength=st.floats(0, 1), smoothing=smoothings, factor=st.integers(2, 1000))
def test_a_category_does_not_move_another(pairs, strength, smoothing, factor):
    images_K, category_K = columns(pairs)
    other = images_K * np.where(category_K == 0, factor, 1)
    before, after = (
        frequency_log_weights(each_K, category_K, strength, smoothing, 3.0)[category_K != 0]
        for each_K in (images_K, other)
    )
    np.testing.assert_array_equal(before, after)


@given(pairs=counts, strength=st.floats(0.01, 1), smoothing=smoothings, most=st.floats(1.01, 10))
def test_rarer_tags_never_count_less_and_the_limit_holds(pairs, strength, smoothing, most):
    images_K, category_K = columns(pairs)
    log_K = frequency_log_weights(images_K, category_K, strength, smoothing, most)
    assert np.abs(log_K).max() <= math.log(most)
    for category in set(category_K.tolist()):
        own = np.flatnonzero(category_K == category)
        own = own[np.argsort(images_K[own])]
        assert (np.diff(log_K[own]) <= 1e-12).all()


@given(pairs=counts, smoothing=smoothings)
def test_strength_0_changes_nothing_and_1_is_the_inverse_frequency(pairs, smoothing):
    images_K, category_K = columns(pairs)
    np.testing.assert_array_equal(frequency_log_weights(images_K, category_K, 0.0, smoothing, 3.0), 0.0)
    own = category_K == category_K[0]
    log_K = frequency_log_weights(images_K, category_K, 1.0, smoothing, UNBOUNDED)[own]
    times = np.exp(log_K) * (images_K[own] + smoothing)
    np.testing.assert_allclose(times, times[0], rtol=1e-9)


@given(pairs=counts, strength=st.floats(0, 1), copies=st.integers(2, 10))
def test_a_data_set_said_several_times_weighs_the_same(pairs, strength, copies):
    """Exactly without smoothing; with it, the less the larger the counts."""
    images_K, category_K = columns(pairs)
    one, several = (
        frequency_log_weights(each_K, category_K, strength, 0.0, 3.0) for each_K in (images_K, copies * images_K)
    )
    np.testing.assert_allclose(one, several, atol=1e-12)
    many_K = 1e4 + images_K
    one, several = (
        frequency_log_weights(each_K, category_K, strength, 1.0, 3.0) for each_K in (many_K, copies * many_K)
    )
    np.testing.assert_allclose(one, several, atol=2e-4)


def test_rare_tags_are_left_alone() -> None:
    rule = FrequencyRule(strength=1.0, smoothing=0.0, min_count=5, max_factor=100)
    found = by_name(rule, common=100, rare=5, typo=4)
    assert found["typo"] == 1.0
    assert found["rare"] == pytest.approx(20 * found["common"])


def test_the_least_count_is_of_pictures_and_the_weight_of_images() -> None:
    """A picture that is repeated ten times is one picture."""
    rule = FrequencyRule(strength=1.0, smoothing=0.0, min_count=5, max_factor=100)
    images_K, pictures_K = np.array([100.0, 50.0, 50.0]), np.array([100.0, 50.0, 4.0])
    log_K = static_log_weights(["common", "half", "repeated"], images_K, pictures_K, np.zeros(3, np.int64), rule)
    assert log_K[2] == 0.0
    assert log_K[1] - log_K[0] == pytest.approx(math.log(2))


def test_what_the_user_says_of_single_tags() -> None:
    rule = FrequencyRule(strength=1.0, smoothing=0.0, min_count=5, overrides={"Dragon": 50.0, "typo": 0.5})
    found = by_name(rule, common=1000, half=500, dragon=10, typo=1)
    assert found["dragon"] == pytest.approx(50.0), "in place of its frequency, beyond max_factor"
    assert found["typo"] == pytest.approx(0.5), "below min_count, too"
    plain = by_name(FrequencyRule(strength=1.0, smoothing=0.0), common=1000, half=500, dragon=10, typo=1)
    assert {name: found[name] for name in ("common", "half")} == {name: plain[name] for name in ("common", "half")}


def test_only_what_is_included_and_not_excluded_matters() -> None:
    tags = {"artist:a": 100, "artist:b": 10, "artist:c": 10, "smile": 1000}
    names, images_K = list(tags), np.array(list(tags.values()), np.float64)
    rule = FrequencyRule(1.0, 0.0, 100.0, 5, include=["Artist:*"], exclude=["artist:c"])
    log_K = static_log_weights(names, images_K, images_K, np.zeros(4, np.int64), rule)
    assert log_K[2:].tolist() == [0.0, 0.0]
    alone = static_log_weights(names[:2], images_K[:2], images_K[:2], np.zeros(2, np.int64), FrequencyRule(1, 0, 100))
    np.testing.assert_allclose(log_K[:2], alone, atol=1e-12, err_msg="what does not matter is no reference either")
    assert tags_that_matter(names, rule).tolist() == [True, True, False, False]
    said = FrequencyRule(include=["artist:*"], overrides={"smile": 2.0})
    assert tags_that_matter(names, said).tolist() == [True, True, True, True]


def test_a_tag_that_does_not_matter_is_as_good_as_not_there() -> None:
    """It would else halve what the others of its category say."""
    written = [["common", "rating:a", "rating:b"]] * 90 + [["rare", "rating:a"]] * 10
    lists = lists_of(written)
    rule = FrequencyRule(1.0, 0.0, 100.0, exclude=["rating:*"])
    log_K = static_log_weights(lists.names_K, lists.count(), lists.count(), lists.category_K, rule)
    log_P = lists.only(tags_that_matter(lists.names_K, rule)).spread(log_K)
    without = lists_of([tags[:1] for tags in written])
    alone_K = static_log_weights(
        without.names_K, without.count(), without.count(), without.category_K, FrequencyRule(1.0, 0.0, 100.0)
    )
    np.testing.assert_allclose(log_P, without.spread(alone_K), atol=1e-12)
    assert log_P[-1] - log_P[0] == pytest.approx(math.log(9))


def test_a_tag_is_found_by_its_name_though_that_reads_as_a_pattern() -> None:
    assert tags_that_matter(["x", "[x]"], FrequencyRule(exclude=["[X]"])).tolist() == [False, False]
    assert tags_that_matter(["y", "[x]"], FrequencyRule(exclude=["[X]"])).tolist() == [True, False]


def test_one_tag_has_one_override() -> None:
    rule = FrequencyRule(overrides={"Glossy": 3.0, "glossy": 0.3})
    with pytest.raises(UserError, match="capital and small letters are the same tag, and one is there twice"):
        static_log_weights(["glossy"], np.ones(1), np.ones(1), np.zeros(1, np.int64), rule)


def test_the_nearest_of_very_many_tags_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "MANY", 10)
    names = [f"number {number}" for number in range(100)] + ["dragon"]
    for typing_error in ("dragn", "ragon", "drgon", "dragoon"):
        rule = FrequencyRule(overrides={typing_error: 2.0})
        with pytest.raises(UserError, match="did you mean dragon"):
            static_log_weights(names, np.ones(101), np.ones(101), np.zeros(101, np.int64), rule)


def test_everything_that_no_picture_has_is_named_at_once() -> None:
    names = ["blue sky", "dragon", "smile"]
    rule = FrequencyRule(include=["arts:*"], exclude=["smlie"], overrides={"Dragoon": 2.0, "smile": 1.5, "zzz": 1.0})
    with pytest.raises(UserError) as caught:
        static_log_weights(names, np.ones(3), np.ones(3), np.zeros(3, np.int64), rule)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("tag_weighting.static.include: no picture has the tag arts:*")
    assert "exclude: no picture has the tag smlie; did you mean smile? Correct it, or delete it" in lines[1]
    assert "overrides: no picture has the tag Dragoon; did you mean dragon?" in lines[2]
    assert "zzz; Correct it, or delete it." in lines[3]


@given(strength=st.floats(0, 1), smoothing=smoothings, pictures=st.integers(1, 50))
def test_a_tag_in_every_picture_and_nothing_else_weighs_nothing(strength, smoothing, pictures):
    lists = lists_of([["always"]] * pictures)
    log_K = static_log_weights(
        lists.names_K, lists.count(), lists.count(), lists.category_K, FrequencyRule(strength, smoothing, min_count=0)
    )
    assert abs(log_K[0]) < 1e-12


def test_a_tag_in_every_picture_moves_no_picture_against_another() -> None:
    """It is there as often with the rare tag as with the common one, so the ratio is that of the others."""
    pictures = [["always", "common"]] * 90 + [["always", "rare"]] * 10
    lists = lists_of(pictures, {"always": "quality"})
    rule = FrequencyRule(strength=1.0, smoothing=0.0, max_factor=100.0)
    log_K = static_log_weights(lists.names_K, lists.count(), lists.count(), lists.category_K, rule)
    weight_P = weights_of(lists.spread(log_K), np.ones(100), Bounds(0.01, 100))
    assert weight_P[-1] / weight_P[0] == pytest.approx(math.sqrt(9)), "half of each picture's tags say so, by category"
