"""What `plan` states, as plain data: pictures, buckets, crops, captions, tags, steps and the cache."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from huggingface_hub import snapshot_download
from PIL import Image
from transformers import CLIPTokenizer

from sdxl_training.assemble.cache_state import CacheState, cache_section
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.contact_sheet import describe_crop, printable
from sdxl_training.data.picture_plan import NOTABLE_CROP, PicturePlan
from sdxl_training.data.pictures import Pictures
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.data.statistics import (
    BatchParts,
    BucketRow,
    LengthTable,
    SourceRow,
    StepSum,
    TagTable,
    bucket_table,
    captions_of,
    decimal,
    describe_sum,
    evenly_spread,
    length_table,
    number_of,
    planned_pictures,
    sum_steps,
)
from sdxl_training.model.load import HUB_ID, MINIATURE, MINIATURE_FOLDER
from sdxl_training.model.text import CAPTIONS_AT_ONCE, RUNS, CaptionTokenizer, ReadWeights, plain_text
from sdxl_training.records import CropPlan, Quarantined, SizeHW
from sdxl_training.tracking.report_plan import Section, Table, sections_as_html, sections_as_text

WORST_CROPS = 50
LEFT_OUT_NAMED = 10_000  # each is made when it is asked for, a tenth of a millisecond
CAPTIONS_COUNTED = 100_000  # pictures whose captions are tokenised; of more, so many evenly spread ones
NO_CAPTION = "it has no caption (data.captions.missing = leave_out)"
RAREST = 10
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, slots=True)
class Crop:
    """What becomes of one picture."""

    path: str
    cropped: float
    scale: float
    plan: CropPlan


@dataclass(frozen=True, slots=True)
class CaptionFigures:
    """How long captions are. table: None where they were not counted, for the reason in `not_counted`.

    pictures: so many take part. pictures_counted: those whose captions were counted. tokens_read: how many of a caption
    a run reads; the rest is never seen.
    """

    pictures: int
    pictures_counted: int = 0
    tokens_read: int = 0
    table: LengthTable | None = None
    not_counted: str = ""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All that `plan` states. Sizes are (height, width), shares 0 to 1.

    pictures: those that take part. records: pictures at each of their resolutions. untouched: records of exactly their
    bucket's size. notable_crops: records that lose more than a tenth. quarantined: all that cannot be used. left_out:
    readable pictures that do not take part, at most LEFT_OUT_NAMED of left_out_in_all. cache: None where there is none.
    """

    sources: tuple[SourceRow, ...]
    pictures: int
    records: int
    quarantined: tuple[Quarantined, ...]
    left_out: tuple[Quarantined, ...]
    left_out_in_all: int
    buckets: tuple[BucketRow, ...]
    untouched: int
    notable_crops: int
    upscaled: int
    worst_crops: tuple[Crop, ...]
    captions: CaptionFigures
    tags: TagTable | None
    steps: StepSum
    cache: CacheState | None

    def text(self) -> str:
        """Return the report for a terminal; of long lists the first ten rows."""
        return sections_as_text(self.sections())

    def html(self, sheet: Image.Image | None = None) -> str:
        """Return the inside of a section of report.html. sheet: the worst crops' contact sheet."""
        return sections_as_html(self.sections(sheet))

    def to_json(self) -> str:
        """Return everything as JSON. Names that are no Unicode hold \\udc80 to \\udcff: Python's surrogateescape."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def sections(self, sheet: Image.Image | None = None) -> list[Section]:
        """Return what text and HTML show."""
        return [
            _sources_section(self),
            _listed_section("Quarantined", self.quarantined, len(self.quarantined)),
            _listed_section("Left out", self.left_out, self.left_out_in_all),
            _bucket_section(self),
            _crop_section(self, sheet),
            _caption_section(self.captions),
            _tag_section(self.tags),
            _step_section(self.steps),
            cache_section(self.cache),
        ]


def build_plan_report(
    plan: PicturePlan,
    schedule: BatchSchedule,
    parts: BatchParts,
    sources: Sequence[SourceRow],
    quarantined: Sequence[Quarantined],
    uncaptioned: Sequence[str],
    captions: CaptionFigures,
    tags: TagTable | None,
    cache: CacheState | None,
) -> PlanReport:
    """Put the report together. uncaptioned: paths of pictures left out for lack of a caption. tags: None for prose."""
    left_out = [Quarantined(path, NO_CAPTION) for path in uncaptioned[:LEFT_OUT_NAMED]]
    rest = plan.left_out[: LEFT_OUT_NAMED - len(left_out)]
    left_out += [Quarantined(absent.record.path, absent.reason) for absent in rest]
    worst = [
        Crop(record.path, crop.cropped_fraction, crop.scale, crop) for record, crop in plan.worst_crops(WORST_CROPS)
    ]
    return PlanReport(
        sources=tuple(sources),
        pictures=int(plan.first_N.sum()),
        records=len(plan.picture_N),
        quarantined=tuple(quarantined),
        left_out=tuple(left_out),
        left_out_in_all=len(uncaptioned) + len(plan.left_out),
        buckets=bucket_table(plan),
        untouched=plan.untouched,
        notable_crops=int((plan.cropped > NOTABLE_CROP).sum()),
        upscaled=plan.upscaled,
        worst_crops=tuple(worst),
        captions=captions,
        tags=tags,
        steps=sum_steps(plan, schedule, parts),
        cache=cache,
    )


# Sections


def _sources_section(report: PlanReport) -> Section:
    rows = [
        (
            *(f"{number:,}" for number in (row.found, row.quarantined, row.without_caption, row.filtered, row.planned)),
            f"{row.repeats:,}",
            f"{row.images:,}",
            f"{row.weight:g}",
            printable(row.path),
        )
        for row in report.sources
    ]
    header = ("found", "unreadable", "no caption", "filtered", "planned", "repeats", "images", "weight", "source")
    lines = [f"taking part: {number_of(report.pictures, 'picture')}"]
    if report.records != report.pictures:
        lines.append(f"counted at each of their resolutions, as below: {report.records:,}")
    return Section("Pictures", lines, Table(header, rows, whole=True))


def _listed_section(title: str, listed: Sequence[Quarantined], in_all: int) -> Section:
    rows = [(f"{printable(entry.path)}: {printable(entry.reason)}",) for entry in listed]
    return Section(title, [number_of(in_all, "picture") if in_all else "none"], Table(("",), rows, rows_in_all=in_all))


def _bucket_section(report: PlanReport) -> Section:
    fullest = max(row.pictures for row in report.buckets)
    rows = [
        (
            _size(row.size_hw),
            f"{row.pictures:,}",
            f"{row.images:,}",
            f"{100 * row.cropped_mean:.1f} %",
            f"{100 * row.cropped_worst:.1f} %",
            f"{row.scale_largest:.2f}x",
        )
        for row in report.buckets
    ]
    header = ("height x width", "pictures", "x repeats", "mean cut", "worst cut", "largest scale")
    bars = [row.pictures / fullest for row in report.buckets]
    return Section("Buckets", [number_of(len(rows), "bucket")], Table(header, rows, bars, whole=True))


def _crop_section(report: PlanReport, sheet: Image.Image | None) -> Section:
    lines = [
        f"{report.untouched:,} of {report.records:,} untouched (exactly a bucket's size), {report.notable_crops:,} "
        f"lose more than {NOTABLE_CROP:.0%} of their area, {report.upscaled:,} are enlarged"
    ]
    rows = [
        (f"{number}.", f"{describe_crop(crop.plan)}:", printable(crop.path))
        for number, crop in enumerate(report.worst_crops, 1)
    ]
    return Section("Crops", lines, Table(("", "", ""), rows), sheet)


def _caption_section(captions: CaptionFigures) -> Section:
    table = captions.table
    if table is None:
        return Section("Captions", [f"lengths were not counted: {captions.not_counted}"])
    who = number_of(table.captions, "caption")
    if captions.pictures_counted < captions.pictures:
        who += f" of {captions.pictures_counted:,} pictures, evenly spread over all {captions.pictures:,}"
    over = (f"{count:,} over {limit} tokens ({_percent(count, table.captions)})" for limit, count in table.over.items())
    lines = [f"{who}: {', '.join(over)}", f"longest {table.longest:,} tokens, mean {table.mean:.1f}"]
    return Section("Captions", [*lines, f"a run reads {captions.tokens_read} tokens of each; the rest is never seen"])


def _tag_section(tags: TagTable | None) -> Section:
    if tags is None:
        return Section("Tags", ["not counted: captions are prose"])
    once = f"{tags.once:,} of them on one picture only; {tags.untagged:,} without tags"
    lines = [f"{number_of(tags.distinct, 'tag')}, {once}"]
    lines.append(
        f"rarest: {', '.join(f'{printable(tag)} ({count:,})' for tag, count in tags.rarest[:RAREST]) or 'none'}"
    )
    rows = [(f"{count:,}", _percent(count, tags.pictures), printable(tag)) for tag, count in tags.most]
    return Section("Tags", lines, Table(("pictures", "share", "tag"), rows, rows_in_all=tags.distinct))


def _step_section(steps: StepSum) -> Section:
    lines = [
        describe_sum(steps),
        f"{steps.max_steps:,} steps = {decimal(steps.epochs)} epochs; what does not fill a batch is carried over",
    ]
    if steps.micro_batch is not None:
        return Section("Steps", lines)
    rows = [
        (_size(row.size_hw), f"{row.images:,}", f"{row.micro_batch:,}", f"{row.images_a_step:,}", decimal(row.steps))
        for row in steps.by_bucket
    ]
    header = ("height x width", "images", "micro-batch", "images a step", "steps an epoch")
    return Section("Steps", lines, Table(header, rows, whole=True))


def _size(size_hw: SizeHW) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


# Captions in tokens


def caption_figures(
    source: str,
    pictures: Pictures,
    plan: PicturePlan,
    rules: Sequence[CaptionRules],
    chunks: int = 1,
    read: ReadWeights = plain_text,
    most: int = CAPTIONS_COUNTED,
) -> CaptionFigures:
    """Return the caption figures of a plan of `pictures`.

    source: of the model. rules: how captions vary, for each source. chunks, read: see CaptionTokenizer. most: pictures
    whose captions are counted.
    """
    numbers = planned_pictures(plan)
    tokenizers = find_tokenizers(source)
    if tokenizers is None:
        absent = f"the tokenizers of model.source = {source} are not on this machine, and a plan fetches nothing"
        return CaptionFigures(len(numbers), not_counted=absent)
    counted = evenly_spread(numbers, most)
    tokenizer = CaptionTokenizer(*tokenizers, chunks, read=read)
    return count_captions(captions_of(pictures, counted, rules), tokenizer, len(numbers), len(counted))


def find_tokenizers(source: str) -> tuple[CLIPTokenizer, CLIPTokenizer] | None:
    """Return the tokenizers of a model source if they are on this machine; nothing is fetched."""
    folder = MINIATURE_FOLDER if source == MINIATURE else Path(source).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(source):
        try:
            patterns = [f"{part}/*" for part in TOKENIZERS]
            folder = Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))
        except (OSError, ValueError):
            return None
    parts = [folder / part for part in TOKENIZERS]
    if not all((part / "tokenizer.json").is_file() or (part / "vocab.json").is_file() for part in parts):
        return None
    try:
        first, second = (CLIPTokenizer.from_pretrained(part, local_files_only=True) for part in parts)
    except (OSError, ValueError, TypeError):
        return None
    return first, second


def count_captions(
    captions: Iterable[str], tokenizer: CaptionTokenizer, pictures: int, pictures_counted: int
) -> CaptionFigures:
    """Return how many captions exceed one, two and three chunks; they are those of `pictures_counted` pictures."""
    chunk = int(tokenizer.tokenizer.model_max_length) - 2  # without the marks of start and end: SDXL's 75
    table = length_table(token_lengths(captions, tokenizer), [chunk * number for number in (1, 2, 3)])
    return CaptionFigures(pictures, pictures_counted, chunk * tokenizer.chunks, table)


def token_lengths(captions: Iterable[str], tokenizer: CaptionTokenizer) -> Iterator[int]:
    """Yield how many tokens each caption has, before it is cut into chunks: the more of both tokenizers'.

    Every word is tokenised once, which makes this hundreds of times faster than `CaptionTokenizer` itself.
    """
    known: dict[str, tuple[int, int]] = {}
    rest = iter(captions)
    while batch := list(islice(rest, CAPTIONS_AT_ONCE)):
        words_of = [
            [run for text, _ in tokenizer.read(caption) for _, run in RUNS.findall(text) if run] for caption in batch
        ]
        new = sorted({word for words in words_of for word in words if word not in known})
        if new:
            counts = [
                [len(ids) for ids in each(new, add_special_tokens=False, verbose=False)["input_ids"]]
                for each in (tokenizer.tokenizer, tokenizer.tokenizer_2)
            ]
            known.update(zip(new, zip(*counts, strict=True), strict=True))
        for words in words_of:
            yield max(map(sum, zip(*(known[word] for word in words), strict=True)), default=0)
