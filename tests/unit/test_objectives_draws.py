"""Noise levels are functions of (seed, visit, sample id), and of the sample's stratum where asked; in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.densities import LogNormal, Uniform
from sdxl_training.objectives.objective import OBJECTIVES, DrawnLevels, Objective, make_objective
from sdxl_training.objectives.shifts import FixedShift, PerBucketShift
from sdxl_training.objectives.strata import Draws, IndependentDraws, StratifiedDraws
from sdxl_training.objectives.weights import NoWeight
from sdxl_training.records import Batch
from sdxl_training.rng import Stream, uniform

MakeBatch = Callable[..., Batch]
SIZE_HW = (64, 64)
OPTIONS: dict[str, dict[str, object]] = {
    "epsilon": {},
    "v_prediction": {"zero_terminal_snr": True},
    "x0": {"zero_terminal_snr": False},
    "flow_matching": {"mode": "raw", "zero_terminal_snr": True},
    "edm": {"sigma_data": 0.5, "label": "timestep", "zero_terminal_snr": False},
}
every_objective = pytest.mark.parametrize("name", OPTIONS)
both_draws = pytest.mark.parametrize("draws", [IndependentDraws(), StratifiedDraws()], ids=["own", "stratified"])


def objective_called(name: str, draws: Draws | None = None) -> Objective:
    density = LogNormal(0.0, 1.0) if name == "flow_matching" else Uniform()
    return make_objective(name, OPTIONS[name], density, NoWeight(), draws=draws or IndependentDraws())


def rows(drawn: DrawnLevels) -> list[tuple[float, ...]]:
    levels = drawn.levels
    columns = (levels.a_B, levels.b_B, levels.label_B, drawn.uniform_B, drawn.log_sigma_B, drawn.weight_B)
    return [*zip(*(column.tolist() for column in columns), strict=True)]


def of_samples(batch: Batch, count: int) -> Batch:
    """Return `batch` as if it had `count` samples; of its tensors nothing is read."""
    return replace(
        batch, sample_ids=tuple(range(count)), visits=(0,) * count, slots=tuple(range(count)), global_batch=count
    )


def test_every_objective_is_tested() -> None:
    assert set(OBJECTIVES) == set(OPTIONS)


@every_objective
@both_draws
def test_a_sample_draws_the_same_in_every_batch(make_batch: MakeBatch, name: str, draws: Draws) -> None:
    objective = objective_called(name, draws)

    def drawn(ids: Sequence[int], visits: Sequence[int], slots: Sequence[int]) -> list[tuple[float, ...]]:
        return rows(objective.draw_levels(7, make_batch(ids, visits=visits, slots=slots, global_batch=4), SIZE_HW))

    together = drawn([11, 12, 13], [0, 0, 2], [0, 1, 2])
    assert drawn([13, 12, 11], [2, 0, 0], [2, 1, 0]) == together[::-1]
    assert drawn([12], [0], [1]) == together[1:2]
    assert drawn([13, 99], [2, 5], [2, 3])[0] == together[2]


@every_objective
@both_draws
def test_seed_visit_and_sample_each_change_the_level(make_batch: MakeBatch, name: str, draws: Draws) -> None:
    objective = objective_called(name, draws)
    keys = [(7, 1, 11), (8, 1, 11), (7, 2, 11), (7, 1, 12), (7, 11, 1)]
    drawn = [objective.draw_levels(seed, make_batch([i], visits=[v], global_batch=4), SIZE_HW) for seed, v, i in keys]
    assert len({float(one.uniform_B) for one in drawn}) == len(keys)


def test_each_sample_has_the_number_of_its_own_stream(make_batch: MakeBatch) -> None:
    """A level drawn from the noise's generator would be a function of the noise, and readable from the input."""
    uniform_B = IndependentDraws().uniform(3, make_batch([5, 6], visits=[1, 0]))
    assert uniform_B.dtype == torch.float64
    assert uniform_B.tolist() == [uniform(3, Stream.LEVEL, 1, 5), uniform(3, Stream.LEVEL, 0, 6)]
    assert len(set(Stream)) == len(Stream.__members__), "no two streams share a number"


@every_objective
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_levels_are_float32_even_under_autocast(make_batch: MakeBatch, name: str, precision: torch.dtype) -> None:
    batch = of_samples(make_batch([0]), 2000)
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        drawn = objective_called(name).draw_levels(0, batch, SIZE_HW)
    levels = drawn.levels
    given = (levels.a_B, levels.b_B, levels.label_B, drawn.log_sigma_B, drawn.weight_B, drawn.importance_B)
    assert {value.dtype for value in given} == {torch.float32}
    assert {value.shape for value in given} == {(2000,)}
    # 2000 uniform draws of 1000 timesteps hit 865 of them; bf16 holds at most 256 + 128 whole numbers below 1000.
    assert len(levels.label_B.unique()) > (1990 if name in ("flow_matching", "edm") else 800)
    assert torch.equal(drawn.importance_B, torch.ones(2000))


