"""Samplers and grids against diffusers' schedulers, and against the k-diffusion samplers written out here.

Where the two differ for a reason, the reason stands in the test and the difference is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import numpy
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from sdxl_training.objectives.grids import Grid, Karras, Linear, Native, Trailing
from sdxl_training.objectives.heads import Head
from sdxl_training.objectives.objective import path_and_head
from sdxl_training.objectives.paths import NoisePath, TimestepTable
from sdxl_training.objectives.sampling import draw, guide

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "x0": "sample"}


class Setting(NamedTuple):
    """What a sampler reads of an objective."""

    path: NoisePath
    head: Head


@dataclass(frozen=True)
class Chosen:
    """A grid of given sigmas."""

    sigmas: Sequence[float]

    def log_sigma(self, path: NoisePath, steps: int) -> Tensor:
        return torch.tensor(self.sigmas, dtype=torch.float64).log()


def setting(name: str, **options: Any) -> Any:
    if name in ("v_prediction", "x0"):
        options = {"zero_terminal_snr": False, **options}
    return Setting(*path_and_head(name, options))


FLOW = setting("flow_matching", mode="raw", zero_terminal_snr=True)
EDM = setting("edm", sigma_data=0.5, label="c_noise", zero_terminal_snr=False)


def toy_network(x: Tensor, label: Tensor) -> Tensor:
    """Linear in x, mixing neighbours, different at each noise level."""
    level = label.float() / 1000
    return 0.4 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(2, 1) + 0.5 * level * x.roll(1, -2) + 0.1


def predict(x: Tensor, label_B: Tensor) -> Tensor:
    return toy_network(x, label_B[0])


def without_label(x: Tensor, label: Tensor) -> Tensor:
    return toy_network(x, torch.tensor(500.0))


def draw_with(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor] = toy_network) -> Tensor:
    """The loop of diffusers' pipelines around a scheduler whose steps are set."""
    x = NOISE * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(model_input, timestep), timestep, x, return_dict=False)[0]
    return x


def from_sigma_max(objective: Any, grid: Grid, steps: int) -> Tensor:
    """Noise for which `draw` starts like the samplers in sigma: at b times NOISE, ours at NOISE itself on this path."""
    return NOISE * float(objective.path.at(grid.log_sigma(objective.path, steps)).b_B[0])


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert float(ours.std()) > 0.1
    return float((ours - theirs).abs().max() / theirs.abs().max())


# --- first order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (Trailing(), {"timestep_spacing": "trailing"}),
        (Native(), {"timestep_spacing": "linspace"}),
        (Karras(), {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    ],
    ids=["trailing", "native", "karras"],
)
def test_euler_is_that_of_diffusers(name: str, grid: Grid, options: dict[str, Any]) -> None:
    """In 28 steps, where `native` falls on whole timesteps."""
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL, **options, prediction_type=PREDICTIONS[name])
    scheduler.set_timesteps(28)
    objective = setting(name)
    ours = draw(predict, objective, from_sigma_max(objective, grid, 28), 28, "euler", grid)
    assert difference(ours, draw_with(scheduler)) < 2e-5


def test_fractional_timesteps_are_log_linear_where_those_of_diffusers_are_linear_in_sigma() -> None:
    """0.5 % at most, between the timesteps 1 and 2; the fractions that the network is told agree."""
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL, timestep_spacing="linspace")
    scheduler.set_timesteps(700)
    path = setting("epsilon").path
    log_sigma_S = Native().log_sigma(path, 700)
    assert path.at(log_sigma_S).label_B.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=1e-3)
    ratio = scheduler.sigmas[:-1].double() / log_sigma_S.exp()
    assert float(ratio.min()) > 1 - 2e-5
    assert 1.004 < float(ratio.max()) < 1.006


def ddim_scheduler(steps: int, **options: Any) -> Any:
    options |= {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = diffusers.DDIMScheduler(**SDXL, **options, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 10, 25])
def test_ddim_is_that_of_diffusers(zero_terminal_snr: bool, steps: int) -> None:
    """It keeps exact zero terminal SNR and starts from the noise itself, as we do."""
    scheduler = ddim_scheduler(steps, rescale_betas_zero_snr=zero_terminal_snr)
    ours = draw(predict, setting("v_prediction", zero_terminal_snr=zero_terminal_snr), NOISE, steps, "ddim", Trailing())
    assert difference(ours, draw_with(scheduler)) < 5e-6


