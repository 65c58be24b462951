"""What an update tells of its samples: the same table to the last bit on all ranks, however the batch was cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sdxl_training.training.step import Run, train_step
from sdxl_training.weighting import watch as watch_module
from sdxl_training.weighting.residuals import LEVELS, ResidualRule, TagResiduals
from sdxl_training.weighting.watch import NO_WATCH, TagWatch, level_bins
from tests.tags import lists_of
from tests.unit.test_step import CPU, MakeBatch, MakeUnet, make_run

LISTS = lists_of([["a"], ["a", "b"], ["b", "c"], [], ["c"]])
UPDATES, SAMPLES = 12, 8
CUTS = {  # slots of each micro-batch, for each rank
    "one": [[range(8)]],
    "accumulated": [[range(4), range(4, 8)]],
    "single": [[range(i, i + 1) for i in range(8)]],
    "two ranks": [[range(4)], [range(4, 8)]],
    "two ranks, accumulated": [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]],
    "unequal": [[range(1), range(3, 8)], [range(1, 3)]],
}


def new_watch() -> TagWatch:
    return TagWatch(TagResiduals(LISTS, ResidualRule(half_life=5.0)), CPU)


def alone(table: Tensor) -> Tensor:
    return table


def updates(seed: int = 0) -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """Return pictures, draws and losses of some updates; dropped captions and losses that are no numbers included."""
    generator = np.random.default_rng(seed)
    told = []
    for _ in range(UPDATES):
        picture_G = generator.integers(-1, len(LISTS), SAMPLES)
        loss_G = torch.from_numpy(np.exp(generator.standard_normal(SAMPLES)).astype(np.float32))
        loss_G[generator.random(SAMPLES) < 0.1] = float(generator.choice([np.nan, np.inf, 0.0]))
        told.append((picture_G, torch.from_numpy(generator.random(SAMPLES)), loss_G))
    return told


@pytest.fixture
def see(make_batch: MakeBatch) -> Callable[..., None]:
    def note(watch: TagWatch, update: tuple[np.ndarray, Tensor, Tensor], slots: range) -> None:
        picture_G, uniform_G, loss_G = update
        own = slice(slots.start, slots.stop)
        batch = make_batch(list(slots), slots=list(slots), global_batch=SAMPLES)
        watch.see(replace(batch, tagged=tuple(picture_G[own].tolist())), uniform_G[own], loss_G[own])

    return note


def fed_directly() -> TagResiduals:
    residuals = TagResiduals(LISTS, ResidualRule(half_life=5.0))
    for picture_G, uniform_G, loss_G in updates():
        residuals.see(picture_G, level_bins(uniform_G).numpy(), loss_G.double().numpy())
    return residuals


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_however_it_is_cut_all_ranks_know_what_residuals_fed_directly_know(cut, see):
    ranks = [new_watch() for _ in cut]
    for update in updates():
        shares: list[Tensor] = []
        for micro_batches in cut:
            teller = new_watch()
            for slots in micro_batches:
                see(teller, update, slots)
            teller.after_update(lambda table, to=shares: to.append(table) or table)
        for rank, micro_batches in zip(ranks, cut, strict=True):
            for slots in micro_batches:
                see(rank, update, slots)
            rank.after_update(lambda _, told=shares: torch.stack(told).sum(0))
    expected = fed_directly().state()
    assert expected["seen"].min() > 5
    for rank in ranks:
        for name, value in rank.state().items():
            np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)


def test_the_cut_of_a_real_update(make_tiny_unet: MakeUnet, make_batch: MakeBatch):
    """Unweighted losses of the step itself: the weights of samples, which follow from them, do not come back in."""

    def noted(cut: list[range], weights: list[float]) -> dict[str, Tensor]:
        run: Run = make_run(make_tiny_unet())
        run.watch = watch = new_watch()
        for step in range(3):
            micro_batches = []
            for slots in cut:
                own = [weights[slot] for slot in slots]
                batch = make_batch(
                    [10 * step + slot for slot in slots], own, step=step, slots=list(slots), global_batch=4
                )
                micro_batches.append(replace(batch, tagged=tuple([0, 1, 2, -1][slot] for slot in slots)))
            run.update.learning_rate = 0.0
            train_step(run, step, micro_batches)
        return watch.state()

    whole = noted([range(4)], [1.0] * 4)
    assert whole["level_count"].sum() == 9
    cut = noted([range(2), range(2, 4)], [0.1, 5.0, 0.5, 2.0])
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-6)


def test_what_a_rehearsal_saw_is_forgotten(see):
    watch, expected = new_watch(), new_watch()
    first, second = updates()[:2]
    see(watch, first, range(8))
    watch.forget()
    watch.after_update(alone)
    for each in (watch, expected):
        see(each, second, range(8))
        each.after_update(alone)
    for name, value in expected.state().items():
        assert torch.equal(watch.state()[name], value)


def test_updates_are_fetched_together(see, monkeypatch):
    """Not one by one, which would wait for the device; and never so many that they fill it."""
    monkeypatch.setattr(watch_module, "UPDATES_KEPT", 3)
    watch, fetched = new_watch(), []
    residuals = watch.residuals()
    monkeypatch.setattr(residuals, "see", lambda *update: fetched.append(update))
    for number, update in enumerate(updates(), 1):
        see(watch, update, range(8))
        watch.after_update(alone)
        assert len(fetched) == number // 3 * 3
    watch.residuals()
    assert len(fetched) == UPDATES


def test_when_they_are_fetched_does_not_matter(see):
    eager, lazy = new_watch(), new_watch()
    for update in updates():
        for watch in (eager, lazy):
            see(watch, update, range(8))
            watch.after_update(alone)
        eager.residuals()
    for name, value in lazy.state().items():
        assert torch.equal(eager.state()[name], value)


def test_a_saved_state_goes_on(see):
    one, other = new_watch(), new_watch()
    told = updates()
    for update in told[:6]:
        see(one, update, range(8))
        one.after_update(alone)
    saved = one.state()
    for update in told[6:]:
        see(one, update, range(8))
        one.after_update(alone)
    other.load(saved)
    for update in told[6:]:
        see(other, update, range(8))
        other.after_update(alone)
    for name, value in one.state().items():
        assert torch.equal(other.state()[name], value)
        assert not np.shares_memory(value.numpy(), one.residuals().state()[name]), "training goes on while it is saved"


def test_levels_have_bins_of_equal_probability():
    uniform = torch.linspace(0, 1, 32 * LEVELS + 1, dtype=torch.float64)
    counts = torch.bincount(level_bins(uniform[:-1]), minlength=LEVELS)
    assert counts.tolist() == [32] * LEVELS
    assert level_bins(torch.tensor([1.0, 1.0 - 1e-17, 0.0], dtype=torch.float64)).tolist() == [LEVELS - 1] * 2 + [0]


def test_without_tags_nothing_is_noted(make_batch: MakeBatch):
    NO_WATCH.see(make_batch([1]), torch.zeros(1), torch.zeros(1))
    NO_WATCH.after_update(alone)
    NO_WATCH.forget()
    assert NO_WATCH.state() == {}
