"""How other programs are told what a model was trained to predict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdxl_training.objectives.heads import EpsilonHead, FlowHead, VelocityHead
from sdxl_training.objectives.objective import Objective


def scheduler_config(objective: Objective) -> dict[str, Any]:
    """Return the diffusers scheduler configuration that samples a model trained with this objective."""
    if isinstance(objective.head, FlowHead):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    return {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction" if isinstance(objective.head, VelocityHead) else "epsilon",
        "rescale_betas_zero_snr": objective.path.zero_terminal_snr,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }


def prediction_type(objective: Objective) -> str:
    """Return the word for `modelspec.prediction_type`: epsilon, v, or (no word of the standard) flow."""
    return {EpsilonHead: "epsilon", VelocityHead: "v", FlowHead: "flow"}[type(objective.head)]


def marker_keys(objective: Objective) -> dict[str, Tensor]:
    """Return the empty tensors by which ComfyUI and AUTOMATIC1111 recognise v-prediction (v_pred) and ZTSNR (ztsnr)."""
    if not isinstance(objective.head, VelocityHead):
        return {}
    names = ["v_pred", "ztsnr"] if objective.path.zero_terminal_snr else ["v_pred"]
    return {name: torch.tensor([]) for name in names}


def facts(objective: Objective) -> dict[str, str]:
    """Return what a reader of the file must know to sample a model that no standard describes; metadata strings."""
    if isinstance(objective.head, FlowHead):
        return {
            "objective": "flow_matching",
            "flow.sign": "noise_minus_data",
            "flow.time": "0 clean, 1 noise",
            "flow.t_scale": "1000",
            "flow.input_scale": "none",
            "flow.shift": "1.0",
        }
    return {"objective": objective.name, "zero_terminal_snr": str(objective.path.zero_terminal_snr).lower()}


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
    if isinstance(objective.head, VelocityHead):
        terminal = "with" if objective.path.zero_terminal_snr else "without"
        return (
            f"V-prediction {terminal} zero terminal SNR, on SDXL's schedule. Any program that knows v-prediction "
            "models samples it; use trailing timestep spacing, so that the first step sees pure noise."
        )
    return "Epsilon prediction on SDXL's own schedule: any program that samples SDXL samples it."
