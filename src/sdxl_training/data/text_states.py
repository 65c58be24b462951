"""Text states on disk: each caption is encoded once, so that the text encoders need not stay on the GPU.

Of each record K captions are kept, which its visits show in turn; captions that are equal share an entry, and the empty
caption has one. An entry's key is a function of the caption and of all that decides what it is encoded to.

Shape legend: B captions of a batch, C tokens of a chunk, L tokens of a caption's own chunks (a multiple of C), or of
all captions of a batch once they are of one length, D text width, P pooled text width, N keys; a key is two u64.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdxl_training.data.captions import CaptionRules, draw_caption
from sdxl_training.data.claims import Claims
from sdxl_training.data.filling import WAIT_SECONDS, Progress
from sdxl_training.data.store import DamagedEntry, Store
from sdxl_training.data.store_format import ORIGIN, Keys, as_keys
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import ImageRecord, UserError
from sdxl_training.rng import Stream, numpy_generator

CODE_VERSION = 1  # of how text states are stored: part of every key
LOOKED_UP = 1024  # captions that are looked for at once
ENCODED = 32  # captions that go through the encoders at once
SHOWN = 200  # characters of a caption in a message

States = tuple[Tensor, Tensor]
"""text_LD of the caption's own chunks, pooled_P"""
EncodeCaptions = Callable[[Sequence[str]], Sequence[States]]
"""captions -> the states of each, on any device"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextShape:
    """How large text states are: tokens of a chunk (C), text width (D), pooled width (P)."""

    chunk: int
    width: int
    pooled: int

    def entry_bytes(self, chunks: int) -> int:
        """Return the size on disk of a caption of so many chunks."""
        return (chunks * self.chunk * self.width + self.pooled) * torch.float16.itemsize


def projected_bytes(records: int, variants: int, chunks: int, shape: TextShape) -> int:
    """Return the most that text states can take on disk: all captions different, and as long as captions get."""
    return (records * variants + 1) * shape.entry_bytes(chunks)


class TextCache:
    """The text states in a folder that were made by one pair of text encoders.

    settings: names all that decides a caption's states beside its text: encoders, tokenizers, how captions are read.
    variants: how many captions of each record are kept. May be read by several threads and after a fork; `refresh` is
    for one thread, while the others do not read.
    """

    def __init__(self, folder: Path, settings: str, shape: TextShape, variants: int = 1) -> None:
        self.store = Store(folder)
        self.shape = shape
        self.variants = variants
        self._said_lost = False
        self._settings = hashlib.blake2b(f"{CODE_VERSION} {shape} {settings}".encode(), digest_size=16).digest()

    def key(self, text: str) -> bytes:
        """Return the 16 bytes by which a caption is found."""
        return hashlib.blake2b(text.encode(), digest_size=16, key=self._settings).digest()

    def has(self, text: str) -> bool:
        """Return whether there is an entry that `read` would try."""
        return bool(self.there(as_keys([self.key(text)]))[0])

    def there(self, keys_N2: Keys) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return which keys have an entry (N,)."""
        return self.store.find(keys_N2) >= 0

    def read(self, text: str) -> States | None:
        """Return text_LD and pooled_P, fp32; None where the cache has none that can be used."""
        states = self._read_half(text)
        return None if states is None else (states[0].float(), states[1].float())

    def read_batch(self, texts: Sequence[str], paths: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Return text_BLD and pooled_BP of captions, as they are stored: fp16; None where one has no entry.

        paths: the captions' pictures; the first whose caption is lost is named.
        """
        states = []
        for text, path in zip(texts, paths, strict=True):
            each = self._read_half(text)
            if each is None:
                self._say_lost(path)
                return None
            states.append(each)
        text_BLD = same_length([text_LD for text_LD, _ in states], self.shape.chunk)
        return text_BLD, torch.stack([pooled_P for _, pooled_P in states])

    def _say_lost(self, path: str) -> None:
        if not self._said_lost:
            log.warning(
                "%s: the text states of its caption are no longer in the cache (%s). This batch's captions are encoded "
                "anew, and so are those of all others that miss some, which takes time. The next start stores them "
                "again.",
                path,
                self.store.folder,
            )
        self._said_lost = True

    def _read_half(self, text: str) -> States | None:
        row = int(self.store.find(as_keys([self.key(text)]))[0])
        if row < 0:
            return None
        try:
            entry = self.store.read(row)
        except DamagedEntry as damage:
            log.warning("%s", damage)
            return None
        return entry[: -self.shape.pooled].view(-1, self.shape.width), entry[-self.shape.pooled :]

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return those of these captions that nobody has stored by now, each once."""
        self.refresh()
        once = list(dict.fromkeys(texts))
        there = self.there(as_keys(map(self.key, once)))
        return [text for text, is_there in zip(once, there, strict=True) if not is_there]

    def claim(self, text: str) -> int:
        """Return the number by which a caption is claimed; of two captions that have the same one waits."""
        return int.from_bytes(self.key(text)[:4], "little") >> 1

    def append(self, writer: StoreWriter, texts: Sequence[str], states: Sequence[States]) -> None:
        """Store captions; raises UserError, naming the caption, where 16 bits cannot hold what it is encoded to."""
        entries = [self._entry(text, *each) for text, each in zip(texts, states, strict=True)]
        writer.append(as_keys(map(self.key, texts)), np.zeros(len(texts), ORIGIN), entries)

    def refresh(self) -> bool:
        """Find what has been written since, by anybody; return whether there was anything."""
        return self.store.refresh() > 0

    def _entry(self, text: str, text_LD: Tensor, pooled_P: Tensor) -> Tensor:
        shape = self.shape
        if text_LD.shape[0] % shape.chunk or text_LD.shape[1:] != (shape.width,) or pooled_P.shape != (shape.pooled,):
            raise ValueError(f"states {tuple(text_LD.shape)} and {tuple(pooled_P.shape)} are not of {shape}")
        entry = torch.cat([text_LD.flatten(), pooled_P]).detach().to("cpu", torch.float16)
        # Judged after rounding: a value beyond fp16's range becomes infinite.
        if not entry.isfinite().all():
            raise UserError(
                f"data.cache.text_variants: the text states of the caption {text[:SHOWN]!r} are not finite in 16 bit. "
                "Change the caption, or set data.cache.text_variants: 0, which encodes captions anew each time."
            )
        return entry


def same_length(texts: Sequence[Tensor], chunk: int) -> Tensor:
    """Return text_BLD: each caption's own text_LD repeated until all are of one length, C times 1, 2 or 6.

    The same length, and the same states at the same places, as when the captions are encoded together (model/text.py):
    attention over repeated keys is attention over the keys.
    """
    most = max(len(text_LD) for text_LD in texts) // chunk
    common = chunk * math.lcm(*range(1, most + 1))
    return torch.stack([text_LD.repeat(common // len(text_LD), 1) for text_LD in texts])


def caption_of_visit(record: ImageRecord, rules: CaptionRules, seed: int, visit: int, variants: int) -> str | None:
    """Return the caption that a visit shows where only `variants` captions of each record are kept.

    Visit v shows what visit v mod K would show if nothing were dropped whole. Whether the caption is dropped is drawn
    for each visit by itself: were it drawn with the variant, it would be the same pictures that always lack theirs.
    """
    # The first number that `draw_caption` draws: the first K visits show what they would without a cache of texts.
    if numpy_generator(seed, Stream.CAPTION, visit, record.sample_id).random() < rules.caption_dropout:
        return None if rules.null_mode == "zeros" else ""
    return _caption_of_variant(record, replace(rules, caption_dropout=0.0), seed, visit % variants)


def captions_to_keep(
    records: Iterable[ImageRecord], rules: Sequence[CaptionRules], seed: int, variants: int
) -> Iterator[str]:
    """Yield the empty caption, then those of each record's variants; the same again and again where they are equal.

    rules: how captions vary, for each source.
    """
    yield ""
    undropped = [replace(each, caption_dropout=0.0) for each in rules]
    for record in records:
        own = undropped[record.source]
        for variant in range(variants if _varies(record, own) else 1):
            yield _caption_of_variant(record, own, seed, variant)


def _varies(record: ImageRecord, rules: CaptionRules) -> bool:
    in_parts = rules.shuffle or rules.tag_dropout > 0
    return in_parts or len(record.captions) > 1 or len(rules.templates) > 1


def _caption_of_variant(record: ImageRecord, rules: CaptionRules, seed: int, variant: int) -> str:
    generator = numpy_generator(seed, Stream.CAPTION, variant, record.sample_id)
    caption = draw_caption(record.captions, rules, generator, record.tags)
    if caption is None:
        raise ValueError("a variant of a caption is never dropped whole")
    return caption


def fill_texts(
    cache: TextCache,
    texts: Iterable[str],
    most: int,
    encode: EncodeCaptions,
    writer: StoreWriter,
    claims: Claims,
    progress: Progress,
    wait: Callable[[], None] = lambda: time.sleep(WAIT_SECONDS),
) -> int:
    """Encode the captions that the cache lacks until it has all; return how many this process encoded.

    texts: read once, in passing; `most` of them at most. Any number of processes may do this at once, each with the
    captions in an order of its own: who encodes a caption claims it first, and takes over those of a process that died.
    wait: called while all that is left is in other hands. Raises UserError for states that are not finite in 16 bit and
    where the cache cannot be written.
    """
    encoded, stream, said = 0, iter(texts), False
    elsewhere: list[str] = []
    with claims, progress.track("encoding captions", most) as advance:
        while some := [*elsewhere, *islice(stream, LOOKED_UP)]:
            is_old = len(some) == len(elsewhere)
            count, elsewhere = _encode_free(cache, some, encode, writer, claims)
            encoded += count
            advance(len(some) - len(elsewhere))
            if elsewhere and is_old and not count:
                if not said:
                    log.info("%d captions are in the hands of other processes: waiting for them", len(elsewhere))
                    said = True
                wait()
    cache.refresh()
    return encoded


def _encode_free(
    cache: TextCache, texts: Sequence[str], encode: EncodeCaptions, writer: StoreWriter, claims: Claims
) -> tuple[int, list[str]]:
    """Encode those of these captions that are neither stored nor in other hands; return how many, and the latter."""
    missing, encoded = cache.missing(texts), 0
    elsewhere: list[str] = []
    for first in range(0, len(missing), ENCODED):
        some = missing[first : first + ENCODED]
        taken = [text for text in some if claims.take(cache.claim(text))]
        elsewhere += [text for text in some if text not in taken]
        mine = cache.missing(taken)  # whoever had one until a moment ago has stored it
        if mine:
            cache.append(writer, mine, encode(mine))
        encoded += len(mine)
        for text in taken:
            claims.give_back(cache.claim(text))
    return encoded, elsewhere
