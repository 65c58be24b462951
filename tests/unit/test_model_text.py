"""Token ids, chunks, weights of tokens, and text states."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer

from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL, predict
from sdxl_training.model.text import CaptionTokenizer, caption_tokenizer, encode_text
from sdxl_training.records import Conditioning
from tests.tiny_sdxl import LENGTH, POOLED, WIDTH_1, WIDTH_2, tiny_pipeline, tiny_tokenizer

ROOM = LENGTH - 2

words = st.text(alphabet="abc", min_size=1, max_size=6)
tags = st.lists(words, min_size=1, max_size=3).map(" ".join)
tag_lists = st.lists(tags, min_size=1, max_size=6)
chunk_counts = st.integers(1, 3)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> SDXL:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return load_sdxl(str(folder), seed=0, device="cpu")


def plain_ids(sdxl: SDXL, text: str) -> list[int]:
    """Return the stock tokenizer's ids of the whole text."""
    return sdxl.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def inside_chunks(sdxl: SDXL, ids_L: Tensor) -> list[list[int]]:
    """Return the ids between the marks of each chunk, having checked that marks and padding are where they belong."""
    start, end = sdxl.tokenizer.bos_token_id, sdxl.tokenizer.eos_token_id
    chunks = []
    for chunk in ids_L.reshape(-1, LENGTH).tolist():
        if start not in chunk:
            assert set(chunk) == {sdxl.tokenizer.pad_token_id}
            continue
        last = chunk.index(end)
        assert chunk[0] == start
        assert set(chunk[last:]) == {end}, "the first encoder pads with the mark of the end"
        chunks.append(chunk[1:last])
    return chunks


def fits(lengths: list[int], chunks: int) -> bool:
    """Return whether some way to put runs of these lengths into chunks leaves nothing over: all ways are tried."""
    borders = range(1, len(lengths))
    cuts = (cut for count in range(chunks) for cut in combinations(borders, count))
    return any(
        all(sum(lengths[first:last]) <= ROOM for first, last in zip((0, *cut), (*cut, len(lengths)), strict=True))
        for cut in cuts
    )


# One chunk


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
    assert tokenize.lost_tokens(["a" * length, "b"]) == [max(0, length - ROOM), 0]


def test_second_tokenizer_pads_with_its_own_token(sdxl: SDXL) -> None:
    ids_1_BL, ids_2_BL = caption_tokenizer(sdxl)(["ab"])
    assert set(ids_1_BL[0, 4:].tolist()) == {sdxl.tokenizer.eos_token_id}
    assert set(ids_2_BL[0, 4:].tolist()) == {0}


def test_tokenizer_travels_to_loader_workers(sdxl: SDXL) -> None:
    tokenize = caption_tokenizer(sdxl, chunks=2, read=parse_weights)
    copy = pickle.loads(pickle.dumps(tokenize))
    caption = "red, (blue:1.2) and much more"
    assert all(torch.equal(*pair) for pair in zip(tokenize([caption]), copy([caption]), strict=True))
    assert torch.equal(tokenize.with_weights([caption])[2], copy.with_weights([caption])[2])
    plain = caption_tokenizer(sdxl)
    assert plain.with_weights(["(a:2)"])[2] is None
    assert pickle.loads(pickle.dumps(plain)).with_weights(["(a:2)"])[2] is None


# Chunks


@given(listed=tag_lists, chunks=chunk_counts)
def test_no_token_is_lost_moved_or_doubled_where_there_is_room(sdxl: SDXL, listed: list[str], chunks: int) -> None:
    caption = ", ".join(listed)
    tokenize = caption_tokenizer(sdxl, chunks)
    everything, [lost] = plain_ids(sdxl, caption), tokenize.lost_tokens([caption])
    inside = inside_chunks(sdxl, tokenize([caption])[0][0])
    seen = [token for chunk in inside for token in chunk]
    assert len(inside) <= chunks
    assert seen == everything[: len(everything) - lost]
    assert (lost == 0) is fits([len(plain_ids(sdxl, word)) for word in caption.split()], chunks)
    if lost:
        assert len(inside) == chunks
        assert len(inside[-1]) == ROOM


