"""Probes beside the training: their numbers are those of exact gradients, and they leave the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sdxl_training.memory.precision import autocast
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.uncertainty import LogVariance
from sdxl_training.records import Batch
from sdxl_training.training import probes
from sdxl_training.training.probes import Probe, caption_gains, directional_derivatives, inner_products, products
from sdxl_training.training.step import loss_per_sample
from sdxl_training.weighting.watch import level_bins
from tests.unit.test_step import CPU, OBJECTIVES, SEED, SIZE_HW, MakeBatch, MakeUnet, every_objective


def alone(value: Tensor) -> Tensor:
    return value


def dot(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> Tensor:
    pairs = zip(one, other, strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs if a is not None and b is not None]).sum()


def exact_products(
    parameters: list[nn.Parameter], losses: Callable[[], Tensor], meta_loss: Callable[[], Tensor]
) -> Tensor:
    """Return <grad l_i, grad L_meta>, each gradient by autograd."""
    meta = torch.autograd.grad(meta_loss(), parameters, allow_unused=True)
    own = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses()]
    return torch.stack([dot(gradient, meta) for gradient in own])


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Check that what happens within changes neither parameters nor gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = [(parameter.detach().clone(), parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, (value, needs_grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == needs_grad
        assert torch.equal(parameter.grad, torch.full_like(parameter, 0.5))


# --- a linear model, whose losses are squares: central differences are exact ------------------------------------------


class Linear:
    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.model = nn.Linear(5, 3).to(dtype)
        self.unused = nn.Parameter(normal(2))
        with torch.no_grad():
            self.model.weight.copy_(normal(3, 5))
            self.model.bias.copy_(normal(3))
        self.data, self.meta = ((normal(count, 5), normal(count, 3)) for count in (7, 4))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), self.unused]

    def losses(self) -> Tensor:
        return (self.model(self.data[0]) - self.data[1]).square().mean(1)

    def meta_loss(self) -> Tensor:
        return (self.model(self.meta[0]) - self.meta[1]).square().mean()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_two_passes_give_the_inner_products_of_exact_gradients(dtype, tolerance, seed):
    problem = Linear(dtype, seed)
    exact = exact_products(problem.parameters, problem.losses, problem.meta_loss)
    with left_alone(problem.model):
        found = products(problem.parameters, problem.losses, problem.meta_loss, alone)
    assert not found.requires_grad
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def test_directional_derivatives_are_the_gradients_shares():
    problem = Linear(torch.float64)
    direction = [torch.ones_like(parameter) * 0.3 for parameter in problem.parameters]
    exact = torch.stack(
        [
            dot(torch.autograd.grad(loss, problem.parameters, retain_graph=True, allow_unused=True), tuple(direction))
            for loss in problem.losses()
        ]
    )
    for step in (1e-3, 1.0, 100.0):
        found = directional_derivatives(problem.parameters, direction, problem.losses, step)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_parameters_are_put_back_whatever_happens():
    problem = Linear(torch.float32)

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with left_alone(problem.model), pytest.raises(RuntimeError, match="out of memory"):
        products(problem.parameters, fail, problem.meta_loss, alone)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf])
def test_where_the_meta_gradient_says_nothing_there_are_zeros(factor):
    problem = Linear(torch.float32)
    with left_alone(problem.model):
        found = products(problem.parameters, problem.losses, lambda: problem.meta_loss() * factor, alone)
    assert torch.equal(found, torch.zeros(7))
    assert not found.requires_grad


def test_the_scale_of_the_backward_pass_changes_no_bit(monkeypatch):
    problem = Linear(torch.float32)
    scaled = products(problem.parameters, problem.losses, problem.meta_loss, alone)
    monkeypatch.setattr(probes, "SCALE", 1.0)
    assert torch.equal(scaled, products(problem.parameters, problem.losses, problem.meta_loss, alone))


def test_gradients_that_fp16_would_flush_to_zero_are_measured():
    """The gradient of this loss is about 1e-8 where it passes through fp16, whose smallest number is 6e-8."""
    problem, small = Linear(torch.float32), 1e-8

    def meta_loss() -> Tensor:
        return (problem.model(problem.meta[0]).half().float() - problem.meta[1]).square().mean() * small

    assert not any(part.any() for part in torch.autograd.grad(meta_loss(), list(problem.model.parameters())))
    found = products(problem.parameters, problem.losses, meta_loss, alone)
    exact = exact_products(problem.parameters, problem.losses, problem.meta_loss)
    torch.testing.assert_close(found / small, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_ranks_share_one_meta_gradient():
    """Each has half of the meta batch; the direction is that of the whole, and each measures its own samples."""
    problem = Linear(torch.float64)
    whole = products(problem.parameters, problem.losses, problem.meta_loss, alone)
    halves = [tuple(part[own] for part in problem.meta) for own in (slice(0, 2), slice(2, 4))]
    shares: list[list[Tensor]] = []
    for problem.meta in halves:
        told: list[Tensor] = []
        products(
            problem.parameters, problem.losses, problem.meta_loss, lambda value, to=told: to.append(value) or value
        )
        shares.append(told)
    means = [(one + other) / 2 for one, other in zip(*shares, strict=True)]
    for problem.meta in halves:
        remaining = iter(means)
        found = products(problem.parameters, problem.losses, problem.meta_loss, lambda _, of=remaining: next(of))
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)  # the direction is kept in float32


# --- an SDXL in small ------------------------------------------------------------------------------------------------


def probe_of(unet: nn.Module, objective: Objective, precision: str = "fp32") -> Probe:
    return Probe(unet, objective, autocast(precision, CPU), SEED)


def last_parameters(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in unet.named_parameters() if name.startswith(("up_blocks.1", "conv_out"))]


@every_objective
@pytest.mark.parametrize(
    ("precision", "change", "error"), [("fp32", 0.02, 0.02), ("fp32", 0.004, 1e-3), ("bf16", 0.02, 0.1)]
)
def test_inner_products_of_a_unet(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, monkeypatch, name, precision, change, error
):
    """The error shrinks with the square of how far the parameters are moved; bf16 passes measure it, too."""
    monkeypatch.setattr(probes, "CHANGE", change)
    unet, batch, meta = make_tiny_unet(), make_batch(range(8)), make_batch(range(100, 104))
    plain, parameters = probe_of(unet, OBJECTIVES[name]), last_parameters(unet)
    exact = exact_products(parameters, lambda: plain.losses(batch), lambda: plain.losses(meta).mean())
    with left_alone(unet):
        found = inner_products(probe_of(unet, OBJECTIVES[name], precision), parameters, batch, meta, alone)
    assert float((found - exact).abs().max()) < error * float(exact.abs().max())


def test_what_has_no_weight_is_no_part_of_the_meta_loss(make_tiny_unet: MakeUnet, make_batch: MakeBatch):
    """As pictures without a finite latent, whose losses are of noise alone."""
    unet, batch, meta = make_tiny_unet(), make_batch(range(4)), make_batch(range(100, 104))
    parameters, probe = last_parameters(unet), probe_of(unet, OBJECTIVES["v_prediction"])
    usable = meta.weight_B.clone()
    usable[2] = 0
    found = inner_products(probe, parameters, batch, replace(meta, weight_B=usable), alone)
    exact = exact_products(parameters, lambda: probe.losses(batch), lambda: probe.losses(meta)[[0, 1, 3]].sum() / 4)
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("learned", [False, True])
def test_a_probe_weighs_noise_levels_as_training_does(make_tiny_unet: MakeUnet, make_batch: MakeBatch, learned):
    """So that its gradients are those of the samples in training, but for the weights of pictures."""
    uncertainty = LogVariance(SEED)
    with torch.no_grad():
        uncertainty.weight_F.normal_(generator=torch.Generator().manual_seed(1))
    objective = OBJECTIVES["v_prediction"]
    objective = replace(objective, uncertainty=uncertainty) if learned else objective
    unet, batch = make_tiny_unet(), make_batch([1, 2, 3], [0.1, 5.0, 2.0])
    parameters = list(unet.parameters())
    of_probe = torch.autograd.grad(probe_of(unet, objective).losses(batch).sum(), parameters, allow_unused=True)
    of_training = torch.autograd.grad(
        loss_per_sample(unet, objective, batch, SEED).sum(), parameters, allow_unused=True
    )
    assert sum(gradient is not None for gradient in of_training) > 20
    for one, other in zip(of_probe, of_training, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def without(batch: Batch) -> Batch:
    """Return the batch without captions."""
    told = batch.conditioning
    nothing = replace(told, text_BLD=torch.zeros_like(told.text_BLD), pooled_BP=torch.zeros_like(told.pooled_BP))
    return replace(batch, conditioning=nothing)


@every_objective
def test_gains_of_captions(make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str):
    """The same picture, noise and level with and without: the weight of the level cancels."""
    unet, batch, objective = make_tiny_unet(), make_batch(range(4), visits=[2**40 + 3] * 4), OBJECTIVES[name]
    with left_alone(unet):
        gain_B, bin_B = caption_gains(probe_of(unet, objective), batch, without(batch).conditioning)
    with torch.no_grad():
        told, untold = (loss_per_sample(unet, objective, each, SEED) for each in (batch, without(batch)))
    torch.testing.assert_close(gain_B, untold.log() - told.log(), rtol=1e-3, atol=1e-5)
    assert float(gain_B.abs().min()) > 0, "captions make a difference in this model"
    assert torch.equal(bin_B, level_bins(objective.draw_levels(SEED, batch, SIZE_HW).uniform_B))
    assert not gain_B.requires_grad
    none, _ = caption_gains(probe_of(unet, objective), without(batch), without(batch).conditioning)
    assert torch.equal(none, torch.zeros(4)), "a caption that is none helps exactly nothing"
