"""Weights of pictures: mean exactly 1 within the bounds, a property of the picture, moved only when they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.weighting.normaliser import Bounds, figures_of, log_normaliser, weights_of
from sdxl_training.weighting.picture_weights import EQUAL_WEIGHTS, PictureWeights, Ramp
from tests.tags import lists_of

DEFAULT = Bounds(0.25, 4.0)
bounds_around_1 = st.builds(Bounds, st.floats(0.01, 1), st.floats(1, 100))
pictures_to_weigh = st.lists(
    st.tuples(st.floats(-20, 20), st.sampled_from([0.0, 0.5, 1.0, 7.0])), min_size=1, max_size=40
).filter(lambda rows: any(share for _, share in rows))


def columns(rows: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    log_P, share_P = np.array(rows, np.float64).T
    return log_P, share_P


# --- the normaliser --------------------------------------------------------------------------------------------------


@given(rows=pictures_to_weigh, bounds=bounds_around_1)
def test_the_mean_is_1_however_many_weights_are_at_a_bound(rows, bounds):
    log_P, share_P = columns(rows)
    weight_P = weights_of(log_P, share_P, bounds)
    assert np.average(weight_P, weights=share_P) == pytest.approx(1, abs=1e-9)
    assert weight_P.min() >= bounds.least
    assert weight_P.max() <= bounds.most
    order = np.argsort(log_P)
    assert (np.diff(weight_P[order]) >= 0).all()
    inside = (weight_P > bounds.least) & (weight_P < bounds.most)
    centred_P = log_P - log_normaliser(log_P, share_P, bounds)
    np.testing.assert_allclose(np.log(weight_P[inside]), centred_P[inside], atol=1e-9)


def test_the_mean_is_1_where_nearly_all_weights_are_at_a_bound():
    """A division by the mean before or after clipping, however often, does not end here."""
    log_P, share_P = np.concatenate([np.full(900, -9.0), np.full(100, 9.0)]), np.ones(1000)
    weight_P = weights_of(log_P, share_P, DEFAULT)
    assert weight_P.mean() == pytest.approx(1, abs=1e-9)
    assert figures_of(weight_P, share_P, DEFAULT).at_bounds >= 0.1
    clipped_P = np.clip(np.exp(log_P) / np.exp(log_P).mean(), DEFAULT.least, DEFAULT.most)
    assert abs(clipped_P.mean() - 1) > 0.3, "this example would tell"


@given(rows=pictures_to_weigh, bounds=bounds_around_1, apart=st.floats(-50, 50))
def test_only_differences_count(rows, bounds, apart):
    log_P, share_P = columns(rows)
    one, other = weights_of(log_P, share_P, bounds), weights_of(log_P + apart, 3 * share_P, bounds)
    np.testing.assert_allclose(one[share_P > 0], other[share_P > 0], rtol=1e-9)


def test_pictures_that_are_not_drawn_have_no_say():
    log_P, share_P = np.array([0.5, -0.5, 30.0, -30.0]), np.array([1.0, 2.0, 0.0, 0.0])
    np.testing.assert_allclose(weights_of(log_P, share_P, DEFAULT)[:2], weights_of(log_P[:2], share_P[:2], DEFAULT))


@pytest.mark.parametrize("bounds", [Bounds(1.0, 1.0), Bounds(0.5, 1.0), Bounds(1.0, 2.0)])
def test_bounds_that_leave_no_room_leave_1(bounds):
    weight_P = weights_of(np.array([-3.0, 0.1, 5.0]), np.ones(3), bounds)
    np.testing.assert_allclose(weight_P, 1.0, atol=1e-12)


@pytest.mark.parametrize(("least", "most"), [(0.2, 0.9), (1.1, 4.0), (0.0, 2.0), (-1.0, 2.0), (math.nan, 2.0)])
def test_bounds_that_exclude_1_are_refused(least, most):
    with pytest.raises(ValueError, match="do not enclose 1"):
        Bounds(least, most)


def test_figures():
    weight_P, share_P = np.array([0.25, 0.5, 4.0, 9.0]), np.array([4.0, 2.0, 1.0, 0.0])
    figures = figures_of(weight_P, share_P, DEFAULT)
    mean = (4 * 0.25 + 2 * 0.5 + 4) / 7
    assert figures.mean == pytest.approx(mean)
    assert (figures.least, figures.most) == (0.25, 4.0), "the last picture is not drawn"
    assert figures.at_bounds == pytest.approx(5 / 7)
    images = np.repeat(weight_P[:3], [4, 2, 1])
    assert figures.effective == pytest.approx(images.sum() ** 2 / (7 * (images**2).sum()))
    assert figures_of(np.ones(5), np.ones(5), DEFAULT).effective == pytest.approx(1)


# --- weights of a run ------------------------------------------------------------------------------------------------

LISTS = lists_of([["common"], ["common"], ["common", "rare"], ["rare"]])
STATIC_P = LISTS.spread(np.array([-0.2, 0.4]))
SHARE_P = np.array([3.0, 1.0, 1.0, 1.0])
WIDE = Bounds(1e-3, 1e3)


class Term:
    """Something whose log weights a test sets."""

    def __init__(self, *values: float) -> None:
        self.now = np.array(values)

    def log_weights(self) -> np.ndarray:
        return self.now

    def log_trust(self) -> np.ndarray:
        return self.now


def ratio(weights: PictureWeights) -> float:
    """Return how many times the picture with the rare tag alone counts of the first one."""
    first, last = weights.all_of(4)[[0, 3]]
    return float(np.log(last / first))


def test_a_weight_is_the_picture_s_and_not_its_company_s():
    """Divided by the mean of its batch, a picture alone would always weigh 1."""
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE)
    alone = torch.cat([weights.of([picture]) for picture in (3, 0, 3, 2)])
    assert torch.equal(weights.of([3, 0, 3, 2]), alone)
    assert alone.dtype == torch.float32
    assert alone[0] > 1 > alone[1]
    np.testing.assert_array_equal(weights.all_of(4)[[3, 0, 3, 2]], alone.numpy())
    assert np.average(weights.all_of(4), weights=SHARE_P) == pytest.approx(1, abs=1e-7)


def test_weights_known_before_training_stay():
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE)
    before = weights.all_of(4)
    weights.refresh(10_000)
    np.testing.assert_array_equal(weights.all_of(4), before)
    assert not weights.moves
    assert weights.state() == {}


@pytest.mark.parametrize(
    ("warmup", "step", "share"), [(100, 0, 0), (100, 100, 0), (100, 150, 0.5), (100, 200, 1), (100, 999, 1), (0, 0, 1)]
)
def test_dynamic_weights_come_in_after_the_warm_up(warmup, step, share):
    assert Ramp(warmup).at(step) == share
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(0.0, 1.0), ramp=Ramp(warmup))
    weights.refresh(step)
    assert ratio(weights) == pytest.approx(0.6 + share, abs=1e-6)
    assert np.average(weights.all_of(4), weights=SHARE_P) == pytest.approx(1, abs=1e-7)


def test_everything_adds_up_in_logarithms():
    trust = Term(0.0, 0.0, -0.5, -1.0)
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(0.3, 0.1), trust)
    assert weights.moves
    weights.refresh(1)
    assert ratio(weights) == pytest.approx(0.6 - 0.2 - 1.0, abs=1e-6)
    assert np.average(weights.all_of(4), weights=SHARE_P) == pytest.approx(1, abs=1e-7)


def test_trust_waits_for_no_warm_up():
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(9.0, 0.0), Term(0.0, 0.0, 0.0, -1.0), Ramp(100))
    weights.refresh(1)
    assert ratio(weights) == pytest.approx(0.6 - 1.0, abs=1e-6)


def test_nothing_moves_between_two_refreshes_and_a_resumed_run_has_the_same():
    term = Term(0.0, 0.0)
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, term)
    before = weights.all_of(4)
    term.now = np.array([0.0, 1.0])
    np.testing.assert_array_equal(weights.all_of(4), before)
    weights.refresh(1)
    assert (weights.all_of(4) != before).any()
    saved, after = weights.state(), weights.all_of(4)
    term.now = np.array([0.0, 5.0])
    weights.refresh(2)
    resumed = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, term)
    resumed.load(saved)
    resumed.resume(2, anew=False)
    np.testing.assert_array_equal(resumed.all_of(4), after)


@pytest.mark.parametrize(
    ("static_P", "share_P", "bounds"),
    [(-STATIC_P, SHARE_P, WIDE), (STATIC_P, SHARE_P[::-1], WIDE), (STATIC_P, SHARE_P, Bounds(0.9, 1.1))],
)
def test_other_settings_hold_from_the_resume_on(static_P, share_P, bounds):
    """And not from the next refresh, until when weights could be beyond new bounds."""
    term = Term(0.0, 1.0)
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, term)
    weights.refresh(1)
    changed = PictureWeights(LISTS, share_P, static_P, bounds, term)
    changed.load(weights.state())
    changed.resume(1, anew=False)
    expected = PictureWeights(LISTS, share_P, static_P, bounds, term)
    expected.refresh(1)
    np.testing.assert_array_equal(changed.all_of(4), expected.all_of(4))
    assert (changed.all_of(4) != weights.all_of(4)).any()


def test_what_begins_at_a_resume_has_its_warm_up_then():
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(0.0, 1.0), ramp=Ramp(100))
    weights.resume(50_000, anew=True)
    assert ratio(weights) == pytest.approx(0.6, abs=1e-6)
    weights.refresh(50_150)
    assert ratio(weights) == pytest.approx(0.6 + 0.5, abs=1e-6)
    again = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(0.0, 1.0), ramp=Ramp(100))
    again.load(weights.state())
    again.resume(50_150, anew=False)
    again.refresh(50_200)
    assert ratio(again) == pytest.approx(0.6 + 1.0, abs=1e-6)


def test_weights_of_other_pictures_are_not_taken():
    weights = PictureWeights(LISTS, SHARE_P, STATIC_P, WIDE, Term(0.0, 0.0))
    with pytest.raises(ValueError, match="3 pictures, here are 4"):
        weights.load({"weight": torch.ones(3)})


def test_without_weighting_all_count_the_same():
    EQUAL_WEIGHTS.refresh(3)
    assert torch.equal(EQUAL_WEIGHTS.of([5, 1, 5]), torch.ones(3))
    assert EQUAL_WEIGHTS.all_of(4).tolist() == [1.0] * 4
    assert EQUAL_WEIGHTS.state() == {}
    assert not EQUAL_WEIGHTS.moves
