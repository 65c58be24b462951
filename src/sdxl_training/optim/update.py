"""One optimizer update: unscale, measure, clip, step unless something is not finite, average.

Everything stays on the device; nothing here waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdxl_training.optim.averaging import WeightAverage
from sdxl_training.optim.loss_scale import LossScale
from sdxl_training.optim.schedules import Schedule

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def make_adamw(
    parameters: Parameters, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) as one fused kernel, which can skip an update by a device-side flag."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
    )


def make_sgd(
    parameters: Parameters, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Stochastic gradient descent: for comparing runs number by number."""
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # torch would leave the buffers uninitialised where the first update is void
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# Each must honour `found_inf`, by which a void update is skipped on the device: torch's fused optimizers do.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": make_adamw, "sgd": make_sgd}


@dataclass
class Update:
    """All that happens between the last backward of a step and the next forward.

    `beside`: parameters that help in training and are no part of the model; the gradient norm leaves them out.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    learning_rate: float
    schedule: Schedule
    loss_scale: LossScale
    average: WeightAverage
    max_grad_norm: float | None
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Apply the gathered gradients as update number `step`, counted from 0, and clear them.

        Returns (global gradient norm before clipping, 1.0 where the update was void because the norm is not finite).
        A void update leaves weights and optimizer state untouched.
        """
        gradients = _gradients(self.parameters)
        self.loss_scale.unscale(gradients + _gradients(self.beside))
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm is not None:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        skipped = (~norm.isfinite()).float()
        self.set_learning_rate(step)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by fused optimizers: the skip needs no sync
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(skipped)
        self.average.update(step)
        return norm, skipped

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update `step`."""
        return self.learning_rate * self.schedule.factor(step)

    def set_learning_rate(self, step: int) -> None:
        """Tell the optimizer the learning rate of update `step`; a group may have a peak of its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("peak", self.learning_rate) * self.schedule.factor(step)


def _gradients(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
