"""The names SDXL's weights have in its original single-file layout, and the way there and back.

Most of the work is renaming modules: for each network one table from diffusers' (or transformers') module name to the
original one, built from the network's configuration; the way back reads the same table from right to left. Three
things are more than renaming: the VAE's attention is linear layers here and 1x1 convolutions there, and the second text
encoder (OpenCLIP) has query, key and value in one matrix and its text projection transposed.

The original layout was laid down by Stability-AI/generative-models (`sgm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Table = dict[str, str]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}

# Entries of original files that hold no weight of ours: an index buffer and the temperature of CLIP's training loss.
NOT_WEIGHTS = ("text_model.embeddings.position_ids", "logit_scale")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_original(networks: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]) -> Weights:
    """Return one state dict in the original layout for the four networks, each under its folder name.

    `configs` holds the U-Net's and the VAE's configuration. Raises KeyError naming a weight that has no place there.
    """
    parts = {
        "unet": _renamed(networks["unet"], unet_table(configs["unet"])),
        "vae": _vae_to_original(networks["vae"], configs["vae"]),
        "text_encoder": with_text_model_prefix(networks["text_encoder"]),
        "text_encoder_2": _open_clip_to_original(networks["text_encoder_2"]),
    }
    return {PREFIXES[part] + name: tensor for part, weights in parts.items() for name, tensor in weights.items()}


def from_original(weights: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Weights]:
    """Return the four networks' state dicts out of one in the original layout: the inverse of `to_original`.

    Text encoders come with the `text_model.` prefix. Raises KeyError naming a weight that has no place.
    """
    parts = {part: _below(prefix, weights) for part, prefix in PREFIXES.items()}
    return {
        "unet": _renamed(parts["unet"], _inverse(unet_table(configs["unet"]))),
        "vae": _vae_from_original(parts["vae"], configs["vae"]),
        "text_encoder": parts["text_encoder"],
        "text_encoder_2": _open_clip_from_original(parts["text_encoder_2"]),
    }


def with_text_model_prefix(weights: Mapping[str, Tensor]) -> Weights:
    """Return a text encoder's weights under the names every version of transformers reads.

    From version 5.6 on `CLIPTextModel` itself has no `text_model.` in its names; files have kept it.
    """
    bare = ("text_model.", "text_projection.")
    return {name if name.startswith(bare) else f"text_model.{name}": tensor for name, tensor in weights.items()}


def unet_table(config: Mapping[str, Any]) -> Table:
    """Return the table from diffusers' to the original U-Net module names for a `UNet2DConditionModel` configuration.

    The original numbers its blocks flat: a downsampling is a block of its own, an upsampling the last part of one.
    """
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        **_children("mid_block.resnets.0", "middle_block.0", _RESNET),
        "mid_block.attentions.0": "middle_block.1",
        **_children("mid_block.resnets.1", "middle_block.2", _RESNET),
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    kinds = config["down_block_types"]
    layers = _layers_per_block(config)
    table.update(_input_blocks(kinds, layers))
    table.update(_output_blocks(config["up_block_types"], layers[::-1]))
    return table


def _input_blocks(kinds: Sequence[str], layers: Sequence[int]) -> Table:
    table: Table = {}
    place = 1
    for block, kind in enumerate(kinds):
        attends = _attends(kind, plain="DownBlock2D")
        for layer in range(layers[block]):
            table |= _children(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{place}.0", _RESNET)
            if attends:
                table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if block + 1 < len(kinds):
            table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    return table


def _output_blocks(kinds: Sequence[str], layers: Sequence[int]) -> Table:
    table: Table = {}
    place = 0
    for block, kind in enumerate(kinds):
        attends = _attends(kind, plain="UpBlock2D")
        for layer in range(layers[block] + 1):
            table |= _children(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{place}.0", _RESNET)
            if attends:
                table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        if block + 1 < len(kinds):
            table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{1 + attends}.conv"
    return table


def vae_table(config: Mapping[str, Any]) -> Table:
    """Return the table from diffusers' to the original module names for an `AutoencoderKL` configuration.

    The original counts the decoder's levels from fine to coarse, diffusers from coarse to fine.
    """
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for number in (0, 1):
            table |= _children(f"{side}.mid_block.resnets.{number}", f"{side}.mid.block_{number + 1}", _VAE_RESNET)
        table |= _children(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(layers):
            table |= _children(f"encoder.down_blocks.{level}.resnets.{layer}", f"{down}.block.{layer}", _VAE_RESNET)
        for layer in range(layers + 1):
            table |= _children(f"decoder.up_blocks.{level}.resnets.{layer}", f"{up}.block.{layer}", _VAE_RESNET)
        if level + 1 < levels:
            table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"{down}.downsample.conv"
            table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    return table


def open_clip_table(layers: int) -> Table:
    """Return the table from transformers' to OpenCLIP's names for a text encoder of so many layers."""
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }
    for layer in range(layers):
        old, new = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        table |= _children(old, new, _OPEN_CLIP_LAYER)
    return table


def _vae_to_original(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    renamed = _renamed(weights, vae_table(config))
    return {
        name: tensor[:, :, None, None] if _is_attention_matrix(name) else tensor for name, tensor in renamed.items()
    }


def _vae_from_original(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Weights:
    linear = {
        name: tensor.reshape(tensor.shape[:2]) if _is_attention_matrix(name) else tensor
        for name, tensor in weights.items()
    }
    return _renamed(linear, _inverse(vae_table(config)))


def _is_attention_matrix(original_name: str) -> bool:
    return ".mid.attn_1." in original_name and original_name.endswith(".weight") and ".norm." not in original_name


def _open_clip_to_original(weights: Mapping[str, Tensor]) -> Weights:
    weights = with_text_model_prefix(weights)
    layers = _count_numbers("text_model.encoder.layers.", weights)
    original: Weights = {}
    for layer in range(layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{attention}.{letter}_proj.{kind}") for letter in "qkv"]
            original[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    original |= _renamed(weights, open_clip_table(layers))
    original["text_projection"] = original["text_projection"].T
    return original


def _open_clip_from_original(weights: Weights) -> Weights:
    layers = _count_numbers("transformer.resblocks.", weights)
    weights = {**weights, "text_projection": weights["text_projection"].T}
    separate: Weights = {}
    for layer in range(layers):
        attention = f"text_model.encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            fused = weights.pop(f"transformer.resblocks.{layer}.attn.in_proj_{kind}")
            for letter, part in zip("qkv", fused.chunk(3), strict=True):
                separate[f"{attention}.{letter}_proj.{kind}"] = part
    return separate | _renamed(weights, _inverse(open_clip_table(layers)))


def _renamed(weights: Mapping[str, Tensor], table: Table) -> Weights:
    return {_rename(name, table): tensor for name, tensor in weights.items()}


def _rename(name: str, table: Table) -> str:
    """Replace the longest leading module name that the table knows."""
    module = name
    while module not in table:
        module = module.rpartition(".")[0]
        if not module:
            raise KeyError(f"{name} has no counterpart in the other layout")
    return table[module] + name[len(module) :]


def _inverse(table: Table) -> Table:
    return {original: ours for ours, original in table.items()}


def _children(module: str, original: str, names: Table) -> Table:
    return {f"{module}.{child}": f"{original}.{other}" for child, other in names.items()}


def _below(prefix: str, weights: Mapping[str, Tensor]) -> Weights:
    below = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in below.items() if name not in NOT_WEIGHTS}


def _count_numbers(prefix: str, names: Mapping[str, Tensor]) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def _layers_per_block(config: Mapping[str, Any]) -> list[int]:
    layers = config["layers_per_block"]
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)


def _attends(kind: str, plain: str) -> bool:
    if kind not in (plain, f"CrossAttn{plain}"):
        raise KeyError(f"the original layout has no {kind}")
    return kind != plain
