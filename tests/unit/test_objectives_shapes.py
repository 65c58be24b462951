"""Loss shapes: the squared error where errors are small, linear beyond, and torch's own functions up to a factor."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from sdxl_training.config.schema import Training
from sdxl_training.objectives.paths import FlowPath, Levels, VariancePreservingPath
from sdxl_training.objectives.shapes import (
    SHAPES,
    THRESHOLDS,
    Absolute,
    LossShape,
    MeanSquared,
    PseudoHuber,
    SmoothL1,
)

HALF = torch.tensor(0.5)
ROBUST = {"pseudo_huber": PseudoHuber, "smooth_l1": SmoothL1}
every_robust = pytest.mark.parametrize("shape", ROBUST.values(), ids=ROBUST)
errors = st.floats(-50, 50, allow_subnormal=False).map(lambda error: error if abs(error) > 1e-100 else 0.0)
thresholds = st.floats(1e-3, 10)


def loss_of(shape: LossShape, error: Tensor) -> Tensor:
    """Return the loss at a level of no importance."""
    return shape(error, HALF.to(error), HALF.to(error))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def levels_of(path: FlowPath | VariancePreservingPath) -> Levels:
    """Return 50 levels evenly over the path's clock, both ends included."""
    return path.at(path.clock(torch.linspace(0, 1, 50, dtype=torch.float64)))


def test_table_names_every_choice() -> None:
    sections = get_args(Training.model_fields["loss_shape"].annotation)
    assert set(SHAPES) == {section.model_fields["type"].default for section in sections}
    schedules = {get_args(section.model_fields["schedule"].annotation) for section in sections[2:]}
    assert schedules == {tuple(THRESHOLDS)}


@given(error=errors, threshold=thresholds)
def test_parity_with_torch(error: float, threshold: float) -> None:
    """Ours is 2 c times smooth_l1_loss(beta = c) and twice huber_loss(delta = c): so small errors count error^2."""
    value, zero = double(error), double(0.0)
    assert torch.equal(loss_of(MeanSquared(), value), functional.mse_loss(value, zero, reduction="none"))
    assert torch.equal(loss_of(Absolute(), value), functional.l1_loss(value, zero, reduction="none"))
    ours = loss_of(SmoothL1(threshold, "constant"), value)
    smooth = 2 * threshold * functional.smooth_l1_loss(value, zero, reduction="none", beta=threshold)
    huber = 2 * functional.huber_loss(value, zero, reduction="none", delta=threshold)
    # torch's threshold is double, ours float32: they part by its rounding
    torch.testing.assert_close(ours, smooth, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours, huber, rtol=1e-6, atol=1e-9)


@given(error=errors, threshold=thresholds)
def test_pseudo_huber_is_the_formula_of_sd_scripts(error: float, threshold: float) -> None:
    ours = float(loss_of(PseudoHuber(threshold, "constant"), double(error)))
    theirs = 2 * threshold * (math.sqrt(error**2 + threshold**2) - threshold)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-12)


@every_robust
@pytest.mark.parametrize("threshold", [0.01, 0.1, 1.0])
def test_limits_of_small_and_large_errors(shape: type, threshold: float) -> None:
    loss = shape(threshold, "constant")
    small, large = double(1e-4 * threshold), double(1e4 * threshold)
    torch.testing.assert_close(loss_of(loss, small), small.square(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss_of(loss, large), 2 * threshold * large, rtol=1e-3, atol=0)
    wide = shape(1e6, "constant")
    torch.testing.assert_close(loss_of(wide, double(3.0)), double(9.0))


@every_robust
@given(error=errors, threshold=thresholds)
def test_a_robust_loss_is_even_and_never_above_the_squared_error(shape: type, error: float, threshold: float) -> None:
    loss = shape(threshold, "constant")
    value = loss_of(loss, double(error))
    assert torch.equal(value, loss_of(loss, double(-error)))
    assert 0 <= float(value) <= error**2 * (1 + 1e-6)


def test_small_errors_do_not_cancel_in_float32() -> None:
    """Taken literally, sqrt(error^2 + c^2) - c is 0 for them, and nothing is learnt any more."""
    error = torch.tensor([1e-4, 1e-5, 1e-6])
    literal = 2 * ((error.square() + 1).sqrt() - 1)
    assert float(literal[1]) == 0
    torch.testing.assert_close(loss_of(PseudoHuber(1.0, "constant"), error), error.square(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "shape",
    [MeanSquared(), Absolute(), *(make(0.1, schedule) for make in ROBUST.values() for schedule in THRESHOLDS)],
)
def test_gradients_are_finite_and_zero_at_zero(shape: LossShape) -> None:
    for path in (FlowPath(), VariancePreservingPath(zero_terminal_snr=True)):
        levels = levels_of(path)
        error = torch.zeros(50, requires_grad=True)
        shape(error, levels.a_B, levels.b_B).sum().backward()
        assert error.grad is not None
        assert torch.equal(error.grad, torch.zeros(50))


@every_robust
@given(error=errors, threshold=thresholds)
def test_the_gradient_is_twice_the_error_bounded_by_twice_the_threshold(
    shape: type, error: float, threshold: float
) -> None:
    value = double(error).requires_grad_()
    loss_of(shape(threshold, "constant"), value).sum().backward()
    assert value.grad is not None
    gradient = float(value.grad)
    if shape is SmoothL1:
        expected = 2 * math.copysign(min(abs(error), threshold), error)
    else:
        expected = 2 * error / math.sqrt(1 + (error / threshold) ** 2)
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert abs(gradient) <= 2 * threshold * (1 + 1e-6)


@pytest.mark.parametrize("schedule", THRESHOLDS)
def test_thresholds_at_both_ends(schedule: str) -> None:
    """1 where it is clean (but for `constant`), the threshold itself at pure noise, falling between."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    clean, noisy = THRESHOLDS[schedule](0.2, a, b).tolist()
    assert clean == pytest.approx(0.2 if schedule == "constant" else 1.0)
    assert noisy == pytest.approx(0.2)
    levels = levels_of(FlowPath())
    between = THRESHOLDS[schedule](0.2, levels.a_B, levels.b_B)
    assert bool((between.diff() <= 1e-7).all())


def test_thresholds_are_those_of_sd_scripts_at_its_sigmas() -> None:
    """huber_schedule snr: (1 - c) / (1 + sigma)^2 + c. exponential: exp(-alpha t), c = exp(-alpha), over flow time."""
    levels = levels_of(VariancePreservingPath(zero_terminal_snr=False))
    sigma_B = levels.b_B / levels.a_B
    torch.testing.assert_close(THRESHOLDS["snr"](0.1, levels.a_B, levels.b_B), 0.9 / (1 + sigma_B).square() + 0.1)
    flow = levels_of(FlowPath())
    expected = torch.exp(math.log(0.1) * flow.label_B / 1000)
    torch.testing.assert_close(THRESHOLDS["exponential"](0.1, flow.a_B, flow.b_B), expected)


@every_robust
@pytest.mark.parametrize("schedule", THRESHOLDS)
def test_each_sample_has_its_own_threshold(shape: type, schedule: str) -> None:
    levels = levels_of(FlowPath())
    a, b = levels.a_B[:, None, None, None], levels.b_B[:, None, None, None]
    error = torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    together = shape(0.1, schedule)(error, a, b)
    assert together.shape == error.shape
    for i in (0, 20, 49):
        torch.testing.assert_close(together[i], shape(0.1, schedule)(error[i], a[i], b[i]))
