"""Caption files: a text, or JSON with captions, tags and the box that matters. Bytes in, what they say out."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_training.data.captions import split_tags

TAG_SEPARATOR = ","  # in a sidecar whose tags are one string
SIXTEEN_BITS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What stands beside a picture.

    captions: alternatives, empty where none is given (an empty caption is one). tags: beside the captions, empty where
    none are given. focus: (top, left, height, width) as written, in pixels or fractions; judged by `crops.read_box`,
    which knows the picture's size.
    """

    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    focus: tuple[float, float, float, float] | None = None


def read_caption_file(data: bytes, name: str) -> Sidecar:
    """Return what a caption file of this name says: JSON where it ends in .json, else its text is the one caption.

    Raises ValueError with the reason, which begins with "its caption <name>".
    """
    if name.lower().endswith(".json"):
        return read_sidecar(data, name)
    return Sidecar((_decode(data, name),))


def read_sidecar(data: bytes, name: str) -> Sidecar:
    """Return what a JSON caption says; see `sidecar_of`.

    Raises ValueError with the reason, which begins with "its caption <name>".
    """
    text = _decode(data, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno} column {error.colno}"
        raise ValueError(f"its caption {name} is not JSON ({reason})") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of too many digits
        raise ValueError(f"its caption {name} is not JSON ({error})") from error
    try:
        return sidecar_of(value)
    except ValueError as error:
        raise ValueError(f"its caption {name}: {error}") from error


def sidecar_of(value: object) -> Sidecar:
    """Return what parsed JSON says: a string is a caption, an object may have these keys, others are ignored.

    "caption": a string, or "captions": a list of them, alternatives. "tags": a list, or a string with commas. "focus":
    four numbers. A key whose value is null counts as not given. Raises ValueError for anything else.
    """
    if isinstance(value, str):
        return Sidecar((_text(value, "it"),))
    if not isinstance(value, Mapping):
        raise ValueError('neither a text nor an object such as {"caption": "a red car"}')
    given = {key: value[key] for key in ("caption", "captions", "tags", "focus") if value.get(key) is not None}
    if "caption" in given and "captions" in given:
        raise ValueError('"caption" and "captions" are both given; keep one')
    captions: tuple[str, ...] = ()
    if "caption" in given:
        captions = (_text(given["caption"], '"caption"'),)
    elif "captions" in given:
        captions = _texts(given["captions"], '"captions"')
    return Sidecar(captions, tags_of(given["tags"]) if "tags" in given else (), _focus(given.get("focus")))


def tags_of(value: object) -> tuple[str, ...]:
    """Return the tags of a list or of a string with commas, without surrounding blanks and empty ones.

    Raises ValueError for anything else.
    """
    if isinstance(value, str):
        return split_tags(_text(value, '"tags"'), TAG_SEPARATOR)
    return tuple(tag for tag in _texts(value, '"tags"') if tag)


def decode_text(data: bytes) -> str:
    """Return the text of UTF-8 with or without byte order mark, or of UTF-16 with one, without surrounding blanks.

    Raises ValueError for other bytes: what they stand for would be guessed.
    """
    body = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-16") if data.startswith(SIXTEEN_BITS) else body.decode()
    except UnicodeDecodeError as error:
        raise _not_text(error.start + len(data) - len(body)) from error
    if "\0" in text:  # UTF-16 without its mark passes as UTF-8
        raise _not_text(data.index(b"\0"))
    return text.strip()


def _not_text(byte: int) -> ValueError:
    return ValueError(f"is not UTF-8 text (byte {byte}); save it as UTF-8")


def _decode(data: bytes, name: str) -> str:
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"its caption {name} {error}") from error


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise ValueError(f"{what} has half a character ({value[error.start]!r})") from error
    return value.strip()


def _texts(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of texts, not {_shown(value)}")
    return tuple(_text(item, f"{what}[{i}]") for i, item in enumerate(value))


def _focus(value: object) -> tuple[float, float, float, float] | None:
    if value is None:
        return None
    problem = ValueError(f'"focus" must be [top, left, height, width], four numbers, not {_shown(value)}')
    if not isinstance(value, list) or len(value) != 4:
        raise problem
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        raise problem
    try:
        top, left, height, width = (float(number) for number in value)
    except OverflowError:
        raise problem from None
    if not all(map(math.isfinite, (top, left, height, width))):
        raise problem
    return top, left, height, width


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:  # it was nested just little enough to be read
        return type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."
