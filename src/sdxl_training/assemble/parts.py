"""From sections of the configuration to the objects that do the work."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdxl_training.config.schema import Config, CosineSchedule, ExponentialEma, MinSnrLossWeight, min_snr_terminal
from sdxl_training.objectives.densities import DENSITIES
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.weights import WEIGHTS, LossWeight, MinSNR
from sdxl_training.optim.averaging import ExponentialAverage, NoAverage, WeightAverage
from sdxl_training.optim.loss_scale import DynamicLossScale, LossScale, NoLossScale
from sdxl_training.optim.schedules import Constant, Cosine, Schedule
from sdxl_training.optim.update import OPTIMIZERS, Update


def build_objective(config: Config) -> Objective:
    """Return the objective with its density and weight."""
    training = config.training
    density = DENSITIES[training.level_density.type](**training.level_density.model_dump(exclude={"type"}))
    options = training.objective.model_dump(exclude={"type"})
    return make_objective(training.objective.type, options, density, _build_weight(config))


def _build_weight(config: Config) -> LossWeight:
    weight = config.training.loss_weight
    if isinstance(weight, MinSnrLossWeight):
        return MinSNR(weight.gamma, min_snr_terminal(config.training.objective, weight), weight.minimum)
    return WEIGHTS[weight.type]()


def build_update(config: Config, model: nn.Module, device: torch.device) -> Update:
    """Return the optimizer with everything around it, for what is trainable in `model` on `device`."""
    training = config.training
    parameters: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    options = training.optimizer.model_dump(exclude={"type"})
    return Update(
        parameters=parameters,
        optimizer=OPTIMIZERS[training.optimizer.type](parameters.values(), **options),
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
