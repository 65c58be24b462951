"""Token ids and text states against stock transformers and stock diffusers: one chunk, several chunks, weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import caption_tokenizer, encode_text
from tests.tiny_sdxl import tiny_pipeline

CAPTIONS = [
    "red circle, blue background",
    "",
    "a !! b!c, miku (vocaloid), o_o",
    "purple square, large, on a yellow background, with a cyan triangle, and more than fits into a chunk, by far",
    " \t\n red \u00a0 RED",
    "<|endoftext|> cut <|startoftext|>",
]


@pytest.fixture(scope="module", params=["tiny", "miniature"])
def sdxl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    if request.param == "miniature":
        return load_sdxl("miniature", seed=0, device="cpu")
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return load_sdxl(str(folder), seed=0, device="cpu")


def encode_prompt(sdxl: SDXL, captions: list[str], zeros: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the stock pipeline conditions on: (text, null text, pooled, null pooled)."""
    pipeline = StableDiffusionXLPipeline(
        vae=sdxl.vae,
        text_encoder=sdxl.text_encoder,
        text_encoder_2=sdxl.text_encoder_2,
        tokenizer=sdxl.tokenizer,
        tokenizer_2=sdxl.tokenizer_2,
        unet=sdxl.unet,
        scheduler=DDIMScheduler(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    with torch.no_grad():
        return pipeline.encode_prompt(captions, do_classifier_free_guidance=True)


@given(caption=st.text(alphabet=" \t\n\x1c\x85\u00a0\u3000\u0301'.,!()<>|aAredé9日😀_-", max_size=60))
def test_ids_are_the_tokenizers_own(sdxl: SDXL, caption: str) -> None:
    captions = [caption, f"{caption}<|endoftext|>{caption}"]
    for ids_BL, tokenizer in zip(caption_tokenizer(sdxl)(captions), (sdxl.tokenizer, sdxl.tokenizer_2), strict=True):
        expected = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        assert torch.equal(ids_BL, expected.input_ids)


def test_one_chunk_is_encode_prompt(sdxl: SDXL) -> None:
    text_BLD, pooled_BP = encode_text(sdxl, *caption_tokenizer(sdxl)(CAPTIONS))
    expected_BLD, zeros_BLD, expected_BP, zeros_BP = encode_prompt(sdxl, CAPTIONS)
    assert torch.equal(text_BLD, expected_BLD)
    assert torch.equal(pooled_BP, expected_BP)
    assert zeros_BLD.abs().max() == zeros_BP.abs().max() == 0, "a dropped caption's states"


def test_the_empty_caption_is_the_pipelines_null_text_without_zeros(sdxl: SDXL) -> None:
    text_BLD, pooled_BP = encode_text(sdxl, *caption_tokenizer(sdxl)([""]))
    _, expected_BLD, _, expected_BP = encode_prompt(sdxl, ["red"], zeros=False)
    torch.testing.assert_close(text_BLD, expected_BLD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled_BP, expected_BP, rtol=1e-5, atol=1e-6)


def test_several_chunks_are_several_calls_joined(sdxl: SDXL) -> None:
    room = sdxl.tokenizer.model_max_length - 2
    parts = [[letter * (room - 1) + "," for letter in "xyz"], ["ab, " * (room // 3), "x" * room, "cd"]]
    captions = [" ".join(of_caption) for of_caption in parts]
    text_BLD, pooled_BP = encode_text(sdxl, *caption_tokenizer(sdxl, chunks=3)(captions))
    expected_NCD, _, expected_NP, _ = encode_prompt(sdxl, [*parts[0], *parts[1]])
    expected_BLD = expected_NCD.reshape(2, -1, expected_NCD.shape[-1])
    assert torch.equal(text_BLD, torch.cat([expected_BLD, expected_BLD], dim=1)), "twice over: L is that of six chunks"
    assert torch.equal(pooled_BP, expected_NP[::3]), "the pooled text is the first chunk's"


def test_weights_scale_the_deviation_from_the_empty_prompt(sdxl: SDXL) -> None:
    """ComfyUI's rule, token by token, over the stock pipeline's states."""
    tokenize = caption_tokenizer(sdxl, read=parse_weights)
    text_BLD, pooled_BP = encode_text(sdxl, *tokenize.with_weights(["ab ((c):1.2) [d!]"]))
    expected_BLD, _, expected_BP, _ = encode_prompt(sdxl, ["ab c d!"])
    empty_BLD, *_ = encode_prompt(sdxl, [""])
    weights = [1.0, 1.0, 1.0, 1.32, 1 / 1.1, 1 / 1.1]  # start, a, b, c, d, !
    for place in range(text_BLD.shape[1]):
        weight = weights[place] if place < len(weights) else 1.0
        expected_D = (expected_BLD[0, place] - empty_BLD[0, place]) * weight + empty_BLD[0, place]
        torch.testing.assert_close(text_BLD[0, place], expected_D, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled_BP, expected_BP, rtol=1e-5, atol=1e-6)
