"""How other programs are told what a model was trained to predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdxl_training.objectives.grids import EDM_SIGMAS
from sdxl_training.objectives.heads import CleanHead, EpsilonHead, FlowHead, VelocityHead
from sdxl_training.objectives.objective import Objective
from sdxl_training.objectives.paths import EDMPath, PreconditionedFlowPath
from sdxl_training.records import UserError

FLOW_FACTS = {"objective": "flow_matching", "flow.sign": "noise_minus_data", "flow.time": "0 clean, 1 noise"}
"""What raw and preconditioned flow models have in common."""


def scheduler_config(objective: Objective) -> dict[str, Any]:
    """Return the diffusers scheduler configuration that samples a model trained with this objective.

    Raises UserError where diffusers has none: edm with SDXL's labels and a sigma_data other than 1.
    """
    if isinstance(objective.head, FlowHead):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    if _is_edm(objective):
        return _edm_scheduler(objective)
    return {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction_type(objective)],
        "rescale_betas_zero_snr": objective.path.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }


def _edm_scheduler(objective: Objective) -> dict[str, Any]:
    path = objective.path
    if not isinstance(path, EDMPath) or path.label == "timestep":
        raise UserError(
            "training.objective = edm with label: timestep and a sigma_data other than 1: diffusers has no scheduler "
            "that draws it. `sdxl-training sample` does; or export it as --format single_file for a program of yours."
        )
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sigma_data": path.sigma_data,
        "sigma_min": EDM_SIGMAS[0],
        "sigma_max": EDM_SIGMAS[1],
        "sigma_schedule": "karras",
        "rho": 7.0,
    }


def prediction_type(objective: Objective) -> str:
    """Return the word for `modelspec.prediction_type`: epsilon, v, or (no words of the standard) x0, flow, edm."""
    if _is_edm(objective):
        return "edm"
    names = {EpsilonHead: "epsilon", CleanHead: "x0", FlowHead: "flow"}
    return names.get(type(objective.head), "v")


def marker_keys(objective: Objective) -> dict[str, Tensor]:
    """Return the tensors by which ComfyUI and AUTOMATIC1111 recognise v-prediction, zero terminal SNR and EDM.

    v_pred and ztsnr are empty; edm_vpred.sigma_max and .sigma_min (ComfyUI, for models like CosXL) hold the range.
    ComfyUI takes sigma_data 1 and labels ln(sigma) / 4 for granted with these, so no other EDM model may bear them.
    """
    if _is_like_cosxl(objective):
        return {
            "edm_vpred.sigma_max": torch.tensor(EDM_SIGMAS[1]),
            "edm_vpred.sigma_min": torch.tensor(EDM_SIGMAS[0]),
        }
    if _is_edm(objective):
        return {}
    if not isinstance(objective.head, VelocityHead):
        return {}
    names = ["v_pred", "ztsnr"] if objective.path.zero_terminal_snr else ["v_pred"]
    return {name: torch.tensor([]) for name in names}


def facts(objective: Objective) -> dict[str, str]:
    """Return what a reader of the file must know to sample a model that no standard describes; metadata strings."""
    table = {"zero_terminal_snr": str(objective.path.zero_terminal_snr).lower()}
    if isinstance(objective.head, FlowHead):
        return {
            **FLOW_FACTS,
            "flow.t_scale": "1000",
            "flow.input_scale": "none",
            "flow.label": "raw",
            "flow.shift": "1.0",
        }
    if isinstance(objective.path, PreconditionedFlowPath):
        return {**FLOW_FACTS, "flow.input_scale": "vp", "flow.label": "snr_matched", "flow.output": "v", **table}
    if isinstance(objective.path, EDMPath):
        return {
            "objective": "edm",
            "edm.sigma_data": str(objective.path.sigma_data),
            "edm.label": objective.path.label,
            "edm.output": "v, that is -F of Karras et al. 2022",
            **table,
        }
    return {"objective": objective.name, **table}


def describe(objective: Objective) -> str:
    """Say in plain words what the model predicts and what can sample it."""
    if isinstance(objective.head, FlowHead):
        return (
            "Flow matching: the network predicts noise minus data on the straight path x = (1 - t) x0 + t noise, with "
            "time label 1000 t and unscaled input. diffusers' StableDiffusionXLPipeline cannot sample it (it has no "
            "place for a flow scheduler); `sdxl-training sample` can, and so can ComfyUI with the node "
            "ModelSamplingSD3 at shift 1. scheduler_config.json holds the matching FlowMatchEulerDiscreteScheduler "
            "for your own loops."
        )
    if isinstance(objective.path, EDMPath) and _is_edm(objective):
        return _describe_edm(objective, objective.path)
    if isinstance(objective.head, VelocityHead):
        terminal = "with" if objective.path.zero_terminal_snr else "without"
        trained = "" if objective.name == "v_prediction" else f" It was trained as {objective.name}."
        return (
            f"V-prediction {terminal} zero terminal SNR, on SDXL's schedule.{trained} Any program that knows "
            "v-prediction models samples it; use trailing timestep spacing, so that the first step sees pure noise."
        )
    if isinstance(objective.head, CleanHead):
        return (
            "The network predicts the clean latent, on SDXL's schedule. diffusers samples it (prediction_type: sample);"
            " other programs mostly do not."
        )
    return "Epsilon prediction on SDXL's own schedule: any program that samples SDXL samples it."


def _describe_edm(objective: Objective, path: EDMPath) -> str:
    what = f"EDM (Karras et al. 2022) with sigma_data {path.sigma_data:g}: the network predicts v at that input scale"
    if path.label == "timestep":
        return f"{what}, with SDXL's timesteps as labels. `sdxl-training sample` draws it; other programs do not."
    by_comfy = "ComfyUI knows the single file, as it does CosXL" if _is_like_cosxl(objective) else "ComfyUI does not"
    return f"{what}, with labels ln(sigma) / 4. diffusers draws it with EDMEulerScheduler; {by_comfy}."


def _is_like_cosxl(objective: Objective) -> bool:
    path = objective.path
    return isinstance(path, EDMPath) and path.sigma_data == 1 and path.label == "c_noise"


def _is_edm(objective: Objective) -> bool:
    """Whether the network is anything but a v-prediction network: other input scale, or other labels."""
    path = objective.path
    return isinstance(path, EDMPath) and (path.sigma_data != 1 or path.label != "timestep")
