"""Updates of an objective that learns or remembers beside the network: whatever the cut, the ranks, the accidents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdxl_training.memory.precision import autocast
from sdxl_training.objectives.adaptive import AdaptiveLevels, AdaptiveSettings
from sdxl_training.objectives.densities import LogNormal
from sdxl_training.objectives.noise import InputNoise
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.shapes import PseudoHuber
from sdxl_training.objectives.strata import StratifiedDraws
from sdxl_training.objectives.uncertainty import LogVariance
from sdxl_training.objectives.weights import MinSNR, NoWeight
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch
from sdxl_training.training.step import add_gradients, loss_per_sample, train_step
from tests.unit.test_step import CPU, OBJECTIVES, RAW_FLOW, SEED, SIZE_HW, MakeBatch, MakeUnet, make_run


def everything() -> Objective:
    """An objective with every part that learns, remembers or looks at the batch; it adapts after each update."""
    settings = AdaptiveSettings(bins=4, warmup_samples=1, decay=0.9, uniform_share=0.2, every_steps=1)
    return make_objective(
        "flow_matching",
        RAW_FLOW,
        LogNormal(0.0, 1.0),
        NoWeight(),
        draws=StratifiedDraws(),
        level_draw=AdaptiveLevels(settings, CPU),
        shape=PseudoHuber(0.3, "snr"),
        input_noise=InputNoise(0.1),
        uncertainty=LogVariance(seed=1, channels=16),
    )


CUTS: dict[str, list[list[int]]] = {
    "one": [[0, 1, 2, 3]],
    "fours": [[0], [1], [2], [3]],
    "twos, out of order": [[3, 1], [2, 0]],
    "unequal": [[1, 2, 3], [0]],
}


def steps_of_everything(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, cut: list[list[int]]
) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Make four updates of `everything`; return losses, weights of u and what the levels remember."""
    objective = everything()
    run, losses = make_run(make_tiny_unet(), objective=objective), []
    for step in range(4):
        micro_batches = [
            make_batch(
                [10 * step + slot for slot in part],
                [1 + slot / 8 for slot in part],
                step=step,
                slots=part,
                global_batch=4,
            )
            for part in cut
        ]
        losses.append(train_step(run, step, micro_batches).loss.item())
    (weight_F,) = objective.uncertainty.parameters()
    return losses, weight_F.detach(), objective.level_draw.state()


@pytest.mark.parametrize("name", [name for name in CUTS if name != "one"])
def test_what_learns_and_remembers_does_not_depend_on_how_the_batch_is_cut(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch, name: str
) -> None:
    whole_losses, whole_u, whole_levels = steps_of_everything(make_tiny_unet, make_batch, CUTS["one"])
    losses, u, levels = steps_of_everything(make_tiny_unet, make_batch, CUTS[name])
    assert losses == pytest.approx(whole_losses, rel=1e-4)
    for key, value in whole_levels.items():
        torch.testing.assert_close(levels[key], value, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(u, whole_u, rtol=1e-2, atol=1e-4)
    assert float((whole_levels["probability"] - 1 / 4).abs().max()) > 0.05, "the draw has adapted"
    assert float(whole_u.abs().min()) > 1e-3, "u has learnt"


def test_ranks_average_what_no_wrapper_averages(make_tiny_unet: MakeUnet, make_batch: MakeBatch) -> None:
    """Each rank multiplies by the number of ranks; the mean of both is the gradient of u in one process."""

    class Recorded(Group):
        def average_gradients(self, parameters: Iterable[Tensor]) -> None:
            averaged.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

    def gradient(batch: Batch, world_size: int) -> Tensor:
        averaged.clear()
        run = make_run(make_tiny_unet(), objective=everything())
        run.group = Recorded(0, world_size, CPU)
        add_gradients(run, [batch])
        ((gradient_F,),) = averaged
        return gradient_F

    averaged: list[list[Tensor]] = []
    whole = gradient(make_batch([1, 2, 3, 4]), 1)
    shares = (([1, 3], [0, 2]), ([2, 4], [1, 3]))
    ranks = [gradient(make_batch(ids, slots=slots, global_batch=4), 2) for ids, slots in shares]
    assert float(whole.abs().max()) > 0
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, whole, rtol=1e-5, atol=1e-6)


