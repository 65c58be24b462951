"""Published recipes as settings of the `training` section; what a file sets itself lies over them.

Each holds only what its source says about objective, levels, weight and noise. Learning rate, batch and length are
nobody's business but the user's.
"""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "level_shift": {"type": "none"},
    "stratified_levels": False,
    "loss_shape": {"type": "mse"},
    "noise": {"offset": 0.0, "pyramid": 0.0, "input_perturbation": 0.0},
    "coupling": {"type": "independent"},
}
"""What none of the sources mentions. Presets say it all the same, so that they mean the same over any base."""

PRESETS: dict[str, dict[str, Any]] = {
    # NovelAI Diffusion V3 (arXiv:2409.15997). What Min-SNR does at SNR 0 is not published: that it
    # is plus_one here is our choice.
    "nai_v3": {
        **PLAIN,
        "objective": {"type": "v_prediction", "zero_terminal_snr": True},
        "level_density": {"type": "uniform"},
        "loss_weight": {"type": "min_snr", "gamma": 5.0, "terminal": "plus_one", "minimum": 0.01, "normalise": False},
    },
    # nyaflow-xl-alpha (model card, July 2024) and the flow trainer of its author.
    "nyaflow": {
        **PLAIN,
        "objective": {"type": "flow_matching", "mode": "raw", "zero_terminal_snr": True},
        "level_density": {"type": "logit_normal", "mean": 0.0, "std": 1.0},
        "loss_weight": {"type": "none", "normalise": False},
    },
    # Stable Diffusion 3 (Esser et al. 2024): rf/lognorm(0.00, 1.00), shift 3 at 1024 pixels. The preconditioned mode
    # has the same loss at every level and lets it begin from SDXL.
    "sd3_flow": {
        **PLAIN,
        "objective": {"type": "flow_matching", "mode": "preconditioned", "zero_terminal_snr": True},
        "level_density": {"type": "logit_normal", "mean": 0.0, "std": 1.0},
        "level_shift": {"type": "fixed", "factor": 3.0},
        "loss_weight": {"type": "none", "normalise": False},
    },
    # EDM (Karras et al. 2022), table 1, with sigma_data = 1 for SDXL's latents, as in k-diffusion and sgm.
    "edm": {
        **PLAIN,
        "objective": {"type": "edm", "sigma_data": 1.0, "label": "timestep", "zero_terminal_snr": False},
        "level_density": {"type": "log_normal_sigma", "mean": -1.2, "std": 1.2},
        "loss_weight": {"type": "none", "normalise": False},
    },
    # SDXL base (Podell et al. 2023): epsilon, uniform timesteps, finished with offset noise 0.05.
    "sdxl_base": {
        **PLAIN,
        "objective": {"type": "epsilon"},
        "level_density": {"type": "uniform"},
        "loss_weight": {"type": "none", "normalise": False},
        "noise": {"offset": 0.05, "pyramid": 0.0, "input_perturbation": 0.0},
    },
}
