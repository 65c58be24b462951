"""One optimizer update: equal to torch's own pieces, void on anything that is not finite; with parameters beside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sdxl_training.optim.averaging import ExponentialAverage, NoAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale
from sdxl_training.optim.schedules import Constant, Cosine
from sdxl_training.optim.update import OPTIMIZERS, Update, make_adamw, make_sgd

CPU = torch.device("cpu")
LEARNING_RATE = 1e-2


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (6, 5), "bias": (6,), "scale": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make_update(
    parameters: dict[str, nn.Parameter],
    loss_scale: LossScale | None = None,
    max_grad_norm: float | None = 1.0,
    schedule: Constant | Cosine | None = None,
) -> Update:
    optimizer = make_adamw(parameters.values(), LEARNING_RATE, (0.9, 0.99), 1e-8, 0.01)
    return Update(
        parameters,
        optimizer,
        LEARNING_RATE,
        schedule or Constant(0),
        loss_scale or NoLossScale(),
        NoAverage(),
        max_grad_norm,
    )


def set_gradients(parameters: dict[str, nn.Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def snapshot(update: Update) -> list[Tensor]:
    state = [value for parameter in update.parameters.values() for value in update.optimizer.state[parameter].values()]
    return [value.detach().clone() for value in (*update.parameters.values(), *state)]


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
def test_updates_equal_plain_torch(max_grad_norm: float | None) -> None:
    schedule = Cosine(3, 20, 0.1)
    ours, theirs = make_parameters(), make_parameters()
    update = make_update(ours, max_grad_norm=max_grad_norm, schedule=schedule)
    plain = torch.optim.AdamW(
        theirs.values(), lr=LEARNING_RATE, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, foreach=False, fused=False
    )
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm or float("inf"))
        plain.param_groups[0]["lr"] = LEARNING_RATE * schedule.factor(step)
        plain.step()
        our_norm, skipped = update(step)
        assert float(our_norm) == pytest.approx(float(norm), rel=1e-6)
        assert float(skipped) == 0.0
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6), name


def test_gradients_are_cleared() -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    make_update(parameters)(0)
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("before", [0, 3])
def test_a_gradient_that_is_not_finite_makes_the_update_void(
    bad: float, max_grad_norm: float | None, before: int
) -> None:
    parameters = make_parameters()
    update = make_update(parameters, max_grad_norm=max_grad_norm)
    for step in range(before):
        set_gradients(parameters, step)
        update(step)
    weights = [parameter.detach().clone() for parameter in parameters.values()]
    kept = snapshot(update)
    set_gradients(parameters, before)
    assert parameters["bias"].grad is not None
    parameters["bias"].grad[2] = bad
    norm, skipped = update(before)
    assert float(skipped) == 1.0
    assert not norm.isfinite()
    assert all(torch.equal(old, new) for old, new in zip(weights, parameters.values(), strict=True))
    if before:
        assert all(torch.equal(old, new) for old, new in zip(kept, snapshot(update), strict=True))
    assert all(parameter.grad is None for parameter in parameters.values())


def test_training_goes_on_after_a_void_update_as_if_it_had_not_been() -> None:
    with_void, without = make_parameters(), make_parameters()
    first, second = make_update(with_void), make_update(without)
    for step in range(6):
        if step == 3:
            set_gradients(with_void, step, float("nan"))
            assert float(first(step)[1]) == 1.0
        for parameters, update in ((with_void, first), (without, second)):
            set_gradients(parameters, step)
            update(step)
    assert all(torch.equal(one, other) for one, other in zip(snapshot(first), snapshot(second), strict=True))


def test_clipping_is_by_the_global_norm_and_keeps_the_direction() -> None:
    """One big tensor and one small: clipped tensor by tensor, the small one would not shrink with the big one."""
    big, small = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    parameters = {"big": big, "small": small}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0, fused=True)
    update = Update(parameters, optimizer, 1.0, Constant(0), NoLossScale(), NoAverage(), 1.0)
    big.grad, small.grad = torch.full((4,), 50.0), torch.full((4,), 0.1)
    norm, _ = update(0)
    assert float(norm) == pytest.approx((4 * 50**2 + 4 * 0.1**2) ** 0.5)
    moved = torch.cat([big, small]).detach()
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-5)
    assert float((big[0] / small[0]).detach()) == pytest.approx(500.0, rel=1e-5)


def test_a_norm_below_the_limit_is_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    update = Update({"w": parameter}, optimizer, 1.0, Constant(0), NoLossScale(), NoAverage(), 1.0)
    parameter.grad = torch.tensor([0.3, 0.4])
    update(0)
    assert torch.equal(parameter.detach(), -torch.tensor([0.3, 0.4]))


def test_frozen_parameters_are_left_out() -> None:
    parameters = make_parameters()
    update = make_update(parameters)
    set_gradients(parameters, 0)
    parameters["bias"].grad = None
    kept = parameters["bias"].detach().clone()
    update(0)
    assert torch.equal(parameters["bias"], kept)


def test_learning_rate_is_the_schedules() -> None:
    update = make_update(make_parameters(), schedule=Cosine(4, 20, 0.5))
    assert update.learning_rate_at(0) == pytest.approx(LEARNING_RATE / 5)
    assert update.learning_rate_at(4) == LEARNING_RATE
    assert update.learning_rate_at(20) == pytest.approx(LEARNING_RATE / 2)
    set_gradients(dict(update.parameters), 0)  # type: ignore[arg-type]
    update(4)
    assert update.optimizer.param_groups[0]["lr"] == LEARNING_RATE


def test_the_average_follows_the_new_weights() -> None:
    parameters = make_parameters()
    update = make_update(parameters)
    update.average = ExponentialAverage(parameters, decay=0.0)
    set_gradients(parameters, 0)
    update(0)
    assert all(torch.equal(update.average.state()[name], parameters[name]) for name in parameters)


@pytest.mark.parametrize("make", [NoLossScale, lambda: DynamicLossScale(CPU, initial=1024.0)], ids=["none", "dynamic"])
def test_the_loss_scale_is_taken_out_before_norm_and_clipping(make: Callable[[], LossScale]) -> None:
    parameters = make_parameters()
    loss_scale = make()
    update = make_update(parameters, loss_scale, max_grad_norm=None)
    loss = sum(parameter.square().sum() for parameter in parameters.values())
    assert isinstance(loss, Tensor)
    loss_scale.scale(loss).backward()
    expected = 2 * torch.cat([parameter.detach().flatten() for parameter in parameters.values()]).norm()
    norm, _ = update(0)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)


def test_table_of_optimizers() -> None:
    assert OPTIMIZERS["adamw"] is make_adamw


def test_sgd_with_momentum_is_torchs_own_also_after_a_void_first_update() -> None:
    ours, theirs = make_parameters(), make_parameters()
    optimizer = make_sgd(ours.values(), LEARNING_RATE, momentum=0.9, weight_decay=0.01)
    oracle = torch.optim.SGD(theirs.values(), LEARNING_RATE, momentum=0.9, weight_decay=0.01, foreach=False)
    update = Update(ours, optimizer, LEARNING_RATE, Constant(0), NoLossScale(), NoAverage(), None)
    for parameter in ours.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert update(0)[1] == 1
    for step in range(1, 4):
        for parameters in (ours, theirs):
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, 0.1 * step)
        update(step)
        oracle.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)


# --- parameters beside the model -------------------------------------------------------------------------------------


def make_update_with_beside(
    make: Callable[..., torch.optim.Optimizer],
    options: dict[str, object],
    loss_scale: LossScale | None = None,
    schedule: Constant | Cosine | None = None,
) -> tuple[dict[str, nn.Parameter], nn.Parameter, Update]:
    """Return the model's parameters, one beside them with a hundred times their learning rate, and the update."""
    parameters, beside = make_parameters(), nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    groups = [{"params": [*parameters.values()]}, {"params": [beside], "peak": 1.0, "weight_decay": 0.0}]
    optimizer = make(groups, LEARNING_RATE, **options)
    scale = loss_scale or NoLossScale()
    chosen = schedule or Constant(0)
    update = Update(parameters, optimizer, LEARNING_RATE, chosen, scale, NoAverage(), 1.0, {"beside": beside})
    return parameters, beside, update