def test_a_void_update_leaves_what_is_learnt_beside_the_network(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch
) -> None:
    objective = everything()
    run = make_run(make_tiny_unet(), objective=objective)
    train_step(run, 0, [make_batch([1, 2, 3, 4])])
    (before,) = (value.detach().clone() for value in objective.uncertainty.parameters())
    bad = make_batch([1, 2, 3, 4], step=1)
    bad.latents_BCHW[0] = float("nan")
    moments = objective.level_draw.state()["moment"]
    assert train_step(run, 1, [bad]).skipped.item() == 1
    (after,) = objective.uncertainty.parameters()
    assert torch.equal(before, after)
    assert objective.level_draw.state()["moment"].isfinite().all()
    assert not torch.equal(objective.level_draw.state()["moment"], moments), "the three good samples are seen"


def test_levels_are_remembered_by_the_weighted_loss_without_importance(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch
) -> None:
    settings = AdaptiveSettings(bins=2, warmup_samples=1, decay=0.99, uniform_share=0.5, every_steps=1)
    draw = AdaptiveLevels(settings, CPU)
    moments = torch.tensor([1.0, 9.0])
    draw.load({"moment": moments, "count": torch.ones(2), "probability": torch.tensor([0.375, 0.625]).double()})
    objective = replace(OBJECTIVES["v_prediction"], level_draw=draw, loss_weight=MinSNR(0.5))
    unet = make_tiny_unet()
    batch = make_batch([3], [7.0])  # the sample's own weight has no say either
    with torch.no_grad():
        drawn = objective.draw_levels(SEED, batch, SIZE_HW)
        expected = loss_per_sample(unet, objective, batch, SEED) / drawn.importance_B
    draw.after_update(0, lambda value: value)
    bin_number = int(drawn.uniform_B * 2)
    assert float(drawn.importance_B) != 1
    assert float(drawn.weight_B) < 0.9
    keep = 0.5  # the second loss of this bin: a running mean
    moved = keep * moments[bin_number] + (1 - keep) * expected[0] ** 2
    assert float(draw.state()["moment"][bin_number]) == pytest.approx(float(moved), rel=1e-5)
    assert float(draw.state()["moment"][1 - bin_number]) == float(moments[1 - bin_number])


def test_levels_are_remembered_by_what_the_learned_variance_leaves(
    make_tiny_unet: MakeUnet, make_batch: MakeBatch
) -> None:
    """Levels that u has brought to unit loss are no harder than others, however large their raw loss."""
    settings = AdaptiveSettings(bins=2, warmup_samples=20, decay=0.99, uniform_share=0.1, every_steps=1)
    draw, uncertainty = AdaptiveLevels(settings, CPU), LogVariance(SEED)
    with torch.no_grad():
        uncertainty.weight_F.normal_(generator=torch.Generator().manual_seed(1))
    objective = replace(OBJECTIVES["v_prediction"], level_draw=draw, loss_weight=NoWeight())
    learned = replace(objective, uncertainty=uncertainty)
    batch = make_batch([3], [1.0])
    with torch.no_grad():
        plain = loss_per_sample(make_tiny_unet(), objective, batch, SEED)
        draw.forget()
        drawn = learned.draw_levels(SEED, batch, SIZE_HW)
        loss_per_sample(make_tiny_unet(), learned, batch, SEED)
    draw.after_update(0, lambda value: value)
    u = uncertainty.log_variance(drawn.log_sigma_B)
    assert float(u.detach().abs()) > 0.1
    expected = (plain / u.detach().exp()).square()
    assert float(draw.state()["moment"].sum()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_float32_in_every_precision(make_tiny_unet: MakeUnet, make_batch: MakeBatch, precision: str) -> None:
    with autocast(precision, CPU):
        losses = loss_per_sample(make_tiny_unet(), everything(), make_batch([1, 2]), SEED)
    assert losses.dtype == torch.float32
