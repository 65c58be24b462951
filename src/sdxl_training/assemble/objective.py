"""From the training section to the objective, and to the noise that the data path draws."""

from __future__ import annotations

import torch

from sdxl_training.config.levels import AdaptiveDensity, PlainDensity
from sdxl_training.config.objective import (
    ConditionalTransportCoupling,
    LearnedLossWeight,
    LossWeight,
    MinSnrLossWeight,
    NearestOfCoupling,
    OptimalTransportCoupling,
    min_snr_terminal,
)
from sdxl_training.config.objective import Objective as ObjectiveSection
from sdxl_training.config.schema import Config
from sdxl_training.objectives import weights
from sdxl_training.objectives.adaptive import AdaptiveLevels, AdaptiveSettings, LevelDraw, PlainLevels
from sdxl_training.objectives.couplings import ConditionalTransport, Coupling, OptimalTransport
from sdxl_training.objectives.densities import DENSITIES, LevelDensity
from sdxl_training.objectives.noise import InputNoise, Noise
from sdxl_training.objectives.objective import Objective, path_and_head
from sdxl_training.objectives.shapes import SHAPES
from sdxl_training.objectives.shifts import SHIFTS
from sdxl_training.objectives.strata import IndependentDraws, StratifiedDraws
from sdxl_training.objectives.uncertainty import LogVariance, NoUncertainty


def build_objective(config: Config, device: torch.device) -> Objective:
    """Return the objective with everything chosen for it; what it learns or remembers lives on `device`."""
    training, seed = config.training, config.global_config.seed
    path, head = path_and_head(training.objective.type, _options(training.objective))
    density, level_draw = _build_density(training.level_density, device)
    shift = SHIFTS[training.level_shift.type](**training.level_shift.model_dump(exclude={"type"}))
    problem = weights.Problem(path, head, density, shift.log_factor((config.data.resolution,) * 2))
    learned = isinstance(training.loss_weight, LearnedLossWeight)
    return Objective(
        name=training.objective.type,
        path=path,
        head=head,
        density=density,
        loss_weight=_build_weight(training.objective, training.loss_weight, problem),
        shift=shift,
        draws=StratifiedDraws() if training.stratified_levels else IndependentDraws(),
        level_draw=level_draw,
        shape=SHAPES[training.loss_shape.type](**training.loss_shape.model_dump(exclude={"type"})),
        input_noise=InputNoise(training.noise.input_perturbation),
        uncertainty=(LogVariance(seed) if learned else NoUncertainty()).to(device),
    )


def build_noise(config: Config) -> Noise:
    """Return what draws one sample's noise."""
    noise, coupling = config.training.noise, config.training.coupling
    nearest_of = coupling.draws if isinstance(coupling, NearestOfCoupling) else 1
    return Noise(noise.offset, noise.pyramid, nearest_of)


def build_coupling(config: Config) -> Coupling | None:
    """Return what lets noise change hands within a global batch, if anything does."""
    coupling = config.training.coupling
    if isinstance(coupling, OptimalTransportCoupling):
        return OptimalTransport()
    if isinstance(coupling, ConditionalTransportCoupling):
        return ConditionalTransport(coupling.strength)
    return None


def _options(objective: ObjectiveSection) -> dict[str, object]:
    return objective.model_dump(exclude={"type", "accept_mismatch"})


def _build_density(density: PlainDensity | AdaptiveDensity, device: torch.device) -> tuple[LevelDensity, LevelDraw]:
    if not isinstance(density, AdaptiveDensity):
        return DENSITIES[density.type](**density.model_dump(exclude={"type"})), PlainLevels()
    base, _ = _build_density(density.base, device)
    settings = AdaptiveSettings(**density.model_dump(exclude={"type", "base"}))
    return base, AdaptiveLevels(settings, device)


def _build_weight(objective: ObjectiveSection, weight: LossWeight, problem: weights.Problem) -> weights.LossWeight:
    if isinstance(weight, LearnedLossWeight):
        return weights.NoWeight()
    options = weight.model_dump(exclude={"type", "normalise"})
    if isinstance(weight, MinSnrLossWeight):
        options["terminal"] = min_snr_terminal(objective, weight)
    return weights.make_weight(weight.type, options, weight.normalise, problem)
