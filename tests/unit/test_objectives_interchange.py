"""What an export tells other programs: true of the model, and readable by them."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from sdxl_training.objectives.interchange import describe, facts, marker_keys, prediction_type, scheduler_config
from sdxl_training.records import UserError
from tests.objective_table import OBJECTIVES, objective_called

every_objective = pytest.mark.parametrize("name", OBJECTIVES)

V = ("v", {"v_pred"}, "EulerDiscreteScheduler")
V_ZERO_TERMINAL = ("v", {"v_pred", "ztsnr"}, "EulerDiscreteScheduler")
COSXL = {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}
EXPECTED: dict[str, tuple[str, set[str], str | None]] = {
    "epsilon": ("epsilon", set(), "EulerDiscreteScheduler"),
    "v": V,
    "v_zt": V_ZERO_TERMINAL,
    "x0": ("x0", set(), "EulerDiscreteScheduler"),
    "x0_zt": ("x0", set(), "EulerDiscreteScheduler"),
    "flow_raw": ("flow", set(), "FlowMatchEulerDiscreteScheduler"),
    "flow_vp": V,
    "flow_vp_zt": V_ZERO_TERMINAL,
    "edm": V,
    "edm_zt": V_ZERO_TERMINAL,
    "edm_half": ("edm", set(), None),
    "edm_c_noise": ("edm", COSXL, "EDMEulerScheduler"),
    "edm_half_c_noise": ("edm", set(), "EDMEulerScheduler"),
}
"""modelspec.prediction_type, marker keys, and the scheduler of diffusers.

Preconditioned flow, and edm with sigma_data 1 and SDXL's labels, leave a v-prediction network. What ComfyUI takes
edm_vpred for has sigma_data 1 and labels ln(sigma) / 4, so nothing else may bear it.
"""
DRAWN_BY_DIFFUSERS = [name for name, (_, _, scheduler) in EXPECTED.items() if scheduler]


def test_every_objective_has_its_row() -> None:
    assert list(EXPECTED) == list(OBJECTIVES)


@every_objective
def test_prediction_type_and_markers(name: str) -> None:
    objective = objective_called(name)
    prediction, markers, _ = EXPECTED[name]
    keys = marker_keys(objective)
    assert prediction_type(objective) == prediction
    assert set(keys) == markers
    for key, value in keys.items():
        if key in COSXL:
            assert (value.dtype, value.shape) == (torch.float32, ())
            assert float(value) == pytest.approx({"edm_vpred.sigma_max": 80.0, "edm_vpred.sigma_min": 0.002}[key])
        else:
            assert value.numel() == 0


@pytest.mark.parametrize("name", DRAWN_BY_DIFFUSERS)
def test_exported_scheduler_is_what_diffusers_builds(name: str) -> None:
    """No key is unknown to its class, and every value arrives."""
    config = scheduler_config(objective_called(name))
    kind = config.pop("_class_name")
    assert kind == EXPECTED[name][2]
    scheduler: Any = getattr(diffusers, kind).from_config(config)
    assert set(config) <= set(inspect.signature(type(scheduler).__init__).parameters)
    assert {key: scheduler.config[key] for key in config} == config
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5
    assert torch.isfinite(torch.as_tensor(scheduler.sigmas)).all()


@pytest.mark.parametrize("name", [name for name in DRAWN_BY_DIFFUSERS if EXPECTED[name][2] == "EulerDiscreteScheduler"])
def test_exported_schedule_is_the_one_of_the_labels(name: str) -> None:
    config = scheduler_config(objective_called(name))
    assert config["rescale_betas_zero_snr"] is name.endswith("_zt")
    assert config["timestep_spacing"] == "trailing", "the only spacing that begins at timestep 999"
    words = {"epsilon": "epsilon", "x0": "sample"}
    assert config["prediction_type"] == words.get(name.removesuffix("_zt"), "v_prediction")


def test_edm_with_labels_that_no_scheduler_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"label: timestep.*sigma_data other than 1.*sdxl-training sample"):
        scheduler_config(objective_called("edm_half"))


@every_objective
def test_description_claims_only_what_is_true(name: str) -> None:
    text = describe(objective_called(name))
    prediction, markers, scheduler = EXPECTED[name]
    assert ("V-prediction" in text) is (prediction == "v")
    if prediction == "v":
        assert ("with zero terminal SNR" in text) is ("ztsnr" in markers)
        assert ("without zero terminal SNR" in text) is ("ztsnr" not in markers)
        origin = {"flow_vp": "trained as flow_matching", "flow_vp_zt": "trained as flow_matching"}
        origin |= {"edm": "trained as edm", "edm_zt": "trained as edm"}
        assert origin.get(name, "samples it") in text
        assert ("trained as" in text) is (name in origin)
    assert ("CosXL" in text) is (markers == COSXL)
    assert ("EDMEulerScheduler" in text) is (scheduler == "EDMEulerScheduler")
    assert ("FlowMatchEulerDiscreteScheduler" in text) is (scheduler == "FlowMatchEulerDiscreteScheduler")
    if prediction == "edm":
        assert ("sigma_data 0.5" in text) is ("half" in name)
        assert ("ln(sigma) / 4" in text) is name.endswith("c_noise")
    if scheduler is None or prediction == "flow":
        assert "sdxl-training sample" in text


@every_objective
def test_facts_say_what_a_sampler_must_know(name: str) -> None:
    told = facts(objective_called(name))
    kind, options = OBJECTIVES[name]
    assert told["objective"] == kind
    assert all(isinstance(value, str) for value in told.values()), "safetensors metadata holds strings"
    if kind == "flow_matching":
        assert (told["flow.sign"], told["flow.time"]) == ("noise_minus_data", "0 clean, 1 noise")
    if name == "flow_raw":
        assert (told["flow.t_scale"], told["flow.input_scale"], told["flow.label"]) == ("1000", "none", "raw")
        return
    assert told["zero_terminal_snr"] == str(options.get("zero_terminal_snr", False)).lower()
    if kind == "flow_matching":
        assert (told["flow.input_scale"], told["flow.label"], told["flow.output"]) == ("vp", "snr_matched", "v")
    if kind == "edm":
        assert float(told["edm.sigma_data"]) == options["sigma_data"]
        assert told["edm.label"] == options["label"]
