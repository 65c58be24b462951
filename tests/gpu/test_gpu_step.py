"""The training step on a CUDA device: the CPU's numbers, the CPU's noise, and no waiting for the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_training.doctor import TINY_UNET
from sdxl_training.memory.precision import autocast
from sdxl_training.objectives.densities import LogitNormal
from sdxl_training.objectives.objective import make_objective, noise_like
from sdxl_training.objectives.weights import MinSNR, NoWeight
from sdxl_training.optim.averaging import ExponentialAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, NoLossScale
from sdxl_training.optim.schedules import Constant
from sdxl_training.optim.update import Update, make_adamw
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Conditioning
from sdxl_training.training.step import Run, train_step

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SEED, BATCH = 5, 4
# Relative error of a loss and a gradient norm against float32 on the CPU: some roundings of the format
# (TF32's for fp32, since cuDNN convolves with it by default), averaged over thousands of terms.
TOLERANCE = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 3e-2}


def make_run(device: torch.device, precision: str) -> Run:
    """Return a tiny run whose weights do not depend on the device."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**TINY_UNET).train().to(device)
    parameters = dict(unet.named_parameters())
    return Run(
        model=unet,
        objective=make_objective("flow_matching", {}, LogitNormal(), NoWeight()),
        update=Update(
            parameters=parameters,
            optimizer=make_adamw(parameters.values(), 1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01),
            learning_rate=1e-3,
            schedule=Constant(warmup_steps=0),
            loss_scale=DynamicLossScale(device, initial=1024.0) if precision == "fp16" else NoLossScale(),
            average=ExponentialAverage(parameters, 0.99),
            max_grad_norm=1.0,
        ),
        precision=autocast(precision, device),
        group=Group(rank=0, world_size=1, device=device),
        seed=SEED,
        samples_per_step=BATCH,
    )


def make_batch(device: torch.device) -> Batch:
    """Return random latents and conditioning that do not depend on the device."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(device)

    conditioning = Conditioning(normal(7, 32), normal(32), torch.full((BATCH, 6), 64.0, device=device))
    ids = tuple(range(BATCH))
    return Batch(normal(4, 8, 8), conditioning, torch.ones(BATCH, device=device), ids, (0,) * BATCH)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_and_gradient_are_the_cpus(precision: str) -> None:
    expected = train_step(make_run(CPU, "fp32"), 0, [make_batch(CPU)])
    actual = train_step(make_run(GPU, precision), 0, [make_batch(GPU)])
    assert actual.loss.device.type == GPU.type
    assert float(actual.loss) == pytest.approx(float(expected.loss), rel=TOLERANCE[precision])
    assert float(actual.grad_norm) == pytest.approx(float(expected.grad_norm), rel=TOLERANCE[precision])
    assert float(actual.skipped) == 0.0


def test_noise_and_levels_are_the_cpus_bit_for_bit() -> None:
    objective, ids, visits = make_run(CPU, "fp32").objective, (3, 1, 2**63), (0, 7, 1)
    latents_BCHW = torch.empty(3, 4, 8, 16)
    on_cpu, on_gpu = (noise_like(latents_BCHW.to(device), SEED, visits, ids) for device in (CPU, GPU))
    assert on_gpu.device.type == GPU.type
    assert torch.equal(on_cpu, on_gpu.cpu())
    levels = objective.draw_levels(SEED, visits, ids)
    for value_B, moved_B in zip(
        (levels.a_B, levels.b_B, levels.label_B),
        (levels.to(GPU).a_B, levels.to(GPU).b_B, levels.to(GPU).label_B),
        strict=True,
    ):
        assert torch.equal(value_B, moved_B.cpu())


@contextmanager
def waiting_for_the_device_is_an_error() -> Iterator[None]:
    """Raise RuntimeError from any operation after which the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_catches_a_synchronisation() -> None:
    value = torch.ones((), device=GPU)
    with waiting_for_the_device_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        float(value)


@pytest.mark.parametrize("objective", ["flow_matching", "v_prediction", "epsilon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_step_never_waits_for_the_device(objective: str, precision: str) -> None:
    options = {"zero_terminal_snr": True} if objective == "v_prediction" else {}
    run = make_run(GPU, precision)
    run.objective = make_objective(objective, options, LogitNormal(), MinSNR())
    batch = make_batch(GPU)
    micro_batches = [batch, replace(batch, visits=(1,) * BATCH)]
    train_step(run, 0, micro_batches)  # the first update allocates optimizer state and loads kernels
    with waiting_for_the_device_is_an_error():
        stats = train_step(run, 1, micro_batches)
    assert stats.loss.isfinite()


def test_a_non_finite_loss_voids_the_update_on_the_device() -> None:
    run, batch = make_run(GPU, "bf16"), make_batch(GPU)
    train_step(run, 0, [batch])
    before = [parameter.detach().clone() for parameter in run.update.parameters.values()]
    stats = train_step(run, 1, [replace(batch, weight_B=torch.full((BATCH,), float("nan"), device=GPU))])
    assert float(stats.skipped) == 1.0
    assert all(torch.equal(old, new) for old, new in zip(before, run.update.parameters.values(), strict=True))


def test_training_on_the_gpu_lowers_the_loss() -> None:
    run, batch = make_run(GPU, "bf16"), make_batch(GPU)
    losses = torch.stack([train_step(run, step, [batch]).loss for step in range(30)])
    assert losses[-1] < 0.9 * losses[0]
