"""Tags and pictures: what the columns say is what a loop over the lists says, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.weighting import tag_lists
from sdxl_training.weighting.tag_lists import TagLists
from tests.tags import CATEGORY, category_shares, lists_of, spread_by_hand, tag_values, values_of, written_tags

emphases = st.sampled_from([0.0, 0.3, 1.0, 5.0])


@pytest.fixture(autouse=True, scope="module")
def slices() -> Iterator[None]:
    """Three pictures at a time, so that most examples are cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tag_lists, "PICTURES_AT_ONCE", 3)
        yield


@given(written=written_tags, value=tag_values, shares=category_shares, emphasis=emphases)
def test_a_picture_has_the_mean_of_its_categories(written, value, shares, emphasis):
    lists = lists_of(written, CATEGORY, shares, emphasis)
    expected = [spread_by_hand(own, value, CATEGORY, shares, emphasis) for own in written]
    np.testing.assert_allclose(lists.spread(values_of(lists, value)), expected, rtol=1e-12, atol=1e-12)


@given(written=written_tags, value=tag_values, numbers=st.lists(st.integers(0, 9), min_size=12, max_size=12))
def test_sums_over_pictures_and_over_tags(written, value, numbers):
    lists = lists_of(written, CATEGORY)
    number_P = np.array(numbers[: len(written)])
    assert len(lists) == len(written)
    for number, own in enumerate(written):
        assert sorted(lists.names_K[k] for k in lists.of_picture(number)) == sorted(own)
    having = {name: [i for i, own in enumerate(written) if name in own] for name in lists.names_K}
    np.testing.assert_array_equal(lists.count(), [len(having[name]) for name in lists.names_K])
    np.testing.assert_array_equal(lists.count(number_P), [number_P[having[name]].sum() for name in lists.names_K])
    totals = [sum(value[tag] for tag in own) for own in written]
    np.testing.assert_allclose(lists.total(values_of(lists, value)), totals, rtol=1e-12, atol=1e-12)


@given(
    written=written_tags,
    value=tag_values,
    shares=category_shares,
    emphasis=emphases,
    chosen=st.lists(st.tuples(st.integers(0, 11), st.floats(-2, 2)), max_size=8),
)
def test_the_way_back_is_the_gradient_of_the_way_there(written, value, shares, emphasis, chosen):
    """By central differences of the sum of gradient_b A_b; the same picture may be there several times."""
    lists = lists_of(written, CATEGORY, shares, emphasis)
    pictures = np.array([number % len(written) for number, _ in chosen], np.int64)
    gradient_B = np.array([gradient for _, gradient in chosen])
    value_K, step = values_of(lists, value), 1e-5
    tags, found = lists.pull_back(pictures, gradient_B, value_K)
    gradient_K = np.zeros(len(value_K))
    gradient_K[tags] = found
    for k in range(len(value_K)):
        moved = [lists.spread(value_K + sign * step * (np.arange(len(value_K)) == k)) for sign in (1, -1)]
        expected = gradient_B @ (moved[0] - moved[1])[pictures] / (2 * step)
        assert gradient_K[k] == pytest.approx(expected, abs=1e-8)
    assert set(tags.tolist()) == {k for picture in pictures for k in lists.of_picture(picture).tolist()}


@given(written=written_tags, value=tag_values, shares=category_shares, emphasis=emphases, data=st.data())
def test_the_order_of_pictures_and_of_tags_does_not_matter(written, value, shares, emphasis, data):
    order = data.draw(st.permutations(range(len(written))))
    shuffled = [data.draw(st.permutations(written[number])) for number in order]
    one, other = lists_of(written, CATEGORY, shares, emphasis), lists_of(shuffled, CATEGORY, shares, emphasis)
    value_K = values_of(one, value)
    np.testing.assert_allclose(one.spread(value_K)[list(order)], other.spread(value_K), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(one.count(), other.count())


@given(written=written_tags, value=tag_values)
def test_emphasis_goes_from_the_mean_to_the_largest(written, value):
    value_K = values_of(lists_of(written, CATEGORY), value)
    mean, faint, strong = (lists_of(written, CATEGORY, None, tau).spread(value_K) for tau in (0.0, 1e-6, 1e4))
    np.testing.assert_allclose(faint, mean, atol=1e-5)
    largest = [
        np.mean([max(value[t] for t in own if CATEGORY[t] == c) for c in {CATEGORY[t] for t in own}]) if own else 0.0
        for own in written
    ]
    np.testing.assert_allclose(strong, largest, atol=1e-3)


def test_categories_that_do_not_count_leave_nothing():
    lists = lists_of([["a", "c"], ["c"], []], CATEGORY, {"two": 0.0})
    np.testing.assert_array_equal(lists.spread(np.array([2.0, 5.0])), [2.0, 0.0, 0.0])


@pytest.mark.parametrize("emphasis", [0.0, 2.0])
def test_no_tags_at_all(emphasis):
    lists = lists_of([[], []], emphasis=emphasis)
    nothing = np.zeros(0)
    np.testing.assert_array_equal(lists.spread(nothing), [0.0, 0.0])
    np.testing.assert_array_equal(lists.total(nothing), [0.0, 0.0])
    assert lists.count().tolist() == []
    tags, gradient = lists.pull_back(np.array([0, 1]), np.ones(2), nothing)
    assert (tags.tolist(), gradient.tolist()) == ([], [])


@given(written=written_tags)
def test_tags_of_a_picture_stand_by_category(written):
    lists: TagLists = lists_of(written, CATEGORY)
    for number in range(len(written)):
        categories = lists.category_K[lists.of_picture(number)].tolist()
        assert categories == sorted(categories)
