"""Noise and noise levels are functions of (seed, visit, sample id), in float32, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sdxl_training.objectives import objective as objective_module
from sdxl_training.objectives.densities import DENSITIES, LogitNormal, Uniform
from sdxl_training.objectives.objective import OBJECTIVES, Objective, make_objective, noise_like
from sdxl_training.objectives.weights import WEIGHTS, NoWeight
from sdxl_training.rng import Stream, torch_generator

OPTIONS = {"epsilon": {}, "v_prediction": {"zero_terminal_snr": True}, "flow_matching": {}}


def objective_called(name: str) -> Objective:
    density = LogitNormal() if name == "flow_matching" else Uniform()
    return make_objective(name, OPTIONS[name], density, NoWeight())


def test_tables_name_every_choice() -> None:
    assert set(OBJECTIVES) == set(OPTIONS)
    assert set(DENSITIES) == {"uniform", "logit_normal"}
    assert set(WEIGHTS) == {"none", "min_snr"}


def draws(name: str, seed: int, visits: Sequence[int], sample_ids: Sequence[int]) -> list[tuple[float, ...]]:
    levels = objective_called(name).draw_levels(seed, visits, sample_ids)
    noise = noise_like(torch.empty(len(visits), 4, 3, 2), seed, visits, sample_ids)
    return [
        (float(levels.a_B[i]), float(levels.b_B[i]), float(levels.label_B[i]), *noise[i].flatten().tolist())
        for i in range(len(visits))
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_draws_the_same_in_every_batch(name: str) -> None:
    together = draws(name, 7, [0, 0, 2], [11, 12, 13])
    assert draws(name, 7, [2, 0, 0], [13, 12, 11]) == together[::-1]
    assert draws(name, 7, [0], [12]) == together[1:2]
    assert draws(name, 7, [2, 5], [13, 99])[0] == together[2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_seed_visit_and_sample_each_change_the_draw(name: str) -> None:
    reference = draws(name, 7, [1], [11])
    for other in (draws(name, 8, [1], [11]), draws(name, 7, [2], [11]), draws(name, 7, [1], [12])):
        assert other[0][2] != reference[0][2], "level"
        assert other[0][3:] != reference[0][3:], "noise"


def test_visit_and_sample_are_not_interchangeable() -> None:
    assert draws("flow_matching", 0, [3], [5]) != draws("flow_matching", 0, [5], [3])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_levels_are_float32_even_under_autocast(name: str, precision: torch.dtype) -> None:
    count = 2000
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        levels = objective_called(name).draw_levels(0, [0] * count, range(count))
    assert {levels.a_B.dtype, levels.b_B.dtype, levels.label_B.dtype} == {torch.float32}
    distinct = len(levels.label_B.unique())
    # 2000 uniform draws of 1000 timesteps hit 865 of them; bf16 holds at most 256 + 128 whole numbers below 1000.
    assert distinct > (1990 if name == "flow_matching" else 800)


def test_noise_is_standard_normal_in_float32() -> None:
    noise = noise_like(torch.empty(64, 4, 16, 16, dtype=torch.bfloat16), 0, [0] * 64, range(64))
    assert noise.dtype == torch.float32
    assert noise.shape == (64, 4, 16, 16)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def test_noise_and_level_come_from_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A level drawn from the noise's generator would be a function of the noise, and readable from the input."""
    used: list[tuple[int, ...]] = []

    def note_stream(seed: int, stream: Stream, *coordinates: int) -> torch.Generator:
        used.append((seed, stream, *coordinates))
        return torch_generator(seed, stream, *coordinates)

    monkeypatch.setattr(objective_module, "torch_generator", note_stream)
    objective_called("flow_matching").draw_levels(3, [1], [5])
    noise_like(torch.empty(1, 4, 2, 2), 3, [1], [5])
    assert used == [(3, Stream.LEVEL, 1, 5), (3, Stream.NOISE, 1, 5)]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="zip"):
        objective_called("epsilon").draw_levels(0, [0, 1], [5])
    with pytest.raises(ValueError, match="zip"):
        noise_like(torch.empty(2, 1, 1, 1), 0, [0, 1], [5])
