"""Was the base model trained to predict what this run is going to train? Asked once, before the first update.

The same noisy pictures are given to the network under each parameterisation, with that one's input scale and label,
and its output is read that way. The reading under which the clean latents come out best is what the model predicts.

Shape legend: B samples, C latent channels, H x W latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdxl_training.model.sdxl import predict
from sdxl_training.objectives.heads import FlowHead, Head, VelocityHead
from sdxl_training.objectives.objective import Objective, path_and_head, per_sample
from sdxl_training.objectives.paths import EDMPath, NoisePath
from sdxl_training.records import Batch, UserError

CLEARLY_BETTER = 0.65
"""Another reading must leave less than this share of the configured reading's error ..."""
DENOISES = 0.7
"""... and less than this share of what a linear filter leaves: an untrained network fits nothing."""
SIGMA_ENDS = (0.5, 5.0)
"""Noise levels that are tried. Below, v and epsilon are nearly the same; above, nothing can be denoised well."""

Reading = tuple[NoisePath, Head]
READINGS: dict[str, Reading] = {
    "epsilon": path_and_head("epsilon", {}),
    "v_prediction": path_and_head("v_prediction", {"zero_terminal_snr": False}),
    "flow_matching (raw)": path_and_head("flow_matching", {"mode": "raw", "zero_terminal_snr": True}),
}


class MismatchError(UserError):
    """The base model predicts something else than the run is configured to train."""


@dataclass(frozen=True)
class Fit:
    """How well the base model denoises under each reading: remaining error over a linear filter's, 1 is no better.

    configured: the reading that the run trains.
    """

    configured: str
    scores: dict[str, float]

    @property
    def other(self) -> str | None:
        """The reading that fits clearly better than the configured one, if any does."""
        best = min(self.scores, key=self.scores.__getitem__)
        better = self.scores[best] < min(CLEARLY_BETTER * self.scores[self.configured], DENOISES)
        return best if better else None

    def __str__(self) -> str:
        """Return the scores in a line, best first."""
        ranked = sorted(self.scores.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {score:.2f}" for name, score in ranked)


def measure_fit(
    model: nn.Module, objective: Objective, batches: Sequence[Batch], precision: AbstractContextManager[object]
) -> Fit:
    """Score the model on a few batches under the configured reading and all others; no gradients.

    Scores are geometric means over the samples, whose noise levels are spread evenly in ln sigma.
    """
    configured = _name(objective)
    readings = {**READINGS, configured: (objective.path, objective.head)}
    low, high = (math.log(sigma) for sigma in SIGMA_ENDS)
    sizes = [len(batch.visits) for batch in batches]
    log_sigmas = torch.split(torch.linspace(low, high, sum(sizes), dtype=torch.float64), sizes)
    scores = {}
    for name, reading in readings.items():
        with torch.no_grad(), precision:
            errors = [relative_errors(model, reading, *pair) for pair in zip(batches, log_sigmas, strict=True)]
        scores[name] = float(torch.cat(errors).log().mean().exp())
    return Fit(configured, scores)


def judge(fit: Fit, accept_mismatch: bool) -> str:
    """Say what the base model predicts; raises MismatchError where that is something else and nobody accepted it."""
    numbers = f"remaining error of the base model, read as: {fit} (1.00 is what a linear filter leaves)"
    if fit.other is None:
        return numbers
    if accept_mismatch:
        return f"switch of objective: the base model predicts {fit.other}, this run trains {fit.configured}; {numbers}"
    raise MismatchError(
        f"training.objective: this run trains {fit.configured}, but the base model predicts {fit.other}: {numbers}. "
        f"Set training.objective to what it predicts; or, to switch it on purpose, which costs it a long training, set "
        "training.objective.accept_mismatch: true."
    )


def relative_errors(model: nn.Module, reading: Reading, batch: Batch, log_sigma_B: Tensor) -> Tensor:
    """Return |x0 found - x0|^2 over what the best linear filter leaves of it, sigma^2 s^2 / (sigma^2 + s^2)."""
    path, head = reading
    x0_BCHW = batch.latents_BCHW
    levels = path.at(log_sigma_B).to(x0_BCHW.device)
    a, b = per_sample(levels.a_B), per_sample(levels.b_B)
    x_BCHW = a * x0_BCHW + b * batch.noise_BCHW
    output_BCHW = predict(model, x_BCHW, levels.label_B, batch.conditioning).float()
    found_BCHW, _ = head.clean_and_noise(output_BCHW, x_BCHW, a, b)
    errors_B = (found_BCHW - x0_BCHW).square().mean(dim=(1, 2, 3)).double().cpu()
    noise_B, signal = (2 * log_sigma_B).exp(), x0_BCHW.square().mean().double().cpu()
    return errors_B * (noise_B + signal) / (noise_B * signal)


def _name(objective: Objective) -> str:
    """Return the reading's name; what is a v-prediction network under another name is read as one."""
    if isinstance(objective.head, FlowHead):
        return "flow_matching (raw)"
    ordinary = not isinstance(objective.path, EDMPath) or (objective.path.label, objective.path.sigma_data) == (
        "timestep",
        1.0,
    )
    return "v_prediction" if isinstance(objective.head, VelocityHead) and ordinary else objective.name