@given(listed=tag_lists, chunks=chunk_counts)
def test_chunks_end_between_tags_where_that_loses_nothing_and_never_in_words(
    sdxl: SDXL, listed: list[str], chunks: int
) -> None:
    caption = ", ".join(listed)
    inside = inside_chunks(sdxl, caption_tokenizer(sdxl, chunks)([caption])[0][0])
    ends = sdxl.tokenizer.convert_ids_to_tokens([chunk[-1] for chunk in inside[:-1]])
    assert all(end.endswith("</w>") for end in ends)
    words_and_marks = [plain_ids(sdxl, word) for word in caption.split()]
    between_words = {sum(map(len, words_and_marks[:count])) for count in range(len(words_and_marks))}
    places = [sum(map(len, inside[: count + 1])) for count in range(len(inside) - 1)]
    assert set(places) <= between_words, "a word keeps its comma"
    of_tags = [len(plain_ids(sdxl, tag)) for tag in [*(f"{tag}," for tag in listed[:-1]), listed[-1]]]
    if fits(of_tags, chunks):
        assert set(ends) <= {",</w>"}


def test_borders_of_other_separators_and_of_captions_without_any(sdxl: SDXL) -> None:
    def chunks(caption: str, separator: str, count: int = 3) -> list[str]:
        inside = inside_chunks(sdxl, caption_tokenizer(sdxl, count, separator)([caption])[0][0])
        return ["".join(sdxl.tokenizer.convert_ids_to_tokens(chunk)).replace("</w>", " ").strip() for chunk in inside]

    assert chunks("aaa bbb, ccc ddd, eee", ",") == ["aaa bbb ,", "ccc ddd , eee"]
    assert chunks("aaa bbb\nccc ddd\neeeee", "\n") == ["aaa bbb", "ccc ddd", "eeeee"]
    assert chunks("aaa, bbbbb, cccc", ",") == ["aaa , bbbbb ,", "cccc"]
    assert chunks("aaa bbb ccc ddd eee", ",") == ["aaa bbb ccc", "ddd eee"]
    assert chunks("aaa bbb -- ccc ddd eee", " -- ") == ["aaa bbb --", "ccc ddd eee"]
    assert chunks("aaaaaaa, " + "b" * 23, ",") == ["aaaaaaa ,", "b" * 10, "b" * 10]
    assert chunks("aaaaa, bbbbb cccccc, dddddd", ",", 3) == ["aaaaa ,", "bbbbb", "cccccc , ddd"]
    assert chunks("", ",") == [""]


def test_words_rather_than_tags_are_kept_whole_where_only_that_fits(sdxl: SDXL) -> None:
    caption = "aaaaaa, bbb ccccc, ddd"  # by tags 7 + 9 + 3 tokens, by words 10 + 9
    inside = inside_chunks(sdxl, caption_tokenizer(sdxl, 2)([caption])[0][0])
    assert [len(chunk) for chunk in inside] == [10, 9]
    assert caption_tokenizer(sdxl, 2).lost_tokens([caption]) == [0]
    inside = inside_chunks(sdxl, caption_tokenizer(sdxl, 3)([caption])[0][0])
    assert [len(chunk) for chunk in inside] == [7, 9, 3]
    too_long = caption_tokenizer(sdxl, 2)([caption + "d"])[0][0]
    assert [len(chunk) for chunk in inside_chunks(sdxl, too_long)] == [10, 10]
    much_too_long = caption_tokenizer(sdxl, 2)([caption + ", eeee"])[0][0]
    assert [len(chunk) for chunk in inside_chunks(sdxl, much_too_long)] == [7, 10]


