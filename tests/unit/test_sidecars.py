"""Caption files: what is written comes back, whatever the encoding; anything else is a reason that says where."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.data.captions import split_tags
from sdxl_training.data.sidecars import Sidecar, decode_text, read_caption_file, read_sidecar, sidecar_of, tags_of

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**50), 2**50)
ENCODINGS = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16 LE": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(text=TEXT)
def test_text_comes_back_in_every_encoding_without_its_blanks(encoding: str, text: str) -> None:
    if text.startswith("\ufeff"):  # a second mark; which of them is one is not told
        return
    assert decode_text(ENCODINGS[encoding](text)) == text.strip()


@pytest.mark.parametrize(
    ("data", "byte"),
    [
        ("café".encode("latin-1"), 3),
        (codecs.BOM_UTF8 + b"caf\xe9", 6),
        ("a car".encode("utf-16-le"), 1),  # without its mark it would pass as UTF-8
        (codecs.BOM_UTF16_LE + b"a", 2),
        (b"\xff", 0),
    ],
)
def test_other_bytes_are_refused_with_their_place(data: bytes, byte: int) -> None:
    with pytest.raises(ValueError, match=rf"^is not UTF-8 text \(byte {byte}\); save it as UTF-8$"):
        decode_text(data)


@given(st.binary(max_size=20))
def test_bytes_either_decode_or_raise_value_error_and_nothing_else(data: bytes) -> None:
    for read, start in (
        (decode_text, "is not UTF-8 text"),
        (lambda data: read_sidecar(data, "a.json"), "its caption a.json"),
    ):
        try:
            read(data)
            reason = start
        except ValueError as error:
            reason = str(error)
        assert reason.startswith(start)  # no other ValueError, such as UnicodeError


@given(
    captions=st.lists(TEXT),
    tags=st.lists(TEXT),
    focus=st.none() | st.lists(NUMBER, min_size=4, max_size=4),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    escaped=st.booleans(),
)
def test_an_object_comes_back(
    captions: list[str], tags: list[str], focus: list[float] | None, encoding: str, escaped: bool
) -> None:
    written = {"captions": captions, "tags": tags, "focus": focus, "width": 3, "nested": {"caption": 1}}
    found = read_sidecar(ENCODINGS[encoding](json.dumps(written, ensure_ascii=escaped)), "a.json")
    assert found.captions == tuple(caption.strip() for caption in captions)
    assert found.tags == tuple(tag.strip() for tag in tags if tag.strip())
    assert found.focus == (None if focus is None else tuple(focus))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a car", Sidecar(("a car",))),
        ({"caption": " a car "}, Sidecar(("a car",))),
        ({"caption": ""}, Sidecar(("",))),
        ({"captions": ["one", "two"]}, Sidecar(("one", "two"))),
        ({"captions": []}, Sidecar()),
        ({"caption": None, "captions": ["one"], "tags": None, "focus": None}, Sidecar(("one",))),
        ({"tags": "red,  car,,"}, Sidecar((), ("red", "car"))),
        # what sd-scripts' metadata has for a picture
        ({"caption": "a", "tags": "b, c", "train_resolution": [512, 512]}, Sidecar(("a",), ("b", "c"))),
        ({"focus": [0.25, 0, 0.5, 1]}, Sidecar((), (), (0.25, 0.0, 0.5, 1.0))),
        ({"focus": [-5, 0, 5000, 1]}, Sidecar((), (), (-5.0, 0.0, 5000.0, 1.0))),  # judged with the picture's size
    ],
)
def test_the_forms_people_write(written: object, expected: Sidecar) -> None:
    assert sidecar_of(written) == expected
    assert read_sidecar(json.dumps(written).encode(), "a.json") == expected


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("[1]", "neither a text nor an object"),
        ("null", "neither a text nor an object"),
        ("", "is not JSON"),
        ('{"caption": "a",}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON|neither"),
        ('{"caption": 3}', '"caption" must be a text, not 3'),
        ('{"caption": ["a"]}', '"caption" must be a text'),
        ('{"captions": "a"}', '"captions" must be a list of texts'),
        ('{"captions": ["a", 3]}', r'"captions"\[1\] must be a text, not 3'),
        ('{"caption": "a", "captions": []}', "both given"),
        ('{"tags": {"a": 1}}', '"tags" must be a list'),
        ('{"tags": ["a", null]}', r'"tags"\[1\] must be a text'),
        ('{"caption": "\\ud800"}', "half a character"),
        ('{"focus": [1, 2, 3]}', '"focus" must be'),
        ('{"focus": [1, 2, 3, true]}', '"focus" must be'),
        ('{"focus": [1, 2, 3, "4"]}', '"focus" must be'),
        ('{"focus": [1, 2, 3, NaN]}', '"focus" must be'),
        ('{"focus": [1, 2, 3, 1e999]}', '"focus" must be'),
        ('{"focus": [1, 2, 3, 1' + "0" * 400 + "]}", '"focus" must be'),
        ('{"focus": {"top": 1}}', '"focus" must be'),
    ],
)
def test_anything_else_is_a_reason_that_names_the_file(written: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^its caption sub/a.json.*({reason})"):
        read_sidecar(written.encode(), "sub/a.json")


def test_nesting_that_is_just_readable_is_a_reason_too() -> None:
    for depth in range(900, 1100):
        with pytest.raises(ValueError, match=r"its caption a\.json"):
            read_sidecar(b'{"caption": ' + b"[" * depth + b"]" * depth + b"}", "a.json")


def test_the_ending_says_whether_a_caption_is_json() -> None:
    data = b'{"caption": "a"}'
    assert read_caption_file(data, "a.JSON") == Sidecar(("a",))
    assert read_caption_file(data, "a.txt") == Sidecar(('{"caption": "a"}',))
    assert read_caption_file(b"", "a.txt") == Sidecar(("",))
    with pytest.raises(ValueError, match=r"^its caption a\.txt is not UTF-8 text \(byte 0\); save it as UTF-8$"):
        read_caption_file(b"\xe9", "a.txt")


@given(TEXT)
def test_a_string_of_tags_is_split_as_tag_captions_are(text: str) -> None:
    assert tags_of(text) == split_tags(text, ",")
