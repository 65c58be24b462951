"""The report page: self-contained, escaped, small, and true to the numbers."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdxl_training.tracking.charts import (
    Line,
    bar_chart,
    line_chart,
    linear_axis,
    log_axis,
    round_step,
    smooth,
    thin,
    tick_text,
)
from sdxl_training.tracking.metrics_file import MetricsFile
from sdxl_training.tracking.report import ReportFacts, write_report

finite = st.floats(-1e12, 1e12, allow_nan=False)


class Page(HTMLParser):
    """Collects tags with attributes and visible text, and checks that tags nest."""

    VOID = frozenset({"meta", "img", "input", "path", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + "\n"


def write_metrics(run_dir, steps, **changed):
    file = MetricsFile(run_dir, 0)
    for step in range(1, steps + 1):
        values = {"images": 4 * step, "epoch": step / 10, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5}
        file.scalars(step, values | {"peak_memory_gib": 1.5} | {key: make(step) for key, make in changed.items()})
    file.close()


def facts(**changed) -> ReportFacts:
    return ReportFacts(**{"run_name": "run", "state": "running", "total_steps": 100, "seconds": 302.0} | changed)


# Charts


@given(st.floats(1e-12, 1e12))
def test_round_step_is_one_two_or_five_and_less_than_two_and_a_half_times_too_long(rough):
    step = round_step(rough)
    assert f"{step:.0e}"[0] in "125"
    assert rough * 0.999 <= step <= 2.5 * rough * 1.001


@given(st.lists(finite, min_size=1, max_size=20), st.booleans())
def test_linear_axis_covers_the_values_with_a_few_ticks_inside(values, round_ends):
    axis = linear_axis(np.array(values), round_ends=round_ends)
    slack = 1e-6 * max(abs(axis.low), abs(axis.high))
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks) <= 10
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in axis.ticks)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_log_axis_covers_the_values_with_whole_decades(values):
    axis = log_axis(np.array(values))
    shares = axis.share(np.array(values))
    assert shares.min() >= -1e-9
    assert shares.max() <= 1 + 1e-9
    assert 2 <= len(axis.ticks) <= 8


@given(st.lists(finite, min_size=1, max_size=3000), st.integers(1, 50))
def test_thinning_keeps_ends_and_extremes_and_at_most_two_points_a_bin(values, bins):
    line = Line("", "", np.arange(len(values), dtype=float), np.array(values))
    few = thin(line, bins)
    assert few.x.size <= 2 * bins + 2
    assert (few.y.min(), few.y.max()) == (min(values), max(values))
    assert (few.x[0], few.x[-1]) == (0, len(values) - 1)
    assert np.all(np.diff(few.x) > 0)
    assert np.array_equal(few.y, line.y[few.x.astype(int)])


def test_smoothing_is_the_weighted_mean_of_what_is_finite():
    values = np.array([math.nan, 4.0, 1.0, math.inf, 7.0])
    keep = 1 - 2 / (3 + 1)
    expected = [
        math.nan,
        4.0,
        (keep * 4 + 1) / (keep + 1),
        (keep * 4 + 1) / (keep + 1),
        (keep**2 * 4 + keep * 1 + 7) / (keep**2 + keep + 1),
    ]
    assert smooth(values, 3) == pytest.approx(expected, nan_ok=True)


def test_tick_texts():
    told = [tick_text(value) for value in (0, 0.25, 1500, 20_000, 1_500_000, 2e-5, 1.5e-4, -0.5)]
    assert told == ["0", "0.25", "1500", "20k", "1.5M", "2e-5", "1.5e-4", "-0.5"]


def test_a_line_is_drawn_where_its_numbers_are():
    chart = line_chart("Loss", [Line("", "smooth", np.array([0.0, 5.0, 10.0]), np.array([0.0, 6.0, 3.0]))])
    assert 'd="M0.0,1000.0L500.0,0.0L1000.0,500.0"' in chart


def test_spread_over_decades_gives_decade_ticks_and_nothing_finite_says_so():
    values = np.array([1000.0, *[1.0] * 50])
    assert '">1000</span>' in line_chart("g", [Line("", "raw", np.arange(51.0), values)])
    assert '">100</span>' in line_chart("g", [Line("", "raw", np.arange(51.0), values)])
    assert "No steps yet." in line_chart("g", [Line("", "raw", np.arange(2.0), np.array([math.nan, math.inf]))])


def test_bars_are_proportional():
    bars = bar_chart({"64x64": 40, "48x80": 10, "empty": 0})
    assert re.findall(r"width:([\d.]+)%", bars) == ["100.0", "25.0", "0.0"]
    assert "80.0 %" in bars


# The page


def test_the_page_asks_nothing_of_the_network_and_tags_nest(tmp_path):
    write_metrics(tmp_path, 20)
    (tmp_path / "samples").mkdir()
    for step in (10, 20):
        Image.new("RGB", (64, 32), "red").save(tmp_path / f"samples/step-{step:06d}.png")
    path = write_report(tmp_path, facts(prompts=["red circle"]))
    assert path == tmp_path / "report.html"
    source = path.read_text()
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert attributes.get("src", "data:").startswith("data:")
        assert "href" not in attributes
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert "default-src 'none'" in source
    assert not list(tmp_path.glob("*.tmp"))


def test_everything_a_user_wrote_is_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>&\"'"
    (tmp_path / "config.resolved.yaml").write_text(evil)
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples/step-000001.png")
    given_facts = facts(run_name=evil, prompts=[evil], data="", quarantined={evil: evil}, environment={evil: evil})
    source = write_report(tmp_path, given_facts).read_text()
    assert "<img src=x" not in source
    assert Page(source).text.count(evil) == 8  # title, heading, prompt, file, reason, config, name, version


def test_the_page_tells_state_numbers_and_what_is_not_drawn(tmp_path):
    write_metrics(
        tmp_path,
        50,
        loss=lambda step: math.nan if step in (7, 8) else 0.25,
        skipped=lambda step: int(step == 7),
        peak_memory_gib=lambda step: 9.5 if step == 3 else 1.0,
    )
    text = Page(write_report(tmp_path, facts(state="stopped", quarantined={"a.png": "ends early"})).read_text()).text
    for told in ("Stopped", "at step 50 of 100", "5 min 02 s", "9.50 GiB", "0.25", "200", "a.png", "ends early"):
        assert told in text
    assert "Of 50 logged steps: 2 not finite and not drawn, 1 skipped." in text


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    text = Page(write_report(tmp_path, facts()).read_text()).text
    assert "No steps yet." in text
    assert "No samples yet." in text


def test_a_long_run_makes_a_small_page(tmp_path):
    row = {"images": 1, "epoch": 0.1, "lr": 1e-4, "grad_norm": 0.5}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps({"step": step, "loss": step * 7919 % 1000 / 1000, **row}) + "\n")
    assert write_report(tmp_path, facts()).stat().st_size < 150_000


def test_many_large_grids_make_a_small_page_with_first_and_newest(tmp_path):
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples/step-000001.png", compress_level=1)
    content = (tmp_path / "samples/step-000001.png").read_bytes()
    for step in range(2, 61):
        (tmp_path / f"samples/step-{step:06d}.png").write_bytes(content)
    source = write_report(tmp_path, facts()).read_text()
    assert len(source) < len(content) * 60 / 4
    page = Page(source)
    assert 12 <= sum(tag == "img" for tag, _ in page.tags) <= 24
    assert {"step 1", "step 60"} <= set(page.text.splitlines())


def test_a_torn_picture_is_named_and_the_others_are_shown(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (1, 2, 3):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"samples/step-{step:06d}.png")
    torn = tmp_path / "samples/step-000003.png"
    torn.write_bytes(torn.read_bytes()[:60])
    (tmp_path / "samples/step-000002.png").write_bytes(b"")
    page = Page(write_report(tmp_path, facts()).read_text())
    assert "Cannot be read: step-000002.png, step-000003.png." in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 1


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path):
    path = write_report(tmp_path, facts())
    before = path.read_bytes()
    (tmp_path / "config.resolved.yaml").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(tmp_path, facts())
    assert path.read_bytes() == before
