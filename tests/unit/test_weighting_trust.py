"""Trust in captions: the formula, and that it finds a wrong caption among right ones whatever levels were drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.weighting.residuals import LEVELS
from sdxl_training.weighting.trust import CaptionGains, TrustRule, trust_of_ranks
from tests.tags import lists_of

PICTURES = 200
WRONG = 7
TAGS = [["everywhere", "odd"] if number % 2 else ["everywhere"] for number in range(PICTURES)]


def probe(gains: CaptionGains, batches: int, pictures: list[int] | None = None, seed: int = 0) -> None:
    """Feed gains of which the level makes a hundred times more than the caption; the one of WRONG does harm."""
    generator = np.random.default_rng(seed)
    mean_L, spread_L = np.linspace(-50.0, 50.0, LEVELS), np.exp(np.linspace(-2.0, 2.0, LEVELS))
    for _ in range(batches):
        picture_B = generator.choice(pictures or range(PICTURES), 8)
        level_B = generator.integers(0, LEVELS, 8)
        helps_B = np.where(picture_B == WRONG, -1.5, 0.0) + generator.standard_normal(8)
        gains.see(picture_B, level_B, mean_L[level_B] + spread_L[level_B] * helps_B)


@given(least=st.floats(0.01, 1), quantile=st.floats(0.01, 0.99), width=st.floats(1e-4, 1))
def test_the_formula(least, quantile, width):
    """Half of what can be lost is lost at the quantile; far below nothing, far above all of it."""
    rule = TrustRule(least, quantile, width)
    at, below, above = trust_of_ranks(np.array([quantile, quantile - 800 * width, quantile + 800 * width]), rule)
    assert at == pytest.approx(1 - (1 - least) / 2)
    assert below == 1.0
    assert above == pytest.approx(least)
    ranks = np.linspace(0, 1, 50)
    expected = [1 - (1 - least) / (1 + math.exp(-(q - quantile) / width)) for q in ranks if abs(q - quantile) < width]
    inside = np.abs(ranks - quantile) < width
    np.testing.assert_allclose(trust_of_ranks(ranks, rule)[inside], expected, rtol=1e-12)
    assert (np.diff(trust_of_ranks(ranks, rule)) <= 0).all()


def test_a_wrong_caption_is_found_and_the_others_are_believed():
    """Though gains differ a hundred times more by level than by picture; by the mean gain it would not be."""
    gains = CaptionGains(lists_of(TAGS), TrustRule())
    probe(gains, 600)
    trust_P = np.exp(gains.log_trust())
    assert trust_P[WRONG] < 0.4
    others = np.delete(trust_P, WRONG)
    assert np.median(others) > 0.999
    assert (others > 0.9).mean() > 0.95
    assert trust_P.min() >= 0.3


def test_who_was_probed_once_is_not_judged_by_chance():
    """A mean of one gain has five times the spread of a mean of twenty: all the lowest would be among those."""
    gains, generator = CaptionGains(lists_of([["one tag"]] * 1000), TrustRule()), np.random.default_rng(0)
    seen = np.concatenate([np.repeat(np.arange(500), 20), np.arange(500, 1000)])
    for picture_B in np.split(generator.permutation(seen), 500):
        gains.see(picture_B, generator.integers(0, LEVELS, len(picture_B)), generator.standard_normal(len(picture_B)))
    distrusted_P = gains.log_trust() < np.log(0.9)
    often, once = distrusted_P[:500].sum(), distrusted_P[500:].sum()
    assert often + once > 10, "the lowest fiftieth counts less, whoever that is"
    assert once <= 2 * often


def test_levels_alone_lower_nobody_s_trust():
    """A picture that was only probed where captions do harm is one of many."""
    gains = CaptionGains(lists_of(TAGS), TrustRule())
    level_P = np.arange(PICTURES) % LEVELS
    generator = np.random.default_rng(0)
    for _ in range(30):
        gains.see(np.arange(PICTURES), level_P, -10.0 * level_P + generator.standard_normal(PICTURES))
    rank_by_level = np.corrcoef(gains.log_trust(), level_P)[0, 1]
    assert abs(rank_by_level) < 0.25


def test_tags_of_few_probed_pictures_judge_nobody():
    lists = lists_of([*TAGS, *[["rare"]] * 60, []])
    gains = CaptionGains(lists, TrustRule(min_probed=50))
    probe(gains, 100, pictures=[*range(200, 249)])
    probe(gains, 20, pictures=[260])
    np.testing.assert_array_equal(gains.log_trust(), 0.0)
    probe(gains, 20, pictures=[249])
    trust_P = gains.log_trust()
    assert trust_P[200:250].min() < math.log(0.5), "the fiftieth"
    assert (trust_P[:200] == 0).all()
    assert trust_P[260] == 0.0, "a picture without tags"


def test_a_picture_is_judged_by_the_mean_of_its_ranks():
    """Among 100 pictures WRONG is last of both its tags, and with a third tag, where it is first, in the middle."""

    def trust(tags: list[str]) -> float:
        pictures = [["a", "b"]] * 99 + [["c"]] * 99 + [tags]
        gains = CaptionGains(lists_of(pictures), TrustRule(min_probed=100, quantile=0.9, width=0.01))
        level_P = np.zeros(199, np.int64)
        for _ in range(3):
            gains.see(np.arange(199), level_P, np.concatenate([np.zeros(99), np.full(99, -2.0), [-1.0]]))
            gains.see(np.arange(199), level_P, np.concatenate([np.zeros(99), np.full(99, -2.0), [-1.0]]) + 1e-3)
        return float(np.exp(gains.log_trust()[-1]))

    assert trust(["a", "b"]) == pytest.approx(0.3, abs=1e-3)
    assert trust(["a"]) == pytest.approx(0.3, abs=1e-3)
    assert trust(["c"]) == 1.0
    last, first = 99.5 / 100, 0.5 / 100
    expected = trust_of_ranks(np.array([(2 * last + first) / 3]), TrustRule(quantile=0.9, width=0.01))
    assert trust(["a", "b", "c"]) == pytest.approx(float(expected[0]))


def test_first_gains_that_are_alike_by_chance_decide_nothing():
    """The third one of a level then is a thousand spreads away, through no fault of the picture."""
    gains = CaptionGains(lists_of(TAGS), TrustRule())
    gains.see(np.array([0]), np.array([5]), np.array([1.0]))
    gains.see(np.array([1]), np.array([5]), np.array([1.001]))
    gains.see(np.array([3]), np.array([5]), np.array([-1.0]))
    probe(gains, 600)
    assert np.exp(gains.log_trust())[3] > 0.99


def test_what_is_not_finite_is_passed_over():
    one, other = (CaptionGains(lists_of(TAGS), TrustRule()) for _ in range(2))
    for gains in (one, other):
        probe(gains, 20)
    one.see(np.array([2, 3, 4]), np.array([1, 1, 1]), np.array([0.5, math.nan, -math.inf]))
    other.see(np.array([2]), np.array([1]), np.array([0.5]))
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[name])
        assert np.isfinite(value).all()


def test_before_any_probe_everybody_is_believed():
    np.testing.assert_array_equal(CaptionGains(lists_of(TAGS), TrustRule()).log_trust(), np.zeros(PICTURES))


def test_a_saved_state_comes_back_bit_for_bit():
    one, other = (CaptionGains(lists_of(TAGS), TrustRule(min_probed=5)) for _ in range(2))
    probe(one, 50)
    other.load(one.state())
    for gains in (one, other):
        probe(gains, 50, seed=1)
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[name])
    assert one.log_trust().min() < -0.1
    np.testing.assert_array_equal(one.log_trust(), other.log_trust())
    with pytest.raises(ValueError, match="200 pictures, here are 1"):
        CaptionGains(lists_of([["a"]]), TrustRule()).load(one.state())