def test_ddim_of_diffusers_misses_the_next_level_where_steps_do_not_divide_1000() -> None:
    """In 7 steps it goes from t to t - 142, whatever the next timestep is that it then tells the network."""
    scheduler = ddim_scheduler(7)
    assert scheduler.timesteps.diff().tolist() == [-143, -143, -143, -142, -143, -143]
    ours = draw(predict, setting("v_prediction"), NOISE, 7, "ddim", Trailing())
    assert difference(ours, draw_with(scheduler)) > 1e-3


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 28])
def test_flow_euler_is_that_of_diffusers_where_sigmas_are_handed_to_it(shift: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps))
    labels = FLOW.path.at(Linear(shift).log_sigma(FLOW.path, steps)).label_B
    assert scheduler.timesteps.tolist() == pytest.approx(labels.tolist(), abs=1e-3)
    assert difference(draw(predict, FLOW, NOISE, steps, "euler", Linear(shift)), draw_with(scheduler)) < 2e-6


def test_the_flow_scheduler_left_to_itself_shifts_its_last_level_twice() -> None:
    """Shift 3 takes t = 1/1000 to 0.002994; diffusers, which starts from shifted ends, shifts that once more."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(1000)
    once = Linear(3.0).log_sigma(FLOW.path, 1000)[-1:].sigmoid()
    twice = (once.logit() + math.log(3.0)).sigmoid()
    assert float(once) == pytest.approx(0.002994, abs=1e-6)
    assert float(twice) == pytest.approx(0.008929, abs=1e-6)
    assert float(scheduler.sigmas[-2]) == pytest.approx(float(twice), abs=1e-6)


def edm_noise() -> Tensor:
    """Diffusers starts EDM at sqrt(sigma_max^2 + 1) n, Karras et al. and ours at sigma_max n: a factor of 1.00008."""
    return NOISE * math.hypot(80, 1) / 80


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(diffusers.EDMEulerScheduler, "euler"), (diffusers.EDMDPMSolverMultistepScheduler, "dpmpp_2m")],
    ids=["euler", "dpmpp_2m"],
)
def test_edm_samplers_are_those_of_diffusers(scheduler: Any, sampler: str) -> None:
    """Its v_prediction is F with the opposite sign, which is our head's."""
    theirs = scheduler(sigma_data=0.5, prediction_type="v_prediction")
    theirs.set_timesteps(18)
    ours = EDM.path.at(Karras().log_sigma(EDM.path, 18))
    assert theirs.timesteps.tolist() == pytest.approx(ours.label_B.tolist(), abs=2e-5)
    assert difference(draw(predict, EDM, edm_noise(), 18, sampler), draw_with(theirs)) < 3e-5


# --- second order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (Trailing(), {"timestep_spacing": "trailing"}),
        (Karras(), {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    ],
    ids=["trailing", "karras"],
)
def test_heun_is_that_of_diffusers(name: str, grid: Grid, options: dict[str, Any]) -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**SDXL, **options, prediction_type=PREDICTIONS[name])
    scheduler.set_timesteps(20)
    objective = setting(name)
    ours = draw(predict, objective, from_sigma_max(objective, grid, 20), 20, "heun", grid)
    assert difference(ours, draw_with(scheduler)) < 5e-5


def test_heun_in_flow_time_is_that_of_diffusers() -> None:
    """On its own grid, which ends at 1/1000 instead of 1/steps."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    times = torch.linspace(1, 0.001, 20, dtype=torch.float64)
    assert scheduler.sigmas[[0, *range(1, 38, 2)]].tolist() == pytest.approx(times.tolist(), abs=1e-6)
    ours = draw(predict, FLOW, NOISE, 20, "heun", Chosen((times / (1 - times)).tolist()))
    assert difference(ours, draw_with(scheduler)) < 5e-6


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_the_multistep_sampler_is_that_of_diffusers(name: str, steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SDXL, timestep_spacing="trailing", prediction_type=PREDICTIONS[name]
    )
    scheduler.set_timesteps(steps)
    assert difference(draw(predict, setting(name), NOISE, steps, "dpmpp_2m", Trailing()), draw_with(scheduler)) < 5e-5


def test_the_multistep_sampler_in_flow_time_is_that_of_diffusers() -> None:
    """Apart from labels, which diffusers cuts to whole numbers; the network here reads none."""
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(20)
    times = scheduler.sigmas[:-1].double()
    grid = Chosen((times / (1 - times)).tolist())
    ours = draw(without_label, FLOW, NOISE / times[0], 20, "dpmpp_2m", grid)
    assert difference(ours.float(), draw_with(scheduler, without_label)) < 2e-5
    labels = FLOW.path.at(grid.log_sigma(FLOW.path, 20)).label_B
    assert scheduler.timesteps.tolist() == labels.floor().long().tolist()


def test_a_rho_schedule_keeps_the_fractional_labels_that_the_multistep_scheduler_rounds() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SDXL, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    objective = setting("epsilon")
    log_sigma_S = Karras().log_sigma(objective.path, 20)
    labels = objective.path.at(log_sigma_S).label_B
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(log_sigma_S.exp().tolist(), rel=2e-5)
    assert scheduler.timesteps.tolist() == labels.round().long().tolist()
    assert float((labels - labels.round()).abs().max()) > 0.3
    ours = draw(without_label, objective, NOISE, 20, "dpmpp_2m", Karras())
    assert difference(ours, draw_with(scheduler, without_label)) < 5e-5


def test_nothing_is_extrapolated_from_infinite_sigma_where_diffusers_does_from_4096() -> None:
    """With alpha-bar 2^-24 for 0 the second step has a step before it in ln sigma; with exact zero it has none."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SDXL, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    scheduler.set_timesteps(4)
    theirs = draw_with(scheduler)
    objective = setting("v_prediction", zero_terminal_snr=True)
    assert difference(draw(predict, objective, NOISE, 4, "dpmpp_2m", Trailing()), theirs) > 5e-3

    levels_at, table = objective.path.at, TimestepTable(zero_terminal_snr=True)
    sigmas = [4096.0, *table.log_sigma_T[scheduler.timesteps[1:]].exp().tolist()]
    # Sigma 4096 lies half-way from 998 to infinity on our table; diffusers calls it 999.
    objective.path.at = lambda log_sigma_B: replace(levels_at(log_sigma_B), label_B=scheduler.timesteps.float())
    ours = draw(predict, objective, NOISE, 4, "dpmpp_2m", Chosen(sigmas))
    assert difference(ours, theirs) < 3e-4, "what is left is float32 at sigma 4096"


