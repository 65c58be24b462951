"""Writing SDXL for other programs: a diffusers folder, or one file in the original layout.

Both appear under their final name only after they have been written, flushed to disk, read back and compared with the
model in memory. Nothing that exists is overwritten.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL, plain_weights, predict, unwrapped, with_unet_weights
from sdxl_training.model.single_file import from_original, to_original, with_text_model_prefix
from sdxl_training.records import Conditioning, SizeHW, UserError


def export_diffusers(
    sdxl: SDXL, scheduler_config: Mapping[str, object], note: str, to: Path, zeros_for_empty_prompt: bool = True
) -> None:
    """Write the folder `to` that `StableDiffusionXLPipeline.from_pretrained(to)` loads.

    `scheduler_config` names its class in "_class_name"; `note` says in README.md what the model is and what samples it.
    zeros_for_empty_prompt: whether guidance without a negative prompt is told zeros, or the empty prompt's text states.
    Raises UserError where `to` is not empty or cannot be written or a weight is not finite, ValueError for a scheduler
    or setting unknown to diffusers, RuntimeError where the folder read back differs from the model.
    """
    _refuse_existing(to)
    scheduler = _build_scheduler(scheduler_config)
    plain = _on_cpu(sdxl)
    with _appearing(to) as folder:
        _save_parts(plain, scheduler, folder, zeros_for_empty_prompt)
        (folder / "README.md").write_text(f"# {to.name}\n\n{note.strip()}\n", encoding="utf-8")
        _verify_folder(plain, folder)


def export_single_file(
    sdxl: SDXL,
    markers: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    to: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `to`: one safetensors file in SDXL's original layout, in `dtype` or each weight's own.

    `markers` are further keys that front ends detect an objective by (`v_pred`, `ztsnr`: empty tensors); `metadata` is
    written as it is (see `modelspec`). Raises UserError where `to` exists, cannot be written, or a weight is not
    finite in `dtype`; RuntimeError where the file read back differs from the model.
    """
    _refuse_existing(to)
    networks = _network_weights(sdxl)
    configs = {"unet": unwrapped(sdxl.unet).config, "vae": sdxl.vae.config}
    weights = {name: _cast(name, tensor, dtype) for name, tensor in to_original(networks, configs).items()}
    with _appearing(to) as file:
        save_file({**weights, **markers}, file, metadata={"format": "pt", **metadata})
        _verify_file(file, networks, configs, markers, metadata)


def modelspec(title: str, prediction_type: str, resolution_hw: SizeHW, date: datetime) -> dict[str, str]:
    """Return the metadata of the ModelSpec standard (Stability-AI/ModelSpec 1.0.1) for an SDXL file.

    `prediction_type` is "epsilon" or "v" where the standard has a word for it, or a plain name of the objective.
    """
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": date.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution_hw[1]}x{resolution_hw[0]}",
        "modelspec.prediction_type": prediction_type,
    }


