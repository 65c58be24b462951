"""Drawing pictures: one first-order stepper for every objective.

DDIM without noise, Euler in sigma and Euler in flow time are one and the same step x' = a' x0 + b' eps, so the
objective only chooses the grid of levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdxl_training.objectives.objective import Objective

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_BCHW, label_B) -> the network's output, guidance included."""


@torch.no_grad()
def draw(predict: Predict, objective: Objective, noise_BCHW: Tensor, steps: int) -> Tensor:
    """Return clean latents from standard normal noise in `steps` evaluations of the network.

    The first level's input is the noise itself: where SNR is not zero there (epsilon on SDXL's own table) this is the
    usual approximation. The whole loop runs in the noise's precision; use float32.
    """
    levels = objective.path.sampling_levels(steps).to(noise_BCHW.device)
    clean = torch.ones_like(levels.a_B[:1])
    a_next, b_next = torch.cat([levels.a_B[1:], clean]), torch.cat([levels.b_B[1:], torch.zeros_like(clean)])
    x_BCHW = noise_BCHW
    for i in range(steps):
        label_B = levels.label_B[i].expand(len(x_BCHW))
        output_BCHW = predict(x_BCHW, label_B).to(x_BCHW.dtype)
        x0_BCHW, eps_BCHW = objective.head.clean_and_noise(output_BCHW, x_BCHW, levels.a_B[i], levels.b_B[i])
        x_BCHW = a_next[i] * x0_BCHW + b_next[i] * eps_BCHW
    return x_BCHW


def guide(unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6, in the form u + g (c - u)): 1 is no guidance."""
    return unconditional + guidance * (conditional - unconditional)
