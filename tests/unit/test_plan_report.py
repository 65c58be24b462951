"""The report of a plan: exact figures of a small one; the same facts as text, JSON and HTML, whatever names hold."""

import json
import os
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.assemble import plan_report
from sdxl_training.assemble.cache_state import CacheState
from sdxl_training.assemble.plan_report import (
    CaptionFigures,
    PlanReport,
    build_plan_report,
    caption_figures,
    count_captions,
    find_tokenizers,
    token_lengths,
)
from sdxl_training.data.buckets import Fitting
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.contact_sheet import printable
from sdxl_training.data.listing import pictures_of
from sdxl_training.data.picture_plan import plan_resolutions
from sdxl_training.data.pictures import IndexedSource, Pictures, SourceRules
from sdxl_training.data.sampler import BatchSchedule, batch_sizes
from sdxl_training.data.statistics import BatchParts, SourceRow, describe_sum, sum_steps, tag_table
from sdxl_training.model.text import CaptionTokenizer
from sdxl_training.records import Bucket, ImageRecord, Quarantined
from sdxl_training.tracking.report_plan import Section, Table, sections_as_html, sections_as_text

PROSE = [CaptionRules(kind="prose")]
SQUARE, WIDE = Bucket((64, 64)), Bucket((32, 128))
NASTY = "/a/line\nbreak <b>&\"'\x1b[31m 😀 \udce4.png"
SHOWN = "/a/line\\nbreak <b>&\"'\\x1b[31m 😀 \\udce4.png"


