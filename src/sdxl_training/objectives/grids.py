"""Grids: the noise levels a picture is drawn through.

A grid is ln sigma in float64, strictly descending, one level a step; the clean end after the last level is implied.
Plus infinity is pure noise. `path.at` turns it into network inputs and labels.

Shape legend: S levels of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sdxl_training.objectives.paths import (
    SDXL_TRAIN_STEPS,
    EDMPath,
    FlowPath,
    NoisePath,
    PreconditionedFlowPath,
    TimestepTable,
    VariancePreservingPath,
)
from sdxl_training.records import UserError

EDM_SIGMAS = (0.002, 80.0)
"""Ends of the levels that Karras et al. 2022 draw through."""
PRACTICAL_INFINITY = 20000.0
"""The sigma a rho-schedule starts from where the table ends in pure noise: signal 5e-5, lost in half precision."""


class Grid(Protocol):
    """A rule that chooses the levels."""

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        """Return ln sigma of `steps` levels, float64, strictly descending, inside what the path trains.

        Raises UserError where the path has no such levels.
        """
        ...


@dataclass(frozen=True)
class Native:
    """Timesteps evenly from 999 down to 0, fractions included: both ends of the table the network was trained on."""

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        """Return ln sigma of linspace(999, 0, steps)."""
        table = _table(path, steps, "native")
        return table.log_sigma(torch.linspace(SDXL_TRAIN_STEPS - 1, 0, steps, dtype=torch.float64))


@dataclass(frozen=True)
class Trailing:
    """Every (1000 / steps)-th timestep counted from 999, which is always visited.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed".
    """

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        """Return ln sigma of round(arange(1000, 0, -1000 / steps)) - 1."""
        table = _table(path, steps, "trailing")
        count_S = torch.arange(SDXL_TRAIN_STEPS, 0, -SDXL_TRAIN_STEPS / steps, dtype=torch.float64)[:steps]
        return table.log_sigma(count_S.round() - 1)


@dataclass(frozen=True)
class Karras:
    """Even in sigma^(1 / rho) (Karras et al. 2022, equation 5): rho 1 is even in sigma, infinite rho in ln sigma.

    Ends left out are those of the path's table, SDXL's plain one for the straight path, and 0.002 and 80 for EDM. A
    table that ends in pure noise is entered at sigma 20000; half of the levels then lie above 400, so such a model is
    rather drawn by another grid or from a lower sigma_max.
    """

    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        """Return rho ln linspace(sigma_max^(1 / rho), sigma_min^(1 / rho), steps)."""
        _check_steps(steps)
        _check_positive("rho", self.rho)
        low, high = _karras_ends(path)
        low = low if self.sigma_min is None else _inside("sigma_min", self.sigma_min, path)
        high = high if self.sigma_max is None else _inside("sigma_max", self.sigma_max, path)
        if low >= high:
            raise UserError(
                f"sigma_min = {low:g}: levels run from sigma_max = {high:g} down to it; choose it below sigma_max."
            )
        ends = high ** (1 / self.rho), low ** (1 / self.rho)
        return self.rho * torch.linspace(*ends, steps, dtype=torch.float64).log()


@dataclass(frozen=True)
class Linear:
    """Flow times evenly from 1 to 1 / steps, then t' = shift t / (1 + (shift - 1) t), which is sigma times shift.

    A path that does not reach t = 1, or t = 0, begins and ends at its own noisiest and cleanest level instead. Source
    of the shift: Esser et al. 2024, equation 23.
    """

    shift: float = 1.0

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        """Return the logit of the shifted times."""
        _check_steps(steps)
        _check_positive("shift", self.shift)
        log_shift = math.log(self.shift)
        unshifted = torch.tensor(_linear_ends(path), dtype=torch.float64) - log_shift
        earliest, latest = unshifted.sigmoid().tolist()
        time_S = torch.linspace(latest, max(latest / steps, earliest), steps, dtype=torch.float64)
        return time_S.logit() + log_shift


GRIDS: dict[str, type[Grid]] = {"native": Native, "trailing": Trailing, "karras": Karras, "linear": Linear}


def default_grid(path: NoisePath) -> Grid:
    """Return the grid of the literature the path comes from."""
    if isinstance(path, (FlowPath, PreconditionedFlowPath)):
        return Linear()
    return Karras() if isinstance(path, EDMPath) else Trailing()


def _table(path: NoisePath, steps: int, grid: str) -> TimestepTable:
    """Return the path's timesteps after checking that `steps` of them can be visited."""
    _check_steps(steps)
    if not isinstance(path, (VariancePreservingPath, EDMPath)):
        raise UserError(
            f"grid = {grid}: it counts SDXL's timesteps, which the straight path of flow_matching with mode raw "
            "does not have; use linear or karras."
        )
    if isinstance(path, EDMPath) and path.label == "c_noise" and path.table.zero_terminal_snr:
        raise UserError(
            f"grid = {grid}: it begins at pure noise, for which the label c_noise = ln(sigma) / 4 has no number; "
            "use karras or linear."
        )
    if steps > SDXL_TRAIN_STEPS:
        raise UserError(
            f"steps = {steps}: grid {grid} has {SDXL_TRAIN_STEPS} noise levels; use 1 to {SDXL_TRAIN_STEPS} steps."
        )
    return path.table


def _karras_ends(path: NoisePath) -> tuple[float, float]:
    """Return the (least, largest) sigma of a rho-schedule whose ends are not given."""
    if isinstance(path, EDMPath):
        return EDM_SIGMAS
    table = path.table if isinstance(path, VariancePreservingPath) else TimestepTable(zero_terminal_snr=False)
    low, high = table.finite_T[[0, -1]].exp().tolist()
    return low, PRACTICAL_INFINITY if table.zero_terminal_snr else high


def _linear_ends(path: NoisePath) -> tuple[float, float]:
    """Return ln sigma of the cleanest and noisiest level that even flow times may reach."""
    if isinstance(path, EDMPath):
        return math.log(EDM_SIGMAS[0]), math.log(EDM_SIGMAS[1])
    if isinstance(path, (FlowPath, PreconditionedFlowPath)):
        return -math.inf, math.inf
    return path.log_sigma_range


def _inside(name: str, sigma: float, path: NoisePath) -> float:
    """Return a given end of a rho-schedule if the path trains such a level, a thousandth of slack for rounded ends."""
    _check_positive(name, sigma)
    low, high = (math.exp(end) for end in path.log_sigma_range)
    if not low * 0.999 <= sigma <= high * 1.001:
        raise UserError(
            f"{name} = {sigma:g}: this objective trains noise levels from sigma {low:.4g} to {high:.4g}; choose "
            f"{name} between them, or leave it out."
        )
    return sigma


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name} = {value:g}: must be a finite number above 0; leave it out for the usual value.")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps = {steps}: a picture needs at least one sampler step; use 1 or more.")
