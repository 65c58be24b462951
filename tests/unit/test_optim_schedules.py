"""Learning-rate schedules as pure functions of the update's number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.optim.schedules import Constant, Cosine

STEPS = st.integers(0, 5000)


def test_the_first_update_moves_and_the_warm_up_rises_evenly() -> None:
    schedule = Constant(warmup_steps=4)
    assert [schedule.factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert Constant(0).factor(0) == 1.0
    assert Cosine(0, 100).factor(0) == 1.0


def test_cosine_peaks_after_the_warm_up_and_ends_at_its_final_fraction() -> None:
    schedule = Cosine(warmup_steps=10, total_steps=110, final_fraction=0.1)
    factors = [schedule.factor(step) for step in range(111)]
    assert factors.index(max(factors)) == 10
    assert max(factors) == 1.0
    assert factors[60] == pytest.approx(0.55), "half way"
    assert factors[110] == pytest.approx(0.1)
    assert schedule.factor(10_000) == pytest.approx(0.1), "a run that is prolonged does not rise again"


@given(warmup_steps=st.integers(0, 300), total_steps=st.integers(1, 3000), final=st.floats(0, 1), step=STEPS)
def test_cosine_is_bounded_and_falls_after_the_peak(
    warmup_steps: int, total_steps: int, final: float, step: int
) -> None:
    schedule = Cosine(warmup_steps, total_steps, final)
    factor = schedule.factor(step)
    assert 0 <= factor <= 1
    assert factor == schedule.factor(step), "pure"
    if step < warmup_steps:
        assert schedule.factor(step + 1) >= factor or step + 1 > total_steps
    else:
        assert schedule.factor(step + 1) <= factor + 1e-12
        assert factor >= final - 1e-12
