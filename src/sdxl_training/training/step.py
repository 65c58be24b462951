"""One optimizer update.

Shape legend: B samples, C latent channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxl_training.model.architecture import VAE_FACTOR
from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.objective import DrawnLevels, Objective
from sdxl_training.optim.update import Update
from sdxl_training.parallel.group import Group, set_grad_sync
from sdxl_training.records import Batch, StepStats
from sdxl_training.weighting.watch import NO_WATCH, Watch


@dataclass
class Run:
    """What an update needs. `model` is the U-Net, wrapped for its ranks; `precision` the context of a forward pass."""

    model: nn.Module
    objective: Objective
    update: Update
    precision: AbstractContextManager[object]
    group: Group
    seed: int
    watch: Watch = NO_WATCH


def sample_errors(model: nn.Module, objective: Objective, batch: Batch, seed: int) -> tuple[Tensor, DrawnLevels]:
    """Return each sample's error, unweighted, and its noise level.

    The level comes from (seed, visit, sample id), its stratum, and what adaptive levels have learnt.
    """
    height, width = batch.latents_BCHW.shape[-2:]
    drawn = objective.draw_levels(seed, batch, (VAE_FACTOR * height, VAE_FACTOR * width))
    drawn = drawn.to(batch.latents_BCHW.device)
    input_noise_BCHW = objective.input_noise(batch.noise_BCHW, seed, batch.visits, batch.sample_ids)
    x_BCHW = objective.add_noise(batch.latents_BCHW, input_noise_BCHW, drawn.levels)
    output_BCHW = predict(model, x_BCHW, drawn.levels.label_B, batch.conditioning)
    return objective.errors(output_BCHW, batch.latents_BCHW, batch.noise_BCHW, drawn.levels), drawn


def loss_per_sample(model: nn.Module, objective: Objective, batch: Batch, seed: int, watch: Watch = NO_WATCH) -> Tensor:
    """Return each sample's loss, and let adaptive levels and the tags' statistics take note of it."""
    errors_B, drawn = sample_errors(model, objective, batch, seed)
    watch.see(batch, drawn.uniform_B, errors_B)
    pulling_B = objective.uncertainty.scaled(errors_B * drawn.weight_B, drawn.log_sigma_B)
    objective.level_draw.see(drawn.uniform_B, pulling_B)
    return objective.losses(errors_B, drawn)


def add_gradients(run: Run, micro_batches: Sequence[Batch]) -> Tensor:
    """Run forward and backward over this rank's micro-batches; return its share of the global mean loss.

    Losses are divided by the global sample count, so 4 x 1, 1 x 4 and two ranks of 2 give one and the same gradient.
    """
    total = torch.zeros((), device=run.group.device)
    for i, batch in enumerate(micro_batches):
        set_grad_sync(run.model, i + 1 == len(micro_batches))
        with run.precision:
            losses_B = loss_per_sample(run.model, run.objective, batch, run.seed, run.watch)
        loss = (losses_B * batch.weight_B).sum() / batch.global_batch
        # DDP averages over ranks, but samples are summed.
        scaled = run.update.loss_scale.scale(loss * run.group.world_size)
        scaled.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    run.group.average_gradients(run.objective.uncertainty.parameters())
    return total


def train_step(run: Run, step: int, micro_batches: Sequence[Batch]) -> StepStats:
    """Make update number `step`, counted from 0, from this rank's micro-batches of the global batch."""
    loss = add_gradients(run, micro_batches)
    grad_norm, skipped = run.update(step)
    run.objective.level_draw.after_update(step, run.group.sum)
    run.watch.after_update(run.group.sum)
    return StepStats(loss, grad_norm, skipped)
