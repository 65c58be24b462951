"""Schedules, inputs, targets, labels and denoisers against diffusers, with which users sample exported models.

Whole pictures are compared in test_samplers_parity.py and test_stock_diffusers_draws_the_same.py.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.interchange import scheduler_config
from sdxl_training.objectives.objective import Objective, per_sample
from sdxl_training.objectives.paths import Levels, TimestepTable
from tests.objective_table import OBJECTIVES, objective_called

BY_EULER = [name for name in OBJECTIVES if name != "flow_raw" and "half" not in name and "c_noise" not in name]
BY_EDM = {"edm": 1.0, "edm_half": 0.5, "edm_c_noise": 1.0, "edm_half_c_noise": 0.5}
both_tables = pytest.mark.parametrize("zero_terminal_snr", [False, True])


def random_pictures(count: int, batch: int) -> list[Tensor]:
    return list(torch.randn(count, batch, 4, 8, 8, generator=torch.Generator().manual_seed(1)))


def scheduler_for(objective: Objective) -> Any:
    """What a user gets who loads the exported scheduler_config.json."""
    config = scheduler_config(objective)
    return getattr(diffusers, config["_class_name"]).from_config(config)


def ddpm(zero_terminal_snr: bool) -> Any:
    return diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_terminal_snr
    )


def denoised(objective: Objective, output: Tensor, x: Tensor, levels: Levels) -> Tensor:
    a, b = per_sample(levels.a_B), per_sample(levels.b_B)
    return objective.head.clean_and_noise(output, x, a, b)[0]


@both_tables
def test_noise_table_is_that_of_diffusers(zero_terminal_snr: bool) -> None:
    theirs = ddpm(zero_terminal_snr).alphas_cumprod
    ours = TimestepTable(zero_terminal_snr).alphas_bar_T
    assert float((ours - theirs.double()).abs().max()) < 1e-6


@both_tables
@pytest.mark.parametrize("kind", ["v", "x0", "edm", "flow_vp"])
def test_inputs_are_those_of_diffusers_and_so_are_v_targets(zero_terminal_snr: bool, kind: str) -> None:
    """At SDXL's own levels all of these share one input; edm (sigma_data 1) and preconditioned flow also the target."""
    objective = objective_called(f"{kind}_zt" if zero_terminal_snr else kind)
    scheduler = ddpm(zero_terminal_snr)
    timesteps = torch.tensor([0, 500, 998, 999])
    levels = objective.path.at(TimestepTable(zero_terminal_snr).log_sigma_T[timesteps])
    x0, eps = random_pictures(2, 4)
    assert torch.equal(levels.label_B, timesteps.float())
    assert torch.allclose(objective.add_noise(x0, eps, levels), scheduler.add_noise(x0, eps, timesteps), atol=2e-5)
    target = x0 if kind == "x0" else scheduler.get_velocity(x0, eps, timesteps)
    assert float(objective.errors(target, x0, eps, levels).max()) < 1e-9


@pytest.mark.parametrize("name", BY_EULER)
def test_denoisers_are_those_of_the_exported_euler_scheduler(name: str) -> None:
    """Input, label and x0 at every step of a drawing, for one and the same output of the network.

    Pure noise is sigma 4096 in diffusers, so 1/4096 of the picture is still in its input there.
    """
    objective = objective_called(name)
    scheduler = scheduler_for(objective)
    scheduler.set_timesteps(10)
    x0, eps, output = random_pictures(3, 1)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        pure_noise = sigma > 4000
        levels = objective.path.at(torch.where(pure_noise, torch.inf, sigma.log())[None])
        exploding = x0 + sigma.float() * eps
        theirs_in = scheduler.scale_model_input(exploding, timestep)
        step = scheduler.step(output, timestep, exploding)
        ours_in = objective.add_noise(x0, eps, levels)
        assert torch.allclose(ours_in, theirs_in, atol=1e-3 if pure_noise else 1e-5)
        assert float(levels.label_B) == pytest.approx(float(timestep), abs=0.02), "their table is float32"
        ours = denoised(objective, output, ours_in, levels)
        # x0 is what eps and x leave of each other, times sigma; so is their rounding.
        assert torch.allclose(ours, step.pred_original_sample, rtol=1e-4, atol=2e-5 * float(sigma.clamp(1, 50)))


@both_tables
def test_labels_between_timesteps_are_those_of_diffusers(zero_terminal_snr: bool) -> None:
    """Its Karras grid falls between the entries of the table; ln sigma is interpolated there."""
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    if zero_terminal_snr:
        scheduler = diffusers.EulerDiscreteScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(30)
    sigmas = scheduler.sigmas[:-1].double()
    finite = sigmas < 2000  # theirs goes up to 4096, on a straight line where ours goes on to infinity
    ours = TimestepTable(zero_terminal_snr).timestep(sigmas.log())[finite]
    assert (ours != ours.round()).sum() > 20
    assert ours.tolist() == pytest.approx(scheduler.timesteps[finite].tolist(), abs=0.02)


@pytest.mark.parametrize("name", BY_EDM)
def test_edm_is_the_preconditioning_of_diffusers(name: str) -> None:
    """EDMEulerScheduler with v_prediction has c_out negative, which is our sign of the network."""
    objective, sigma_data = objective_called(name), BY_EDM[name]
    scheduler = diffusers.EDMEulerScheduler(sigma_data=sigma_data, prediction_type="v_prediction")
    x0, eps, output = random_pictures(3, 5)
    sigma = torch.tensor([0.002, 0.3, 1.0, 9.0, 80.0])
    levels = objective.path.at(sigma.double().log())
    sigma_B = per_sample(sigma)
    exploding = x0 + sigma_B * eps
    x = objective.add_noise(x0, eps, levels)
    assert torch.allclose(x, scheduler.precondition_inputs(exploding, sigma_B), atol=1e-5)
    theirs = scheduler.precondition_outputs(exploding, output, sigma_B)
    assert torch.allclose(denoised(objective, output, x, levels), theirs, rtol=1e-4, atol=3e-5)
    if name.endswith("c_noise"):
        assert torch.allclose(levels.label_B, scheduler.precondition_noise(sigma))
        exported = scheduler_for(objective)
        assert exported.config.sigma_data == sigma_data
        assert exported.config.prediction_type == "v_prediction"


def test_flow_inputs_targets_and_denoiser_are_those_of_diffusers() -> None:
    objective = objective_called("flow_raw")
    scheduler = scheduler_for(objective)
    labels = scheduler.timesteps[[0, 400, 900]]
    levels = objective.path.at(torch.logit(labels.double() / 1000))
    x0, eps, output = random_pictures(3, 3)
    assert torch.equal(levels.label_B, labels)
    x = objective.add_noise(x0, eps, levels)
    assert torch.allclose(x, scheduler.scale_noise(x0, labels, eps), atol=1e-6)
    for i in range(3):
        scheduler.set_timesteps(sigmas=[float(labels[i]) / 1000])  # one step, from there to clean
        theirs = scheduler.step(output[i], scheduler.timesteps[0], x[i]).prev_sample
        assert torch.allclose(denoised(objective, output, x, levels)[i], theirs, atol=1e-6)
