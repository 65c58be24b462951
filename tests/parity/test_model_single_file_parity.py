"""Our original-layout names against diffusers' own reader of that layout, and against the real SDXL's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.single_file import PREFIXES, from_original, to_original, with_text_model_prefix
from tests.tiny_sdxl import tiny_pipeline

# configs of stabilityai/stable-diffusion-xl-base-1.0, as far as they differ from the classes' defaults
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SDXL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return load_sdxl(str(folder), seed=0, device="cpu")


def states(sdxl: SDXL) -> dict[str, dict[str, Tensor]]:
    return {name: network.state_dict() for name, network in sdxl.networks.items()}


def original(sdxl: SDXL) -> dict[str, Tensor]:
    return to_original(states(sdxl), {"unet": sdxl.unet.config, "vae": sdxl.vae.config})


def assert_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_diffusers_reads_our_unet(sdxl: SDXL) -> None:
    assert_same(sdxl.unet.state_dict(), convert_ldm_unet_checkpoint(original(sdxl), sdxl.unet.config))


def test_diffusers_reads_our_vae(sdxl: SDXL) -> None:
    assert_same(sdxl.vae.state_dict(), convert_ldm_vae_checkpoint(original(sdxl), sdxl.vae.config))


def test_diffusers_reads_our_first_text_encoder(sdxl: SDXL) -> None:
    assert_same(with_text_model_prefix(sdxl.text_encoder.state_dict()), convert_ldm_clip_checkpoint(original(sdxl)))


def test_diffusers_reads_our_second_text_encoder(sdxl: SDXL) -> None:
    found = convert_open_clip_checkpoint(sdxl.text_encoder_2, original(sdxl), PREFIXES["text_encoder_2"])
    assert_same(sdxl.text_encoder_2.state_dict(), found)


def test_there_and_back_is_the_identity(sdxl: SDXL) -> None:
    configs = {"unet": sdxl.unet.config, "vae": sdxl.vae.config}
    once = original(sdxl)
    back = from_original(once, configs)
    for name, state in states(sdxl).items():
        assert_same(with_text_model_prefix(state) if name.startswith("text") else state, back[name])
    assert_same(once, to_original(back, configs))


@pytest.fixture(scope="module")
def real_shape() -> dict[str, Tensor]:
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**SDXL_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G, projection_dim=1280)),
        }
    configs = {name: networks[name].config for name in ("unet", "vae")}
    return to_original({name: network.state_dict() for name, network in networks.items()}, configs)


def test_real_sdxl_has_the_known_number_of_tensors(real_shape: dict[str, Tensor]) -> None:
    # Of the 2515 entries of sd_xl_base_1.0.safetensors two are no weights: position_ids and logit_scale.
    counts = {part: sum(name.startswith(prefix) for name in real_shape) for part, prefix in PREFIXES.items()}
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 389}
    assert len(real_shape) == sum(counts.values()) == 2513
    unet = [tensor for name, tensor in real_shape.items() if name.startswith(PREFIXES["unet"])]
    assert sum(tensor.numel() for tensor in unet) == 2_567_463_684


@pytest.mark.parametrize(
    ("name", "shape"),
    [  # what front ends tell SDXL base from other models by, and one name of each kind of module
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3)),
        ("model.diffusion_model.time_embed.2.bias", (1280,)),
        ("model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("model.diffusion_model.label_emb.0.2.weight", (1280, 1280)),
        ("model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("model.diffusion_model.input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight", (640, 2048)),
        ("model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight", (10240, 1280)),
        ("model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_out.0.bias", (1280,)),
        ("model.diffusion_model.middle_block.2.out_layers.3.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.2.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("model.diffusion_model.output_blocks.8.0.in_layers.2.weight", (320, 640, 3, 3)),
        ("model.diffusion_model.out.2.weight", (4, 320, 3, 3)),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight", (77, 768)),
        ("conditioner.embedders.1.model.positional_embedding", (77, 1280)),
        ("conditioner.embedders.1.model.text_projection", (1280, 1280)),
        ("conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_fc.weight", (5120, 1280)),
        ("conditioner.embedders.1.model.ln_final.weight", (1280,)),
        ("first_stage_model.encoder.down.2.downsample.conv.weight", (512, 512, 3, 3)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("first_stage_model.decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("first_stage_model.post_quant_conv.weight", (4, 4, 1, 1)),
    ],
)
def test_real_sdxl_has_the_names_front_ends_look_for(
    real_shape: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> None:
    assert tuple(real_shape[name].shape) == shape
