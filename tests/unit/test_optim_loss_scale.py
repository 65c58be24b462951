"""Dynamic loss scaling: halve on overflow, double after a while, and a float16 run that survives an overflow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_training.optim.averaging import NoAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, NoLossScale
from sdxl_training.optim.schedules import Constant
from sdxl_training.optim.update import Update, make_adamw

CPU = torch.device("cpu")
GOOD, VOID = torch.tensor(0.0), torch.tensor(1.0)


def factor_of(loss_scale: DynamicLossScale) -> float:
    return float(loss_scale.scale(torch.tensor(1.0)))


def test_halves_at_once_and_doubles_after_the_interval() -> None:
    loss_scale = DynamicLossScale(CPU, initial=64.0, growth_interval=3)
    factors = []
    for skipped in (VOID, GOOD, GOOD, GOOD, GOOD, GOOD, VOID, GOOD, GOOD, GOOD):
        loss_scale.update(skipped)
        factors.append(factor_of(loss_scale))
    assert factors == [32, 32, 32, 64, 64, 64, 32, 32, 32, 64], "a void update starts the count again"


def test_factor_stays_within_bounds() -> None:
    loss_scale = DynamicLossScale(CPU, initial=1.0, growth_interval=1)
    for _ in range(60):
        loss_scale.update(VOID)
    assert factor_of(loss_scale) == 2.0**-14
    for _ in range(60):
        loss_scale.update(GOOD)
    assert factor_of(loss_scale) == 2.0**24


def test_saved_state_goes_on_as_if_never_saved() -> None:
    whole, resumed = (DynamicLossScale(CPU, initial=64.0, growth_interval=4) for _ in range(2))
    for skipped in (VOID, GOOD, GOOD):
        whole.update(skipped)
    saved = {name: value.clone() for name, value in whole.state().items()}
    resumed.load(saved)
    for _ in range(5):
        whole.update(GOOD)
        resumed.update(GOOD)
        assert factor_of(whole) == factor_of(resumed)
    assert factor_of(whole) == 64.0
    assert float(saved["scale"]) == 32.0, "loading must not tie the run to the checkpoint's tensors"


def test_unscale_leaves_infinities_to_be_found() -> None:
    gradients = [torch.tensor([1024.0, float("inf")])]
    DynamicLossScale(CPU, initial=1024.0).unscale(gradients)
    assert gradients[0][0] == 1.0
    assert gradients[0][1].isinf()


def test_twin_does_nothing() -> None:
    loss, gradient = torch.tensor(3.0), torch.tensor([2.0])
    twin = NoLossScale()
    twin.unscale([gradient])
    twin.update(VOID)
    twin.load({})
    assert twin.scale(loss) is loss
    assert gradient == 2.0
    assert twin.state() == {}


@pytest.mark.parametrize("initial", [2.0**20, 1.0])
def test_float16_run_recovers_from_overflow_and_learns(initial: float) -> None:
    """At 2^20 the first float16 gradients overflow: those updates are void, the factor falls, and training goes on."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    parameters = dict(model.named_parameters())
    loss_scale = DynamicLossScale(CPU, initial, growth_interval=1000)
    optimizer = make_adamw(parameters.values(), 0.05, (0.9, 0.99), 1e-8, 0.0)
    update = Update(parameters, optimizer, 0.05, Constant(0), loss_scale, NoAverage(), 1.0)
    inputs = torch.randn(64, 4)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 1
    void, losses = 0, []
    for step in range(200):
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(inputs)
        loss = (output.float() - targets).square().mean()
        loss_scale.scale(loss).backward()
        _, skipped = update(step)
        void += int(skipped)
        losses.append(loss.item())
        assert all(parameter.isfinite().all() for parameter in parameters.values())
    assert (void > 0) is (initial > 1)
    assert losses[-1] < 0.02 * losses[0]
    assert len(set(losses[: void + 1])) == 1, "void updates leave the weights as they were"
