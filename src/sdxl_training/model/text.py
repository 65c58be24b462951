"""Captions to token ids, token ids to the text states SDXL is conditioned on.

A text encoder reads C tokens at once: 77, of which two are the marks of start and end. A longer caption is cut into
chunks of 75 tokens, each read by itself, and their states are joined along L.

Legend: B captions, K chunks of the longest caption, C tokens of a chunk, L tokens of all chunks, N = B K chunks,
E the two encoders, D text width (of both encoders together unless a comment says otherwise), P pooled width.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sdxl_training.model.sdxl import TextParts

ReadWeights = Callable[[str], Sequence[tuple[str, float]]]
"""caption -> its text in pieces of one weight each."""
Token = tuple[int, float]
"""(id, weight)"""
Chunk = tuple[list[Token], list[Token]]
"""A chunk's tokens for either encoder."""

# Blanks at which every version of CLIP's tokenizer ends a word, so that words can be read one by one.
RUNS = re.compile(r"([ \t\n\r\f\v]+)|([^ \t\n\r\f\v]+)")
CAPTIONS_AT_ONCE = 1024
WORDS_REMEMBERED = 2**16  # by a tokenizer; a data set has a few thousand that matter


def plain_text(caption: str) -> Sequence[tuple[str, float]]:
    """Read a caption without weights: brackets are text."""
    return ((caption, 1.0),)


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """Both of SDXL's tokenizers as one function; holds no network, so loader workers can have it.

    chunks: most chunks a caption is cut into; the rest is lost. separator: the text that ends a tag; chunks end between
    tags where they can. read: captions to text and weights.

    The second tokenizer pads with "!" and so reads every "!" as padding, and a run of them as more tokens than the
    first one does. Chunks are cut so that both encoders read the same words in the same chunk.
    """

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    chunks: int = 1
    separator: str = ","
    read: ReadWeights = plain_text
    _ids_of: tuple[dict[str, list[int]], dict[str, list[int]]] = field(
        default_factory=lambda: ({}, {}), init=False, compare=False, repr=False
    )

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (ids_1_BL, ids_2_BL), int64, with L = K C.

        A caption with fewer chunks than K is filled up with padding alone, without a mark of start.
        """
        ids_1_BL, ids_2_BL, _ = self.with_weights(captions)
        return ids_1_BL, ids_2_BL

    def with_weights(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (ids_1_BL, ids_2_BL, weights_EBL), the last fp32, or None where captions are read without weights."""
        if self.read is plain_text and self.chunks == 1:
            return *self._one_chunk(captions), None
        cut = self._cut(captions)
        most = max(len(chunks) for chunks in cut)
        rows_EB = [
            [_row([chunk[encoder] for chunk in chunks], most, tokenizer) for chunks in cut]
            for encoder, tokenizer in enumerate(self._tokenizers)
        ]
        ids_1_BL, ids_2_BL = (torch.tensor([[token for token, _ in row] for row in rows_B]) for rows_B in rows_EB)
        if self.read is plain_text:
            return ids_1_BL, ids_2_BL, None
        return ids_1_BL, ids_2_BL, torch.tensor([[[weight for _, weight in row] for row in rows] for rows in rows_EB])

    def lost_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return how many tokens of each caption are never seen, because they do not fit into the chunks."""
        batches = (captions[first : first + CAPTIONS_AT_ONCE] for first in range(0, len(captions), CAPTIONS_AT_ONCE))
        last_chunks = (chunks[-1] for batch in batches for chunks in self._cut(batch))
        return [max(0, max(map(len, chunk)) - self._room) for chunk in last_chunks]

    @property
    def most_tokens(self) -> int:
        """Return how many tokens of a caption are seen at most."""
        return self.chunks * self._room

    def longest_caption(self) -> str:
        """Return a caption that fills all chunks."""
        return " ".join("a" * self.most_tokens)

    @property
    def _tokenizers(self) -> tuple[CLIPTokenizer, CLIPTokenizer]:
        return self.tokenizer, self.tokenizer_2

    @property
    def _room(self) -> int:
        return _room(self.tokenizer)

    def _one_chunk(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the general way does for plain captions of one chunk, in a fraction of its time."""
        words = [[run for _, run in RUNS.findall(caption) if run] for caption in captions]
        self._remember({word for caption in words for word in caption})
        ids_1_BL, ids_2_BL = (
            torch.tensor([_framed([token for word in caption for token in ids[word]], tokenizer) for caption in words])
            for ids, tokenizer in zip(self._ids_of, self._tokenizers, strict=True)
        )
        return ids_1_BL, ids_2_BL

    def _remember(self, texts: Set[str]) -> None:
        """Tokenise what is new of these words: they come again and again."""
        new = sorted(texts - self._ids_of[0].keys())
        if len(self._ids_of[0]) + len(new) > WORDS_REMEMBERED:
            new = sorted(texts)
            for ids in self._ids_of:
                ids.clear()
        for ids, tokenizer in zip(self._ids_of, self._tokenizers, strict=True):
            ids.update(_token_ids(tokenizer, new))

    def _cut(self, captions: Sequence[str]) -> list[list[Chunk]]:
        """Return each caption's chunks; the last one may be longer than there is room for."""
        read = [_words(self.read(caption), self.separator) for caption in captions]
        self._remember({text for words in read for word in words for text, _ in word.parts})
        cut = []
        for words in read:
            units = [unit for word in words for unit in _units(word, self._ids_of, self._room)]
            cut.append(_cut_into_chunks(units, self._room, self.chunks))
        return cut


