"""Text states beforehand: captions are encoded once, then the text encoders make room on the GPU.

Legend: B captions, L tokens of a caption's own chunks, D text width, P pooled text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from sdxl_training.assemble.captions import caption_rules
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.data.claims import Claims
from sdxl_training.data.kept_captions import KeptCaptions
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.text_states import States, TextCache, TextShape, captions_to_keep, fill_texts
from sdxl_training.model.sdxl import TextParts
from sdxl_training.model.text import CaptionTokenizer, encode_text, text_fingerprint
from sdxl_training.parallel.group import Group
from sdxl_training.records import ImageRecord
from sdxl_training.tracking.progress import Progress

CLAIMS = "claims"


def text_folder(config: Config) -> Path:
    """Return where text states are kept."""
    return Path(cache_folder(config)) / "texts"


def open_texts(config: Config, sdxl: TextParts) -> TextCache:
    """Return the text states that these encoders make of captions as they are read in this configuration."""
    captions = config.data.captions
    reading = f"{captions.max_tokens} {captions.weights} {captions.separator!r}"
    settings = f"{text_fingerprint(sdxl)} {reading}"
    return TextCache(text_folder(config), settings, text_shape(sdxl), config.data.cache.text_variants)


def text_shape(sdxl: TextParts) -> TextShape:
    """Return how large these encoders' states are."""
    first, second = sdxl.text_encoder.config, sdxl.text_encoder_2.config
    chunk = sdxl.tokenizer.model_max_length
    return TextShape(int(chunk), first.hidden_size + second.hidden_size, second.projection_dim)


def fill_text_cache(
    config: Config,
    records: Sequence[ImageRecord],
    drawn_from: str,
    sdxl: TextParts,
    tokenizer: CaptionTokenizer,
    writer: StoreWriter,
    group: Group,
    progress: Progress,
) -> TextCache:
    """Encode the captions that the cache lacks, together with every other process that does; return it full.

    drawn_from: names pictures and captions; where they are those of an earlier start, captions are not drawn anew.
    """
    cache, variants, seed = open_texts(config, sdxl), config.data.cache.text_variants, config.global_config.seed
    rules = caption_rules(config)
    kept = KeptCaptions(cache, f"{drawn_from} {rules} {seed}")
    if kept.all_there(captions_to_keep(records, rules, seed, variants)):
        progress.message(f"all captions are encoded already; {len(cache.store)} are kept")
        return cache
    begin = len(records) * group.rank // group.world_size  # processes that begin apart rarely meet
    in_own_order = (records[(begin + number) % len(records)] for number in range(len(records)))
    encoded = fill_texts(
        cache,
        kept.noting(captions_to_keep(in_own_order, rules, seed, variants)),
        1 + len(records) * variants,
        partial(encode_captions, sdxl, tokenizer),
        writer,
        Claims(text_folder(config) / CLAIMS),
        progress,
    )
    if group.is_main:
        kept.remember()
    here = " by this process" if group.world_size > 1 else ""
    progress.message(f"{encoded} captions encoded{here}; {len(cache.store)} are kept")
    return cache


def encode_captions(sdxl: TextParts, tokenizer: CaptionTokenizer, captions: Sequence[str]) -> list[States]:
    """Return text_LD of each caption's own chunks, and pooled_P; fp32, on the encoders' device."""
    ids_1_BL, ids_2_BL, weights_EBL = tokenizer.with_weights(captions)
    text_BLD, pooled_BP = encode_text(sdxl, ids_1_BL, ids_2_BL, weights_EBL)
    chunk = sdxl.tokenizer.model_max_length
    # A chunk that only fills a caption up has no mark of start; `encode_text` puts a caption's own chunks first.
    chunks_B = (ids_1_BL[:, ::chunk] == sdxl.tokenizer.bos_token_id).sum(1).tolist()
    own = [text_LD[: chunks * chunk] for text_LD, chunks in zip(text_BLD, chunks_B, strict=True)]
    return list(zip(own, pooled_BP, strict=True))


def move_encoders(text: TextParts, device: torch.device | str) -> None:
    """Move the text encoders; on the CPU they still read the prompts of previews."""
    text.text_encoder.to(device)
    text.text_encoder_2.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