# --- k-diffusion, written out ----------------------------------------------------------------------------------------

Denoiser = Callable[[Tensor, float], Tensor]
SIGMAS = [14.0, 8.0, 4.5, 2.5, 1.3, 0.7, 0.3, 0.1, 0.0]


def k_euler(denoiser: Denoiser, x: Tensor) -> Tensor:
    for sigma, sigma_next in pairwise(SIGMAS):
        x = x + (x - denoiser(x, sigma)) / sigma * (sigma_next - sigma)
    return x


def k_heun(denoiser: Denoiser, x: Tensor) -> Tensor:
    for sigma, sigma_next in pairwise(SIGMAS):
        slope = (x - denoiser(x, sigma)) / sigma
        ahead = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope = (slope + (ahead - denoiser(ahead, sigma_next)) / sigma_next) / 2
        x = x + slope * (sigma_next - sigma)
    return x


def k_dpmpp_2m(denoiser: Denoiser, x: Tensor) -> Tensor:
    before, step_before = x, math.inf
    for sigma, sigma_next in pairwise(SIGMAS):
        denoised = denoiser(x, sigma)
        if sigma_next == 0:
            return denoised
        step = math.log(sigma / sigma_next)
        ratio = step_before / step
        mixed = (1 + 1 / (2 * ratio)) * denoised - 1 / (2 * ratio) * before
        x = sigma_next / sigma * x - math.expm1(-step) * mixed
        before, step_before = denoised, step
    raise AssertionError


@pytest.mark.parametrize("name", ["v_prediction", "x0", "epsilon", "edm"])
@pytest.mark.parametrize(("sampler", "walk"), [("euler", k_euler), ("heun", k_heun), ("dpmpp_2m", k_dpmpp_2m)])
def test_samplers_are_those_of_k_diffusion(name: str, sampler: str, walk: Callable[[Denoiser, Tensor], Tensor]) -> None:
    def denoiser(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh((x / math.hypot(1, sigma)).roll(1, -1)) * (1 + 0.3 * math.log1p(sigma))

    objective = EDM if name == "edm" else setting(name)
    labels = objective.path.at(Chosen(SIGMAS[:-1]).log_sigma(objective.path, 8)).label_B.tolist()

    def network(x: Tensor, label_B: Tensor) -> Tensor:
        sigma = SIGMAS[labels.index(float(label_B[0]))]
        levels = objective.path.at(torch.tensor([sigma], dtype=torch.float64).log())
        a, b = levels.a_B.double(), levels.b_B.double()
        x0 = denoiser(x / a, sigma)
        output: Tensor = objective.head.target(x0, (x - a * x0) / b, a, b)
        return output

    noise = NOISE.double() if name == "edm" else NOISE.double() * 14 / math.hypot(14, 1)
    ours = draw(network, objective, noise, 8, sampler, Chosen(SIGMAS[:-1]))
    assert difference(ours, walk(denoiser, NOISE.double() * 14)) < 5e-6


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(rescale: float) -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = rescale_noise_cfg(unconditional + 7.5 * (conditional - unconditional), conditional, rescale)
    assert torch.allclose(guide(unconditional, conditional, 7.5, rescale), theirs, atol=1e-5)