def caption_tokenizer(
    sdxl: TextParts, chunks: int = 1, separator: str = ",", read: ReadWeights = plain_text
) -> CaptionTokenizer:
    """Return the tokenizers of `sdxl` as one picklable function."""
    return CaptionTokenizer(sdxl.tokenizer, sdxl.tokenizer_2, chunks, separator, read)


@torch.no_grad()
def encode_text(
    sdxl: TextParts, ids_1_BL: Tensor, ids_2_BL: Tensor, weights_EBL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (text_BLD, pooled_BP) in fp32 on the encoders' device.

    SDXL (arXiv:2307.01952, section 2.1): the states before the last layer of both encoders, side by side and without
    the final layer norm; the pooled text is the second encoder's projected end-of-text state, here of the first chunk.

    A caption with fewer chunks than others has its own repeated until all are of one length, as ComfyUI does
    (`CONDCrossAttn`): attention over repeated keys is attention over the keys, so what a picture is told does not
    depend on its neighbours, and is what programs tell that pad nothing. L thus is C times 1, 2 or 6 for K = 1, 2, 3.
    """
    length = sdxl.tokenizer.model_max_length
    weights_1_BL, weights_2_BL = (None, None) if weights_EBL is None else weights_EBL
    states_1_NCD, _ = _states(sdxl.text_encoder, sdxl.tokenizer, ids_1_BL, weights_1_BL)
    states_2_NCD, output = _states(sdxl.text_encoder_2, sdxl.tokenizer_2, ids_2_BL, weights_2_BL)
    batch, chunks = ids_1_BL.shape[0], ids_1_BL.shape[1] // length
    starts_BK = ids_1_BL.reshape(batch, chunks, length)[:, :, 0] == sdxl.tokenizer.bos_token_id
    text_BLD = _joined(torch.cat([states_1_NCD, states_2_NCD], dim=-1), starts_BK)
    return text_BLD, output.text_embeds[: batch * chunks : chunks].float()


def text_fingerprint(sdxl: TextParts) -> str:
    """Return a BLAKE2b digest (32 hex digits) of both text encoders and tokenizers: equal only if text states are."""
    digest = hashlib.blake2b(digest_size=16)
    for encoder in (sdxl.text_encoder, sdxl.text_encoder_2):
        # Names with an underscore, and the library's version, are bookkeeping.
        kept = {name: value for name, value in encoder.config.to_diff_dict().items() if not name.startswith("_")}
        kept.pop("transformers_version", None)
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for tokenizer in (sdxl.tokenizer, sdxl.tokenizer_2):
        marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
        # A CLIP vocabulary lists its merges, in their order.
        known = sorted(tokenizer.get_vocab().items())
        digest.update(json.dumps([known, marks, tokenizer.model_max_length]).encode())
    return digest.hexdigest()


def _states(encoder: Any, tokenizer: CLIPTokenizer, ids_BL: Tensor, weights_BL: Tensor | None) -> tuple[Tensor, Any]:
    """Return (states_NCD, output) of one encoder; with weights its output has the empty prompt as a last row."""
    length = tokenizer.model_max_length
    ids_NC = ids_BL.to(encoder.device).reshape(-1, length)
    if weights_BL is None:
        output = encoder(ids_NC, output_hidden_states=True)
        return output.hidden_states[-2].float(), output
    empty_1C = torch.full_like(ids_NC[:1], tokenizer.pad_token_id)
    empty_1C[0, 0], empty_1C[0, 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    output = encoder(torch.cat([ids_NC, empty_1C]), output_hidden_states=True)
    states_NCD = output.hidden_states[-2].float()
    weights_NC1 = weights_BL.to(encoder.device).reshape(-1, length, 1)
    return _weighted(states_NCD[:-1], states_NCD[-1:], weights_NC1), output


def _weighted(states_NCD: Tensor, empty_1CD: Tensor, weights_NC1: Tensor) -> Tensor:
    """Return e + w (s - e) for states s, weights w and the empty prompt's states e at the same places.

    This is ComfyUI's rule (`ClipTokenWeightEncoder.encode_token_weights`). stable-diffusion-webui multiplies s by w and
    then scales all states so that their mean is what it was; where that mean is near zero the scale can be anything.
    """
    return torch.where(weights_NC1 == 1, states_NCD, empty_1CD + weights_NC1 * (states_NCD - empty_1CD))


def _joined(states_NCD: Tensor, starts_BK: Tensor) -> Tensor:
    """Return text_BLD: the states of each caption's chunks, in a circle until all captions have the same number."""
    batch, chunks = starts_BK.shape
    states_BKCD = states_NCD.reshape(batch, chunks, *states_NCD.shape[1:])
    counts_B1 = starts_BK.to(states_NCD.device).sum(1, keepdim=True)
    same_for_all = math.lcm(*range(1, chunks + 1))
    rows_B1 = torch.arange(batch, device=states_NCD.device)[:, None]
    chosen_BM = torch.arange(same_for_all, device=states_NCD.device) % counts_B1
    return states_BKCD[rows_B1, chosen_BM].flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Word:
    """Text between two blanks, in parts of one weight each; ends_tag: a tag ends with it."""

    parts: tuple[tuple[str, float], ...]
    ends_tag: bool


@dataclass(frozen=True, slots=True)
class _Unit:
    """Tokens that stay in one chunk: a word, or a part of one that is longer than a chunk."""

    tokens: Chunk
    ends_tag: bool


def _words(pieces: Sequence[tuple[str, float]], separator: str) -> list[_Word]:
    mark = separator.strip()
    words: list[_Word] = []
    parts: list[tuple[str, float]] = []
    for text, weight in (*pieces, (" ", 1.0)):
        for blank, run in RUNS.findall(text):
            if run:
                parts.append((run, weight))
            elif parts:
                words.append(_Word(tuple(parts), parts[-1][0].endswith(mark) if mark else separator in blank))
                parts = []
    return words


def _token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> dict[str, list[int]]:
    if not texts:
        return {}
    return dict(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True))


