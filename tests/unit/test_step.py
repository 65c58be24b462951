"""The update: one gradient however the global batch is cut, weights that stay with their samples, labels in float32,
one noise in input and target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxl_training.memory.precision import autocast
from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.densities import LogNormal, Uniform
from sdxl_training.objectives.noise import InputNoise, Noise
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.weights import MinSNR, NoWeight
from sdxl_training.optim.averaging import NoAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale
from sdxl_training.optim.schedules import Constant
from sdxl_training.optim.update import Update, make_adamw
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch
from sdxl_training.training.step import Run, add_gradients, loss_per_sample, train_step

CPU = torch.device("cpu")
MakeUnet = Callable[[], UNet2DConditionModel]
MakeBatch = Callable[..., Batch]
RAW_FLOW = {"mode": "raw", "zero_terminal_snr": True}
OBJECTIVES: dict[str, Objective] = {
    "epsilon": make_objective("epsilon", {}, Uniform(), MinSNR(5.0)),
    "v_prediction": make_objective("v_prediction", {"zero_terminal_snr": True}, Uniform(), MinSNR(5.0, "plus_one")),
    "flow_matching": make_objective("flow_matching", RAW_FLOW, LogNormal(0.0, 1.0), NoWeight()),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
SEED = 7
SIZE_HW = (64, 64)


def make_run(
    model: nn.Module,
    name: str = "flow_matching",
    precision: str = "fp32",
    world_size: int = 1,
    loss_scale: LossScale | None = None,
    objective: Objective | None = None,
) -> Run:
    objective = objective or OBJECTIVES[name]
    parameters, beside = dict(model.named_parameters()), dict(objective.uncertainty.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [*parameters.values()]},
        {"params": [*beside.values()], "peak": 1e-2},
    ]
    optimizer = make_adamw(groups, 1e-3, (0.9, 0.99), 1e-8, 0.0)
    scale = loss_scale or NoLossScale()
    update = Update(parameters, optimizer, 1e-3, Constant(0), scale, NoAverage(), 1.0, beside)
    group = Group(0, world_size, CPU)
    return Run(model, objective, update, autocast(precision, CPU), group, SEED)


def gradients_of(run: Run, micro_batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    run.model.zero_grad()
    loss = add_gradients(run, micro_batches)
    return loss.item(), {
        name: value.grad.clone() for name, value in run.model.named_parameters() if value.grad is not None
    }


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    assert scale > 0
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) < tolerance * scale, name


@every_objective
def test_gradients_do_not_depend_on_how_the_batch_is_cut(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str
) -> None:
    run = make_run(make_tiny_unet(), name)
    whole_loss, whole = gradients_of(run, [make_batch([1, 2, 3, 4], [0.5, 2.0, 1.0, 0.5])])
    ones = [make_batch([i + 1], [weight], global_batch=4) for i, weight in enumerate((0.5, 2.0, 1.0, 0.5))]
    halves = [make_batch(ids, weights, global_batch=4) for ids, weights in (([4, 1], [0.5, 0.5]), ([3, 2], [1.0, 2.0]))]
    for cut in (ones, ones[::-1], halves):
        loss, gradients = gradients_of(run, cut)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert_close(whole, gradients, 2e-6)


def test_unequal_micro_batches_count_by_their_samples(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    """Divided by the number of micro-batches, the lone sample would weigh as much as the other three together."""
    run = make_run(make_tiny_unet())
    _, whole = gradients_of(run, [make_batch([1, 2, 3, 4])])
    _, cut = gradients_of(run, [make_batch([1, 2, 3], global_batch=4), make_batch([4], global_batch=4)])
    assert_close(whole, cut, 2e-6)


def test_each_batch_divides_by_its_own_size(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    """Buckets may have global batches of their own: one run, and each update is the mean over its samples."""
    run = make_run(make_tiny_unet())
    for ids in ([1, 2, 3, 4, 5, 6], [7, 8], [9]):
        loss, gradients = gradients_of(run, [make_batch([i], global_batch=len(ids)) for i in ids])
        alone = [gradients_of(run, [make_batch([i])]) for i in ids]
        assert loss == pytest.approx(sum(one for one, _ in alone) / len(ids), rel=1e-5)
        assert_close({name: sum(one[name] for _, one in alone) / len(ids) for name in gradients}, gradients, 2e-6)


@every_objective
def test_loss_is_the_weighted_mean_by_hand(make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str) -> None:
    unet, weights = make_tiny_unet(), [0.25, 2.0, 0.75]
    run = make_run(unet, name)
    loss, _ = gradients_of(run, [make_batch([5, 6, 7], weights)])
    expected = 0.0
    for sample_id, weight in zip([5, 6, 7], weights, strict=True):
        batch = make_batch([sample_id])
        levels = run.objective.draw_levels(SEED, batch, SIZE_HW).levels
        a, b = float(levels.a_B), float(levels.b_B)
        x0, eps = batch.latents_BCHW, batch.noise_BCHW
        target = {"epsilon": eps, "v_prediction": a * eps - b * x0, "flow_matching": eps - x0}[name]
        snr = (a / b) ** 2
        level_weight = {
            "epsilon": min(snr, 5) / snr if snr else 0,
            "v_prediction": min(snr + 1, 5) / (snr + 1),
            "flow_matching": 1.0,
        }[name]
        with torch.no_grad():
            output = predict(unet, a * x0 + b * eps, levels.label_B, batch.conditioning)
        expected += weight * level_weight * float((output - target).square().mean()) / 3
    assert loss == pytest.approx(expected, rel=1e-4)


def test_weights_belong_to_samples(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    run = make_run(make_tiny_unet())
    _, first = gradients_of(run, [make_batch([1, 2], [1.0, 0.0])])
    _, second = gradients_of(run, [make_batch([1, 2], [0.0, 1.0])])
    _, mixed = gradients_of(run, [make_batch([1, 2], [3.0, 0.5])])
    assert_close(mixed, {name: 3.0 * first[name] + 0.5 * second[name] for name in first}, 1e-5)
    assert any(not torch.allclose(first[name], second[name]) for name in first)


def test_losses_do_not_depend_on_the_company(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    unet, objective = make_tiny_unet(), OBJECTIVES["v_prediction"]
    with torch.no_grad():
        together = loss_per_sample(unet, objective, make_batch([1, 2, 3]), SEED)
        reversed_ = loss_per_sample(unet, objective, make_batch([3, 2, 1]), SEED)
        alone = loss_per_sample(unet, objective, make_batch([2]), SEED)
    assert torch.allclose(together.flip(0), reversed_, rtol=1e-5)
    assert torch.allclose(together[1:2], alone, rtol=1e-5)


def test_every_visit_draws_anew(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    unet, batch = make_tiny_unet(), make_batch([1])
    with torch.no_grad():
        losses = [
            loss_per_sample(unet, OBJECTIVES["flow_matching"], replace(batch, visits=(visit,)), SEED).item()
            for visit in range(4)  # the noise stays, so it is the level that changes
        ]
    assert len(set(losses)) == 4


def seen_input(unet: UNet2DConditionModel, objective: Objective, batch: Batch) -> Tensor:
    inputs: list[Tensor] = []
    handle = unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].clone()))
    with torch.no_grad():
        loss_per_sample(unet, objective, batch, SEED)
    handle.remove()
    return inputs[0]


@every_objective
@pytest.mark.parametrize("noise", [Noise(), Noise(offset=0.5), Noise(pyramid=0.6)])
def test_the_input_holds_the_very_noise_of_the_target(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str, noise: Noise
) -> None:
    """Offset noise that were in the input but not in the target would have to be guessed."""
    objective, batch = OBJECTIVES[name], make_batch([1, 2, 3], noise=noise)
    levels = objective.draw_levels(SEED, batch, SIZE_HW).levels
    a, b = levels.a_B[:, None, None, None], levels.b_B[:, None, None, None]
    input_BCHW = seen_input(make_tiny_unet(), objective, batch)
    torch.testing.assert_close(input_BCHW - a * batch.latents_BCHW, b * batch.noise_BCHW, rtol=1e-5, atol=1e-6)


def test_input_perturbation_is_in_the_input_and_not_in_the_target(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch
) -> None:
    batch, unet = make_batch([1, 2, 3]), make_tiny_unet()
    objective = replace(OBJECTIVES["flow_matching"], input_noise=InputNoise(0.5))
    levels = objective.draw_levels(SEED, batch, SIZE_HW).levels
    a, b = levels.a_B[:, None, None, None], levels.b_B[:, None, None, None]
    input_BCHW = seen_input(unet, objective, batch)
    xi_BCHW = (input_BCHW - a * batch.latents_BCHW - b * batch.noise_BCHW) / (0.5 * b)
    assert abs(float(xi_BCHW.mean())) < 5 / xi_BCHW.numel() ** 0.5
    assert abs(float(xi_BCHW.std()) - 1) < 5 / (2 * xi_BCHW.numel()) ** 0.5
    with torch.no_grad():
        output = predict(unet, input_BCHW, levels.label_B, batch.conditioning)
        losses = loss_per_sample(unet, objective, batch, SEED)
    expected = (output - (batch.noise_BCHW - batch.latents_BCHW)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_gives_the_same_gradients(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    plain, checkpointed = make_tiny_unet().train(), make_tiny_unet().train()
    checkpointed.enable_gradient_checkpointing()
    batches = [make_batch([1, 2], global_batch=4), make_batch([3, 4], global_batch=4)]
    loss, gradients = gradients_of(make_run(plain), batches)
    other_loss, other_gradients = gradients_of(make_run(checkpointed), batches)
    assert loss == other_loss
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@every_objective
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_timestep_embedding_gets_exact_float32_labels(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str, precision: str
) -> None:
    unet = make_tiny_unet()
    seen: dict[str, list[Tensor]] = {"time_proj": [], "add_time_proj": []}
    for part, values in seen.items():
        unet.get_submodule(part).register_forward_pre_hook(lambda _, inputs, to=values: to.append(inputs[0].clone()))
    batch = make_batch(range(16))
    add_gradients(make_run(unet, name, precision), [batch])
    levels = OBJECTIVES[name].draw_levels(SEED, batch, SIZE_HW).levels
    (labels,), (sizes,) = seen["time_proj"], seen["add_time_proj"]
    assert labels.dtype == torch.float32
    assert torch.equal(labels, levels.label_B)
    assert not torch.equal(labels.bfloat16().float(), labels), "these labels would not survive bf16"
    assert torch.equal(sizes, batch.conditioning.time_ids_B6.flatten())
    top = 1000 if name == "flow_matching" else 999
    assert labels.min() >= 0
    assert labels.max() <= top
    assert labels.max() > 100, "0..1000, not 0..1"
    noisiest, cleanest = labels.argmax(), labels.argmin()
    assert levels.b_B[noisiest] > levels.b_B[cleanest], "a greater label is more noise"


def test_bf16_changes_the_products_and_nothing_else(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    unet = make_tiny_unet()
    plain_loss, plain = gradients_of(make_run(unet), [make_batch([1, 2])])
    loss, gradients = gradients_of(make_run(unet, precision="bf16"), [make_batch([1, 2])])
    assert loss != plain_loss
    assert loss == pytest.approx(plain_loss, rel=0.02)
    assert {value.dtype for value in gradients.values()} == {torch.float32}
    assert_close(plain, gradients, 0.1)


def test_ranks_are_averaged_so_each_multiplies_by_their_number(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    """Two ranks of two: the mean of what both compute is the gradient of the four in one process."""
    unet = make_tiny_unet()
    _, whole = gradients_of(make_run(unet), [make_batch([1, 2, 3, 4])])
    run = make_run(unet, world_size=2)
    loss_a, rank_a = gradients_of(run, [make_batch([1, 3], global_batch=4)])
    loss_b, rank_b = gradients_of(run, [make_batch([2, 4], global_batch=4)])
    assert_close(whole, {name: (rank_a[name] + rank_b[name]) / 2 for name in rank_a}, 2e-6)
    whole_loss, _ = gradients_of(make_run(unet), [make_batch([1, 2, 3, 4])])
    assert loss_a + loss_b == pytest.approx(whole_loss, rel=1e-6)


def test_a_step_moves_the_weights_and_reports(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    unet = make_tiny_unet()
    run = make_run(unet)
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    expected, gradients = gradients_of(run, [make_batch([1, 2])])
    unet.zero_grad()
    stats = train_step(run, 0, [make_batch([1, 2])])
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    assert stats.loss.item() == expected
    assert stats.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert stats.skipped.item() == 0
    assert sum(not torch.equal(value, before[name]) for name, value in unet.named_parameters()) > len(before) / 2
    assert not stats.loss.requires_grad


def test_a_sample_that_is_not_finite_makes_the_step_void(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    unet = make_tiny_unet()
    run = make_run(unet)
    before = [value.detach().clone() for value in unet.parameters()]
    good, bad, other = (make_batch(ids, global_batch=4) for ids in ([1, 2], [3, 4], [5, 6]))
    bad.latents_BCHW[0, 0, 0, 0] = float("nan")
    stats = train_step(run, 0, [good, bad])
    assert stats.skipped.item() == 1
    assert stats.loss.isnan()
    assert all(torch.equal(old, new) for old, new in zip(before, unet.parameters(), strict=True))
    assert train_step(run, 1, [good, other]).skipped.item() == 0


def test_loss_scale_changes_neither_loss_nor_norm(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    plain = train_step(make_run(make_tiny_unet()), 0, [make_batch([1, 2])])
    scaled_run = make_run(make_tiny_unet(), loss_scale=DynamicLossScale(CPU, 1024.0))
    scaled = train_step(scaled_run, 0, [make_batch([1, 2])])
    assert scaled.loss.item() == plain.loss.item()
    assert scaled.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-6)


@every_objective
def test_steps_learn_two_samples(make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str) -> None:
    run = make_run(make_tiny_unet(), name)
    run.update.learning_rate = 1e-2
    losses = [train_step(run, step, [make_batch([1, 2])]).loss.item() for step in range(60)]
    assert losses[-1] < 0.5 * losses[0]