ADAMW = (make_adamw, {"betas": (0.9, 0.99), "epsilon": 1e-8, "weight_decay": 0.5})
SGD = (make_sgd, {"momentum": 0.9, "weight_decay": 0.5})
both_optimizers = pytest.mark.parametrize(("make", "options"), [ADAMW, SGD], ids=["adamw", "sgd"])


@both_optimizers
def test_what_lies_beside_changes_nothing_for_the_model(
    make: Callable[..., torch.optim.Optimizer], options: dict[str, object]
) -> None:
    """However large its gradient, it is in no norm, so that the model's is clipped as if it were alone."""
    parameters, beside, update = make_update_with_beside(make, options)
    alone = make_parameters()
    reference = Update(
        alone,
        make(alone.values(), LEARNING_RATE, **options),
        LEARNING_RATE,
        Constant(0),
        NoLossScale(),
        NoAverage(),
        1.0,
    )
    for step in range(5):
        set_gradients(parameters, step, size=10.0)
        set_gradients(alone, step, size=10.0)
        beside.grad = torch.full((3,), 1e6)
        norm, skipped = update(step)
        assert torch.equal(norm, reference(step)[0])
        assert float(skipped) == 0.0
        assert beside.grad is None
    assert all(torch.equal(parameters[name], alone[name]) for name in alone)


