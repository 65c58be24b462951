"""Adaptive levels: whatever is drawn more often counts less for it, exactly; and what is drawn follows the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.objectives.adaptive import AdaptiveLevels, AdaptiveSettings, PlainLevels
from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.objective import make_objective
from sdxl_training.objectives.weights import MinSNR
from sdxl_training.records import Batch

CPU = torch.device("cpu")
MakeBatch = Callable[..., Batch]
SETTINGS = AdaptiveSettings(bins=4, warmup_samples=3, decay=0.9, uniform_share=0.1, every_steps=2)
CENTRES = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
histograms = st.lists(st.floats(0.01, 1), min_size=2, max_size=12)


def alone(value: Tensor) -> Tensor:
    """Sum over the ranks of a single process."""
    return value


def adapted(bars: Sequence[float]) -> AdaptiveLevels:
    """Return adaptive levels that draw their bins with these probabilities."""
    levels = AdaptiveLevels(replace(SETTINGS, bins=len(bars)), CPU)
    probability_K = torch.tensor(bars, dtype=torch.float64)
    zeros_K = torch.zeros(len(bars))
    levels.load({"moment": zeros_K, "count": zeros_K, "probability": probability_K / probability_K.sum()})
    return levels


def quadrature(levels: AdaptiveLevels, per_bin: int) -> tuple[Tensor, Tensor]:
    """Return uniform numbers and their mass: the midpoint rule in what falls to every bin."""
    probability_K = levels.probabilities()
    start_K = probability_K.cumsum(0) - probability_K
    middle_N = (torch.arange(per_bin, dtype=torch.float64) + 0.5) / per_bin
    uniform_B = (start_K[:, None] + probability_K[:, None] * middle_N).flatten()
    return uniform_B, (probability_K / per_bin).repeat_interleave(per_bin)


def learn(levels: AdaptiveLevels, losses_K: Tensor, updates: int, first_step: int = 0) -> None:
    """Show the loss of each bin once an update."""
    for step in range(first_step, first_step + updates):
        levels.see(CENTRES, losses_K)
        levels.after_update(step, alone)


# --- nothing that is expected changes --------------------------------------------------------------------------------


@given(bars=histograms, seed=st.integers(0, 10**6))
def test_the_expectation_is_the_bases_for_any_probabilities(bars: list[float], seed: int) -> None:
    """Integrated over the draw, for any function of the level: here one with a random value at every node."""
    levels = adapted(bars)
    uniform_B, mass_B = quadrature(levels, per_bin=5)
    drawn_B, importance_B = levels.remap(uniform_B)
    nodes_B = (torch.arange(len(drawn_B), dtype=torch.float64) + 0.5) / len(drawn_B)
    torch.testing.assert_close(drawn_B, nodes_B, rtol=0, atol=1e-12)
    values_B = torch.randn(len(drawn_B), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close((mass_B * importance_B * values_B).sum(), values_B.mean(), rtol=0, atol=1e-12)
    assert float((mass_B * importance_B).sum()) == pytest.approx(1, abs=1e-12)


@dataclass(frozen=True)
class FixedDraws:
    """Draws that are given."""

    uniform_B: Tensor

    def uniform(self, seed: int, batch: Batch) -> Tensor:
        return self.uniform_B


@pytest.mark.parametrize("bars", [[1.0, 1.0, 1.0], [0.7, 0.05, 0.25], [0.01, 0.01, 0.98]])
def test_loss_and_gradient_of_an_objective_are_unbiased(make_batch: MakeBatch, bars: list[float]) -> None:
    """Through levels, weights and losses: the integral of the gradient of a network of one parameter."""

    def integral(levels: AdaptiveLevels | PlainLevels, uniform_B: Tensor, mass_B: Tensor) -> tuple[float, float]:
        objective = make_objective(
            "v_prediction",
            {"zero_terminal_snr": True},
            LogNormal(0.0, 1.5),
            MinSNR(5.0, "plus_one"),
            level_draw=levels,
            draws=FixedDraws(uniform_B),
        )
        drawn = objective.draw_levels(0, make_batch([0]), (64, 64))
        parameter = torch.tensor(0.3, requires_grad=True)
        losses_B = objective.losses((parameter * drawn.log_sigma_B - 1).square(), drawn)
        loss = (losses_B.double() * mass_B).sum()
        loss.backward()
        assert parameter.grad is not None
        return loss.item(), parameter.grad.item()

    levels = adapted(bars)
    uniform_B, mass_B = quadrature(levels, per_bin=4000)
    even_B = (torch.arange(len(uniform_B), dtype=torch.float64) + 0.5) / len(uniform_B)
    expected = integral(PlainLevels(), even_B, torch.full_like(even_B, 1 / len(even_B)))
    assert integral(levels, uniform_B, mass_B) == pytest.approx(expected, rel=1e-5)


@given(bars=histograms)
def test_bins_are_drawn_as_often_as_they_should(bars: list[float]) -> None:
    levels = adapted(bars)
    uniform_B = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    drawn_B, importance_B = levels.remap(uniform_B)
    assert bool((drawn_B.diff() > 0).all()), "the order stays, so strata stay apart"
    share_K = torch.bincount((drawn_B * len(bars)).long(), minlength=len(bars)) / 20000
    torch.testing.assert_close(share_K.double(), levels.probabilities(), rtol=0, atol=2e-4)
    expected_B = 1 / (len(bars) * levels.probabilities()[(drawn_B * len(bars)).long()])
    torch.testing.assert_close(importance_B, expected_B)


def test_before_anything_is_learnt_draws_are_the_bases() -> None:
    uniform_B = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for levels in (PlainLevels(), AdaptiveLevels(replace(SETTINGS, bins=49), CPU)):
        drawn_B, importance_B = levels.remap(uniform_B)
        torch.testing.assert_close(drawn_B, uniform_B, rtol=0, atol=1e-14)
        assert torch.equal(importance_B.float(), torch.ones(1000))


# --- what is drawn follows the losses --------------------------------------------------------------------------------


def test_probabilities_become_proportional_to_the_root_of_the_second_moment() -> None:
    levels, losses_K = AdaptiveLevels(SETTINGS, CPU), torch.tensor([0.1, 0.4, 2.0, 0.5])
    learn(levels, losses_K, 20)
    expected = 0.1 / 4 + 0.9 * losses_K / losses_K.sum()
    torch.testing.assert_close(levels.probabilities(), expected.double(), rtol=1e-5, atol=0)


def test_it_is_the_second_moment_and_not_the_mean_that_counts() -> None:
    """Equal means; in the last bin the loss is 0 or twice as much, so its second moment is twice the others'."""
    levels = AdaptiveLevels(replace(SETTINGS, decay=0.999), CPU)
    for step in range(2000):
        levels.see(CENTRES, torch.tensor([1.0, 1.0, 1.0, 2.0 * (step % 2)]))
        levels.after_update(step, alone)
    root_K = torch.tensor([1, 1, 1, math.sqrt(2)], dtype=torch.float64)
    torch.testing.assert_close(levels.probabilities(), 0.1 / 4 + 0.9 * root_K / root_K.sum(), rtol=1e-2, atol=0)


