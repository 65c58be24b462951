"""Couplings: a permutation of the batch's noises, of least cost; with a price on unlike captions where asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.couplings import ConditionalTransport, Coupling, OptimalTransport

COUPLINGS: dict[str, Coupling] = {
    "optimal": OptimalTransport(),
    "conditional": ConditionalTransport(2.0),
    "strict": ConditionalTransport(1e6),
}
every_coupling = pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
TAGS = [("red", "circle"), ("red", "square"), ("blue", "circle"), ("circle", "red"), (), (), ("red", "circle")]


def batch(seed: int, count: int, *shape: int) -> tuple[Tensor, Tensor]:
    x0_GCHW, eps_GCHW = torch.randn(2, count, *(shape or (4, 2, 3)), generator=torch.Generator().manual_seed(seed))
    return x0_GCHW, eps_GCHW


def squared_distance(x0_GCHW: Tensor, eps_GCHW: Tensor, permutation: Sequence[int]) -> float:
    return float((x0_GCHW - eps_GCHW[list(permutation)]).double().square().sum())


def tag_distance(one: Sequence[str], other: Sequence[str]) -> float:
    either = {*one, *other}
    return sum((tag in one) != (tag in other) for tag in either) / len(either) if either else 0.0


@every_coupling
@given(seed=st.integers(0, 10**6), count=st.integers(1, 7))
def test_a_coupling_is_a_permutation_that_never_costs_more(coupling: Coupling, seed: int, count: int) -> None:
    x0_GCHW, eps_GCHW = batch(seed, count)
    permutation = coupling(x0_GCHW, eps_GCHW, TAGS[:count])
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(count))
    kept = squared_distance(x0_GCHW, eps_GCHW, range(count))
    assert squared_distance(x0_GCHW, eps_GCHW, permutation.tolist()) <= kept + 1e-6


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_the_assignment_is_the_best_of_all(count: int) -> None:
    for seed in range(8):
        x0_GCHW, eps_GCHW = batch(seed, count)
        every = list(itertools.permutations(range(count)))
        costs = [squared_distance(x0_GCHW, eps_GCHW, permutation) for permutation in every]
        found = OptimalTransport()(x0_GCHW, eps_GCHW, TAGS[:count])
        assert tuple(found.tolist()) == every[costs.index(min(costs))]


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_conditional_assignment_is_the_best_of_all_for_its_cost(strength: float) -> None:
    """`strength` standard deviations of -2 <x0, eps>, the part of the distance that pairing decides."""
    for seed in range(8):
        x0_GCHW, eps_GCHW = batch(seed, 6)
        tags = TAGS[:6]
        price = strength * float((-2 * x0_GCHW.flatten(1) @ eps_GCHW.flatten(1).T).std(correction=0))
        every = list(itertools.permutations(range(6)))
        costs = [
            squared_distance(x0_GCHW, eps_GCHW, permutation)
            + price * sum(tag_distance(tags[i], tags[j]) for i, j in enumerate(permutation))
            for permutation in every
        ]
        found = ConditionalTransport(strength)(x0_GCHW, eps_GCHW, tags)
        assert tuple(found.tolist()) == every[costs.index(min(costs))]


@given(seed=st.integers(0, 10**6))
def test_strength_zero_is_optimal_transport(seed: int) -> None:
    x0_GCHW, eps_GCHW = batch(seed, 7)
    found = ConditionalTransport(0.0)(x0_GCHW, eps_GCHW, TAGS)
    assert torch.equal(found, OptimalTransport()(x0_GCHW, eps_GCHW, TAGS))


@given(seed=st.integers(0, 10**6))
def test_a_large_strength_exchanges_between_equal_captions_only(seed: int) -> None:
    x0_GCHW, eps_GCHW = batch(seed, 7)
    found = ConditionalTransport(1e6)(x0_GCHW, eps_GCHW, TAGS).tolist()
    assert all(set(TAGS[i]) == set(TAGS[j]) for i, j in enumerate(found))
    alike = [0, 3, 6]  # "red, circle" in any order
    apart = OptimalTransport()(x0_GCHW[alike], eps_GCHW[alike], [TAGS[i] for i in alike])
    assert [found[i] for i in alike] == [alike[j] for j in apart.tolist()], "and optimally among those"


def test_equal_captions_leave_nothing_to_pay_for() -> None:
    x0_GCHW, eps_GCHW = batch(1, 6)
    tags = [("red",)] * 6
    expected = OptimalTransport()(x0_GCHW, eps_GCHW, tags)
    assert torch.equal(ConditionalTransport(1e6)(x0_GCHW, eps_GCHW, tags), expected)
    assert expected.tolist() != list(range(6)), "this batch has something to exchange"


def test_strength_changes_gradually_how_often_unlike_captions_exchange() -> None:
    tags = [(color,) for color in ("red", "blue") * 4]
    shares = []
    for strength in (0.0, 1.0, 4.0, 100.0):
        crossed = 0
        for seed in range(60):
            x0_GCHW, eps_GCHW = batch(seed, 8)
            found = ConditionalTransport(strength)(x0_GCHW, eps_GCHW, tags).tolist()
            crossed += sum(tags[i] != tags[j] for i, j in enumerate(found))
        shares.append(crossed / 480)
    assert shares[0] == pytest.approx(4 / 7, abs=0.1), "by chance, but for a sample's own noise"
    assert shares[0] > shares[1] > shares[2] >= shares[3] == 0


@every_coupling
def test_the_order_of_the_batch_does_not_matter(coupling: Coupling) -> None:
    x0_GCHW, eps_GCHW = batch(4, 7)
    order = [3, 0, 6, 5, 1, 2, 4]
    found = coupling(x0_GCHW, eps_GCHW, TAGS).tolist()
    shuffled = coupling(x0_GCHW[order], eps_GCHW[order], [TAGS[i] for i in order]).tolist()
    assert [order[j] for j in shuffled] == [found[i] for i in order]


@pytest.mark.parametrize(("count", "batches"), [(4, 60), (16, 20), (64, 6)])
def test_cost_falls_as_little_as_the_oracle_says(oracles: dict[str, Any], count: int, batches: int) -> None:
    """Relative drop of |x0 - eps|^2 on white 4 x 64 x 64 latents: on the order of one percent."""
    kept = coupled = 0.0
    for seed in range(batches):
        x0_GCHW, eps_GCHW = batch(seed, count, 4, 64, 64)
        found = OptimalTransport()(x0_GCHW, eps_GCHW, [()] * count)
        kept += squared_distance(x0_GCHW, eps_GCHW, range(count))
        coupled += squared_distance(x0_GCHW, eps_GCHW, found.tolist())
    expected = oracles["ot_relative_cost_drop"]["white"][str(count)]
    assert 1 - coupled / kept == pytest.approx(expected, rel=0.25 if count == 4 else 0.12)


def test_paths_of_a_coupled_batch_cross_less() -> None:
    """What the method is for: on the line, the optimal pairing is the one in order, which no two paths cross."""
    x0_G, eps_G = torch.randn(2, 30, generator=torch.Generator().manual_seed(5))
    found = OptimalTransport()(x0_G[:, None, None, None], eps_G[:, None, None, None], [()] * 30)
    order = x0_G.argsort()
    assert torch.equal(eps_G[found][order], eps_G.sort().values)
    assert math.isclose(float(eps_G[found].sum()), float(eps_G.sum()), rel_tol=1e-5)