@given(captions=st.lists(tag_lists.map(", ".join), min_size=1, max_size=4), chunks=chunk_counts)
def test_captions_of_a_batch_have_as_many_chunks_as_the_longest(sdxl: SDXL, captions: list[str], chunks: int) -> None:
    tokenize = caption_tokenizer(sdxl, chunks)
    together, _ = tokenize(captions)
    alone = [tokenize([caption])[0] for caption in captions]
    assert together.shape == (len(captions), max(ids_1L.shape[1] for ids_1L in alone))
    for row, ids_1L in zip(together, alone, strict=True):
        assert torch.equal(row[: ids_1L.shape[1]], ids_1L[0])
        assert set(row[ids_1L.shape[1] :].tolist()) <= {sdxl.tokenizer.pad_token_id}


@pytest.fixture
def unlike(tmp_path: Path) -> CaptionTokenizer:
    """Tokenizers as unlike as SDXL's: "!!" is one token to the first, and two to the second, which pads with "!"."""
    pair = []
    for pad_token in ("<|endoftext|>", "!"):
        folder = tmp_path / pad_token.strip("<|>")
        tiny_tokenizer(folder, pad_token)
        vocabulary = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps({**vocabulary, "!!</w>": len(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n! !</w>\n")
        for written in ("tokenizer.json", "special_tokens_map.json"):
            (folder / written).unlink(missing_ok=True)
        pair.append(CLIPTokenizer.from_pretrained(folder))
    assert [len(tokenizer("!!", add_special_tokens=False)["input_ids"]) for tokenizer in pair] == [1, 2]
    return CaptionTokenizer(*pair, chunks=2, read=parse_weights)


def test_both_encoders_read_the_same_words_in_a_chunk(unlike: CaptionTokenizer) -> None:
    ids_1_BL, ids_2_BL, weights_EBL = unlike.with_weights(["aaa bbb !! (!!:2) ccc"])  # 8 and 10 tokens, then 3
    letters = unlike.tokenizer("abc aa bb cc", add_special_tokens=False)["input_ids"]
    assert [[token in letters for token in row].count(True) for row in ids_1_BL.reshape(-1, LENGTH).tolist()] == [6, 3]
    assert [[token in letters for token in row].count(True) for row in ids_2_BL.reshape(-1, LENGTH).tolist()] == [6, 3]
    assert weights_EBL[0, 0].tolist() == [1.0] * 8 + [2.0] + [1.0] * (2 * LENGTH - 9)
    assert weights_EBL[1, 0].tolist() == [1.0] * 9 + [2.0] * 2 + [1.0] * (2 * LENGTH - 11)


def test_what_only_one_encoder_loses_is_lost(unlike: CaptionTokenizer) -> None:
    assert replace(unlike, chunks=1).lost_tokens(["!! " * 5, "!! " * 6, "!! " * 11]) == [0, 2, 12]
    assert unlike.lost_tokens(["!! " * 11]) == [2]
    assert unlike.lost_tokens(["!! " * 10, "!! " * 11]) == [0, 2]
    assert unlike(["a!!" * 4])[1].shape == (1, 2 * LENGTH), "one word of 8 tokens for one encoder and 12 for the other"


@given(chunks=chunk_counts)
def test_the_longest_caption_fills_all_chunks_and_loses_nothing(sdxl: SDXL, chunks: int) -> None:
    tokenize = caption_tokenizer(sdxl, chunks)
    caption = tokenize.longest_caption()
    inside = inside_chunks(sdxl, tokenize([caption])[0][0])
    assert [len(chunk) for chunk in inside] == [ROOM] * chunks
    assert tokenize.lost_tokens([caption, f"{caption} a"]) == [0, 1]
    assert tokenize.most_tokens == chunks * ROOM
    assert set(caption.split()) == {"a"}, "a token of its own in every vocabulary; letters of longer words merge"


# Weights


@given(
    listed=st.lists(st.tuples(tags, st.sampled_from(["0.5", "1.3", "2"])), min_size=1, max_size=5), chunks=chunk_counts
)
def test_every_token_has_the_weight_of_its_tag(sdxl: SDXL, listed: list[tuple[str, str]], chunks: int) -> None:
    plain = ", ".join(tag for tag, _ in listed)
    written = ", ".join(f"({tag}:{weight})" for tag, weight in listed)
    ids_1_BL, ids_2_BL, weights_EBL = caption_tokenizer(sdxl, chunks, read=parse_weights).with_weights([written])
    for ids_BL, expected_BL in zip((ids_1_BL, ids_2_BL), caption_tokenizer(sdxl, chunks)([plain]), strict=True):
        assert torch.equal(ids_BL, expected_BL)
    comma = (plain_ids(sdxl, ",")[0], 1.0)
    expected = [pair for tag, weight in listed for pair in [*((i, float(weight)) for i in plain_ids(sdxl, tag)), comma]]
    assert weights_EBL.shape == (2, *ids_1_BL.shape)
    assert weights_EBL.dtype == torch.float32
    assert torch.equal(weights_EBL[0], weights_EBL[1])
    special = [sdxl.tokenizer.bos_token_id, sdxl.tokenizer.eos_token_id]
    pairs = list(zip(ids_1_BL[0].tolist(), weights_EBL[0, 0].tolist(), strict=True))
    assert {weight for token, weight in pairs if token in special} <= {1.0}
    found = [(token, pytest.approx(weight)) for token, weight in pairs if token not in special]
    assert found == expected[: len(found)]


def test_a_weight_may_change_inside_a_word_and_brackets_are_text_without_weights(sdxl: SDXL) -> None:
    _, _, weights_EBL = caption_tokenizer(sdxl, read=parse_weights).with_weights(["a(b:2)c d"])
    assert weights_EBL[0, 0].tolist() == [1, 1, 2, 1, 1] + [1] * (LENGTH - 5)
    brackets = caption_tokenizer(sdxl)(["(a)"])[0]
    assert brackets[0, 1:4].tolist() == plain_ids(sdxl, "(a)")
    assert not torch.equal(brackets, caption_tokenizer(sdxl, read=parse_weights)(["(a)"])[0])


def states(sdxl: SDXL, tokenize: CaptionTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    return encode_text(sdxl, *tokenize.with_weights(captions))


def test_a_weight_moves_its_own_states_away_from_the_empty_prompt(sdxl: SDXL) -> None:
    weighted, plain = caption_tokenizer(sdxl, read=parse_weights), caption_tokenizer(sdxl)
    text_BLD, pooled_BP = states(sdxl, weighted, ["red (bl:1.5) x", "red (bl:0) x", "red bl x"])
    expected_BLD, expected_BP = states(sdxl, plain, ["red bl x"])
    empty_BLD, _ = states(sdxl, plain, [""])
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(pooled_BP, expected_BP.expand(3, -1), **close)
    torch.testing.assert_close(text_BLD[2], expected_BLD[0], **close)
    heavy = torch.zeros(LENGTH, dtype=torch.bool)
    heavy[4:6] = True  # start, r e d, b l
    assert heavy.sum() == len(plain_ids(sdxl, "bl"))
    torch.testing.assert_close(text_BLD[:2, ~heavy], expected_BLD[:, ~heavy].expand(2, -1, -1), **close)
    torch.testing.assert_close(text_BLD[1, heavy], empty_BLD[0, heavy], **close)
    torch.testing.assert_close(text_BLD[0, heavy], (1.5 * expected_BLD - 0.5 * empty_BLD)[0, heavy], **close)


# States


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


@pytest.mark.parametrize(("chunks", "repeats"), [(1, (1,)), (2, (2, 1)), (3, (6, 3, 2))])
def test_shorter_captions_are_repeated(sdxl: SDXL, chunks: int, repeats: tuple[int, ...]) -> None:
    tokenize = caption_tokenizer(sdxl, chunks)
    captions = ["aaaaaa", "aaaaaa bbbbbb", "aaaaaa bbbbbb cccccc"][:chunks]
    text_BLD, pooled_BP = states(sdxl, tokenize, captions)
    for row, (caption, count) in enumerate(zip(captions, repeats, strict=True)):
        alone_BLD, alone_BP = states(sdxl, caption_tokenizer(sdxl, 1 + row), [caption])
        own_LD = alone_BLD[0, : (1 + row) * LENGTH]
        torch.testing.assert_close(text_BLD[row], own_LD.repeat(count, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled_BP[row], alone_BP[0], rtol=1e-5, atol=1e-6)


def test_what_the_network_says_does_not_depend_on_the_length_of_other_captions(sdxl: SDXL) -> None:
    generator = torch.Generator().manual_seed(2)
    x_BCHW = torch.randn(1, 4, 8, 8, generator=generator)
    sizes_B6 = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    tokenize = caption_tokenizer(sdxl, 3)

    def output(captions: list[str], kept: int | None = None) -> Tensor:
        text_BLD, pooled_BP = states(sdxl, tokenize, captions)
        with torch.no_grad():
            told = Conditioning(text_BLD[:1, :kept], pooled_BP[:1], sizes_B6)
            return predict(sdxl.unet, x_BCHW, torch.tensor([500.0]), told)

    for caption, own in (("aaaaaa", LENGTH), ("aaaaaa bbbbbb", 2 * LENGTH)):
        alone = output([caption], own)
        together = output([caption, "aaaaaa bbbbbb cccccc"])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        uneven = output([caption, "aaaaaa bbbbbb cccccc"], 4 * LENGTH + 5)
        assert not torch.allclose(uneven, alone, rtol=1e-4, atol=1e-4), "other lengths are not the same"


def test_zeros_say_the_same_at_any_length(sdxl: SDXL) -> None:
    """A dropped caption is zeros in the shape of its batch."""
    text_BLD, pooled_BP = states(sdxl, caption_tokenizer(sdxl, 3), ["", "aaaaaa bbbbbb cccccc"])
    assert text_BLD.shape == (2, 6 * LENGTH, WIDTH_1 + WIDTH_2)
    x_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sizes_B6 = torch.full((2, 6), 64.0)
    with torch.no_grad():
        outputs = [
            predict(
                sdxl.unet,
                x_BCHW,
                torch.tensor([10.0, 900.0]),
                Conditioning(factor * text_BLD[:, :length], torch.zeros_like(pooled_BP), sizes_B6),
            )
            for factor, length in ((0, 6 * LENGTH), (0, LENGTH), (1, LENGTH))
        ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[1], outputs[2], rtol=1e-4, atol=1e-4)


def test_half_precision_encoders_give_fp32_states(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path)
    sdxl = load_sdxl(str(tmp_path), seed=0, device="cpu")
    sdxl.text_encoder.bfloat16()
    sdxl.text_encoder_2.bfloat16()
    for tokenize in (caption_tokenizer(sdxl), caption_tokenizer(sdxl, read=parse_weights)):
        assert {state.dtype for state in states(sdxl, tokenize, ["(red)"])} == {torch.float32}


@given(captions=st.lists(st.text(alphabet="ab!é, .\t\n\u3000", max_size=40), min_size=1, max_size=5))
def test_the_quick_way_for_plain_captions_is_the_general_one(sdxl: SDXL, captions: list[str]) -> None:
    quick = caption_tokenizer(sdxl)
    general = replace(quick, read=lambda caption: ((caption, 1.0),))
    for ours, expected in zip(quick.with_weights(captions)[:2], general.with_weights(captions)[:2], strict=True):
        assert torch.equal(ours, expected)


def test_words_are_remembered_but_not_without_end(sdxl: SDXL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdxl_training.model.text.WORDS_REMEMBERED", 5)
    tokenizer = caption_tokenizer(sdxl)
    for number in range(20):
        captions = [f"w{number} x{number} same", "same"]
        expected = [[*plain_ids(sdxl, caption)] for caption in captions]
        ids_1_BL, _ = tokenizer(captions)
        assert [row[1 : 1 + len(ids)].tolist() for row, ids in zip(ids_1_BL, expected, strict=True)] == expected
        assert all(len(ids) <= 5 for ids in tokenizer._ids_of)