def _units(word: _Word, ids_of: Sequence[dict[str, list[int]]], room: int) -> list[_Unit]:
    first, second = ([(token, weight) for text, weight in word.parts for token in ids[text]] for ids in ids_of)
    # Parts of a long word fill a chunk each, so that it does not matter which of them is said to end the tag.
    return [
        _Unit((first[begin : begin + room], second[begin : begin + room]), word.ends_tag)
        for begin in range(0, max(len(first), len(second)), room)
    ]


def _cut_into_chunks(units: Sequence[_Unit], room: int, chunks: int) -> list[Chunk]:
    """Return at most `chunks` chunks; the last takes all that is left, however much.

    A chunk ends after the last tag that fits, or after the last word if the rest would fit only then.
    """
    lengths = [max(map(len, unit.tokens)) for unit in units]
    ends: list[int] = []
    first = 0
    for left in range(chunks - 1, 0, -1):
        after_word = _end_of_chunk(lengths, first, room)
        if after_word == len(units):
            break
        after_tag = max(
            (end for end in range(first + 1, after_word + 1) if units[end - 1].ends_tag), default=after_word
        )
        fits_by_words_alone = (
            _chunks_needed(lengths, after_word, room) <= left < _chunks_needed(lengths, after_tag, room)
        )
        first = after_word if fits_by_words_alone else after_tag
        ends.append(first)
    return [_joined_units(units[begin:end]) for begin, end in zip([0, *ends], [*ends, len(units)], strict=True)]


def _joined_units(units: Sequence[_Unit]) -> Chunk:
    return [token for unit in units for token in unit.tokens[0]], [token for unit in units for token in unit.tokens[1]]


def _end_of_chunk(lengths: Sequence[int], first: int, room: int) -> int:
    """Return the number of the unit, `first` or later, that no longer fits into a chunk beginning with `first`."""
    filled = 0
    for unit in range(first, len(lengths)):
        filled += lengths[unit]
        if filled > room:
            return unit
    return len(lengths)


def _chunks_needed(lengths: Sequence[int], first: int, room: int) -> int:
    """Return how many chunks hold the units from `first` on."""
    needed = 0
    while first < len(lengths):
        first, needed = _end_of_chunk(lengths, first, room), needed + 1
    return needed


def _room(tokenizer: CLIPTokenizer) -> int:
    """Return how many tokens a chunk holds between its marks of start and end."""
    return int(tokenizer.model_max_length) - 2


def _framed(tokens: list[int], tokenizer: CLIPTokenizer) -> list[int]:
    """Return a chunk's tokens between the marks of start and end, filled up."""
    room = _room(tokenizer)
    padding = [tokenizer.pad_token_id] * (room - len(tokens))
    return [tokenizer.bos_token_id, *tokens[:room], tokenizer.eos_token_id, *padding]


def _row(chunks: Sequence[list[Token]], most: int, tokenizer: CLIPTokenizer) -> list[Token]:
    """Return one encoder's tokens of a caption, filled up to `most` chunks; a chunk that is too long is cut."""
    room = _room(tokenizer)
    start, end, pad = (
        (token, 1.0) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    )
    row: list[Token] = []
    for chunk in chunks:
        row += [start, *chunk[:room], end, *[pad] * (room - len(chunk))]
    return row + [pad] * ((most - len(chunks)) * (room + 2))