@every_objective
def test_moving_to_a_device_changes_no_bit(make_batch: MakeBatch, name: str) -> None:
    drawn = objective_called(name).draw_levels(7, make_batch([1, 2, 3]), SIZE_HW)
    assert rows(drawn.to(torch.device("cpu"))) == rows(drawn)


def test_the_shift_moves_ln_sigma_and_stops_at_the_paths_ends(make_batch: MakeBatch) -> None:
    batch = of_samples(make_batch([0]), 500)
    plain = objective_called("flow_matching")
    shifted = replace(plain, shift=FixedShift(3.0))
    expected = plain.draw_levels(7, batch, SIZE_HW).log_sigma_B + math.log(3)
    torch.testing.assert_close(shifted.draw_levels(7, batch, SIZE_HW).log_sigma_B, expected)
    per_bucket = replace(plain, shift=PerBucketShift(1.0, 1024))
    for size_hw in ((64, 64), (1024, 512)):
        moved = per_bucket.draw_levels(7, batch, size_hw).log_sigma_B - expected + math.log(3)
        alpha = math.sqrt(size_hw[0] * size_hw[1]) / 1024
        torch.testing.assert_close(moved, torch.full_like(moved, math.log(alpha)), rtol=1e-5, atol=1e-5)
    end = plain.path.log_sigma_range[1]
    far = replace(plain, shift=FixedShift(1e30)).draw_levels(7, batch, SIZE_HW)
    assert torch.equal(far.log_sigma_B, torch.full_like(far.log_sigma_B, end))


def test_lengths_must_agree(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match="zip"):
        objective_called("epsilon").draw_levels(0, replace(make_batch([5]), visits=(0, 1)), SIZE_HW)


# --- strata ----------------------------------------------------------------------------------------------------------


def stratified(batch: Batch, global_batch: int, step: int, seed: int = 0) -> Tensor:
    """Return the draws of a whole global batch, whose samples are new at each step."""
    ids = range(step * global_batch, (step + 1) * global_batch)
    whole = replace(of_samples(batch, global_batch), sample_ids=tuple(ids), step=step)
    return StratifiedDraws().uniform(seed, whole)


@pytest.mark.parametrize("global_batch", [1, 2, 7, 32])
def test_every_stratum_is_drawn_from_once(make_batch: MakeBatch, global_batch: int) -> None:
    batch = make_batch([0])
    for step in range(20):
        uniform_G = stratified(batch, global_batch, step)
        assert uniform_G.dtype == torch.float64
        assert sorted((uniform_G * global_batch).floor().int().tolist()) == list(range(global_batch))


def test_a_sample_keeps_its_own_number_within_its_stratum(make_batch: MakeBatch) -> None:
    batch = make_batch([3, 4, 5, 6], visits=[0, 1, 0, 2], step=9)
    own, moved = IndependentDraws().uniform(2, batch), StratifiedDraws().uniform(2, batch)
    torch.testing.assert_close((4 * moved).frac(), own)
    assert torch.equal(StratifiedDraws().uniform(2, replace(make_batch([3]), step=5)), own[:1])


def test_which_slot_has_which_stratum_is_drawn_anew_each_step(make_batch: MakeBatch) -> None:
    batch = make_batch([0])
    orders = [tuple((stratified(batch, 8, step) * 8).int().tolist()) for step in range(20)]
    assert len(set(orders)) == 20
    assert tuple((stratified(batch, 8, 0, seed=1) * 8).int().tolist()) != orders[0]


def test_the_density_of_one_slot_stays_uniform(make_batch: MakeBatch) -> None:
    """Kolmogorov's distance of 2000 steps, for the first and the last slot of the batch."""
    batch, count = make_batch([0]), 2000
    uniform_NG = torch.stack([stratified(batch, 6, step) for step in range(count)])
    for slot in (0, 5):
        ordered_N = uniform_NG[:, slot].sort().values
        steps_N = torch.arange(1, count + 1) / count
        assert float((ordered_N - steps_N).abs().max()) < 1.95 / math.sqrt(count)  # one chance in a thousand


def test_the_mean_over_a_batch_varies_less(make_batch: MakeBatch) -> None:
    """Of a smooth f by the factor E[f'^2] / (12 G^2 Var f): with f = u^2, G = 8 that is 1 / 51."""
    batch, count, global_batch = make_batch([0]), 600, 8
    means = torch.stack([stratified(batch, global_batch, step).square().mean() for step in range(count)])
    own = torch.rand(count, global_batch, generator=torch.Generator().manual_seed(0)).square().mean(dim=1)
    assert float(means.mean()) == pytest.approx(1 / 3, abs=0.002)
    expected = (4 / 3) / (12 * global_batch**2) / (1 / 5 - 1 / 9)
    assert float(means.var() / own.double().var()) == pytest.approx(expected, rel=0.4)
