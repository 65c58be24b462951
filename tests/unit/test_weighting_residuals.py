"""Residual losses of tags: what the noise level explains is not blamed on a tag, and nothing depends on the cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.weighting.residuals import LEVELS, ResidualRule, TagResiduals
from tests.tags import lists_of

PICTURES = [["easy"], ["plain"], ["hard"], ["hard", "plain"]]
FACTOR = {"easy": 0.6, "plain": 1.0, "hard": 1.5}
LISTS = lists_of(PICTURES)
LONG = ResidualRule(half_life=2000.0, shrinkage=0.0)
uniformly: Callable[[np.ndarray], np.ndarray] = lambda u: u  # noqa: E731
mostly_clean: Callable[[np.ndarray], np.ndarray] = lambda u: u**3  # noqa: E731
mostly_noisy: Callable[[np.ndarray], np.ndarray] = lambda u: 1 - (1 - u) ** 4  # noqa: E731


def level_factor(level_G: np.ndarray) -> np.ndarray:
    """Return the loss of each level: a hundred times more at one end than at the other."""
    return np.exp(4.6 * level_G / (LEVELS - 1))


def simulate(
    residuals: TagResiduals,
    updates: int,
    factor: dict[str, float],
    draw: Callable[[np.ndarray], np.ndarray] = uniformly,
    pictures: tuple[int, ...] = (0, 1, 2),
    noise: float = 0.1,
    size: int = 8,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Feed losses that are level factor x tag factor x chance; return the log losses of each tag."""
    generator, seen = np.random.default_rng(seed), {name: [] for name in factor}
    for _ in range(updates):
        picture_G = generator.choice(pictures, size)
        level_G = np.minimum(draw(generator.random(size)) * LEVELS, LEVELS - 1).astype(np.int64)
        tag_G = [PICTURES[picture][0] for picture in picture_G]
        of_tag_G = np.array([factor[tag] for tag in tag_G])
        loss_G = level_factor(level_G) * of_tag_G * np.exp(noise * generator.standard_normal(size))
        residuals.see(picture_G, level_G, loss_G)
        for tag, loss in zip(tag_G, loss_G, strict=True):
            seen[tag].append(math.log(loss))
    return seen


def relative(residuals: TagResiduals) -> dict[str, float]:
    return dict(zip(residuals.lists.names_K, residuals.relative(), strict=True))


def assert_same(one: TagResiduals, other: TagResiduals, rtol: float = 0.0) -> None:
    first, second = one.state(), other.state()
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=rtol, atol=rtol, err_msg=name)


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [uniformly, mostly_clean, mostly_noisy], ids=["uniform", "clean", "noisy"])
def test_residual_unbiased_in_t(draw):
    """Whatever levels a run draws, a tag's z is the logarithm of its factor, less the mean of all tags."""
    residuals = TagResiduals(LISTS, LONG)
    simulate(residuals, 1500, FACTOR, draw)
    found = relative(residuals)
    mean = np.mean([math.log(factor) for factor in FACTOR.values()])
    for tag, factor in FACTOR.items():
        assert found[tag] == pytest.approx(math.log(factor) - mean, abs=0.02)


def test_the_levels_that_happened_to_be_drawn_say_nothing():
    """Few samples: the mean loss of a tag is that of the levels it was drawn at, its residual is not."""
    errors: dict[str, list[float]] = {"residual": [], "mean loss": []}
    for seed in range(20):
        residuals = TagResiduals(LISTS, LONG)
        simulate(residuals, 300, dict.fromkeys(FACTOR, 1.0), seed=seed)  # the levels' means are known
        late = TagResiduals(LISTS, LONG)
        late.load({**residuals.state(), **{name: np.zeros_like(late.state()[name]) for name in ("number", "sum")}})
        seen = simulate(late, 10, dict.fromkeys(FACTOR, 1.0), seed=2000 + seed)
        found = relative(late)
        errors["residual"].append(found["hard"] - found["easy"])
        errors["mean loss"].append(np.mean(seen["hard"]) - np.mean(seen["easy"]))
    assert np.std(errors["residual"]) < 0.2 * np.std(errors["mean loss"])


def test_a_category_is_compared_with_itself():
    lists = lists_of([["easy", "x"], ["plain", "x"], ["hard", "y"]], {"x": "other", "y": "other"})
    residuals = TagResiduals(lists, LONG)
    simulate(residuals, 400, FACTOR)
    number_K, z_K = residuals.state()["number"][0], residuals.relative()
    for category in range(2):
        own = lists.category_K == category
        assert np.average(z_K[own], weights=number_K[own]) == pytest.approx(0, abs=1e-12)
    assert relative(residuals)["y"] > 0 > relative(residuals)["x"]


