"""One optimizer update: unscale, measure, clip, step unless something is not finite, average.

Everything stays on the device; nothing here waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_training.optim.averaging import WeightAverage
from sdxl_training.optim.loss_scale import LossScale
from sdxl_training.optim.schedules import Schedule


def make_adamw(
    parameters: Iterable[Tensor], learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) as one fused kernel, which can skip an update by a device-side flag."""
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
    )


def make_sgd(
    parameters: Iterable[Tensor], learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Stochastic gradient descent: for comparing runs number by number."""
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # torch would leave the buffers uninitialised where the first update is void
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


# Each must honour `found_inf`, by which a void update is skipped on the device: torch's fused optimizers do.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": make_adamw, "sgd": make_sgd}


@dataclass
class Update:
    """All that happens between the last backward of a step and the next forward."""

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    learning_rate: float
    schedule: Schedule
    loss_scale: LossScale
    average: WeightAverage
    max_grad_norm: float | None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Apply the gathered gradients as update number `step`, counted from 0, and clear them.

        Returns (global gradient norm before clipping, 1.0 where the update was void because the norm is not finite).
        A void update leaves weights and optimizer state untouched.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        self.loss_scale.unscale(gradients)
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
        """Tell the optimizer the learning rate of update `step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
