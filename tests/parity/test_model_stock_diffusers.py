"""Our encoders and exports against the stock `StableDiffusionXLPipeline`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from sdxl_training.model.export import export_diffusers
from sdxl_training.model.latents import decode_latents, encode_latents
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL, predict
from sdxl_training.model.text import caption_tokenizer, encode_text
from sdxl_training.records import Conditioning
from tests.tiny_sdxl import tiny_pipeline

V_PREDICTION = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
CAPTIONS = ["red", "", "a blue circle, large, on a white background", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> SDXL:
    return load_sdxl(str(folder), seed=0, device="cpu")


@pytest.fixture(scope="module")
def exported(sdxl: SDXL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to: Path = tmp_path_factory.mktemp("export") / "model"
    export_diffusers(sdxl, V_PREDICTION, "v-prediction with zero terminal SNR.", to)
    return to


def stock(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_encode_text_is_encode_prompt(folder: Path, sdxl: SDXL) -> None:
    expected, _, expected_pooled, _ = stock(folder).encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    text_BLD, pooled_BP = encode_text(sdxl, *caption_tokenizer(sdxl)(CAPTIONS))
    assert torch.equal(text_BLD, expected)
    assert torch.equal(pooled_BP, expected_pooled)
    assert len({tuple(row) for row in pooled_BP.tolist()}) == len(CAPTIONS)


def test_latents_are_the_pipelines(folder: Path, sdxl: SDXL) -> None:
    vae = stock(folder).vae.requires_grad_(False)  # torch sums in another order where a gradient may follow
    pixels_BCHW = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean_BCHW, std_BCHW = encode_latents(sdxl.vae, pixels_BCHW)
    with torch.no_grad():
        posterior = vae.encode(pixels_BCHW).latent_dist
        image = vae.decode(mean_BCHW / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.equal(mean_BCHW, posterior.mean * 0.13025)
    assert torch.equal(std_BCHW, posterior.std * 0.13025)
    torch.testing.assert_close(decode_latents(sdxl.vae, mean_BCHW, batch_size=2), image, rtol=1e-5, atol=1e-5)


def test_stock_pipeline_draws_from_the_export_what_it_draws_from_the_source(folder: Path, exported: Path) -> None:
    source, export = stock(folder), stock(exported)
    source.scheduler = DDIMScheduler.from_config(V_PREDICTION)
    assert type(export.scheduler) is DDIMScheduler
    assert {name: export.scheduler.config[name] for name in V_PREDICTION if name != "_class_name"} == {
        name: value for name, value in V_PREDICTION.items() if name != "_class_name"
    }
    pictures = [
        pipeline(
            "red circle",
            num_inference_steps=2,
            height=32,
            width=32,
            output_type="pt",
            guidance_rescale=0.7,
            generator=torch.Generator().manual_seed(3),
        ).images
        for pipeline in (source, export)
    ]
    assert torch.equal(*pictures)
    assert pictures[0].isfinite().all()


def test_export_names_no_local_folder_and_reads_in_older_transformers(exported: Path, folder: Path) -> None:
    texts = [file.read_text() for file in exported.rglob("*.json")]
    assert not any(str(folder.parent) in text for text in texts)
    assert json.loads((exported / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True
    for name in ("tokenizer", "tokenizer_2"):  # the tokenizer of transformers 4 reads these two, not tokenizer.json
        assert json.loads((exported / name / "vocab.json").read_text())["<|endoftext|>"] == 81
        assert (exported / name / "merges.txt").is_file()


def test_stock_unet_takes_our_conditioning(sdxl: SDXL) -> None:
    generator = torch.Generator().manual_seed(2)
    x_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    text_BLD, pooled_BP = encode_text(sdxl, *caption_tokenizer(sdxl)(["red", "blue"]))
    sizes_B6 = torch.tensor([[64, 48, 0, 8, 64, 32], [1024, 768, 3, 0, 832, 1216]])
    labels_B = torch.tensor([10.0, 999.0])
    conditioning = Conditioning(text_BLD, pooled_BP, sizes_B6)
    with torch.no_grad():
        expected = sdxl.unet(
            x_BCHW, labels_B, text_BLD, added_cond_kwargs={"text_embeds": pooled_BP, "time_ids": sizes_B6.float()}
        ).sample
        assert torch.equal(predict(sdxl.unet, x_BCHW, labels_B, conditioning), expected)
        turned = replace(conditioning, time_ids_B6=sizes_B6[:, [1, 0, 2, 3, 4, 5]])
        assert not torch.allclose(predict(sdxl.unet, x_BCHW, labels_B, turned), expected)