def test_rare_tags_are_shrunk_to_nothing_known():
    """After n appearances with residual r, z is r n / (n + shrinkage)."""
    lists = lists_of([["common"], ["rare"]], {"rare": "own"})
    residuals = TagResiduals(lists, ResidualRule(1e9, 20.0))
    level = np.array([3])
    for _ in range(500):
        residuals.see(np.array([0]), level, np.array([1.0]))
    state = residuals.state()
    assert state["level_mean"][3] == pytest.approx(0, abs=1e-12)
    for appearances in range(1, 4):
        residuals.load(state)
        residuals.see(np.full(appearances, 1), np.full(appearances, 3), np.full(appearances, 2.0))
        shrunk = residuals.state()["sum"][0][1] / (residuals.state()["number"][0][1] + 20)
        assert shrunk == pytest.approx(math.log(2) * appearances / (appearances + 20))
    assert relative(residuals) == {"common": pytest.approx(0), "rare": pytest.approx(0)}, "alone in its category"


def test_a_loss_counts_half_after_so_many_appearances():
    residuals = TagResiduals(lists_of([["a"]]), ResidualRule(half_life=50.0, shrinkage=0.0))
    residuals.see(np.zeros(1, int), np.zeros(1, int), np.ones(1))  # gives the level its mean
    residuals.load({**residuals.state(), "number": np.array([[8.0], [8.0]]), "sum": np.array([[4.0], [4.0]])})
    for _ in range(50):
        residuals.see(np.zeros(1, int), np.zeros(1, int), np.ones(1))
    state = residuals.state()
    assert state["sum"][0] == pytest.approx([2.0])
    assert state["number"][0] - state["seen"] < 8.0
    expected = 8 * 0.5 + sum(0.5 ** (i / 50) for i in range(50))
    assert state["number"][0] == pytest.approx([expected])
    assert residuals.seen().tolist() == [50.0]


# --- how sure it is ---------------------------------------------------------------------------------------------------


def of_forty_tags(updates: int, rule: ResidualRule, seed: int, hard: float = 1.0) -> np.ndarray:
    """Return the standard errors of 40 tags of unequal frequency, alike but for tag 20, after so many updates of 16."""
    residuals = TagResiduals(lists_of([[f"t{k:02d}"] for k in range(40)]), rule)
    generator, odds = np.random.default_rng(seed), 1 / np.arange(1, 41)
    for _ in range(updates):
        picture_G, level_G = generator.choice(40, 16, p=odds / odds.sum()), generator.integers(0, LEVELS, 16)
        of_tag_G = np.where(picture_G == 20, hard, 1.0)
        residuals.see(
            picture_G, level_G, level_factor(level_G) * of_tag_G * np.exp(0.5 * generator.standard_normal(16))
        )
    return residuals.standard_errors()[residuals.seen() >= 20]


@pytest.mark.parametrize(("updates", "half_life"), [(200, 200.0), (800, 200.0), (800, 20.0)])
def test_tags_that_are_alike_are_two_standard_errors_away_as_often_as_chance_says(updates, half_life):
    errors = np.concatenate([of_forty_tags(updates, ResidualRule(half_life), seed) for seed in range(6)])
    assert np.mean(errors > 2) < 0.06
    assert np.mean(errors < -2) < 0.06
    assert np.std(errors) == pytest.approx(1, abs=0.2)


def test_a_tag_that_loses_more_is_many_standard_errors_away():
    errors = of_forty_tags(800, ResidualRule(), 0, hard=1.5)
    assert np.argmax(errors) == 20
    assert errors[20] > 4


def test_a_standard_error_is_that_of_the_mean_by_hand():
    """Two tags, each alone on its pictures, of a category each: with a half-life that long, what statistics says."""
    residuals = TagResiduals(lists_of([["a"], ["b"]]), ResidualRule(half_life=1e12))
    generator, told = np.random.default_rng(0), ([], [])
    for _ in range(30):
        loss_2, mean = np.exp(generator.standard_normal(2)), residuals.state()["level_mean"][0]
        for tag in range(2):
            told[tag].append(math.log(loss_2[tag]) - mean)
        residuals.see(np.arange(2), np.zeros(2, np.int64), loss_2)
    first, second = (np.array(own[1:]) for own in told)  # the level's first losses say nothing
    assert np.max(np.abs([first, second])) < 3, "nothing was clipped"
    half = (first.mean() - second.mean()) / 2
    expected = [half / (first.std(ddof=1) / 29**0.5), -half / (second.std(ddof=1) / 29**0.5)]
    np.testing.assert_allclose(residuals.standard_errors(), expected, rtol=1e-9)


def test_what_was_seen_once_or_never_is_not_judged():
    residuals = TagResiduals(lists_of([["often"], ["once"]], names=["never"]), ResidualRule())
    for pictures in ([0, 0], [0, 0], [0, 1]):
        residuals.see(np.array(pictures), np.zeros(2, np.int64), np.array([1.0, 2.0]))
    errors = dict(zip(residuals.lists.names_K, residuals.standard_errors(), strict=True))
    assert errors["never"] == errors["once"] == 0
    assert errors["often"] != 0


# --- however it is cut -----------------------------------------------------------------------------------------------

samples = st.lists(
    st.tuples(st.integers(-1, 3), st.integers(0, 3), st.sampled_from([0.1, 1.0, 3.0, 50.0])), min_size=8, max_size=8
)


