"""From sections of the configuration to the objects that do the work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_training.config.objective import LearnedLossWeight
from sdxl_training.config.schema import Config, CosineSchedule, ExponentialEma
from sdxl_training.optim.averaging import ExponentialAverage, NoAverage, WeightAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale
from sdxl_training.optim.schedules import Constant, Cosine, Schedule
from sdxl_training.optim.update import OPTIMIZERS, Update


def build_update(config: Config, model: nn.Module, uncertainty: nn.Module, device: torch.device) -> Update:
    """Return the optimizer with everything around it, for what is trainable in `model` on `device`.

    The learned log-variance, where there is one, has a learning rate of its own and is neither clipped nor averaged.
    """
    training = config.training
    parameters: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    beside = {f"uncertainty.{name}": value for name, value in uncertainty.named_parameters()}
    options = training.optimizer.model_dump(exclude={"type"})
    groups: list[dict[str, Any]] = [{"params": [*parameters.values()]}]
    if isinstance(training.loss_weight, LearnedLossWeight):
        groups.append({"params": [*beside.values()], "peak": training.loss_weight.learning_rate, "weight_decay": 0.0})
    return Update(
        parameters=parameters,
        beside=beside,
        optimizer=OPTIMIZERS[training.optimizer.type](groups, **options),
        learning_rate=training.optimizer.learning_rate,
        schedule=_build_schedule(config),
        loss_scale=_build_loss_scale(config, device),
        average=_build_average(config, parameters),
        max_grad_norm=training.max_grad_norm,
    )


def _build_schedule(config: Config) -> Schedule:
    schedule = config.training.schedule
    if isinstance(schedule, CosineSchedule):
        return Cosine(schedule.warmup_steps, config.training.max_steps, schedule.final_fraction)
    return Constant(schedule.warmup_steps)


def _build_loss_scale(config: Config, device: torch.device) -> LossScale:
    return DynamicLossScale(device) if config.training.precision == "fp16" else NoLossScale()


def _build_average(config: Config, parameters: Mapping[str, Tensor]) -> WeightAverage:
    ema = config.training.ema
    return ExponentialAverage(parameters, ema.decay) if isinstance(ema, ExponentialEma) else NoAverage()
