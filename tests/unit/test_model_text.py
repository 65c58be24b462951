"""Token ids and text states."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import caption_tokenizer, encode_text
from tests.tiny_sdxl import LENGTH, POOLED, WIDTH_1, WIDTH_2, tiny_pipeline


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return load_sdxl(str(folder), seed=0, device="cpu")


@given(length=st.integers(0, 3 * LENGTH))
def test_ids_have_one_length_and_truncation_is_counted(sdxl: SDXL, length: int) -> None:
    tokenize = caption_tokenizer(sdxl)
    ids_1_BL, ids_2_BL = tokenize(["a" * length, "b"])
    assert ids_1_BL.shape == ids_2_BL.shape == (2, LENGTH)
    assert ids_1_BL.dtype == ids_2_BL.dtype == torch.int64
    start, end = sdxl.tokenizer.bos_token_id, sdxl.tokenizer.eos_token_id
    letters = min(length, LENGTH - 2)
    assert ids_1_BL[0, 0] == start
    assert ids_1_BL[0, letters + 1] == ids_2_BL[0, letters + 1] == end
    assert tokenize.count_truncated(["a" * length, "b"]) == int(length > LENGTH - 2)


def test_second_tokenizer_pads_with_its_own_token(sdxl: SDXL) -> None:
    ids_1_BL, ids_2_BL = caption_tokenizer(sdxl)(["ab"])
    assert set(ids_1_BL[0, 4:].tolist()) == {sdxl.tokenizer.eos_token_id}
    assert set(ids_2_BL[0, 4:].tolist()) == {0}


def test_tokenizer_travels_to_loader_workers(sdxl: SDXL) -> None:
    tokenize = caption_tokenizer(sdxl)
    copy = pickle.loads(pickle.dumps(tokenize))
    assert all(torch.equal(a, b) for a, b in zip(tokenize(["red, blue"]), copy(["red, blue"]), strict=True))


def test_text_states_do_not_depend_on_the_rest_of_the_batch(sdxl: SDXL) -> None:
    ids_1_BL, ids_2_BL = caption_tokenizer(sdxl)(["red", "a very long caption indeed", ""])
    text_BLD, pooled_BP = encode_text(sdxl, ids_1_BL, ids_2_BL)
    assert text_BLD.shape == (3, LENGTH, WIDTH_1 + WIDTH_2)
    assert pooled_BP.shape == (3, POOLED)
    assert not text_BLD.requires_grad
    for row in range(3):
        alone = encode_text(sdxl, ids_1_BL[row : row + 1], ids_2_BL[row : row + 1])
        torch.testing.assert_close(alone[0][0], text_BLD[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[1][0], pooled_BP[row], rtol=1e-5, atol=1e-6)


def test_half_precision_encoders_give_fp32_states(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path)
    sdxl = load_sdxl(str(tmp_path), seed=0, device="cpu")
    sdxl.text_encoder.bfloat16()
    sdxl.text_encoder_2.bfloat16()
    states = encode_text(sdxl, *caption_tokenizer(sdxl)(["red"]))
    assert {state.dtype for state in states} == {torch.float32}
