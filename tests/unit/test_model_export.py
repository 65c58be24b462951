"""Exports: what is in them, what is refused, and that nothing half-written is ever left."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from sdxl_training.model import export
from sdxl_training.model.export import export_diffusers, export_single_file, modelspec
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL, with_unet_weights
from sdxl_training.records import UserError
from tests.tiny_sdxl import tiny_pipeline

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
METADATA = modelspec("Tiny", "v", (64, 48), datetime(2026, 11, 23, 12, tzinfo=timezone.utc))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return load_sdxl(str(folder), seed=0, device="cpu")


def test_markers_and_metadata(sdxl: SDXL, tmp_path: Path) -> None:
    to = tmp_path / "new" / "tiny.safetensors"
    export_single_file(sdxl, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, METADATA, to)
    with safe_open(to, framework="pt") as opened:
        assert opened.get_tensor("v_pred").numel() == opened.get_tensor("ztsnr").numel() == 0
        metadata = opened.metadata()
    assert METADATA.items() <= metadata.items()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["modelspec.resolution"] == "48x64"  # width first, as the standard has it
    assert metadata["modelspec.date"] == "2026-11-23T12:00:00+00:00"
    assert [file.name for file in to.parent.iterdir()] == [to.name]
    assert to.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None])
def test_precision_of_a_single_file(sdxl: SDXL, tmp_path: Path, dtype: torch.dtype | None) -> None:
    to = tmp_path / "tiny.safetensors"
    export_single_file(sdxl, {}, METADATA, to, dtype)
    weights = load_file(to)
    assert {tensor.dtype for tensor in weights.values()} == {dtype or torch.float32}
    found = weights["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(found, sdxl.unet.conv_in.weight.to(found.dtype))


class Wrapped(nn.Module):
    """Gives names the prefix that DDP gives them, around a network that is compiled block by block."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network


def test_no_wrapper_prefix_survives(sdxl: SDXL, tmp_path: Path) -> None:
    unet = copy.deepcopy(sdxl.unet)
    unet.mid_block = torch.compile(unet.mid_block)
    compiled, replicated = torch.compile(unet), Wrapped(unet)
    assert any("_orig_mod." in name for name in unet.state_dict())
    export_single_file(sdxl, {}, METADATA, tmp_path / "plain.safetensors")
    expected = load_file(tmp_path / "plain.safetensors")
    for number, network in enumerate((unet, compiled, replicated)):
        to = tmp_path / f"{number}.safetensors"
        export_single_file(replace(sdxl, unet=network), {}, METADATA, to)
        found = load_file(to)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    export_diffusers(replace(sdxl, unet=replicated), FLOW, "note", tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == sdxl.unet.state_dict().keys()


def test_average_weights_are_exported_in_place_of_the_live_ones(sdxl: SDXL, tmp_path: Path) -> None:
    average = {f"module.{name}": tensor + 1 for name, tensor in sdxl.unet.state_dict().items()}
    averaged = with_unet_weights(sdxl, average)
    assert averaged.vae is sdxl.vae
    assert averaged.unet.conv_in.weight.data_ptr() == average["module.conv_in.weight"].data_ptr()
    export_diffusers(averaged, FLOW, "note", tmp_path / "average")
    again = load_sdxl(str(tmp_path / "average"), seed=0, device="cpu")
    assert torch.equal(again.unet.conv_in.weight, sdxl.unet.conv_in.weight + 1)


def test_parameters_in_training_stay_trainable(sdxl: SDXL) -> None:
    frozen = with_unet_weights(sdxl, dict(sdxl.unet.named_parameters()))
    assert not any(parameter.requires_grad for parameter in frozen.unet.parameters())
    assert all(parameter.requires_grad for parameter in sdxl.unet.parameters())


def test_incomplete_weights_are_no_unet(sdxl: SDXL) -> None:
    weights = dict(sdxl.unet.state_dict())
    del weights["conv_out.bias"]
    with pytest.raises(RuntimeError, match=r"conv_out\.bias"):
        with_unet_weights(sdxl, weights)


def test_export_leaves_the_model_alone(sdxl: SDXL, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in sdxl.unet.state_dict().items()}
    sdxl.unet.train()
    export_diffusers(sdxl, FLOW, "note", tmp_path / "folder")
    assert sdxl.unet.training
    assert all(parameter.requires_grad for parameter in sdxl.unet.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in sdxl.unet.state_dict().items())


def test_half_precision_networks_are_exported_exactly(sdxl: SDXL, tmp_path: Path) -> None:
    half = replace(sdxl, unet=copy.deepcopy(sdxl.unet).bfloat16(), vae=copy.deepcopy(sdxl.vae).bfloat16())
    export_diffusers(half, FLOW, "note", tmp_path / "folder")
    saved = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["conv_in.weight"], half.unet.conv_in.weight)


def test_note_and_empty_target(sdxl: SDXL, tmp_path: Path) -> None:
    to = tmp_path / "model"
    to.mkdir()
    export_diffusers(sdxl, FLOW, "Flow matching with shift 3.", to)
    assert (to / "README.md").read_text() == "# model\n\nFlow matching with shift 3.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("zeros", [True, False])
def test_the_pipeline_is_told_what_no_prompt_is(sdxl: SDXL, tmp_path: Path, zeros: bool) -> None:
    export_diffusers(sdxl, FLOW, "note", tmp_path / "folder", zeros_for_empty_prompt=zeros)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is zeros


def test_nothing_is_overwritten(sdxl: SDXL, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="never overwritten"):
        export_diffusers(sdxl, FLOW, "note", tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        export_single_file(sdxl, {}, METADATA, tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("config", "words"),
    [({"_class_name": "NoScheduler"}, "NoScheduler"), ({"_class_name": "DDIMScheduler", "snr": 0}, "no setting snr")],
)
def test_a_scheduler_setting_without_effect_is_refused(
    sdxl: SDXL, tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        export_diffusers(sdxl, config, "note", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_refused(sdxl: SDXL, tmp_path: Path) -> None:
    unet = copy.deepcopy(sdxl.unet)
    unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=r"conv_out\.bias holds values that are not finite"):
        export_diffusers(replace(sdxl, unet=unet), FLOW, "note", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_values_that_overflow_are_refused_by_name(sdxl: SDXL, tmp_path: Path) -> None:
    unet = copy.deepcopy(sdxl.unet)
    unet.conv_out.bias.data[0] = 1e6
    large = replace(sdxl, unet=unet)
    with pytest.raises(UserError, match=r"model\.diffusion_model\.out\.2\.bias"):
        export_single_file(large, {}, METADATA, tmp_path / "a.safetensors", torch.float16)
    export_single_file(large, {}, METADATA, tmp_path / "b.safetensors", torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_a_write_that_went_wrong_is_noticed_and_removed(
    sdxl: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.save_file

    def wrong(weights: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        right({name: tensor + 1 for name, tensor in weights.items()}, file, metadata=metadata)

    monkeypatch.setattr(export, "save_file", wrong)
    with pytest.raises(RuntimeError, match="not written as it is in memory"):
        export_single_file(sdxl, {}, METADATA, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="text_encoder"):
        export_diffusers(sdxl, FLOW, "note", tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(sdxl: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"a\.safetensors could not be written: .*No space left"):
        export_single_file(sdxl, {}, METADATA, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
