"""Captions as the model reads them: tags shuffled and dropped afresh for each visit of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator


@dataclass(frozen=True, slots=True)
class CaptionRules:
    """How a caption varies between visits.

    separator: what stands between tags. shuffle: new order of tags each visit. keep_first: so many tags at the front
    keep their place and are never dropped. tag_dropout: probability of each other tag to be left out.
    caption_dropout: probability that the whole caption is dropped, which trains the unconditional branch.
    """

    separator: str = ","
    shuffle: bool = False
    keep_first: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0


def split_tags(caption: str, separator: str) -> tuple[str, ...]:
    """Return the caption's tags without surrounding blanks; empty ones are left out."""
    return tuple(tag for tag in (part.strip() for part in caption.split(separator)) if tag)


def join_tags(tags: Sequence[str], separator: str) -> str:
    """Join tags the way people write them: a blank follows a separator that has none of its own."""
    return (separator if separator != separator.strip() else f"{separator} ").join(tags)


def augment(tags: Sequence[str], rules: CaptionRules, generator: Generator) -> str | None:
    """Return the caption of one visit, or None where it is dropped whole (zero text embeddings).

    The generator is made from (seed, stream, visit, sample id), so the caption does not depend on who computes it. Each
    rule draws its numbers whether or not another one is on: switching one rule does not reshuffle the others.
    """
    dropped = generator.random() < rules.caption_dropout
    front, rest = list(tags[: rules.keep_first]), list(tags[rules.keep_first :])
    survives = generator.random(len(rest)) >= rules.tag_dropout
    order = generator.permutation(len(rest)) if rules.shuffle else range(len(rest))
    if dropped:
        return None
    return join_tags(front + [rest[i] for i in order if survives[i]], rules.separator)
