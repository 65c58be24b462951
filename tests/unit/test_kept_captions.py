"""Captions that were all encoded are not drawn again at the next start, unless anything about them is new."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.claims import Claims
from sdxl_training.data.kept_captions import KeptCaptions
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.text_states import LOOKED_UP, TextCache, TextShape, captions_to_keep, fill_texts
from sdxl_training.records import ImageRecord
from sdxl_training.tracking.progress import SilentProgress

SHAPE = TextShape(chunk=1, width=1, pooled=1)
RULES = (CaptionRules(shuffle=True),)
RECORDS = [ImageRecord(i, f"{i}.png", (64, 64), (f"{i}, a, b, c",), ()) for i in range(LOOKED_UP)]


def encode(captions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(1, 1), torch.zeros(1)) for _ in captions]


def cache_in(folder: Path, settings: str = "encoders", variants: int = 2) -> TextCache:
    return TextCache(folder, settings, SHAPE, variants)


def texts(records: Sequence[ImageRecord] = RECORDS, seed: int = 0) -> Iterator[str]:
    return captions_to_keep(records, RULES, seed, 2)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache = cache_in(tmp_path)
    kept = KeptCaptions(cache, "pictures")
    assert not kept.all_there(texts())
    with StoreWriter(tmp_path) as writer:
        fill_texts(
            cache,
            kept.noting(texts()),
            1 + 2 * len(RECORDS),
            encode,
            writer,
            Claims(tmp_path / "claims"),
            SilentProgress(),
        )
    kept.remember()
    return tmp_path


def test_what_is_all_there_is_found_with_few_captions_drawn(filled: Path) -> None:
    drawn = []

    def listening() -> Iterator[str]:
        for text in texts():
            drawn.append(text)
            yield text

    assert KeptCaptions(cache_in(filled), "pictures").all_there(listening())
    assert len(drawn) == LOOKED_UP < 2 * len(RECORDS)


@pytest.mark.parametrize(
    ("made_from", "changed"),
    [("others", {}), ("pictures", {"settings": "other encoders"}), ("pictures", {"variants": 3})],
)
def test_anything_new_has_captions_drawn(filled: Path, made_from: str, changed: dict[str, int | str]) -> None:
    assert not KeptCaptions(cache_in(filled, **changed), made_from).all_there(texts())


def test_captions_that_a_new_version_draws_otherwise_are_noticed(filled: Path) -> None:
    assert not KeptCaptions(cache_in(filled), "pictures").all_there(texts(seed=1))


def test_states_that_are_gone_are_noticed(filled: Path) -> None:
    for shard in filled.glob("*/*.blobs"):
        shard.unlink()
    assert not KeptCaptions(cache_in(filled), "pictures").all_there(iter(()))


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x93NUMPY"])
def test_a_damaged_note_is_as_good_as_none(filled: Path, content: bytes) -> None:
    (note,) = filled.glob("captions-*.npy")
    whole = note.read_bytes()
    for damaged in (content, whole[: len(whole) // 2]):
        note.write_bytes(damaged)
        assert not KeptCaptions(cache_in(filled), "pictures").all_there(texts())
