"""Drawing pictures: one walk down a grid of levels for every objective.

In the network's own input x = a x0 + b eps a first-order step is x' = a' x0 + b' eps, whatever the path: DDIM without
noise, Euler in sigma and Euler in flow time are one and the same. It is regular at pure noise (a = 0) and at the clean
end, where x' is x0 itself. The second-order samplers are this step and a correction.

Shape legend: B pictures, C latent channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_training.objectives.grids import Grid, default_grid
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import FlowPath, PreconditionedFlowPath, VariancePreservingPath

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, label_B) -> the network's output, guidance included."""
Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x_BCHW, number of its level) -> the (x0_BCHW, eps_BCHW) that the network sees in x."""


@dataclass(frozen=True)
class Schedule:
    """The levels of one drawing, float64: one a step, noisiest first, and in `a` and `b` the clean end after them.

    flow_time: whether the path's own clock is t = b / (a + b) instead of sigma = b / a.
    """

    a: list[float]
    b: list[float]
    log_sigma: list[float]
    flow_time: bool

    def __len__(self) -> int:
        return len(self.log_sigma)

    def first_order(self, i: int, x0_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
        """Return x at the level after the i-th."""
        return self.a[i + 1] * x0_BCHW + self.b[i + 1] * eps_BCHW

    def heun_gain(self, i: int) -> float:
        """Return the factor on the change of slope in Heun's correction of step i; 0 where the step stays Euler's.

        On either clock x / s moves along a straight line in b / s, with s = a for sigma and s = a + b for flow time.
        """
        scale, scale_next = (self.a[j] + self.flow_time * self.b[j] for j in (i, i + 1))
        if scale == 0 or i == len(self) - 1:
            return 0.0
        return (self.b[i + 1] - scale_next / scale * self.b[i]) / 2

    def multistep_gain(self, i: int) -> float:
        """Return the factor on the change of x0 in DPM-Solver++(2M)'s correction of step i; 0 where there is none."""
        if i in (0, len(self) - 1):
            return 0.0
        before, ahead = (self.log_sigma[j] - self.log_sigma[j + 1] for j in (i - 1, i))
        return (self.a[i + 1] - self.a[i] * self.b[i + 1] / self.b[i]) * ahead / (2 * before)


def _euler(denoise: Denoise, schedule: Schedule, x_BCHW: Tensor) -> Tensor:
    """Walk by first-order steps: Euler's, and DDIM's with eta = 0 (Song et al. 2021)."""
    for i in range(len(schedule)):
        x_BCHW = schedule.first_order(i, *denoise(x_BCHW, i))
    return x_BCHW


def _heun(denoise: Denoise, schedule: Schedule, x_BCHW: Tensor) -> Tensor:
    """Walk by Heun's steps: algorithm 1 of Karras et al. 2022 on the path's own clock.

    The slope is taken at both ends of a step, so a step costs two evaluations, except the last and one that starts at
    an infinite sigma, which are Euler's.
    """
    for i in range(len(schedule)):
        x0_BCHW, eps_BCHW = denoise(x_BCHW, i)
        x_BCHW = schedule.first_order(i, x0_BCHW, eps_BCHW)
        gain = schedule.heun_gain(i)
        if gain:
            x0_ahead_BCHW, eps_ahead_BCHW = denoise(x_BCHW, i + 1)
            change_BCHW = eps_ahead_BCHW - eps_BCHW
            if schedule.flow_time:
                change_BCHW = change_BCHW - (x0_ahead_BCHW - x0_BCHW)
            x_BCHW = x_BCHW + gain * change_BCHW
    return x_BCHW


def _dpmpp_2m(denoise: Denoise, schedule: Schedule, x_BCHW: Tensor) -> Tensor:
    """Walk by DPM-Solver++(2M) (Lu et al. 2022): x0 is extrapolated in ln sigma from the step before.

    First order at the first step, at the last, and at the one after an infinite sigma, from which nothing can be
    extrapolated.
    """
    x0_before_BCHW = x_BCHW
    for i in range(len(schedule)):
        x0_BCHW, eps_BCHW = denoise(x_BCHW, i)
        x_BCHW = schedule.first_order(i, x0_BCHW, eps_BCHW)
        gain = schedule.multistep_gain(i)
        if gain:
            x_BCHW = x_BCHW + gain * (x0_BCHW - x0_before_BCHW)
        x0_before_BCHW = x0_BCHW
    return x_BCHW


SAMPLERS: dict[str, Callable[[Denoise, Schedule, Tensor], Tensor]] = {
    "euler": _euler,
    "ddim": _euler,  # one step under its second name
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
}


@torch.no_grad()
def draw(
    predict: Predict,
    objective: Objective,
    noise_BCHW: Tensor,
    steps: int,
    sampler: str = "euler",
    grid: Grid | None = None,
) -> Tensor:
    """Return clean latents from standard normal noise in `steps` steps of the grid; None is the path's own grid.

    A step is one evaluation of the network, with heun two. The first input is the noise itself where the path keeps the
    variance, else b times the noise (Karras et al. 2022: sigma_max n). Where SNR is not zero there, as for epsilon on
    SDXL's own table, the signal it lacks is the usual approximation. The whole loop runs in the noise's precision; use
    float32. Raises UserError for steps or a grid that the path does not have.
    """
    path, head = objective.path, objective.head
    log_sigma_S = (default_grid(path) if grid is None else grid).log_sigma(path, steps)
    levels = path.at(log_sigma_S)
    schedule = Schedule(
        a=[*levels.a_B.tolist(), 1.0],
        b=[*levels.b_B.tolist(), 0.0],
        log_sigma=log_sigma_S.tolist(),
        flow_time=isinstance(path, (FlowPath, PreconditionedFlowPath)),
    )
    levels = levels.to(noise_BCHW.device)

    def denoise(x_BCHW: Tensor, i: int) -> tuple[Tensor, Tensor]:
        output_BCHW = predict(x_BCHW, levels.label_B[i].expand(len(x_BCHW))).to(x_BCHW.dtype)
        return head.clean_and_noise(output_BCHW, x_BCHW, levels.a_B[i], levels.b_B[i])

    start = 1.0 if isinstance(path, VariancePreservingPath) else schedule.b[0]
    return SAMPLERS[sampler](denoise, schedule, start * noise_BCHW)


def guide(unconditional: Tensor, conditional: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6, in the form u + g (c - u)): guidance 1 is none.

    Rescale draws each sample's standard deviation back to that of the conditional side by this share, 0 to 1, against
    overexposure at large guidance; 0 is off (Lin et al. 2024, section 3.4).
    """
    guided = unconditional + guidance * (conditional - unconditional)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return guided * (1 + rescale * (ratio - 1))