@given(rows=samples, order=st.permutations(range(8)))
def test_an_update_is_one_whatever_the_order_of_its_samples(rows, order):
    one, other = TagResiduals(LISTS, ResidualRule()), TagResiduals(LISTS, ResidualRule())
    for residuals in (one, other):
        simulate(residuals, 3, FACTOR)
    picture_G, level_G, loss_G = (np.array(column) for column in zip(*rows, strict=True))
    one.see(picture_G, level_G, loss_G)
    order_G = np.array(order)
    other.see(picture_G[order_G], level_G[order_G], loss_G[order_G])
    assert_same(one, other, rtol=1e-12)


@given(rows=samples, bad=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0]), min_size=8, max_size=8))
def test_what_says_nothing_is_passed_over(rows, bad):
    """Dropped captions and losses that are not finite or not positive, wherever they stand."""
    one, other = TagResiduals(LISTS, ResidualRule()), TagResiduals(LISTS, ResidualRule())
    for residuals in (one, other):
        simulate(residuals, 3, FACTOR)
    picture_G, level_G, loss_G = (np.array(column) for column in zip(*rows, strict=True))
    told_G = picture_G >= 0
    one.see(picture_G[told_G], level_G[told_G], loss_G[told_G])
    other.see(
        np.concatenate([picture_G, np.full(8, 2)]),
        np.concatenate([level_G, level_G]),
        np.concatenate([loss_G, np.array(bad)]),
    )
    assert_same(one, other)


def test_nothing_told_leaves_everything():
    residuals = TagResiduals(LISTS, ResidualRule())
    simulate(residuals, 3, FACTOR)
    before = {name: value.copy() for name, value in residuals.state().items()}
    residuals.see(np.array([-1, 2]), np.array([0, 0]), np.array([1.0, math.nan]))
    for name, value in residuals.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_pictures_without_tags_tell_of_levels_alone():
    residuals = TagResiduals(lists_of([[], ["a"]]), ResidualRule())
    for _ in range(2):
        residuals.see(np.array([0, 0]), np.array([5, 5]), np.array([2.0, 2.0]))
    assert residuals.state()["level_mean"][5] == pytest.approx(math.log(2))
    assert residuals.seen().tolist() == [0.0]


def test_a_saved_state_comes_back_bit_for_bit():
    one, other = TagResiduals(LISTS, ResidualRule()), TagResiduals(LISTS, ResidualRule())
    simulate(one, 20, FACTOR)
    other.load(one.state())
    simulate(one, 20, FACTOR, seed=5)
    simulate(other, 20, FACTOR, seed=5)
    assert_same(one, other)
    np.testing.assert_array_equal(one.log_weights(0.5, 1.5), other.log_weights(0.5, 1.5))
    with pytest.raises(ValueError, match="3 tags, these pictures 1"):
        TagResiduals(lists_of([["a"]]), ResidualRule()).load(one.state())


# --- what is made of it ----------------------------------------------------------------------------------------------


def test_weights_follow_the_sign_of_strength_within_the_limit():
    residuals = TagResiduals(lists_of(PICTURES, names=["never seen"]), LONG)
    simulate(residuals, 500, FACTOR)
    names, z = list(residuals.lists.names_K), relative(residuals)
    for strength in (0.5, -0.5, 2.0):
        found = dict(zip(names, residuals.log_weights(strength, 1.2), strict=True))
        assert found["never seen"] == 0.0
        for tag in FACTOR:
            limit = math.log(1.2)
            assert found[tag] == pytest.approx(min(max(strength * z[tag], -limit), limit))
    assert z["hard"] > math.log(1.2), "the limit was met"
    np.testing.assert_array_equal(residuals.log_weights(0.0, 1.5), 0.0)


@pytest.mark.parametrize("updates", [10, 50, 400])
@pytest.mark.parametrize("rule", [ResidualRule(), ResidualRule(shrinkage=0.0)])
def test_where_nothing_moves_there_is_no_trend(updates, rule):
    """However hard or easy a tag is, and however often it has been seen."""
    residuals = TagResiduals(LISTS, rule)
    simulate(residuals, 60, {**dict.fromkeys(FACTOR, 1.0)}, noise=0.0)
    state = residuals.state()
    residuals.load({**state, "number": np.zeros((2, 3)), "sum": np.zeros((2, 3)), "seen": np.zeros(3)})
    for update in range(updates):
        level_3 = np.full(3, update % LEVELS)
        of_level = np.exp(residuals.state()["level_mean"][update % LEVELS])
        residuals.see(np.arange(3), level_3, of_level * np.array([0.5, 1.0, 2.0]))
    assert relative(residuals)["hard"] > 0.2
    np.testing.assert_allclose(residuals.trend(), 0.0, atol=1e-9)


def test_the_trend_is_down_where_a_tag_catches_up():
    residuals = TagResiduals(LISTS, ResidualRule())
    simulate(residuals, 400, {**FACTOR, "hard": 3.0, "easy": 0.5})
    simulate(residuals, 15, {**FACTOR, "hard": 1.5, "easy": 1.0})
    trend = dict(zip(LISTS.names_K, residuals.trend(), strict=True))
    assert trend["hard"] < -0.1
    assert trend["easy"] > 0.1
    assert relative(residuals)["hard"] > 0, "though it is still behind"
