"""Learned margins against the closed form of a linear problem; batches in which tags are drawn equally often."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.weighting.balanced import LEAST_PICTURES, balanced_odds, draw_one_bucket, draw_with_odds
from sdxl_training.weighting.margins import DECAY, MarginRule, TagMargins, weight_gradients
from tests.tags import CATEGORY, category_shares, lists_of, written_tags


class Linear:
    """y = x theta, squared loss: gradients of everything are known."""

    def __init__(self, seed: int, samples: int = 6, width: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x_BF, self.y_B = normal(samples, width), normal(samples)
        self.meta_MF, self.meta_y_M = normal(5, width), normal(5)
        self.theta_F = normal(width)

    def losses(self, theta_F: Tensor) -> Tensor:
        return (self.x_BF @ theta_F - self.y_B).square()

    def meta_loss(self, theta_F: Tensor) -> Tensor:
        return (self.meta_MF @ theta_F - self.meta_y_M).square().mean()

    def inner_products(self, theta_F: Tensor) -> np.ndarray:
        """Return <grad l_i, grad L_meta> in closed form."""
        gradient_BF = 2 * (self.x_BF @ theta_F - self.y_B)[:, None] * self.x_BF
        meta_F = 2 * (self.meta_MF @ theta_F - self.meta_y_M) @ self.meta_MF / len(self.meta_y_M)
        return (gradient_BF @ meta_F).numpy()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_meta_grad(seed):
    """d L_meta(theta - lr sum w_i grad l_i / B) / d w_i by autograd through the step, divided by lr."""
    problem = Linear(seed)
    theta_F = problem.theta_F.requires_grad_()
    weight_B = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).requires_grad_()
    rate = 1e-6
    training_loss = (weight_B * problem.losses(theta_F)).mean()
    (gradient_F,) = torch.autograd.grad(training_loss, theta_F, create_graph=True)
    stepped_F = theta_F - rate * gradient_F
    (exact_B,) = torch.autograd.grad(problem.meta_loss(stepped_F), weight_B)
    found_B = weight_gradients(problem.inner_products(theta_F.detach()))
    np.testing.assert_allclose(found_B, exact_B.numpy() / rate, rtol=1e-4, atol=1e-6)
    at_the_step_B = weight_gradients(
        ((2 * (problem.x_BF @ theta_F - problem.y_B)[:, None] * problem.x_BF).detach())
        @ torch.autograd.grad(problem.meta_loss(stepped_F), stepped_F)[0]
    )
    np.testing.assert_allclose(at_the_step_B, exact_B / rate, rtol=1e-9)


@given(written=written_tags, seed=st.integers(0, 100), emphasis=st.sampled_from([0.0, 2.0]))
def test_theta_goes_down_the_gradient_of_the_meta_loss(written, seed, emphasis):
    """Against numerical derivatives of sum_i w_i g_i, w_i = exp(A(phi(theta))_i) / batch mean, in each theta."""
    lists = lists_of(written, CATEGORY, emphasis=emphasis)
    generator = np.random.default_rng(seed)
    picture_B = generator.integers(0, len(written), 6)
    inner_B = generator.standard_normal(6)
    margins = TagMargins(lists, MarginRule())
    start_K = generator.uniform(-1, 1, len(lists.names_K))
    margins.load({**margins.state(), "theta": start_K})

    def weights(theta_K: np.ndarray) -> np.ndarray:
        grown_B = np.exp(lists.spread(math.log(3) * np.tanh(theta_K))[picture_B])
        return grown_B / grown_B.mean()

    def pull(theta_K: np.ndarray) -> float:
        return float(weights(theta_K) @ weight_gradients(inner_B))

    margins.learn(picture_B, weights(start_K), inner_B)
    moved_K, first_K = margins.state()["theta"] - start_K, margins.state()["moments"][0]
    for k in range(len(start_K)):
        ahead, behind = (pull(start_K + sign * 1e-5 * (np.arange(len(start_K)) == k)) for sign in (1, -1))
        expected = (ahead - behind) / 2e-5
        assert first_K[k] / 0.1 == pytest.approx(expected, abs=1e-7)
        if abs(expected) > 1e-6:
            decayed = 0.05 * (np.sign(expected) + DECAY * start_K[k])
            assert moved_K[k] == pytest.approx(-decayed, rel=1e-4, abs=1e-5), "Adam's first step"
        elif not np.isin(k, np.concatenate([lists.of_picture(p) for p in picture_B])):
            assert moved_K[k] == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_source_weights_are_part_of_the_loss_that_is_descended(seed):
    """Against numerical derivatives of the meta loss after an SGD step on (1 / B) sum s w l, with sum s w / B = 1."""
    problem, rate = Linear(seed), 1e-4
    source_B = np.array([0.1, 1.0, 3.0, 0.5, 1.0, 0.1])
    picture_B = np.arange(6)
    lists = lists_of([["a"], ["b"], ["c"], ["a", "b"], ["b", "c"], ["c"]])
    margins = TagMargins(lists, MarginRule())
    start_K = np.random.default_rng(seed).uniform(-1, 1, 3)
    margins.load({**margins.state(), "theta": start_K})

    def weights(theta_K: np.ndarray) -> np.ndarray:
        weight_B = source_B * np.exp(lists.spread(math.log(3) * np.tanh(theta_K)))
        return weight_B / weight_B.mean()

    def meta_after_a_step(theta_K: np.ndarray) -> float:
        theta_F = problem.theta_F.clone().requires_grad_()
        loss = (torch.from_numpy(weights(theta_K)) * problem.losses(theta_F)).mean()
        (gradient_F,) = torch.autograd.grad(loss, theta_F)
        return float(problem.meta_loss(theta_F.detach() - rate * gradient_F))

    margins.learn(picture_B, weights(start_K), problem.inner_products(problem.theta_F))
    descended_K = margins.state()["moments"][0] / 0.1
    for k in range(3):
        ahead, behind = (meta_after_a_step(start_K + sign * 1e-3 * np.eye(3)[k]) for sign in (1, -1))
        assert descended_K[k] == pytest.approx((ahead - behind) / 2e-3 / rate, rel=0.02, abs=1e-3)


# --- learning --------------------------------------------------------------------------------------------------------


def toy(steps: int, rule: MarginRule) -> TagMargins:
    """Samples of tag `helps` point where the meta batch wants to go, those of `hurts` the other way, theta at rest."""
    lists = lists_of([["helps"], ["hurts"], ["helps", "both"], ["hurts", "both"]])
    margins = TagMargins(lists, rule)
    theta, meta_target = 0.0, 1.0
    target_P = np.array([1.0, -1.0, 1.0, -1.0])
    generator = np.random.default_rng(0)
    for _ in range(steps):
        picture_B = generator.integers(0, 4, 4)
        inner_B = 2 * (theta - target_P[picture_B]) * 2 * (theta - meta_target)
        weight_P = np.exp(lists.spread(margins.log_weights()))
        margins.learn(picture_B, weight_P[picture_B] / weight_P.mean(), inner_B)
    return margins


def test_tags_that_help_count_more_and_tags_that_hurt_less():
    margins = toy(60, MarginRule())
    found = dict(zip(margins.lists.names_K, margins.log_weights(), strict=True))
    assert found["helps"] > 0.5
    assert found["hurts"] < -0.5


def test_noise_moves_no_tag_far_however_long_it_lasts():
    """Nothing is to be learnt here: the margins would wander to their limits, and count as if learnt."""
    generator = np.random.default_rng(0)
    names = [f"tag {k}" for k in range(20)]
    lists = lists_of([list(generator.choice(names, 4, replace=False)) for _ in range(200)])
    margins = TagMargins(lists, MarginRule(max_factor=3.0))
    for _ in range(1000):
        margins.learn(generator.integers(0, 200, 4), np.ones(4), generator.standard_normal(4))
    assert margins.log_weights().std() < 0.3 * math.log(3)


@pytest.mark.parametrize("most", [1.2, 3.0])
def test_margins_stay_within_their_factor(most):
    margins = toy(800, MarginRule(learning_rate=0.5, max_factor=most))
    assert np.abs(margins.log_weights()).max() <= math.log(most)
    assert np.abs(margins.log_weights()).max() > 0.8 * math.log(most)


def test_a_gradient_that_all_samples_share_moves_nothing():
    """The weights have mean 1 whatever it is: all cannot rise at once."""
    margins = TagMargins(lists_of([["a"], ["b"]]), MarginRule())
    margins.learn(np.array([0, 1, 1]), np.array([2.0, 0.5, 0.5]), np.full(3, 5.0))
    np.testing.assert_allclose(margins.log_weights(), 0.0, atol=1e-4)


def test_what_is_not_finite_is_passed_over():
    lists = lists_of([["a"], ["b"], ["c"]])
    one, other = TagMargins(lists, MarginRule()), TagMargins(lists, MarginRule())
    one.learn(np.array([0, 2, 1]), np.ones(3), np.array([1.0, math.nan, -1.0]))
    other.learn(np.array([0, 1]), np.ones(2), np.array([1.0, -1.0]))
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[name])
    before = {name: value.copy() for name, value in one.state().items()}
    one.learn(np.array([0, 1]), np.ones(2), np.array([math.nan, math.inf]))
    one.learn(np.array([], np.int64), np.ones(0), np.zeros(0))
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_tags_that_are_not_measured_stay_and_are_not_behind_later():
    """Each tag has its own count of measurements, so a rare one's first step is as long as a common one's was."""
    lists = lists_of([["a"], ["b"], ["c"], ["d"]])
    margins = TagMargins(lists, MarginRule())
    for _ in range(20):
        margins.learn(np.array([0, 1]), np.ones(2), np.array([1.0, -1.0]))
    assert margins.log_weights()[2:].tolist() == [0.0, 0.0]
    margins.learn(np.array([2, 3]), np.ones(2), np.array([1.0, -1.0]))
    first = math.log(3) * math.tanh(0.05)
    np.testing.assert_allclose(margins.log_weights()[2:], [first, -first], rtol=1e-6)


def test_a_saved_state_comes_back_bit_for_bit():
    one = toy(20, MarginRule())
    other = TagMargins(one.lists, MarginRule())
    other.load({name: value.copy() for name, value in one.state().items()})
    for margins in (one, other):
        margins.learn(np.array([0, 1]), np.ones(2), np.array([1.0, 0.3]))
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[name])
    with pytest.raises(ValueError, match="3 tags, these pictures 1"):
        TagMargins(lists_of([["a"]]), MarginRule()).load(one.state())


# --- balanced batches ------------------------------------------------------------------------------------------------


def test_tags_are_drawn_equally_often_under_the_odds():
    """Exactly, where no picture has two of them."""
    pictures = [["common"]] * 300 + [["rare"]] * 5 + [["middling"]] * 40
    lists = lists_of(pictures)
    odds_P = balanced_odds(lists, np.arange(len(pictures)))
    assert odds_P.sum() == pytest.approx(1)
    np.testing.assert_allclose(lists.count(odds_P), 1 / 3)


def test_a_tag_needs_pictures_not_records():
    """A picture that is in five buckets may have a typing error as well as any other."""
    lists = lists_of([["common"]] * 9 + [["typing error"]])
    odds_N = balanced_odds(lists, np.array([*range(10), *[9] * LEAST_PICTURES]))
    np.testing.assert_allclose(odds_N, [1 / 9] * 9 + [0.0] * (1 + LEAST_PICTURES))


@given(written=written_tags, chosen=st.lists(st.integers(0, 11), min_size=1, max_size=60), shares=category_shares)
def test_odds_are_those_of_drawing_a_tag_and_then_a_record(written, chosen, shares):
    """Tags of categories that do not count are not drawn, nor are those on few pictures."""
    lists = lists_of(written * LEAST_PICTURES, CATEGORY, shares)
    members = [number % len(lists) for number in chosen]
    own = [lists.of_picture(number) for number in members]
    counts = Counter(lists.names_K[k] for tags in own for k in tags)
    pictures = Counter(lists.names_K[k] for number in set(members) for k in lists.of_picture(number))
    drawn = [tag for tag in counts if pictures[tag] >= LEAST_PICTURES and shares.get(CATEGORY[tag], 1)]
    if drawn:
        names = [{lists.names_K[k] for k in tags} & set(drawn) for tags in own]
        expected = [sum(1 / counts[tag] for tag in tags) / len(drawn) for tags in names]
    else:
        expected = [1 / len(members)] * len(members)
    np.testing.assert_allclose(balanced_odds(lists, np.array(members)), expected, atol=1e-12)


def test_a_rare_tag_that_many_buckets_share_is_drawn_as_often_as_a_common_one():
    """No bucket has five pictures of the rare tag; and half of the draws are of it nevertheless."""
    generator = np.random.default_rng(0)
    lists = lists_of([["common"]] * 300 + [["rare"]] * 40)
    bucket_N = np.concatenate([generator.integers(0, 20, 300), np.arange(40) % 20])
    members = [np.flatnonzero(bucket_N == bucket) for bucket in range(20)]
    odds_N = balanced_odds(lists, np.arange(340))
    drawn = [draw_one_bucket(odds_N, members, [4] * 20, np.random.default_rng(probe)) for probe in range(2000)]
    assert all(len(set(bucket_N[records])) == 1 and len(records) == 4 for records in drawn)
    assert np.mean(np.concatenate(drawn) >= 300) == pytest.approx(0.5, abs=0.03)
    assert set(np.concatenate(drawn)) == set(range(340))


def test_each_bucket_gives_as_many_as_it_is_asked_for():
    members = [np.array([3, 1]), np.array([0, 2])]
    for probe in range(20):
        records = draw_one_bucket(np.full(4, 0.25), members, [2, 7], np.random.default_rng(probe))
        assert (len(records) == 2) == (set(records.tolist()) <= {3, 1})
        assert (len(records) == 7) == (set(records.tolist()) <= {0, 2})


def test_pictures_are_drawn_by_their_odds():
    odds = np.array([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn = draw_with_odds(odds, 20_000, np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=6) / 20_000
    assert (shares[odds == 0] == 0).all()
    assert (np.abs(shares - odds) <= 5 * np.sqrt(odds * (1 - odds) / 20_000)).all()
    np.testing.assert_array_equal(drawn, draw_with_odds(7 * odds, 20_000, np.random.default_rng(0)))
