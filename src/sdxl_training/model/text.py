"""Captions to token ids, token ids to the text states SDXL is conditioned on.

Legend: B captions, L tokens, D text width of both encoders together, P pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sdxl_training.model.sdxl import SDXL


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """Both of SDXL's tokenizers as one function; holds no weights, so loader workers can have it."""

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (ids_1_BL, ids_2_BL), int64, each padded and cut to its tokenizer's length (77 for SDXL)."""
        return _token_ids(self.tokenizer, captions), _token_ids(self.tokenizer_2, captions)

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return how many captions are longer than the tokenizers' length, so that their ends are never seen."""
        cut_1 = _is_truncated(self.tokenizer, captions)
        cut_2 = _is_truncated(self.tokenizer_2, captions)
        return sum(one or two for one, two in zip(cut_1, cut_2, strict=True))


def caption_tokenizer(sdxl: SDXL) -> CaptionTokenizer:
    """Return the tokenizers of `sdxl` as one picklable function."""
    return CaptionTokenizer(sdxl.tokenizer, sdxl.tokenizer_2)


@torch.no_grad()
def encode_text(sdxl: SDXL, ids_1_BL: Tensor, ids_2_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return (text_BLD, pooled_BP) in fp32 on the encoders' device.

    SDXL (arXiv:2307.01952, section 2.1): the states before the last layer of both encoders, side by side and without
    the final layer norm; the pooled text is the second encoder's projected end-of-text state.
    """
    first = sdxl.text_encoder(ids_1_BL.to(sdxl.text_encoder.device), output_hidden_states=True)
    second = sdxl.text_encoder_2(ids_2_BL.to(sdxl.text_encoder_2.device), output_hidden_states=True)
    text_BLD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return text_BLD.float(), second.text_embeds.float()


def _token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids_BL: Tensor = tokens.input_ids
    return ids_BL


def _is_truncated(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[bool]:
    full = tokenizer(list(captions), verbose=False)["input_ids"]
    return [len(ids) > tokenizer.model_max_length for ids in full]
