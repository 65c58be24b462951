"""The exponential moving average of the weights, and exchanging it with them."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from sdxl_training.optim.averaging import ExponentialAverage, NoAverage


def moving_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("a", "b")}


def move(parameters: dict[str, nn.Parameter], step: int) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter.add_(torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * step + i)))


def test_decay_ramps_as_published() -> None:
    """average <- d average + (1 - d) weights, d = min(decay, (1 + s) / (10 + s)): written out in float64."""
    parameters = moving_parameters()
    average = ExponentialAverage(parameters, decay=0.9)
    expected = parameters["a"].detach().double().clone()
    for step in range(120):
        move(parameters, step)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameters["a"].detach().double()
    assert torch.allclose(average.state()["a"].double(), expected, atol=1e-5)
    assert float((average.state()["a"] - parameters["a"]).detach().abs().max()) > 0.1


def test_trajectory_is_that_of_diffusers() -> None:
    """EMAModel copies the weights at s = 0 where ours keeps a tenth of the first; from s = 1 on they are one."""
    parameters = moving_parameters()
    ours = ExponentialAverage(parameters, decay=0.95)
    theirs = EMAModel(parameters.values(), decay=0.95)
    theirs.optimization_step = 1
    for step in range(1, 300):
        move(parameters, step)
        ours.update(step)
        theirs.step(parameters.values())
        assert theirs.cur_decay_value == min(0.95, (1 + step) / (10 + step))
    for average, shadow in zip(ours.state().values(), theirs.shadow_params, strict=True):
        assert torch.allclose(average, shadow, atol=1e-5)


def test_swapping_exchanges_and_restores_bit_for_bit() -> None:
    parameters = moving_parameters()
    average = ExponentialAverage(parameters, decay=0.9)
    move(parameters, 0)
    average.update(0)
    weights = {name: value.detach().clone() for name, value in parameters.items()}
    averages = {name: value.clone() for name, value in average.state().items()}
    identities = [id(value) for value in parameters.values()]
    with average.swapped_in():
        for name, value in parameters.items():
            assert torch.equal(value, averages[name])
            assert not torch.equal(value, weights[name])
    for name, value in parameters.items():
        assert torch.equal(value, weights[name])
        assert torch.equal(average.state()[name], averages[name])
    assert [id(value) for value in parameters.values()] == identities, "optimizer and wrapper hold these objects"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_swapping_restores_when_drawing_fails(error: type[BaseException]) -> None:
    parameters = moving_parameters()
    average = ExponentialAverage(parameters, decay=0.9)
    move(parameters, 0)
    weights = {name: value.detach().clone() for name, value in parameters.items()}
    averages = {name: value.clone() for name, value in average.state().items()}
    with pytest.raises(error), average.swapped_in():
        raise error
    assert all(torch.equal(value, weights[name]) for name, value in parameters.items())
    assert all(torch.equal(value, averages[name]) for name, value in average.state().items())


def test_average_of_half_precision_weights_is_float32() -> None:
    """bf16 would round a decay of 0.9999 away: 1 part in 10000 of the difference is below half a unit."""
    parameter = torch.ones(4, dtype=torch.bfloat16)
    average = ExponentialAverage({"w": parameter}, decay=0.9999)
    parameter.fill_(2.0)
    average.update(10**6)
    assert average.state()["w"].dtype == torch.float32
    assert average.state()["w"] == pytest.approx(torch.full((4,), 1.0001), abs=1e-6)


def test_a_loaded_average_goes_on_as_if_never_saved() -> None:
    parameters = moving_parameters()
    whole = ExponentialAverage(parameters, decay=0.9)
    for step in range(5):
        move(parameters, step)
        whole.update(step)
    resumed = ExponentialAverage(moving_parameters(seed=9), decay=0.9)
    saved = {name: value.clone() for name, value in whole.state().items()}
    resumed.load(saved)
    resumed._parameters = dict(parameters)
    for step in range(5, 10):
        move(parameters, step)
        whole.update(step)
        resumed.update(step)
    assert all(torch.equal(whole.state()[name], resumed.state()[name]) for name in parameters)


def test_loading_an_average_of_other_parameters_fails() -> None:
    with pytest.raises(KeyError):
        ExponentialAverage(moving_parameters(), 0.9).load({"a": torch.zeros(3, 4)})


def test_no_average_changes_and_saves_nothing() -> None:
    average = NoAverage()
    average.update(3)
    with average.swapped_in():
        pass
    average.load({})
    assert average.state() == {}
