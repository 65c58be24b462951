"""From the settings of captions to what scan, loader, previews and rehearsal read them by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.config.objective import ConditionalTransportCoupling
from sdxl_training.config.schema import Config
from sdxl_training.data.buckets import Integers
from sdxl_training.data.caption_weights import MAYBE_HUGE, parse_weights
from sdxl_training.data.captions import CaptionRules, whole_captions
from sdxl_training.data.pictures import Pictures
from sdxl_training.data.text_search import rows_with
from sdxl_training.model.sdxl import TextParts
from sdxl_training.model.text import CaptionTokenizer, caption_tokenizer, plain_text
from sdxl_training.records import ImageRecord, UserError
from sdxl_training.tracking.progress import Progress

TOKENS_OF_A_CHUNK = 75
MEASURED = 2_000
"""Pictures whose captions are measured: a caption takes a millisecond, which for a million would be a quarter hour."""
NAMED = 5


def caption_rules(config: Config) -> tuple[CaptionRules, ...]:
    """Return how captions vary, for each source."""
    captions = config.data.captions
    return tuple(
        CaptionRules(
            separator=captions.separator,
            shuffle=captions.shuffle,
            keep_first=captions.keep_first,
            tag_dropout=captions.tag_dropout,
            caption_dropout=captions.caption_dropout,
            kind=captions.kind,
            null_mode=captions.null_mode,
            templates=captions.templates,
            front=source.add_tags.front,
            back=source.add_tags.back,
            weights=captions.weights,
        )
        for source in config.data.sources
    )


def build_tokenizer(config: Config, sdxl: TextParts) -> CaptionTokenizer:
    """Return what reads captions and prompts, in training and in previews alike."""
    captions = config.data.captions
    read = parse_weights if captions.weights else plain_text
    return caption_tokenizer(sdxl, captions.max_tokens // TOKENS_OF_A_CHUNK, captions.separator, read)


def refuse_absent_tags(config: Config, records: Sequence[ImageRecord]) -> None:
    """Raise UserError where something asks for the tags beside prose and no picture has any."""
    captions = config.data.captions
    in_templates = any("{tags}" in template for template in captions.templates)
    in_coupling = isinstance(config.training.coupling, ConditionalTransportCoupling)
    if captions.kind == "tags" or not (in_templates or in_coupling) or any(record.tags for record in records):
        return
    if in_templates:
        raise UserError(
            "data.captions.templates: {tags} stands for the tags beside prose, and none of the "
            f"{len(records)} pictures has any. Use {{caption}}, or kind: tags."
        )
    if in_coupling:
        raise UserError(
            "training.coupling.type = conditional_transport compares tags, and with data.captions.kind = prose none of "
            f"the {len(records)} pictures has any. Use optimal_transport or independent."
        )


def check_captions(
    config: Config, tokenizer: CaptionTokenizer, records: Sequence[ImageRecord], progress: Progress
) -> None:
    """Say how much of the captions is never seen."""
    rules = caption_rules(config)
    apart = max(1, -(-len(records) // MEASURED))
    measured = [records[number] for number in range(0, len(records), apart)]
    # Of a picture's alternatives and templates all are measured: each is a caption of some visit.
    captions = [
        text for record in measured for text in whole_captions(record.captions, rules[record.source], record.tags)
    ]
    lost = [count for count in tokenizer.lost_tokens(captions) if count]
    if lost:
        which = f"{len(captions)} captions" + (f" (those of one picture in {apart})" if apart > 1 else "")
        progress.message(
            f"data.captions.max_tokens = {config.data.captions.max_tokens}: {len(lost)} of {which} are longer than "
            f"{tokenizer.most_tokens} tokens; their last {sum(lost)} tokens, up to {max(lost)} of one caption, "
            "are never seen by the model"
        )


def refuse_huge_weights(rules: Sequence[CaptionRules], pictures: Pictures, planned: Integers) -> None:
    """Raise UserError, naming pictures, for weights that no training survives: found later, one would end the run.

    rules: of each source. planned: numbers of the pictures that take part; of those only captions that may have such
    a weight are read.
    """
    for number, own in enumerate(rules):
        if own.weights and _frame_has_brackets(own):
            try:
                for caption in whole_captions(("a",), own, ("a",)):
                    parse_weights(caption)
            except UserError as error:
                raise UserError(f"data.captions.templates and data.sources.{number}.add_tags: {error}") from error
    bad: list[str] = []
    maybe = _maybe_huge(rules, pictures)
    for number in maybe[np.isin(maybe, planned)].tolist() if len(maybe) else ():
        record = pictures[number]
        try:
            for caption in whole_captions(record.captions, rules[record.source], record.tags):
                parse_weights(caption)
        except UserError as error:
            bad.append(f"{record.path}: {error}")
    if bad:
        more = f"\nand {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise UserError("\n".join(bad[:NAMED]) + more)


def _maybe_huge(rules: Sequence[CaptionRules], pictures: Pictures) -> Integers:
    """Return the numbers of pictures whose captions may have a weight beyond MAX_WEIGHT."""
    maybe: list[NDArray[np.bool_]] = []
    for own, source, rows in zip(rules, pictures.sources, pictures.rows, strict=True):
        if own.weights:
            # Around a caption may be brackets that go with its own, or with a number at its end.
            pattern = "[(:]" if _frame_has_brackets(own) else MAYBE_HUGE
            maybe.append(rows_with(source.table, partial(pc.match_substring_regex, pattern=pattern))[rows])
        else:
            maybe.append(np.zeros(len(rows), bool))
    return np.flatnonzero(np.concatenate(maybe))


def _frame_has_brackets(rules: CaptionRules) -> bool:
    frame = "".join((*rules.templates, *rules.front, *rules.back, rules.separator))
    return "(" in frame or ")" in frame