def test_what_lies_beside_has_its_own_learning_rate_and_is_not_clipped() -> None:
    schedule = Cosine(4, 20, 0.5)
    parameters, beside, update = make_update_with_beside(
        make_sgd, {"momentum": 0.0, "weight_decay": 0.5}, None, schedule
    )
    expected = beside.detach().clone()
    for step in range(8):
        set_gradients(parameters, step)
        beside.grad = torch.tensor([3.0, 0.0, -1.0])
        update(step)
        expected -= 1.0 * schedule.factor(step) * torch.tensor([3.0, 0.0, -1.0])
        assert [group["lr"] for group in update.optimizer.param_groups] == [
            pytest.approx(LEARNING_RATE * schedule.factor(step)),
            pytest.approx(schedule.factor(step)),
        ]
        torch.testing.assert_close(beside.detach(), expected)


@both_optimizers
@pytest.mark.parametrize("before", [0, 3])
def test_a_void_update_leaves_what_lies_beside(
    make: Callable[..., torch.optim.Optimizer], options: dict[str, object], before: int
) -> None:
    """Its own gradient may be finite: it belongs to a loss that was not."""
    parameters, beside, update = make_update_with_beside(make, options)
    for step in range(before):
        set_gradients(parameters, step)
        beside.grad = torch.ones(3)
        update(step)
    kept = [beside.detach().clone(), *(value.clone() for value in update.optimizer.state[beside].values())]
    set_gradients(parameters, before, float("nan"))
    beside.grad = torch.ones(3)
    assert float(update(before)[1]) == 1.0
    assert torch.equal(beside, kept[0])
    if before:
        now = update.optimizer.state[beside].values()
        assert all(torch.equal(old, new) for old, new in zip(kept[1:], now, strict=True))
    assert beside.grad is None


def test_the_loss_scale_is_taken_out_of_what_lies_beside() -> None:
    loss_scale = DynamicLossScale(CPU, initial=1024.0)
    parameters, beside, update = make_update_with_beside(make_sgd, {"momentum": 0.0, "weight_decay": 0.0}, loss_scale)
    before = beside.detach().clone()
    loss = sum(parameter.square().sum() for parameter in (*parameters.values(), beside))
    assert isinstance(loss, Tensor)
    loss_scale.scale(loss).backward()
    update(0)
    torch.testing.assert_close(beside.detach(), before - 2 * before)