def _refuse_existing(to: Path) -> None:
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UserError(f"{to} exists already and is never overwritten: choose another place or move it away.")


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """Give a temporary sibling of `to`; flush and rename it at the end, remove it if anything fails."""
    temporary = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            _flush(path)
            if path.is_file():
                path.chmod(0o644)  # safetensors are written for their owner alone; an export is to be shared
        temporary.replace(to)
        _flush(to.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{to} could not be written: {error}. Make room or choose another place.") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _build_scheduler(config: Mapping[str, object]) -> Any:
    kind = getattr(diffusers, str(config["_class_name"]), None)
    if kind is None:
        raise ValueError(f"diffusers has no scheduler {config['_class_name']}")
    ignored = {name for name in config if not name.startswith("_")} - inspect.signature(kind).parameters.keys()
    if ignored:
        raise ValueError(f"{config['_class_name']} has no setting {', '.join(sorted(ignored))}")
    return kind.from_config(dict(config))


def _on_cpu(sdxl: SDXL) -> SDXL:
    """Return `sdxl` with unwrapped networks on the CPU; the model in use stays where it is."""
    weights = {name: tensor.cpu() for name, tensor in plain_weights(sdxl.unet).items()}
    for name, tensor in weights.items():
        _refuse_non_finite(name, tensor)
    return replace(
        with_unet_weights(sdxl, weights),
        vae=_cpu_copy(sdxl.vae),
        text_encoder=_cpu_copy(sdxl.text_encoder),
        text_encoder_2=_cpu_copy(sdxl.text_encoder_2),
    )


def _cpu_copy(network: Any) -> Any:
    return network if network.device.type == "cpu" else copy.deepcopy(network).cpu()


def _save_parts(sdxl: SDXL, scheduler: Any, folder: Path, zeros_for_empty_prompt: bool) -> None:
    """Write every part into its own folder, and the index that tells diffusers which class reads it."""
    others = {"tokenizer": sdxl.tokenizer, "tokenizer_2": sdxl.tokenizer_2, "scheduler": scheduler}
    for name, part in others.items():
        part.save_pretrained(folder / name)
    for name, network in sdxl.networks.items():
        # One file a network: diffusers reads several only where accelerate is installed.
        network.save_pretrained(folder / name, max_shard_size="100GB")
        _drop_origin(folder / name / "config.json")
    _keep_text_model_prefix(folder / "text_encoder" / "model.safetensors")
    _keep_vocabulary_files(folder / "tokenizer")
    _keep_vocabulary_files(folder / "tokenizer_2")
    classes = {name: type(part) for name, part in {**others, **sdxl.networks}.items()}
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": zeros_for_empty_prompt,
        **{name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in classes.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _drop_origin(config_file: Path) -> None:
    """Remove the path of this machine that the libraries note in a configuration."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _keep_vocabulary_files(folder: Path) -> None:
    """Add the two files that CLIP tokenizers before transformers 5 read, where only tokenizer.json was written."""
    if (folder / "vocab.json").is_file():
        return
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _keep_text_model_prefix(file: Path) -> None:
    """Rename the first text encoder's weights so that old and new versions of transformers read them."""
    renamed = file.with_suffix(".renamed")
    save_file(with_text_model_prefix(load_file(file)), renamed, metadata={"format": "pt"})
    renamed.replace(file)


def _verify_folder(sdxl: SDXL, folder: Path) -> None:
    read = load_sdxl(str(folder), seed=0, device="cpu")  # in fp32, whatever the precision in memory
    for name, network in sdxl.networks.items():
        _compare(name, network.state_dict(), read.networks[name].state_dict())
    in_fp32 = with_unet_weights(sdxl, {name: tensor.float() for name, tensor in sdxl.unet.state_dict().items()})
    ours, theirs = _probe(in_fp32.unet), _probe(read.unet)
    # Equal weights of equal networks differ by rounding only: how a tensor lies in memory changes the order of sums.
    if (ours - theirs).abs().max() > 1e-3 * ours.abs().max():
        raise RuntimeError(f"the U-Net written to {folder} predicts otherwise than the one in memory")


def _verify_file(
    file: Path,
    networks: Mapping[str, Mapping[str, Tensor]],
    configs: Mapping[str, Mapping[str, Any]],
    markers: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    with safe_open(file, framework="pt") as opened:
        if not markers.keys() <= set(opened.keys()) or not metadata.items() <= (opened.metadata() or {}).items():
            raise RuntimeError(f"{file} lost a marker or its metadata")
    for name, saved in from_original(load_file(file), configs).items():
        live = networks[name] if name in ("unet", "vae") else with_text_model_prefix(networks[name])
        _compare(name, live, saved)


def _compare(name: str, live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless `saved` holds exactly `live`, rounded to the saved precision."""
    if live.keys() != saved.keys():
        raise RuntimeError(f"{name}: the written names differ: {sorted(live.keys() ^ saved.keys())[:3]}")
    for key, tensor in live.items():
        if not torch.equal(tensor.to("cpu", saved[key].dtype), saved[key]):
            raise RuntimeError(f"{name}: {key} was not written as it is in memory")


@torch.no_grad()
def _probe(unet: Any) -> Tensor:
    """Return the U-Net's output for one small fixed input."""
    config = unet.config
    generator = torch.Generator().manual_seed(0)
    side = 2 ** len(config.block_out_channels)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = ((1, config.in_channels, side, side), (1, 4, config.cross_attention_dim), (1, pooled))
    x_BCHW, text_BLD, pooled_BP = (torch.randn(shape, generator=generator).to(unet.dtype) for shape in shapes)
    sizes_B6 = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    return predict(unet, x_BCHW, torch.tensor([500.0]), Conditioning(text_BLD, pooled_BP, sizes_B6))


def _network_weights(sdxl: SDXL) -> dict[str, dict[str, Tensor]]:
    return {name: plain_weights(network) for name, network in sdxl.networks.items()}


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = tensor.to(dtype or tensor.dtype).contiguous()
    _refuse_non_finite(name, cast)
    return cast


def _refuse_non_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} holds values that are not finite in {tensor.dtype}: every picture would be black. "
            "Export in bf16 or fp32, or from an earlier checkpoint."
        )
