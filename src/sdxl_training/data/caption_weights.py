r"""Emphasis in captions: `(tag:1.2)`, as the common web front ends write it.

    (text)       1.1 times the weight        [text]   1 / 1.1 times
    (text:1.3)   1.3 times                   nested   weights multiply
    \( \) \[ \] \\                           the character itself

The notation is that of AUTOMATIC1111's stable-diffusion-webui (`parse_prompt_attention`). Two things differ, because a
caption may be a tagger's output and not a prompt: a bracket without partner is text (as in ComfyUI) and not emphasis up
to the end, and a backslash before any other character stays. What a weight does to the text states is told in
`model.text`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

from sdxl_training.records import UserError

ROUND = 1.1
SQUARE = 1 / 1.1
MAX_WEIGHT = 10.0

_MARK = re.compile(
    r"""\\(?P<escaped>[()\[\]\\])
    | (?P<bracket>[()\[\]])
    | :\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)""",
    re.VERBOSE | re.ASCII,
)

MAYBE_HUGE = r"(?s):[\s\v]*[+-]?\d\d[\d.]*[\s\v]*\)|\((?:[^()\\]|\\.)*\("
"""Matches every text in which a weight is beyond MAX_WEIGHT; in RE2's notation, so that Arrow can search millions.

One pair of brackets needs a number of two digits for that; otherwise there is a round one inside a round one.
"""


@dataclass(frozen=True, slots=True)
class _Emphasis:
    """caption[opening] is the opening bracket, caption[inner_end:end] what closes it, with its number if it has one."""

    opening: int
    inner_end: int
    end: int
    factor: float


def parse_weights(caption: str) -> tuple[tuple[str, float], ...]:
    """Return the caption's text in pieces of one weight each: without markup, neighbours of equal weight joined.

    Raises UserError for a weight beyond +-10, which no text state survives: mostly a bracket that is meant as text.
    """
    emphases, backslashes = _find_marks(caption)
    is_text, weights = [True] * len(caption), [1.0] * len(caption)
    for place in backslashes:
        is_text[place] = False
    for emphasis in emphases:
        is_text[emphasis.opening] = False
        for place in range(emphasis.opening, emphasis.inner_end):
            weights[place] *= emphasis.factor
        for place in range(emphasis.inner_end, emphasis.end):
            is_text[place] = False
    text = [(character, weight) for character, weight, kept in zip(caption, weights, is_text, strict=True) if kept]
    _refuse_huge(caption, [weight for _, weight in text])
    return tuple(
        ("".join(character for character, _ in run), weight) for weight, run in groupby(text, key=lambda pair: pair[1])
    )


def split_outside_brackets(caption: str, separator: str) -> list[str]:
    """Split at the separators that no pair of brackets encloses: `(red, blue:1.2), green` has two parts."""
    emphases, _ = _find_marks(caption)
    parts, begin = [], 0
    for match in re.finditer(re.escape(separator), caption):
        if not any(emphasis.opening < match.start() < emphasis.end for emphasis in emphases):
            parts.append(caption[begin : match.start()])
            begin = match.end()
    return [*parts, caption[begin:]]


def escape_lone_brackets(text: str) -> str:
    """Return the same text so that it may stand beside other text: brackets without partner find none there.

    They get a backslash, and so does a backslash at the end.
    """
    emphases, backslashes = _find_marks(text)
    partners = {place for emphasis in emphases for place in (emphasis.opening, emphasis.end - 1)}
    escaped = {place + 1 for place in backslashes}
    lone = {place for place, character in enumerate(text) if character in "()[]"} - partners - escaped
    if text.endswith("\\") and len(text) - 1 not in escaped:
        lone.add(len(text) - 1)
    return "".join(f"\\{character}" if place in lone else character for place, character in enumerate(text))


def _find_marks(caption: str) -> tuple[list[_Emphasis], list[int]]:
    """Return the pairs of brackets, inner ones first, and the places of backslashes that escape something."""
    emphases: list[_Emphasis] = []
    backslashes: list[int] = []
    round_ones: list[int] = []
    square_ones: list[int] = []
    for mark in _MARK.finditer(caption):
        start, end, bracket, number = mark.start(), mark.end(), mark["bracket"], mark["number"]
        if mark["escaped"]:
            backslashes.append(start)
        elif bracket == "(":
            round_ones.append(start)
        elif bracket == "[":
            square_ones.append(start)
        elif bracket == "]":
            if square_ones:
                emphases.append(_Emphasis(square_ones.pop(), start, end, SQUARE))
        elif round_ones:
            emphases.append(_Emphasis(round_ones.pop(), start, end, float(number) if number else ROUND))
    return emphases, backslashes


def _refuse_huge(caption: str, weights: list[float]) -> None:
    # Not "above": a number of too many digits is infinite, and times zero it is no number.
    huge = [weight for weight in weights if not abs(weight) <= MAX_WEIGHT]
    if huge:
        raise UserError(
            f"caption {caption!r}: a weight of {huge[0]:g}; weights lie between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}. "
            r"Correct the number, or write \( and \) for brackets that belong to the text."
        )
