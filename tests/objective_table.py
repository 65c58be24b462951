"""Every row of the tables of objectives, weights and densities, so that a property can be asked of all of them.

Formulas here are written from the papers in terms of SNR and sigma, in numpy; they share nothing with the code tested.

Shape legend: B samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from sdxl_training.objectives import densities, weights
from sdxl_training.objectives.densities import LevelDensity, Uniform
from sdxl_training.objectives.objective import DrawnLevels, Objective, make_objective, path_and_head
from sdxl_training.objectives.paths import Levels
from sdxl_training.objectives.weights import LossWeight, NoWeight, Problem
from sdxl_training.records import Batch, Conditioning

Row = tuple[str, dict[str, Any]]

OBJECTIVES: dict[str, Row] = {
    "epsilon": ("epsilon", {}),
    "v": ("v_prediction", {"zero_terminal_snr": False}),
    "v_zt": ("v_prediction", {"zero_terminal_snr": True}),
    "x0": ("x0", {"zero_terminal_snr": False}),
    "x0_zt": ("x0", {"zero_terminal_snr": True}),
    "flow_raw": ("flow_matching", {"mode": "raw", "zero_terminal_snr": True}),
    "flow_vp": ("flow_matching", {"mode": "preconditioned", "zero_terminal_snr": False}),
    "flow_vp_zt": ("flow_matching", {"mode": "preconditioned", "zero_terminal_snr": True}),
    "edm": ("edm", {"sigma_data": 1.0, "label": "timestep", "zero_terminal_snr": False}),
    "edm_zt": ("edm", {"sigma_data": 1.0, "label": "timestep", "zero_terminal_snr": True}),
    "edm_half": ("edm", {"sigma_data": 0.5, "label": "timestep", "zero_terminal_snr": True}),
    "edm_c_noise": ("edm", {"sigma_data": 1.0, "label": "c_noise", "zero_terminal_snr": False}),
    "edm_half_c_noise": ("edm", {"sigma_data": 0.5, "label": "c_noise", "zero_terminal_snr": False}),
}
ON_THE_TABLE = ("epsilon", "v", "v_zt", "x0", "x0_zt")
"""Objectives whose levels are SDXL's thousand; all others go from sigma 1e-4 to 1e4."""

WEIGHTS: dict[str, Row] = {
    "none": ("none", {}),
    "min_snr": ("min_snr", {"gamma": 5.0, "terminal": "official"}),
    "min_snr_patched": ("min_snr", {"gamma": 5.0, "terminal": "official_patched"}),
    "min_snr_plus_one": ("min_snr", {"gamma": 5.0, "terminal": "plus_one"}),
    "min_snr_floor": ("min_snr", {"gamma": 5.0, "terminal": "floor", "minimum": 0.01}),
    "soft_min_snr": ("soft_min_snr", {"gamma": 4.0}),
    "debiased": ("debiased", {}),
    "debiased_kohya": ("debiased_kohya", {}),
    "p2": ("p2", {"k": 1.0, "gamma": 1.0}),
    "p2_mild": ("p2", {"k": 2.0, "gamma": 0.5}),
    "snr_trunc": ("snr_trunc", {}),
    "sigmoid": ("sigmoid", {"bias": 0.5}),
    "edm": ("edm", {"sigma_data": 0.5}),
    "cosmap": ("cosmap", {}),
}
X0_WEIGHT: dict[str, Callable[[Any], Any]] = {
    "min_snr": lambda snr: numpy.minimum(snr, 5),
    "min_snr_plus_one": lambda snr: numpy.minimum(snr + 1, 5),
    "soft_min_snr": lambda snr: 4 * snr / (4 + snr),
    "debiased": lambda snr: numpy.sqrt(snr),
    "p2": lambda snr: snr / (1 + snr),
    "p2_mild": lambda snr: snr / numpy.sqrt(2 + snr),
    "snr_trunc": lambda snr: numpy.maximum(snr, 1),
    "edm": lambda snr: snr + 4,
    # 2 / (pi (1 - 2t + 2t^2)) on the error of u, which is that of x0 divided by t = 1 / (1 + sqrt(SNR)).
    "cosmap": lambda snr: 2 / math.pi * (1 + numpy.sqrt(snr)) ** 4 / (1 + snr),
}
"""W(SNR) on the squared error of x0. Not here: what depends on the head (none, patched, floor, kohya) or on the density
(sigmoid)."""

DENSITIES: dict[str, Row] = {
    "uniform": ("uniform", {}),
    "logit_normal": ("logit_normal", {"mean": 0.0, "std": 1.0}),
    "log_normal_sigma": ("log_normal_sigma", {"mean": -1.2, "std": 1.2}),
    "mode": ("mode", {"scale": 1.29}),
    "mode_ends": ("mode", {"scale": -1.0}),
    "cosmap": ("cosmap", {}),
    "karras": ("karras", {"sigma_min": 0.0291672, "sigma_max": 14.6146412, "rho": 7.0}),
    "histogram": ("histogram", {"bars": [0.0, 2.0, 1.0, 0.0, 5.0]}),
}


def density_called(name: str) -> LevelDensity:
    kind, options = DENSITIES[name]
    return densities.DENSITIES[kind](**options)


def problem(objective: str, density: LevelDensity | None = None) -> Problem:
    path, head = path_and_head(*OBJECTIVES[objective])
    return Problem(path, head, density or Uniform())


def weight_called(name: str, of: Problem, normalise: bool = False) -> LossWeight:
    kind, options = WEIGHTS[name]
    return weights.make_weight(kind, options, normalise, of)


def objective_called(
    name: str, density: LevelDensity | None = None, loss_weight: LossWeight | None = None
) -> Objective:
    kind, options = OBJECTIVES[name]
    return make_objective(kind, options, density or Uniform(), loss_weight or NoWeight())


def is_defined(weight: str, objective: str) -> bool:
    """Whether the configuration lets the two be combined, as far as the mathematics is concerned."""
    if weight == "debiased_kohya":
        return objective in ("epsilon", "v", "v_zt")
    return not (weight == "min_snr_plus_one" and objective == "epsilon")


@dataclass(frozen=True)
class GivenDraws:
    """Uniform numbers chosen by the test."""

    uniform_B: Tensor

    def uniform(self, seed: int, batch: Batch) -> Tensor:
        return self.uniform_B


def levels_of(objective: Objective, uniform_B: Tensor) -> DrawnLevels:
    """What `draw_levels` makes of these numbers."""
    nothing = torch.empty(0)
    batch = Batch(nothing, nothing, Conditioning(nothing, nothing, nothing), nothing, (), (), 0, (), 0)
    return replace(objective, draws=GivenDraws(uniform_B)).draw_levels(0, batch, (1024, 1024))


def head_weights(loss_weight: LossWeight, objective: Objective, levels: Levels) -> Tensor:
    return loss_weight.weight(objective.head, levels.a_B, levels.b_B)


def training_range(objective: Objective, count: int = 101) -> Tensor:
    """ln sigma over all that is trained, both ends exactly; an infinite end after 99.9 % of the finite ones."""
    low, high = objective.path.log_sigma_range
    if math.isinf(high):
        return torch.cat([torch.linspace(low, 7.7, count - 1, dtype=torch.float64), torch.tensor([math.inf])])
    return torch.linspace(low, high, count, dtype=torch.float64)
