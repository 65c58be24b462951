"""The training step on a CUDA device: the CPU's numbers, the CPU's levels, and no waiting for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_training.doctor import TINY_UNET
from sdxl_training.memory.precision import autocast
from sdxl_training.objectives.adaptive import AdaptiveLevels, AdaptiveSettings
from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.noise import InputNoise
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.shapes import PseudoHuber
from sdxl_training.objectives.strata import StratifiedDraws
from sdxl_training.objectives.uncertainty import LogVariance
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


RAW_FLOW = {"mode": "raw", "zero_terminal_snr": True}
OBJECTIVES: dict[str, dict[str, object]] = {
    "flow_matching": RAW_FLOW,
    "v_prediction": {"zero_terminal_snr": True},
    "epsilon": {},
    "edm": {"sigma_data": 0.5, "label": "timestep", "zero_terminal_snr": False},
}


def plain(_device: torch.device) -> Objective:
    """Return flow matching with nothing beside it."""
    return make_objective("flow_matching", RAW_FLOW, LogNormal(0.0, 1.0), NoWeight())


def everything(device: torch.device) -> Objective:
    """Return an objective with every part that learns, remembers or looks at the batch; levels change after step 2."""
    settings = AdaptiveSettings(bins=2, warmup_samples=1, decay=0.9, uniform_share=0.2, every_steps=3)
    return make_objective(
        "flow_matching",
        RAW_FLOW,
        LogNormal(0.0, 1.0),
        NoWeight(),
        draws=StratifiedDraws(),
        level_draw=AdaptiveLevels(settings, device),
        shape=PseudoHuber(0.3, "snr"),
        input_noise=InputNoise(0.1),
        uncertainty=LogVariance(seed=1).to(device),
    )


def make_run(device: torch.device, precision: str, make: Callable[[torch.device], Objective] = plain) -> Run:
    """Return a tiny run whose weights do not depend on the device."""
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(**TINY_UNET).train().to(device)
    objective = make(device)
    parameters, beside = dict(unet.named_parameters()), dict(objective.uncertainty.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [*parameters.values()]},
        {"params": [*beside.values()], "peak": 1e-2},
    ]
    return Run(
        model=unet,
        objective=objective,
        update=Update(
            parameters=parameters,
            beside=beside,
            optimizer=make_adamw(groups, 1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01),
            learning_rate=1e-3,
            schedule=Constant(warmup_steps=0),
            loss_scale=DynamicLossScale(device, initial=1024.0) if precision == "fp16" else NoLossScale(),
            average=ExponentialAverage(parameters, 0.99),
            max_grad_norm=1.0,
        ),
        precision=autocast(precision, device),
        group=Group(rank=0, world_size=1, device=device),
        seed=SEED,
    )


def make_batch(device: torch.device) -> Batch:
    """Return random latents, noise and conditioning that do not depend on the device."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(device)

    conditioning = Conditioning(normal(7, 32), normal(32), torch.full((BATCH, 6), 64.0, device=device))
    return Batch(
        latents_BCHW=normal(4, 8, 8),
        noise_BCHW=normal(4, 8, 8),
        conditioning=conditioning,
        weight_B=torch.ones(BATCH, device=device),
        sample_ids=tuple(range(BATCH)),
        visits=(0,) * BATCH,
        step=0,
        slots=tuple(range(BATCH)),
        global_batch=BATCH,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [plain, everything])
def test_loss_and_gradient_are_the_cpus(precision: str, make: Callable[[torch.device], Objective]) -> None:
    expected = train_step(make_run(CPU, "fp32", make), 0, [make_batch(CPU)])
    actual = train_step(make_run(GPU, precision, make), 0, [make_batch(GPU)])
    assert actual.loss.device.type == GPU.type
    assert float(actual.loss) == pytest.approx(float(expected.loss), rel=TOLERANCE[precision])
    assert float(actual.grad_norm) == pytest.approx(float(expected.grad_norm), rel=TOLERANCE[precision])
    assert float(actual.skipped) == 0.0


def test_levels_are_the_cpus_bit_for_bit() -> None:
    objective, batch = everything(CPU), replace(make_batch(CPU), sample_ids=(3, 1, 2**63, 0), visits=(0, 7, 1, 2**40))
    drawn = objective.draw_levels(SEED, batch, (64, 128))
    moved = drawn.to(GPU)
    pairs = [(getattr(drawn.levels, name), getattr(moved.levels, name)) for name in ("a_B", "b_B", "label_B")] + [
        (getattr(drawn, name), getattr(moved, name)) for name in ("log_sigma_B", "weight_B", "importance_B")
    ]
    for value_B, moved_B in pairs:
        assert moved_B.device.type == GPU.type
        assert torch.equal(value_B, moved_B.cpu())


def test_input_noise_is_the_cpus_bit_for_bit() -> None:
    on_cpu, on_gpu = (
        InputNoise(1.0)(torch.zeros(BATCH, 4, 8, 16, device=device), SEED, (0,) * BATCH, range(BATCH))
        for device in (CPU, GPU)
    )
    assert on_gpu.device.type == GPU.type
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_what_is_learnt_and_remembered_is_the_cpus() -> None:
    runs = [make_run(device, "fp32", everything) for device in (CPU, GPU)]
    for step in range(4):
        for run in runs:
            device = run.group.device
            train_step(run, step, [replace(make_batch(device), visits=(step,) * BATCH, step=step)])
    (expected, actual), tolerance = ([run.objective for run in runs]), TOLERANCE["fp32"]
    for key, value in expected.level_draw.state().items():
        torch.testing.assert_close(actual.level_draw.state()[key].cpu(), value, rtol=10 * tolerance, atol=1e-6)
    (u_on_cpu,), (u_on_gpu,) = expected.uncertainty.parameters(), actual.uncertainty.parameters()
    torch.testing.assert_close(u_on_gpu.cpu(), u_on_cpu, rtol=10 * tolerance, atol=1e-3)


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


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_step_never_waits_for_the_device(objective: str, precision: str) -> None:
    run = make_run(GPU, precision)
    run.objective = make_objective(objective, OBJECTIVES[objective], LogNormal(0.0, 1.0), MinSNR())
    batch = make_batch(GPU)
    micro_batches = [batch, replace(batch, visits=(1,) * BATCH)]
    train_step(run, 0, micro_batches)  # the first update allocates optimizer state and loads kernels
    with waiting_for_the_device_is_an_error():
        stats = train_step(run, 1, micro_batches)
    assert stats.loss.isfinite()


def test_what_learns_and_remembers_makes_it_wait_at_its_interval_only() -> None:
    run, batch = make_run(GPU, "bf16", everything), make_batch(GPU)
    train_step(run, 0, [batch])
    with waiting_for_the_device_is_an_error():
        train_step(run, 1, [batch])
    with waiting_for_the_device_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        train_step(run, 2, [batch])  # probabilities are read back


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
