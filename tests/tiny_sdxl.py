"""A tiny SDXL with every kind of part the real one has, written as a diffusers folder by the libraries themselves."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

LENGTH = 12
WIDTH_1, WIDTH_2, POOLED = 16, 24, 20


def tiny_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """Return a CLIP tokenizer of single characters; the last two ids are the text's start and end, as in CLIP."""
    characters = "!" + string.ascii_lowercase + string.digits + ",.-"
    tokens = [*characters, *(f"{character}</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**special, "pad_token": pad_token, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=POOLED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_unet() -> UNet2DConditionModel:
    """Three levels as in SDXL: plain, one transformer layer, two transformer layers."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=WIDTH_1 + WIDTH_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED + 6 * 8,
        sample_size=8,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
        sample_size=64,
    )


def tiny_pipeline(folder: Path, seed: int = 0) -> StableDiffusionXLPipeline:
    """Build the tiny SDXL with random weights and save it to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(folder / "tokenizer", pad_token="<|endoftext|>")
        tokenizer_2 = tiny_tokenizer(folder / "tokenizer_2", pad_token="!")
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(tiny_text_config(tokenizer, WIDTH_1, layers=2)),
            text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer_2, WIDTH_2, layers=3)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=tiny_unet(),
            scheduler=DDIMScheduler(),
            add_watermarker=False,
        )
        # Norms start as ones and zeros and biases as zeros, so that two swapped ones would look alike.
        for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder)
    return pipeline
