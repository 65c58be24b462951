"""The learned log-variance: nothing at first, and at its optimum every level has unit expected loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_training.assemble.parts import build_update
from sdxl_training.config.schema import Config
from sdxl_training.objectives.uncertainty import LogVariance, NoUncertainty

CPU = torch.device("cpu")
LOG_SIGMA = torch.linspace(-4, 4, 81)
MakeUnet = Callable[[], UNet2DConditionModel]


def expected_losses(log_sigma_B: Tensor) -> Tensor:
    """Losses over two decades, falling with the noise, with a bend as those of v-prediction have."""
    return (-0.5 * log_sigma_B).exp() / (1 + (0.7 * log_sigma_B).exp()) + 0.05


def fit(losses_at: Callable[[int], Tensor], updates: int, learning_rate: float) -> LogVariance:
    """Train u on given losses, the learning rate falling to 0."""
    log_variance = LogVariance(seed=3)
    optimizer = torch.optim.AdamW(log_variance.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - update / updates)
        log_variance(losses_at(update), LOG_SIGMA).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return log_variance


@pytest.fixture(scope="module")
def fitted() -> LogVariance:
    """u, trained on the expected losses themselves."""
    return fit(lambda _: expected_losses(LOG_SIGMA), updates=1500, learning_rate=0.2)


def test_none_returns_the_losses() -> None:
    losses_B = torch.rand(5)
    assert NoUncertainty()(losses_B, torch.zeros(5)) is losses_B
    assert [*NoUncertainty().parameters()] == []
    assert NoUncertainty().state_dict() == {}


def test_at_the_start_losses_and_their_gradients_are_unchanged() -> None:
    losses_B = torch.rand(81, requires_grad=True)
    given = LogVariance(seed=3)(losses_B, LOG_SIGMA)
    assert torch.equal(given, losses_B)
    (gradient_B,) = torch.autograd.grad(given.sum(), losses_B)
    assert torch.equal(gradient_B, torch.ones(81))


def test_the_features_are_those_of_edm2() -> None:
    """sqrt(2) cos(2 pi (f c_noise + phi)) of c_noise = ln(sigma) / 4; one weight tells one feature."""
    log_variance, log_sigma = LogVariance(seed=3, channels=16), 1.7
    for feature in (0, 7):
        weight_F = torch.zeros(16)
        weight_F[feature] = 1
        log_variance.weight_F.data = weight_F
        frequency, phase = float(log_variance.frequency_F[feature]), float(log_variance.phase_F[feature])
        expected = math.sqrt(2) * math.cos(2 * math.pi * (frequency * log_sigma / 4 + phase)) / math.sqrt(16)
        assert log_variance.log_variance(torch.tensor([log_sigma])).item() == pytest.approx(expected, abs=1e-6)
    many = LogVariance(seed=3, channels=20000)
    assert float(many.frequency_F.mean()) == pytest.approx(0, abs=0.04)
    assert float(many.frequency_F.std()) == pytest.approx(1, abs=0.03)
    assert float(many.phase_F.min()) >= 0
    assert float(many.phase_F.mean()) == pytest.approx(0.5, abs=0.01)


def test_trained_it_is_the_logarithm_of_the_expected_loss(fitted: LogVariance) -> None:
    with torch.no_grad():
        found = fitted.log_variance(LOG_SIGMA)
        loss = fitted(expected_losses(LOG_SIGMA), LOG_SIGMA)
    expected = expected_losses(LOG_SIGMA).log()
    assert float(expected.max() - expected.min()) > 4
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(loss, 1 + expected, rtol=0, atol=0.05)


def test_losses_that_scatter_are_averaged() -> None:
    """ln of the mean and not mean of the ln, which for these losses (exponential) lies 0.577 lower."""
    generator = torch.Generator().manual_seed(0)

    def scattered(_update: int) -> Tensor:
        return expected_losses(LOG_SIGMA) * torch.empty(81).exponential_(generator=generator)

    found = fit(scattered, updates=3000, learning_rate=0.1).log_variance(LOG_SIGMA).detach()
    error = found - expected_losses(LOG_SIGMA).log()
    assert float(error.abs().mean()) < 0.1
    assert abs(float(error.mean())) < 0.05


def test_at_the_optimum_every_level_pulls_the_network_alike(fitted: LogVariance) -> None:
    """A network that scales all losses by theta: its gradient is 1 at each level, where it was 0.06 to 6."""
    theta_B = torch.ones(81, requires_grad=True)
    (plain_B,) = torch.autograd.grad((theta_B * expected_losses(LOG_SIGMA)).sum(), theta_B)
    (gradient_B,) = torch.autograd.grad(fitted(theta_B * expected_losses(LOG_SIGMA), LOG_SIGMA).sum(), theta_B)
    assert float(plain_B.max() / plain_B.min()) > 50
    torch.testing.assert_close(gradient_B, torch.ones(81), rtol=0, atol=0.05)


def test_levels_without_an_end_are_finite(fitted: LogVariance) -> None:
    edge = torch.tensor([-math.inf, -30.0, math.log(1e-4), math.log(1e4), 30.0, math.inf])
    u = fitted.log_variance(edge).tolist()
    assert all(map(math.isfinite, u))
    assert u[0] == pytest.approx(u[1], rel=1e-6)  # the lanes of a vector may round differently
    assert u[1] == pytest.approx(u[2], abs=1e-4)
    assert u[5] == pytest.approx(u[4], rel=1e-6)
    assert u[4] == pytest.approx(u[3], abs=1e-4)


def test_it_computes_in_float32_under_autocast(fitted: LogVariance) -> None:
    losses_B = expected_losses(LOG_SIGMA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fitted(losses_B, LOG_SIGMA)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, fitted(losses_B, LOG_SIGMA))


def test_its_features_belong_to_the_seed_and_are_saved(fitted: LogVariance) -> None:
    assert torch.equal(LogVariance(3).frequency_F, fitted.frequency_F)
    assert not torch.equal(LogVariance(4).frequency_F, fitted.frequency_F)
    other = LogVariance(4)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.log_variance(LOG_SIGMA), fitted.log_variance(LOG_SIGMA))
    assert [name for name, _ in other.named_parameters()] == ["weight_F"], "the features are not trained"


def test_its_parameters_are_beside_the_models(make_tiny_unet: MakeUnet) -> None:
    """With a learning rate of their own, without weight decay, in neither the norm nor the averaged weights."""
    training = {
        "loss_weight": {"type": "learned", "learning_rate": 0.25},
        "optimizer": {"type": "adamw", "weight_decay": 0.1},
    }
    config = Config.model_validate({"data": {"sources": [{"path": "pictures"}]}, "training": training})
    unet, log_variance = make_tiny_unet(), LogVariance(0)
    update = build_update(config, unet, log_variance, CPU)
    assert update.parameters.keys() == dict(unet.named_parameters()).keys() == update.average.state().keys()
    assert [*update.beside] == ["uncertainty.weight_F"]
    assert update.beside["uncertainty.weight_F"] is log_variance.weight_F
    update.set_learning_rate(config.training.schedule.warmup_steps)
    networks, own = update.optimizer.param_groups
    assert own["params"] == [log_variance.weight_F]
    assert (own["lr"], own["weight_decay"]) == (pytest.approx(0.25), 0.0)
    assert (networks["lr"], networks["weight_decay"]) == (config.training.optimizer.learning_rate, 0.1)


def test_without_it_there_is_one_group_and_nothing_beside(make_tiny_unet: MakeUnet) -> None:
    config = Config.model_validate({"data": {"sources": [{"path": "pictures"}]}})
    update = build_update(config, make_tiny_unet(), NoUncertainty(), CPU)
    assert len(update.optimizer.param_groups) == 1
    assert update.beside == {}
