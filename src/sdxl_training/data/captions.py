"""Captions as the model reads them: varied afresh for each visit of a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from numpy.random import Generator

from sdxl_training.data.caption_weights import escape_lone_brackets, split_outside_brackets
from sdxl_training.records import UserError

Option = TypeVar("Option")

PLACEHOLDER = re.compile(r"\{(\w+)\}")
PLACEHOLDERS = ("caption", "tags")


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """How the captions of one source vary between visits.

    separator: what stands between tags. shuffle: new order of tags each visit. keep_first: so many tags at the front
    keep their place and are never dropped. tag_dropout: probability of each other tag to be left out.
    caption_dropout: probability that the whole caption is dropped, which trains the unconditional branch; null_mode
    says whether that branch is zeros (SDXL's own) or the text states of the empty string.
    kind: prose is never split, shuffled or dropped in parts. templates: sentences around {caption} or {tags}, one drawn
    per visit. front and back: tags around the finished caption, always there; tags of that name elsewhere go.
    weights: brackets are emphasis, and tags are not split inside them.
    """

    separator: str = ","
    shuffle: bool = False
    keep_first: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    kind: Literal["tags", "prose"] = "tags"
    null_mode: Literal["zeros", "empty_string"] = "zeros"
    templates: tuple[str, ...] = ()
    front: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    weights: bool = False

    def __post_init__(self) -> None:
        for template in self.templates:
            _check_template(template)


def split_tags(caption: str, separator: str, weights: bool = False) -> tuple[str, ...]:
    """Return the caption's tags without surrounding blanks; empty ones are left out.

    With weights, what brackets enclose stays one tag.
    """
    parts = split_outside_brackets(caption, separator) if weights else caption.split(separator)
    return tuple(tag for tag in (part.strip() for part in parts) if tag)


def join_tags(tags: Sequence[str], separator: str) -> str:
    """Join tags the way people write them: a blank follows a separator that has none of its own."""
    return (separator if separator != separator.strip() else f"{separator} ").join(tags)


def split_alternatives(text: str) -> tuple[str, ...]:
    """Return the captions of a file that holds one a line; without any, one empty caption."""
    return tuple(line for line in (line.strip() for line in text.splitlines()) if line) or ("",)


def draw_caption(
    captions: Sequence[str], rules: CaptionRules, generator: Generator, tags: Sequence[str] = ()
) -> str | None:
    """Return the caption of one visit, or None where it is dropped whole and stands for zero text states.

    captions: the picture's alternatives as they are written, of which one is drawn. tags: beside prose, what {tags} in
    a template stands for; tag captions bring their own.

    The generator is made from (seed, stream, visit, sample id), so the caption does not depend on who computes it. Each
    rule draws its numbers whether or not another one is on: switching one rule does not reshuffle the others.
    """
    dropped = generator.random() < rules.caption_dropout
    # Their own generator: neither choice moves the numbers of the tags, whose number depends on the first.
    of_caption, of_template = generator.spawn(1)[0].random(2)
    prose, own_tags = _read(_pick(captions, of_caption), tags, rules)
    shown = _vary(own_tags, rules, generator)
    if dropped:
        return None if rules.null_mode == "zeros" else ""
    return _compose(prose, shown, _pick(rules.templates or (None,), of_template), rules)


def whole_captions(captions: Sequence[str], rules: CaptionRules, tags: Sequence[str] = ()) -> list[str]:
    """Return each alternative in each template, with nothing dropped or moved: what visits show parts of."""
    read = [_read(caption, tags, rules) for caption in captions]
    return [_compose(*one, template, rules) for one in read for template in rules.templates or (None,)]


def _read(caption: str, tags: Sequence[str], rules: CaptionRules) -> tuple[str | None, list[str]]:
    """Return (prose, tags) of an alternative; without prose the tags are the caption. Added tags are left out."""
    prose = caption.strip() if rules.kind == "prose" else None
    listed = split_tags(caption, rules.separator, rules.weights) if prose is None else tags
    return prose, [tag for tag in listed if tag not in rules.front and tag not in rules.back]


def _compose(prose: str | None, tags: Sequence[str], template: str | None, rules: CaptionRules) -> str:
    """Return the finished caption. Brackets without partner find none in other tags or in the template, either."""
    if rules.weights:
        prose = prose if prose is None else escape_lone_brackets(prose)
        tags = [escape_lone_brackets(tag) for tag in tags]
    listed = join_tags(tags, rules.separator)
    text = listed if prose is None else prose
    if template is not None:
        text = _fill(template, {"caption": text, "tags": listed})
    return join_tags([part for part in (*rules.front, text, *rules.back) if part], rules.separator)


def _vary(own: Sequence[str], rules: CaptionRules, generator: Generator) -> list[str]:
    front, rest = list(own[: rules.keep_first]), own[rules.keep_first :]
    survives = generator.random(len(rest)) >= rules.tag_dropout
    order = generator.permutation(len(rest)) if rules.shuffle else range(len(rest))
    return front + [rest[i] for i in order if survives[i]]


def _pick(options: Sequence[Option], uniform: float) -> Option:
    return options[int(uniform * len(options))]


def _fill(template: str, values: dict[str, str]) -> str:
    """Fill a template; nothing is said about an empty caption."""
    if not any(values[name] for name in PLACEHOLDER.findall(template)):
        return ""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _check_template(template: str) -> None:
    names = PLACEHOLDER.findall(template)
    unknown = [name for name in names if name not in PLACEHOLDERS]
    if names and not unknown:
        return
    wrong = f"{{{unknown[0]}}} is no placeholder" if unknown else "it has no placeholder"
    raise UserError(
        f"data.captions.templates: {template!r}: {wrong}; a template holds {{caption}} or {{tags}}, for example "
        '"a picture of {caption}". Correct or remove it.'
    )