class Page(HTMLParser):
    """Text and attributes of a fragment; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def record(number, size_hw, repeats=1, path=None) -> ImageRecord:
    return ImageRecord(number, path or f"{number}.png", size_hw, ("a",), ("a",), repeats)


def report_of(records, **changed) -> PlanReport:
    plan = plan_resolutions(records, [(SQUARE, WIDE)], Fitting())
    given = {
        "sources": [SourceRow("/a", 9, 2, 1, 1, 5, 4, 11, 2, 0.5)],
        "quarantined": [],
        "uncaptioned": [],
        "captions": CaptionFigures(4, not_counted="no tokenizer here"),
        "tags": tag_table([["a", "b"], ["a"], []]),
        "cache": CacheState("/cache", "ahead", 10, 2**21, 2**40, 6, {"new": 3, "picture changed": 1, "VAE changed": 0}),
    }
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, 8)
    return build_plan_report(plan, schedule, BatchParts(4, None, 2, 1, 100), **(given | changed))


FOUR = [record(0, (64, 100), 3), record(1, (128, 128)), record(2, (64, 64), 2), record(3, (64, 256), 5)]


def test_the_report_counts_what_the_plan_says():
    report = report_of([*FOUR, record(4, (20, 20))])
    assert (report.pictures, report.records, report.untouched, report.notable_crops, report.upscaled) == (4, 4, 1, 1, 0)
    assert [(row.size_hw, row.pictures, row.images) for row in report.buckets] == [((32, 128), 1, 5), ((64, 64), 3, 6)]
    assert [(crop.path, crop.cropped, crop.scale) for crop in report.worst_crops] == [
        ("0.png", pytest.approx(0.36), 1.0)
    ]
    assert [one.path for one in report.left_out] == ["4.png"]
    assert "20x20 is smaller than its bucket 64x64" in report.left_out[0].reason
    assert (report.steps.images, report.steps.steps_per_epoch) == (11, 11 / 8)


def test_the_text_says_it_all():
    text = report_of([*FOUR, record(4, (20, 20))], quarantined=[Quarantined("/a/x.png", "the file is empty")]).text()
    for said in (
        "Pictures\n  taking part: 4 pictures\n",
        "Quarantined\n  1 picture\n  /a/x.png: the file is empty\n",
        "Left out\n  1 picture\n  4.png: 20x20 is smaller than its bucket 64x64 (needs enlarging 3.20x)\n",
        "  1 of 4 untouched (exactly a bucket's size), 1 lose more than 10% of their area, 0 are enlarged\n",
        "  1.  36 % cut, 1.00x, 64x100 -> 64x64:  0.png\n",
        "Captions\n  lengths were not counted: no tokenizer here\n",
        "  2 tags, 1 of them on one picture only; 1 without tags\n  rarest: b (1), a (2)\n",
        "         2  66.7 %  a\n",
        "Steps\n  1 picture x 1 + 1 picture x 2 + 1 picture x 3 + 1 picture x 5 = 11 images an epoch / "
        "(micro-batch 4 x accumulation 2 x processes 1) = 1.38 steps an epoch\n",
        "  10 latents, 2.0 MiB when full, without compression\n",
        "  6 there already, 4 to encode (new 3, picture changed 1)\n",
        "  1,024.0 GiB free on that disk",
    ):
        assert said in text
    (source,) = (line for line in text.splitlines() if line.endswith("/a"))
    assert source.split() == ["9", "2", "1", "1", "4", "2", "11", "0.5", "/a"]
    square = next(line for line in text.splitlines() if line.lstrip().startswith("64x64  "))
    assert square.split() == ["64x64", "3", "6", "12.0", "%", "36.0", "%", "1.00x", "#" * 30]


def test_the_sum_is_written_out():
    plan = plan_resolutions([record(i, (64, 64), 8 if i < 2 else 1) for i in range(598)], [[SQUARE]], Fitting())
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, 8)
    assert describe_sum(sum_steps(plan, schedule, BatchParts(4, None, 2, 1, 100))) == (
        "596 pictures x 1 + 2 pictures x 8 = 612 images an epoch / (micro-batch 4 x accumulation 2 x processes 1) = "
        "76.5 steps an epoch"
    )
    sizes = batch_sizes(plan.by_bucket, 64 * 64 * 5, parts=6)
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, sizes)
    assert describe_sum(sum_steps(plan, schedule, BatchParts(1, 64 * 64 * 5, 3, 2, 100))) == (
        "596 pictures x 1 + 2 pictures x 8 = 612 images an epoch; micro-batches of 20,480 pixels, or one larger "
        "picture, x accumulation 3 x processes 2; the buckets' steps together = 20.4 steps an epoch"
    )


def test_many_different_repeats_are_not_listed():
    plan = plan_resolutions([record(i, (64, 64), i + 1) for i in range(6)], [[SQUARE]], Fitting())
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, 4)
    told = describe_sum(sum_steps(plan, schedule, BatchParts(4, None, 1, 1, 100)))
    assert told.startswith("6 pictures x repeats = 21 images an epoch / (micro-batch 4 ")
    assert told.endswith("= 5.25 steps an epoch")


def test_batches_by_pixels_have_a_table_of_buckets():
    plan = plan_resolutions(FOUR, [(SQUARE, WIDE)], Fitting())
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, batch_sizes(plan.by_bucket, 2 * 64 * 64, parts=1))
    parts, captions = BatchParts(1, 2 * 64 * 64, 1, 1, 100), CaptionFigures(4, not_counted="no tokenizer here")
    report = build_plan_report(plan, schedule, parts, [], [], [], captions, tags=None, cache=None)
    lines = [line.split() for line in report.text().splitlines()]
    assert ["32x128", "5", "2", "2", "2.5"] in lines
    assert ["64x64", "6", "2", "2", "3"] in lines
    assert "not counted: captions are prose" in report.text()
    assert "data.cache.mode = none" in report.text()


def test_a_picture_at_two_resolutions_is_one_picture_and_two_records():
    small = Bucket((32, 32))
    plan = plan_resolutions(FOUR[2:3], [(SQUARE,), (small,)], Fitting(resolutions="each"))
    schedule = BatchSchedule(plan.by_bucket, plan.repeats, 0, 8)
    captions = CaptionFigures(1, not_counted="no tokenizer here")
    report = build_plan_report(plan, schedule, BatchParts(8, None, 1, 1, 1), [], [], [], captions, None, None)
    assert (report.pictures, report.records) == (1, 2)
    assert "Pictures\n  taking part: 1 picture\n  counted at each of their resolutions, as below: 2\n" in report.text()
    assert "  2 pictures x 2 = 4 images an epoch / " in report.text()


def test_json_holds_everything_and_reads_back():
    bad = [Quarantined(f"/a/{i}.png", "broken") for i in range(300)] + [Quarantined(NASTY, "broken\n")]
    report = report_of(FOUR, quarantined=bad, sources=[SourceRow(NASTY, 1, 0, 0, 0, 1, 1, 1, 1, 1.0)])
    text = report.to_json()
    assert text.isascii()
    read = json.loads(text)

    def as_json(value):
        if isinstance(value, dict):
            return {str(name): as_json(inner) for name, inner in value.items()}
        return [as_json(inner) for inner in value] if isinstance(value, list | tuple) else value

    assert read == as_json(asdict(report))
    assert len(read["quarantined"]) == 301
    assert read["quarantined"][-1] == {"path": NASTY, "reason": "broken\n"}
    assert os.fsencode(read["sources"][0]["path"]).endswith(b"\xf0\x9f\x98\x80 \xe4.png")


def test_text_shows_ten_of_a_long_list_html_two_hundred():
    bad = [Quarantined(f"/bad/{i:03}.png", "broken") for i in range(205)]
    report = report_of(FOUR, quarantined=bad)
    assert report.text().count("/bad/") == 10
    assert "\n  and 195 more\n" in report.text()
    page = Page(report.html())
    assert page.text.count("/bad/") == 200
    assert "and 5 more" in page.text


def test_names_are_shown_and_harm_nothing(tmp_path):
    records = [record(0, (64, 100), path=NASTY), record(1, (20, 20), path=NASTY), record(2, (64, 64))]
    cache = CacheState(NASTY, "ahead", 1, 1, 1, None, unknown="the VAE is not here")
    report = report_of(
        records,
        sources=[SourceRow(NASTY, 1, 0, 0, 0, 1, 1, 1, 1, 1.0)],
        quarantined=[Quarantined(NASTY, "bad\nreason")],
        uncaptioned=[NASTY],
        tags=tag_table([[NASTY]]),
        cache=cache,
    )
    plain = report_of(records, uncaptioned=["x"], quarantined=[Quarantined("x", "y")], tags=tag_table([["x"]]))
    text, page = report.text(), Page(report.html())
    text.encode()
    assert len(text.splitlines()) == len(plain.text().splitlines())
    assert text.count(SHOWN) == page.text.count(SHOWN) == 8
    assert {tag for tag, _ in page.tags} <= {
        "div",
        "figure",
        "figcaption",
        "table",
        "thead",
        "tbody",
        "tr",
        "td",
        "span",
    }
    assert "<b>" not in report.html()
    assert f"{SHOWN}: it has no caption (data.captions.missing = leave_out)" in text


@given(st.text(st.characters(codec=None), max_size=20))
@settings(max_examples=50)
def test_html_is_well_formed_for_any_name(name):
    report = report_of(FOUR, quarantined=[Quarantined(name, name)])
    source = report.html()
    source.encode()
    assert f"{printable(name)}: {printable(name)}" in Page(source).text


def test_the_sheet_is_embedded_in_html_alone():
    report = report_of(FOUR)
    page = Page(report.html(Image.new("RGB", (40, 30), "red")))
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert (image["width"], image["height"]) == ("40", "30")
    assert "<img" not in report.html()
    assert not [value for _, attributes in page.tags for value in attributes.values() if "http" in (value or "")]


def test_html_tells_what_text_tells():
    report = report_of(FOUR)
    page = Page(report.html()).text.split()
    for line in report.text().splitlines():
        assert all(word in page for word in line.split() if set(word) != {"#"}), line


def test_a_full_disk_is_announced():
    tight = CacheState("/cache", "first", 4, 400 * 2**20, 150 * 2**20, 2, {"new": 2})
    assert tight.bytes_to_write == 200 * 2**20
    assert (
        "150.0 MiB free on that disk: 50.0 MiB too little for the 200.0 MiB to be written"
        in report_of(FOUR, cache=tight).text()
    )
    assert "too little" not in report_of(FOUR, cache=CacheState("/cache", "first", 4, 400, 2**20, 4)).text()
    unknown = CacheState("/cache", "first", 4, 400 * 2**20, 2**40, None, unknown="the VAE is not here")
    assert unknown.bytes_to_write == 400 * 2**20
    texts = CacheState("/cache", "first", 4, 400, 100 * 2**20, 4, text_bytes=300 * 2**20, text_bytes_there=50 * 2**20)
    said = report_of(FOUR, cache=texts).text()
    assert "text states: at most 300.0 MiB" in said
    assert "100.0 MiB free on that disk: 150.0 MiB too little for the 250.0 MiB to be written" in said
    assert replace(texts, text_bytes_there=400 * 2**20).bytes_to_write == 0
    assert "what is there already is not known: the VAE is not here" in report_of(FOUR, cache=unknown).text()


def test_very_many_left_out_pictures_are_counted_and_some_named(monkeypatch):
    monkeypatch.setattr(plan_report, "LEFT_OUT_NAMED", 5)
    small = [record(i, (9, 9)) for i in range(4, 12)]
    report = report_of([*FOUR, *small], uncaptioned=["u", "v"])
    assert [one.path for one in report.left_out] == ["u", "v", "4.png", "5.png", "6.png"]
    assert report.left_out_in_all == 10
    assert "Left out\n  10 pictures\n" in report.text()
    assert "\n  and 5 more\n" in report.text()
    assert len(report_of([*FOUR, *small], uncaptioned=list("abcdefgh")).left_out) == 5


# Sections


@given(st.lists(st.tuples(*[st.text("ab1", min_size=1, max_size=5)] * 2), max_size=30), st.booleans())
def test_columns_stand_in_line(rows, with_bars):
    bars = [i / 30 for i in range(len(rows))] if with_bars else ()
    text = sections_as_text([Section("T", ["said"], Table(("first", "second"), rows, bars, whole=True))])
    lines = text.splitlines()
    assert lines[:2] == ["T", "  said"]
    assert len(lines) == 3 + len(rows)
    for line, row in zip(lines[3:], rows, strict=True):
        assert line.startswith("  " + row[0].rjust(5))
        assert line.replace("#", "").split() == " ".join(row).split()


def test_a_table_without_rows_is_a_head_at_most():
    assert sections_as_text([Section("T", [], Table(("",), []))]) == "T"
    assert Page(sections_as_html([Section("T", [], Table(("", ""), []))])).text.split() == ["T"]


# Captions


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer(*find_tokenizers("miniature"))


@pytest.mark.parametrize("read", [None, parse_weights])
def test_lengths_are_those_of_the_tokenizer_that_trains(tokenizer, read):
    """Above one chunk of 30 tokens the miniature loses what is longer."""
    captions = [
        "",
        " ",
        "a red circle",
        "circle, " * 40,
        "!!!! so! " * 20,
        "(long:1.2) " * 30,
        "x" * 500,
        "Ünïcödé 😀 " * 9,
    ]
    if read is not None:
        tokenizer = CaptionTokenizer(tokenizer.tokenizer, tokenizer.tokenizer_2, read=read)
    lengths = list(token_lengths(iter(captions), tokenizer))
    assert [max(0, length - 30) for length in lengths] == tokenizer.lost_tokens(captions)
    assert lengths[:2] == [0, 0]
    assert lengths[2] == len(tokenizer.tokenizer("a red circle", add_special_tokens=False)["input_ids"])
    figures = count_captions(captions, tokenizer, 8, 8)
    assert list(figures.table.over) == [30, 60, 90]
    assert figures.table.over[30] == sum(lost > 0 for lost in tokenizer.lost_tokens(captions))
    assert figures.tokens_read == 30


def test_the_encoder_that_reads_more_tokens_decides(tokenizer):
    class Stammering:
        model_max_length = 32

        def __call__(self, texts, **options):
            return {"input_ids": [ids * 2 for ids in tokenizer.tokenizer(texts, **options)["input_ids"]]}

    captions = ["a red circle", "circle, " * 20]
    plain = list(token_lengths(captions, tokenizer))
    for both in ((tokenizer.tokenizer, Stammering()), (Stammering(), tokenizer.tokenizer)):
        doubled = CaptionTokenizer(*both)
        assert list(token_lengths(captions, doubled)) == [2 * length for length in plain]
        assert [max(0, 2 * length - 30) for length in plain] == doubled.lost_tokens(captions)


def pictures_with(captions) -> Pictures:
    class Place:
        captions_are = "beside"

        def path(self, name):
            return name

    rows = [
        {"file": b"%d" % i, "name": b"%d" % i, "height": 64, "width": 64, "captions": [caption]}
        for i, caption in enumerate(captions)
    ]
    return Pictures([IndexedSource(Place(), SourceRules(), pictures_of(rows))])


def test_captions_are_counted_or_it_is_said_why_not():
    pictures = pictures_with(["a", "circle " * 100, "b", "circle " * 100])
    plan = plan_resolutions(pictures, [[SQUARE]], Fitting(), columns=pictures.columns())
    figures = caption_figures("miniature", pictures, plan, PROSE)
    assert (figures.pictures, figures.pictures_counted, figures.table.captions) == (4, 4, 4)
    assert figures.table.over[90] == 2
    text = report_of(FOUR, captions=figures).text()
    assert (
        "Captions\n  4 captions: 2 over 30 tokens (50.0 %), 2 over 60 tokens (50.0 %), 2 over 90 tokens (50.0 %)\n"
        in text
    )
    assert "a run reads 30 tokens of each; the rest is never seen" in text
    figures = caption_figures("miniature", pictures, plan, PROSE, most=2)
    assert (figures.pictures, figures.pictures_counted, figures.table.over[90]) == (4, 2, 0)  # the first and third
    assert "2 captions of 2 pictures, evenly spread over all 4: 0 over 30 " in report_of(FOUR, captions=figures).text()
    absent = caption_figures("nobody/has-it", pictures, plan, PROSE)
    assert absent.table is None
    assert absent.not_counted == (
        "the tokenizers of model.source = nobody/has-it are not on this machine, and a plan fetches nothing"
    )


def test_templates_and_added_tags_count():
    pictures = pictures_with(["circle " * 20])
    plan = plan_resolutions(pictures, [[SQUARE]], Fitting(), columns=pictures.columns())
    longer = [CaptionRules(kind="prose", templates=("{caption}", "{caption} {caption}"), front=("a",))]
    plain, varied = (caption_figures("miniature", pictures, plan, rules).table for rules in (PROSE, longer))
    assert (plain.captions, varied.captions) == (1, 2)
    assert varied.longest > 2 * plain.longest


def test_tokenizers_are_never_fetched(monkeypatch, tmp_path):
    asked = []

    def download(source, **options):
        asked.append(options["local_files_only"])
        raise FileNotFoundError(source)

    monkeypatch.setattr(plan_report, "snapshot_download", download)
    assert find_tokenizers("owner/name") is None
    assert asked == [True]
    assert find_tokenizers(str(tmp_path)) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer_2").mkdir()
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part / "tokenizer.json").write_text("{broken")
    assert find_tokenizers(str(tmp_path)) is None
    assert asked == [True]