def test_the_moment_is_a_plain_mean_at_first_and_forgets_later() -> None:
    levels = AdaptiveLevels(replace(SETTINGS, decay=0.8), CPU)
    seen: list[float] = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0]):
        learn(levels, torch.full((4,), loss), 1, step)
        seen.append(loss**2)
        torch.testing.assert_close(levels.state()["moment"], torch.full((4,), sum(seen) / len(seen)))
    learn(levels, torch.ones(4), 100, 4)
    torch.testing.assert_close(levels.state()["moment"], torch.ones(4))
    learn(levels, torch.full((4,), 2.0), 1, 104)
    torch.testing.assert_close(levels.state()["moment"], torch.full((4,), 0.8 + 0.2 * 4))


def test_several_losses_of_a_bin_in_one_update_decay_as_often() -> None:
    levels = AdaptiveLevels(replace(SETTINGS, decay=0.8), CPU)
    learn(levels, torch.ones(4), 100)
    levels.see(torch.tensor([0.1, 0.2, 0.0, 0.9]), torch.tensor([2.0, 3.0, 4.0, 1.0]))
    levels.after_update(100, alone)
    moment = levels.state()["moment"].tolist()
    assert moment[0] == pytest.approx(0.8**3 + (1 - 0.8**3) * (4 + 9 + 16) / 3)
    assert moment[1:] == pytest.approx([1, 1, 1]), "bins without a loss keep theirs"


