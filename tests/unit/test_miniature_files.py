"""The miniature's folder: an ordinary SDXL in diffusers' layout, small, with a sound autoencoder and tokenizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import sdxl_training
from sdxl_training.data.demo_set import EXTRA_SHARES, PALETTE, RADIUS_OF_SIZE, SHAPES, draw_picture, draw_specs

FOLDER = Path(sdxl_training.__file__).parent / "model" / "miniature"
WORDS = (*PALETTE, *SHAPES, "background", *RADIUS_OF_SIZE, *EXTRA_SHARES, ",")


def config(part: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / part / "config.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(FOLDER / "vae", low_cpu_mem_usage=False).eval()


@pytest.fixture(scope="module")
def pipeline(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**config("text_encoder"))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(FOLDER / "tokenizer_2"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(FOLDER / "unet")).eval(),
        scheduler=EulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    """Demo pictures of a seed that neither the demo nor the autoencoder's training uses, in [-1, 1]."""
    drawn = [Image.fromarray(draw_picture(spec, (128, 128))) for spec in draw_specs(seed=77, pictures=96)]
    small = np.stack([np.asarray(picture.resize((64, 64), Image.Resampling.BOX)) for picture in drawn])
    return torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def test_the_autoencoder_reconstructs_held_out_pictures(vae: AutoencoderKL, held_out: Tensor) -> None:
    latents = vae.encode(held_out).latent_dist.mean
    assert latents.shape == (96, 4, 8, 8)
    drawn = vae.decode(latents).sample.clamp(-1, 1)
    psnr_db = 10 * math.log10(4.0 / (drawn - held_out).square().mean().item())
    assert psnr_db >= 26.0


@torch.no_grad()
def test_scaled_latents_are_standardised(vae: AutoencoderKL, held_out: Tensor) -> None:
    latents = vae.encode(held_out).latent_dist.mean * vae.config.scaling_factor
    std_C, mean_C = torch.std_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(std_C, torch.ones(4), rtol=0, atol=0.15)
    torch.testing.assert_close(mean_C, torch.zeros(4), rtol=0, atol=0.15)


def test_the_files_are_small_and_no_other_weights_ship() -> None:
    weights = [path for path in FOLDER.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")]
    assert [path.relative_to(FOLDER).as_posix() for path in weights] == ["vae/diffusion_pytorch_model.safetensors"]
    assert weights[0].stat().st_size <= 4 * 2**20


def test_the_unet_has_the_structure_of_sdxl(pipeline: StableDiffusionXLPipeline) -> None:
    unet, text, text_2 = (config(part) for part in ("unet", "text_encoder", "text_encoder_2"))
    assert unet["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet["up_block_types"] == ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    assert (unet["addition_embed_type"], unet["use_linear_projection"]) == ("text_time", True)
    assert unet["cross_attention_dim"] == text["hidden_size"] + text_2["hidden_size"]
    times = 6 * unet["addition_time_embed_dim"]
    assert unet["projection_class_embeddings_input_dim"] == text_2["projection_dim"] + times
    assert 2e6 <= sum(weight.numel() for weight in pipeline.unet.parameters()) <= 6.5e6


@pytest.mark.parametrize(("part", "padding"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_every_word_of_the_demo_is_one_token(part: str, padding: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / part)
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert {len(each) for each in ids} == {3}  # start, word, end
    assert len({each[1] for each in ids}) == len(WORDS)
    assert tokenizer.pad_token == padding
    assert tokenizer("Red circle,blue  background").input_ids == tokenizer("red circle, blue background").input_ids
    assert tokenizer.unk_token_id not in tokenizer("any naïve Wörd 7!").input_ids[1:-1]


def test_token_ids_agree_with_the_encoders() -> None:
    for suffix in ("", "_2"):
        tokenizer = CLIPTokenizer.from_pretrained(FOLDER / f"tokenizer{suffix}")
        encoder = config(f"text_encoder{suffix}")
        assert encoder["vocab_size"] == len(tokenizer)
        assert encoder["max_position_embeddings"] == tokenizer.model_max_length
        assert (encoder["bos_token_id"], encoder["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert encoder["pad_token_id"] == tokenizer.pad_token_id


@torch.no_grad()
def test_the_longest_caption_fits_and_is_pooled_at_its_end(pipeline: StableDiffusionXLPipeline) -> None:
    caption = ", ".join(("purple triangle", "yellow background", "medium", *EXTRA_SHARES))
    tokenizer, encoder = pipeline.tokenizer_2, pipeline.text_encoder_2
    length = len(tokenizer(caption).input_ids)
    assert length <= tokenizer.model_max_length
    padded = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
    output = encoder(padded)
    at_end = encoder.text_projection(output.last_hidden_state[0, length - 1])
    torch.testing.assert_close(output.text_embeds[0], at_end)


@torch.no_grad()
def test_the_stock_pipeline_draws_with_it(pipeline: StableDiffusionXLPipeline) -> None:
    picture = pipeline("red circle, blue background, large", num_inference_steps=1, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()


def test_the_index_names_the_parts_that_are_there() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text(encoding="utf-8"))
    parts = {name for name, value in index.items() if isinstance(value, list)}
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert parts == {path.name for path in FOLDER.iterdir() if path.is_dir()}


def test_the_schedule_is_that_of_sdxl_base() -> None:
    schedule = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    stated = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    stated |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "leading"}
    assert {name: schedule[name] for name in stated} == stated
