"""Schedules, targets and samplers against diffusers, the code that users will sample exported models with."""

from __future__ import annotations

import diffusers
import numpy
import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.densities import Uniform
from sdxl_training.objectives.interchange import scheduler_config
from sdxl_training.objectives.objective import Objective, make_objective
from sdxl_training.objectives.paths import VariancePreservingPath
from sdxl_training.objectives.sampling import draw
from sdxl_training.objectives.weights import NoWeight

EPSILON = make_objective("epsilon", {}, Uniform(), NoWeight())
V_ZERO_TERMINAL = make_objective("v_prediction", {"zero_terminal_snr": True}, Uniform(), NoWeight())
FLOW = make_objective("flow_matching", {}, Uniform(), NoWeight())
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def toy_network(x: Tensor, label: Tensor) -> Tensor:
    """Linear in x, mixing neighbours, different at each noise level."""
    level = label.float() / 1000
    return 0.4 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(2, 1) + 0.5 * level * x.roll(1, -2) + 0.1


def predict(x: Tensor, label_B: Tensor) -> Tensor:
    return toy_network(x, label_B[0])


def draw_with(scheduler: object, noise: Tensor) -> Tensor:
    """The loop of diffusers' pipelines around a scheduler whose steps are set."""
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(toy_network(model_input, timestep), timestep, x, return_dict=False)[0]
    return x


def scheduler_for(objective: Objective) -> object:
    """What a user gets who loads the exported scheduler_config.json."""
    config = scheduler_config(objective)
    return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noise_table_is_that_of_diffusers(zero_terminal_snr: bool) -> None:
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_terminal_snr
    ).alphas_cumprod
    ours = VariancePreservingPath(zero_terminal_snr).alphas_bar_T
    assert float((ours - theirs.double()).abs().max()) < 1e-6


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_inputs_and_v_targets_are_those_of_diffusers(zero_terminal_snr: bool) -> None:
    objective = make_objective("v_prediction", {"zero_terminal_snr": zero_terminal_snr}, Uniform(), NoWeight())
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_terminal_snr
    )
    timesteps = torch.tensor([0, 500, 998, 999])
    levels = VariancePreservingPath(zero_terminal_snr).at_timesteps(timesteps)
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(objective.add_noise(x0, eps, levels), scheduler.add_noise(x0, eps, timesteps), atol=2e-5)
    velocity = scheduler.get_velocity(x0, eps, timesteps)
    assert float(objective.loss_per_sample(velocity, x0, eps, levels).max()) < 1e-9


@pytest.mark.parametrize("objective", [EPSILON, V_ZERO_TERMINAL], ids=["epsilon", "v_zero_terminal"])
@pytest.mark.parametrize("steps", [1, 7, 25, 28, 30, 50, 333, 1000])
def test_levels_of_a_sampler_are_those_of_the_exported_scheduler(objective: Objective, steps: int) -> None:
    scheduler = scheduler_for(objective)
    scheduler.set_timesteps(steps)
    levels = objective.path.sampling_levels(steps)
    assert scheduler.timesteps[:steps].tolist() == levels.label_B.tolist()
    first = 1 if objective is V_ZERO_TERMINAL else 0  # diffusers puts sigma 4096 for infinity
    ours = (levels.b_B.double() / levels.a_B.double())[first:]
    assert torch.allclose(ours, scheduler.sigmas[first:steps].double(), rtol=3e-4)


def test_epsilon_pictures_are_those_of_the_exported_euler_scheduler() -> None:
    """Its pipelines start from b eps, where ours (and DDIM's) start from eps: 0.23 % on SDXL's table."""
    scheduler = scheduler_for(EPSILON)
    scheduler.set_timesteps(28)
    b_first = EPSILON.path.sampling_levels(28).b_B[0]
    theirs, ours = draw_with(scheduler, NOISE), draw(predict, EPSILON, NOISE * b_first, 28)
    assert float(ours.std()) > 0.5
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 5e-6
    unscaled = draw(predict, EPSILON, NOISE, 28)
    assert float((unscaled - theirs).abs().max() / theirs.abs().max()) < 5e-3


def test_v_pictures_are_those_of_the_exported_euler_scheduler() -> None:
    """The limit is diffusers' alpha-bar of 2^-24 for 0, which leaves 1/4096 of the noise in the first x0."""
    scheduler = scheduler_for(V_ZERO_TERMINAL)
    scheduler.set_timesteps(28)
    theirs, ours = draw_with(scheduler, NOISE), draw(predict, V_ZERO_TERMINAL, NOISE, 28)
    assert float(ours.std()) > 0.1
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 3e-4


def test_nothing_but_the_stand_in_for_zero_separates_v_from_euler() -> None:
    """With 2^-24 in our table too, what is left is float32 at sigma 4096."""
    path = VariancePreservingPath(zero_terminal_snr=True)
    path.alphas_bar_T[-1] = 2.0**-24
    objective = Objective("v", path, V_ZERO_TERMINAL.head, Uniform(), NoWeight())
    scheduler = scheduler_for(objective)
    scheduler.set_timesteps(28)
    theirs, ours = draw_with(scheduler, NOISE), draw(predict, objective, NOISE, 28)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-5


@pytest.mark.parametrize("objective", [EPSILON, V_ZERO_TERMINAL], ids=["epsilon", "v_zero_terminal"])
def test_pictures_are_those_of_ddim(objective: Objective) -> None:
    """DDIM keeps exact zero, so nothing but float32 separates the two."""
    config = scheduler_config(objective)
    scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    theirs, ours = draw_with(scheduler, NOISE), draw(predict, objective, NOISE, 25)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 5e-6


@pytest.mark.parametrize("steps", [4, 28])
def test_flow_pictures_are_those_of_the_exported_flow_scheduler(steps: int) -> None:
    """Left to itself that scheduler ends its grid at 1/1000; the sigmas are therefore handed to it."""
    scheduler = scheduler_for(FLOW)
    scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps))
    assert scheduler.timesteps.tolist() == pytest.approx(FLOW.path.sampling_levels(steps).label_B.tolist(), abs=1e-3)
    theirs, ours = draw_with(scheduler, NOISE), draw(predict, FLOW, NOISE, steps)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-6


def test_flow_inputs_and_targets_are_those_of_diffusers() -> None:
    scheduler = scheduler_for(FLOW)
    labels = scheduler.timesteps[[0, 400, 900]]
    levels = FLOW.path.at_times(labels.double() / 1000)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = scheduler.scale_noise(x0, labels, eps)
    assert torch.allclose(FLOW.add_noise(x0, eps, levels), theirs, atol=1e-6)
    assert torch.equal(levels.label_B, labels)


@pytest.mark.parametrize("objective", [EPSILON, V_ZERO_TERMINAL, FLOW], ids=["epsilon", "v_zero_terminal", "flow"])
def test_exported_configuration_has_no_unknown_keys(objective: Objective) -> None:
    config = scheduler_config(objective)
    scheduler = scheduler_for(objective)
    assert {key: scheduler.config[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