def test_nothing_is_favoured_before_every_bin_has_been_seen_often_enough() -> None:
    levels = AdaptiveLevels(replace(SETTINGS, every_steps=1), CPU)
    uneven = torch.tensor([1.0, 5.0, 1.0, 1.0])
    for step in range(20):
        levels.see(CENTRES[:3], uneven[:3])
        levels.after_update(step, alone)
    learn(levels, uneven, 2, 20)
    assert torch.equal(levels.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    learn(levels, uneven, 1, 22)
    assert float(levels.probabilities()[1]) > 0.5


def test_probabilities_change_at_their_interval_only() -> None:
    levels, changed = AdaptiveLevels(replace(SETTINGS, every_steps=7), CPU), []
    before = levels.probabilities()
    for step in range(29):
        learn(levels, torch.tensor([1.0, 2.0, 3.0, float(step)]), 1, step)
        if not torch.equal(levels.probabilities(), before):
            changed.append(step)
            before = levels.probabilities()
    assert changed == [6, 13, 20, 27]


def test_losses_of_zero_favour_nobody() -> None:
    levels = AdaptiveLevels(SETTINGS, CPU)
    learn(levels, torch.zeros(4), 10)
    assert torch.equal(levels.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


@given(
    losses=st.lists(st.floats(0, 2.0**50, width=32), min_size=4, max_size=4),
    share=st.floats(0.01, 1),
)
def test_no_sample_counts_more_than_one_over_the_uniform_share(losses: list[float], share: float) -> None:
    levels = AdaptiveLevels(replace(SETTINGS, uniform_share=share), CPU)
    learn(levels, torch.tensor(losses), 10)
    probability_K = levels.probabilities()
    assert float(probability_K.sum()) == pytest.approx(1)
    _, importance_B = levels.remap(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert float(importance_B.max()) <= 1 / share * (1 + 1e-9)
    if share == 1:
        assert torch.equal(importance_B, torch.ones(101, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_losses_that_are_not_finite_are_not_seen(bad: float) -> None:
    """Nor those whose square is not."""
    levels, reference = AdaptiveLevels(SETTINGS, CPU), AdaptiveLevels(SETTINGS, CPU)
    for step in range(4):
        levels.see(torch.cat([CENTRES, CENTRES]), torch.tensor([1, 2, 3, 4, bad, bad, bad, bad]))
        levels.after_update(step, alone)
    learn(reference, torch.tensor([1.0, 2.0, 3.0, 4.0]), 4)
    assert levels.state().keys() == reference.state().keys()
    assert all(torch.equal(value, reference.state()[key]) for key, value in levels.state().items())


# --- whatever the split, and after a restart -------------------------------------------------------------------------


def test_the_state_is_the_same_on_any_split_of_the_global_batch() -> None:
    """To the bit where sums are exact, as they are for losses in eighths."""
    generator = torch.Generator().manual_seed(0)
    updates = [
        (torch.rand(12, generator=generator, dtype=torch.float64), torch.randint(1, 9, (12,), generator=generator) / 8)
        for _ in range(10)
    ]

    def after(ranks: Sequence[Sequence[slice]]) -> dict[str, Tensor]:
        processes = [AdaptiveLevels(SETTINGS, CPU) for _ in ranks]
        for step, (uniform_B, losses_B) in enumerate(updates):
            for levels, micro_batches in zip(processes, ranks, strict=True):
                for part in micro_batches:
                    levels.see(uniform_B[part], losses_B[part])
            total_2K = torch.stack([levels._seen_2K for levels in processes]).sum(dim=0)
            for levels in processes:
                levels.after_update(step, lambda _, total_2K=total_2K: total_2K)
        states = [levels.state() for levels in processes]
        assert all(torch.equal(state[key], states[0][key]) for state in states for key in state)
        return states[0]

    whole = after([[slice(0, 12)]])
    assert float(whole["count"].sum()) == 120
    for split in (
        [[slice(0, 4), slice(4, 12)]],
        [[slice(6, 12)], [slice(0, 6)]],
        [[slice(i, i + 1)] for i in range(12)],
    ):
        assert all(torch.equal(value, whole[key]) for key, value in after(split).items())


def test_a_restored_state_goes_on_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(1)

    def train(levels: AdaptiveLevels, first: int, last: int) -> None:
        for step in range(first, last):
            uniform_B = torch.rand(5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            drawn_B, _ = levels.remap(uniform_B)
            levels.see(drawn_B, (3 * drawn_B).exp().float())
            levels.after_update(step, alone)

    uninterrupted, interrupted = AdaptiveLevels(SETTINGS, CPU), AdaptiveLevels(SETTINGS, CPU)
    train(uninterrupted, 0, 60)
    train(interrupted, 0, 33)  # between two refreshes, so that probabilities and moments are not of one age
    resumed = AdaptiveLevels(SETTINGS, CPU)
    saved = {key: value.clone() for key, value in interrupted.state().items()}
    resumed.load(saved)
    train(resumed, 33, 60)
    assert all(torch.equal(value, resumed.state()[key]) for key, value in uninterrupted.state().items())
    assert all(torch.equal(value, saved[key]) for key, value in interrupted.state().items()), "loading shares nothing"
    assert float(uninterrupted.probabilities().max()) > 0.4
    uniform_B = torch.rand(9, generator=generator, dtype=torch.float64)
    assert torch.equal(resumed.remap(uniform_B)[0], uninterrupted.remap(uniform_B)[0])


def test_a_state_of_other_bins_is_refused() -> None:
    with pytest.raises(ValueError, match="the saved state has 5 bins, this density 4"):
        AdaptiveLevels(SETTINGS, CPU).load(adapted([1.0] * 5).state())


def test_what_a_rehearsal_saw_is_forgotten() -> None:
    levels = AdaptiveLevels(SETTINGS, CPU)
    levels.see(CENTRES, torch.full((4,), 100.0))
    levels.forget()
    learn(levels, torch.ones(4), 4)
    torch.testing.assert_close(levels.state()["moment"], torch.ones(4))
    assert levels.state()["count"].tolist() == [4.0] * 4


def test_plain_levels_remember_nothing() -> None:
    levels = PlainLevels()
    levels.see(CENTRES, torch.ones(4))
    levels.after_update(0, alone)
    levels.forget()
    levels.load({})
    assert levels.state() == {}


# --- and what it is good for -----------------------------------------------------------------------------------------


def variance_of_the_estimate(levels: AdaptiveLevels | None, second_moment_K: Tensor, mean_K: Tensor) -> float:
    """Return the exact variance of one sample's importance-weighted loss; None is the base density."""
    bins = len(mean_K)
    probability_K = torch.full((bins,), 1 / bins, dtype=torch.float64) if levels is None else levels.probabilities()
    return float((second_moment_K / (bins**2 * probability_K)).sum() - mean_K.mean() ** 2)


def test_the_estimate_varies_less_and_least_of_all_at_the_optimum() -> None:
    """Losses that fall by a factor 30 over the levels, with a spread: exact variances, once per density."""
    generator = torch.Generator().manual_seed(0)
    mean_K = torch.logspace(-1.5, 0, 8, dtype=torch.float64)
    second_moment_K = mean_K.square() * 1.3
    settings = AdaptiveSettings(bins=8, warmup_samples=1, decay=0.5, uniform_share=1e-6, every_steps=1)
    levels, centre_K = AdaptiveLevels(settings, CPU), (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    for step in range(5):
        levels.see(centre_K, second_moment_K.sqrt())
        levels.after_update(step, alone)
    best = variance_of_the_estimate(levels, second_moment_K, mean_K)
    assert best < 0.4 * variance_of_the_estimate(None, second_moment_K, mean_K)
    for _ in range(50):
        other_K = levels.probabilities() * torch.rand(8, generator=generator, dtype=torch.float64).add(0.5)
        assert variance_of_the_estimate(adapted(other_K.tolist()), second_moment_K, mean_K) > best


def test_with_random_losses_the_measured_variance_falls() -> None:
    """From the draw to the loss: own training of the moments on chi-squared losses, then the spread of batch means."""
    settings = AdaptiveSettings(bins=16, warmup_samples=20, decay=0.99, uniform_share=0.1, every_steps=10)
    levels = AdaptiveLevels(settings, CPU)
    generator = torch.Generator().manual_seed(0)

    def losses_at(drawn_B: Tensor) -> Tensor:
        chi_squared_B = torch.randn(len(drawn_B), 8, generator=generator, dtype=torch.float64).square().mean(dim=1)
        return (-4 * drawn_B).exp() * chi_squared_B

    for step in range(400):
        uniform_B = torch.rand(16, generator=generator, dtype=torch.float64)
        drawn_B, _ = levels.remap(uniform_B)
        levels.see(drawn_B, losses_at(drawn_B).float())
        levels.after_update(step, alone)
    estimates = {}
    for name, draw in (("adaptive", levels), ("base", PlainLevels())):
        uniform_B = torch.rand(200_000, generator=generator, dtype=torch.float64)
        drawn_B, importance_B = draw.remap(uniform_B)
        estimates[name] = importance_B * losses_at(drawn_B)
    expected = (1 - math.exp(-4)) / 4
    assert float(estimates["adaptive"].mean()) == pytest.approx(expected, rel=0.02)
    assert float(estimates["base"].mean()) == pytest.approx(expected, rel=0.02)
    assert float(estimates["adaptive"].var()) < 0.5 * float(estimates["base"].var())
