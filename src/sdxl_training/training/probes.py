"""Passes beside the training that measure what tag weights follow: whether captions help, and which samples do.

Both look at batches of their own and leave weights and gradients as they were.

Shape legend: B samples of a batch on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdxl_training.objectives.objective import Objective
from sdxl_training.records import Batch, Conditioning
from sdxl_training.training.step import sample_errors
from sdxl_training.weighting.watch import level_bins

SCALE = 2.0**12  # of the meta loss in its backward pass: fp16 would flush its gradients to zero; no other type sees it
CHANGE = 0.02  # share of the meta loss by which the probe moves it, to first order


@dataclass(frozen=True)
class Probe:
    """What both measurements need. `model`: the U-Net itself, wrapped by nothing that talks to other ranks."""

    model: nn.Module
    objective: Objective
    precision: AbstractContextManager[object]
    seed: int

    def losses(self, batch: Batch) -> Tensor:
        """Return each sample's loss as training weighs its noise level, without weights of pictures."""
        with self.precision:
            errors_B, drawn = sample_errors(self.model, self.objective, batch, self.seed)
        losses_B = self.objective.uncertainty.scaled(errors_B * drawn.weight_B, drawn.log_sigma_B)
        return losses_B * drawn.importance_B


@torch.no_grad()
def caption_gains(probe: Probe, batch: Batch, null: Conditioning) -> tuple[Tensor, Tensor]:
    """Return g = ln loss without caption - ln loss with it, and the bin of the noise level, of each sample.

    Both losses are at the same noise and level. null: the conditioning of the same samples without captions.
    """
    with probe.precision:
        errors_B, drawn = sample_errors(probe.model, probe.objective, batch, probe.seed)
        without_B, _ = sample_errors(probe.model, probe.objective, replace(batch, conditioning=null), probe.seed)
    return without_B.log() - errors_B.log(), level_bins(drawn.uniform_B)


def inner_products(
    probe: Probe,
    parameters: Sequence[nn.Parameter],
    batch: Batch,
    meta: Batch,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return <grad l_i, grad L_meta> over these parameters for each sample of `batch`; see `products`.

    L_meta: the mean loss of `meta`, in which samples of weight 0 count nothing; other weights are not heeded.
    """

    def meta_loss() -> Tensor:
        losses_B = probe.losses(meta)
        return torch.where(meta.weight_B > 0, losses_B, torch.zeros_like(losses_B)).mean()

    return products(parameters, lambda: probe.losses(batch), meta_loss, mean_over_ranks)


def products(
    parameters: Sequence[nn.Parameter],
    losses: Callable[[], Tensor],
    meta_loss: Callable[[], Tensor],
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return <grad l_i, grad L_meta> over these parameters for each of the losses.

    One pass forward and backward gives grad L_meta; two passes forward of the losses, with the parameters moved along
    it and against it, give the products by central differences, without second derivatives. Zeros where grad L_meta
    vanishes or is not finite.
    """
    own_loss = meta_loss()
    gradient = torch.autograd.grad(own_loss * SCALE, parameters, allow_unused=True)
    direction = [
        mean_over_ranks(torch.zeros_like(parameter) if part is None else part.float() / SCALE)
        for part, parameter in zip(gradient, parameters, strict=True)
    ]
    loss = mean_over_ranks(own_loss.detach())
    squared = torch.stack([part.square().sum() for part in direction]).sum()
    if not (squared > 0 and squared.isfinite()):
        with torch.no_grad():
            return torch.zeros_like(losses())
    return directional_derivatives(parameters, direction, losses, float(CHANGE * loss / squared))


@torch.no_grad()
def directional_derivatives(
    parameters: Sequence[nn.Parameter], direction: Sequence[Tensor], losses: Callable[[], Tensor], step: float
) -> Tensor:
    """Return (losses(theta + step d) - losses(theta - step d)) / (2 step); the parameters are put back exactly."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        moved = []
        for sign in (1.0, -1.0):
            for parameter, original, part in zip(parameters, originals, direction, strict=True):
                parameter.copy_(original + sign * step * part)
            moved.append(losses())
        return (moved[0] - moved[1]) / (2 * step)
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)
