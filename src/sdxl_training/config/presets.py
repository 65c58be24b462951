"""Published recipes as settings of the `training` section; what a file sets itself lies over them.

Each holds only what its source says about objective, levels, weight and noise. Learning rate, batch and length are
nobody's business but the user's.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # NovelAI Diffusion V3 (arXiv:2409.15997). What Min-SNR does at SNR 0 is not published: that it
    # is plus_one here is our choice.
    "nai_v3": {
        "objective": {"type": "v_prediction", "zero_terminal_snr": True},
        "level_density": {"type": "uniform"},
        "loss_weight": {"type": "min_snr", "gamma": 5.0, "terminal": "plus_one"},
    },
    # nyaflow-xl-alpha (model card, July 2024) and the flow trainer of its author.
    "nyaflow": {
        "objective": {"type": "flow_matching", "mode": "raw"},
        "level_density": {"type": "logit_normal", "mean": 0.0, "std": 1.0},
        "loss_weight": {"type": "none"},
    },
    # Stable Diffusion 3 (Esser et al. 2024): rf/lognorm(0.00, 1.00), shift 3 at 1024 pixels. The preconditioned mode
    # has the same loss at every level and lets it begin from SDXL.
    "sd3_flow": {
        "objective": {"type": "flow_matching", "mode": "preconditioned", "zero_terminal_snr": True},
        "level_density": {"type": "logit_normal", "mean": 0.0, "std": 1.0},
        "level_shift": {"type": "fixed", "factor": 3.0},
        "loss_weight": {"type": "none"},
    },
    # EDM (Karras et al. 2022), table 1, with sigma_data = 1 for SDXL's latents, as in k-diffusion and sgm.
    "edm": {
        "objective": {"type": "edm", "sigma_data": 1.0, "label": "timestep"},
        "level_density": {"type": "log_normal_sigma", "mean": -1.2, "std": 1.2},
        "loss_weight": {"type": "none"},
    },
    # SDXL base (Podell et al. 2023): epsilon, uniform timesteps, finished with offset noise 0.05.
    "sdxl_base": {
        "objective": {"type": "epsilon"},
        "level_density": {"type": "uniform"},
        "loss_weight": {"type": "none"},
        "noise": {"offset": 0.05},
    },
}
