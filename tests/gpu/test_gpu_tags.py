"""Tags on a CUDA device: their losses are noted without waiting for it, and probes measure what they do on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sdxl_training.memory.precision import autocast
from sdxl_training.records import Batch
from sdxl_training.training.probes import Probe, caption_gains, inner_products
from sdxl_training.training.step import Run, train_step
from sdxl_training.weighting.residuals import ResidualRule, TagResiduals
from sdxl_training.weighting.watch import TagWatch
from tests.gpu import test_gpu_step as steps
from tests.tags import lists_of

pytestmark = pytest.mark.gpu

# Of sums of logarithms of three losses, and of a difference of two; each has the relative error of a loss.
RESIDUAL_TOLERANCE = {"fp32": 0.01, "fp16": 0.02, "bf16": 0.05}
GAIN_TOLERANCE = {"fp32": 0.003, "fp16": 0.004, "bf16": 0.01}
COUNTS = ("seen", "number", "level_count", "squared_discounts")
# Of the largest inner product: central differences of losses that carry the format's roundings.
INNER_TOLERANCE = {"fp32": 0.03, "fp16": 0.05, "bf16": 0.15}


def make_watched_run(device: torch.device, precision: str) -> Run:
    """Return a run that notes the losses of four pictures' tags."""
    run = steps.make_run(device, precision)
    lists = lists_of([["a"], ["b"], ["a", "b"], []])
    run.watch = TagWatch(TagResiduals(lists, ResidualRule(half_life=8.0, shrinkage=1.0)), device)
    return run


def tagged_batch(device: torch.device, visit: int = 0) -> Batch:
    """Return a batch of four pictures, the last one with its caption dropped."""
    return replace(steps.make_batch(device), tagged=(0, 1, 2, -1), visits=(visit,) * steps.BATCH, step=visit)


def probe_of(device: torch.device, precision: str) -> tuple[Probe, list[nn.Parameter]]:
    """Return a probe of the tiny U-Net and the parameters whose gradients are compared."""
    run = steps.make_run(device, precision)
    named = run.model.named_parameters()
    last = [parameter for name, parameter in named if name.startswith(("up_blocks.1", "conv_out"))]
    return Probe(run.model, run.objective, autocast(precision, device), steps.SEED), last


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_of_tags_are_the_cpus(precision: str) -> None:
    runs = [make_watched_run(steps.CPU, "fp32"), make_watched_run(steps.GPU, precision)]
    for visit in range(6):
        for run in runs:
            train_step(run, visit, [tagged_batch(run.group.device, visit)])
    expected, actual = (run.watch.state() for run in runs)
    for key, value in expected.items():
        assert actual[key].device == steps.CPU
        tolerance = 0.0 if key in COUNTS else RESIDUAL_TOLERANCE[precision]
        torch.testing.assert_close(actual[key], value, rtol=0.0, atol=tolerance)
        assert float(value.abs().max()) > 2 * tolerance, "zeros would not pass"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_noting_losses_never_waits_for_the_device(precision: str) -> None:
    run = make_watched_run(steps.GPU, precision)
    train_step(run, 0, [tagged_batch(steps.GPU)])
    with steps.waiting_for_the_device_is_an_error():
        train_step(run, 1, [tagged_batch(steps.GPU, 1)])
    assert float(run.watch.state()["level_count"].sum()) == 2 * 3, "all but the picture without a caption"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gains_of_captions_are_the_cpus(precision: str) -> None:
    gains, levels = [], []
    for device, its_precision in ((steps.CPU, "fp32"), (steps.GPU, precision)):
        batch = tagged_batch(device)
        told = batch.conditioning  # enlarged, so that captions make a difference
        told = replace(told, text_BLD=10 * told.text_BLD, pooled_BP=10 * told.pooled_BP)
        null = replace(told, text_BLD=torch.zeros_like(told.text_BLD), pooled_BP=torch.zeros_like(told.pooled_BP))
        batch = replace(batch, conditioning=told)
        gain_B, level_B = caption_gains(probe_of(device, its_precision)[0], batch, null)
        gains.append(gain_B.cpu())
        levels.append(level_B.cpu())
    torch.testing.assert_close(gains[1], gains[0], rtol=0, atol=GAIN_TOLERANCE[precision])
    assert float(gains[0].abs().max()) > 3 * GAIN_TOLERANCE[precision], "zeros would not pass"
    assert torch.equal(levels[1], levels[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_inner_products_are_the_cpus_and_leave_the_model_alone(precision: str) -> None:
    found = []
    for device, its_precision in ((steps.CPU, "fp32"), (steps.GPU, precision)):
        probe, parameters = probe_of(device, its_precision)
        before = [parameter.detach().clone() for parameter in probe.model.parameters()]
        batch, meta = tagged_batch(device), tagged_batch(device, 7)
        found.append(inner_products(probe, parameters, batch, meta, lambda value: value).cpu())
        assert all(torch.equal(old, new) for old, new in zip(before, probe.model.parameters(), strict=True))
    largest = float(found[0].abs().max())
    assert largest > 0
    assert float((found[1] - found[0]).abs().max()) < INNER_TOLERANCE[precision] * largest
