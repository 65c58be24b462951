"""Meters on an injected clock; progress in a terminal and outside one."""

import io
import logging
import re
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sdxl_training.tracking.meters import Meter, peak_memory_gib
from sdxl_training.tracking.pace import Pace, duration_text, next_save, rate_text
from sdxl_training.tracking.progress import ConsoleProgress, SilentProgress, open_log


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def quiet_log_afterwards():
    yield
    logger = logging.getLogger("sdxl_training")
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def spoken(console: Console) -> str:
    return console.file.getvalue()


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})


# Meters


@given(
    st.lists(st.tuples(*[st.floats(0.01, 100)] * 3, st.integers(1, 512)), min_size=1, max_size=20), st.integers(1, 8)
)
def test_meter_is_the_ratio_of_sums_over_the_last_steps_without_pauses(steps, window):
    clock = Clock()
    meter = Meter(window, clock)
    for wait, work, pause, images in steps:
        with meter.waiting():
            clock.now += wait
        with meter.paused():
            clock.now += pause
        clock.now += work
        meter.step(images)
    late = steps[-window:]
    seconds = sum(wait + work for wait, work, _, _ in late)
    assert meter.images_per_second == pytest.approx(sum(step[3] for step in late) / seconds, rel=1e-6)
    assert meter.data_wait_fraction == pytest.approx(sum(step[0] for step in late) / seconds, rel=1e-6)


def test_meter_before_the_first_step_is_zero(clock):
    meter = Meter(clock=clock)
    assert (meter.images_per_second, meter.data_wait_fraction) == (0.0, 0.0)


def test_peak_memory_grows_by_what_is_allocated_and_never_falls():
    device = torch.device("cpu")
    before = peak_memory_gib(device)
    extra = torch.ones(int((before + 0.25) * 2**28))  # fp32: more than everything so far
    after = peak_memory_gib(device)
    assert before + 0.2 < after
    del extra
    assert peak_memory_gib(device) >= after


@given(st.floats(0.01, 1000), st.integers(0, 10**6), st.integers(1, 10**6))
def test_pace_of_a_steady_count_is_exact(rate, first, left):
    clock = Clock()
    pace = Pace(first, window_marks=10, clock=clock)
    for i in range(1, 30):
        clock.now = 1000.0 + i
        pace.mark(first + int(rate * i))
    if pace.per_second is not None:
        counts = int(rate * 29) - int(rate * 19)  # the window holds the last ten marks
        assert pace.per_second == pytest.approx(counts / 10, abs=max(0.2, 0.2 * rate))
        assert pace.seconds_to(first + int(rate * 29) + left) == pytest.approx(left / pace.per_second)


def test_pace_follows_a_change_and_knows_nothing_at_first(clock):
    pace = Pace(0, window_marks=5, clock=clock)
    assert pace.per_second is None
    assert pace.seconds_to(10) is None
    count = 0
    for rate in (1, 100):
        for _ in range(20):
            clock.now += 1
            count += rate
            pace.mark(count)
    assert pace.per_second == pytest.approx(100)
    assert pace.seconds_to(count - 5) == 0


def test_texts():
    told = [duration_text(seconds) for seconds in (None, 0, 59.6, 302, 3 * 3600 + 421, 6 * 86400 + 4 * 3600)]
    assert told == ["?", "0 s", "1 min 00 s", "5 min 02 s", "3 h 07 min", "6 d 04 h"]
    assert [rate_text(rate) for rate in (None, 0.8512, 41.23, 12345.6)] == ["?", "0.851", "41.2", "12,346"]


@given(st.integers(0, 1000), st.integers(1, 100), st.integers(1, 1000))
def test_next_save_is_the_first_multiple_after_the_step_or_the_end(step, every, total):
    expected = next((s for s in range(step + 1, total + 1) if s % every == 0), total)
    assert next_save(step, every, total) == expected or step >= total


# Progress


def train(progress: ConsoleProgress, clock: Clock, first: int, last: int, total: int) -> None:
    with progress.training(first, total, 500) as update:
        for step in range(first + 1, last + 1):
            clock.now += 0.5
            update(step, 0.25, 64.0)


def test_outside_a_terminal_training_is_a_line_every_ten_seconds_with_the_first_and_the_last(tmp_path, clock):
    console = plain_console()
    open_log(tmp_path, console)
    train(ConsoleProgress(console, clock), clock, 100, 150, 3000)
    lines = spoken(console).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"step {step}/3000" for step in (101, 121, 141, 150)]
    assert lines[1] == "step 121/3000: loss 0.2500, 64 images/s, end in 24 min 00 s, save in 3 min 10 s"


def test_outside_a_terminal_nothing_steers_one(tmp_path, clock):
    console = plain_console()
    open_log(tmp_path, console)
    progress = ConsoleProgress(console, clock)
    progress.message("[bold]broken\x1b[2J\x9b name\r.png")
    with progress.track("scan", 600) as advance:
        for _ in range(600):
            advance()
    said = spoken(console) + (tmp_path / "run.log").read_text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
    assert r"[bold]broken\x1b[2J\x9b name\r.png" in said
    assert [line.split(":")[0] for line in spoken(console).splitlines()[1:]] == ["scan 1/600", "scan 600/600"]


def test_track_says_rate_and_time_left(tmp_path, clock):
    console = plain_console()
    open_log(tmp_path, console)
    with ConsoleProgress(console, clock).track("cache", 1000) as advance:
        for _ in range(10):
            clock.now += 5
            advance(10)
    assert spoken(console).splitlines()[-1] == "cache 100/1000: 2/s, 7 min 30 s left"


def test_a_terminal_shows_bars_while_the_lines_go_to_the_log_only(tmp_path, clock):
    console = terminal()
    open_log(tmp_path, console)
    progress = ConsoleProgress(console, clock)
    train(progress, clock, 0, 30, 30)
    progress.message("saved")
    assert "30/30" in spoken(console)
    assert "━" in spoken(console)
    assert "images/s" in spoken(console)
    assert "step 30/30:" not in spoken(console)
    log = (tmp_path / "run.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO    step 30/30: loss 0\.2500", log, re.MULTILINE)
    assert "saved" in log
    assert "saved" in spoken(console)


@pytest.mark.parametrize("console", [plain_console(), terminal()], ids=["plain", "terminal"])
def test_an_interrupted_run_still_says_its_last_step(tmp_path, clock, console):
    open_log(tmp_path, console)
    with suppress(KeyboardInterrupt), ConsoleProgress(console, clock).training(0, 100, 10) as update:
        for step in (1, 2, 3):
            update(step, 0.1, 1.0)
        raise KeyboardInterrupt
    assert "3/100" in spoken(console)
    assert "step 3/100" in (tmp_path / "run.log").read_text()


def test_a_job_of_nothing_says_nothing(tmp_path, clock):
    console = plain_console()
    open_log(tmp_path, console)
    with ConsoleProgress(console, clock).track("scan", 0):
        pass
    assert spoken(console) == ""


def test_the_log_is_appended_to_and_nothing_is_said_twice_after_a_second_opening(tmp_path):
    console = plain_console()
    open_log(tmp_path, console).info("first")
    open_log(tmp_path, console).warning("second")
    assert [line.split()[2:] for line in (tmp_path / "run.log").read_text().splitlines()] == [
        ["INFO", "first"],
        ["WARNING", "second"],
    ]
    assert spoken(console).splitlines() == ["first", "second"]


def test_a_long_sentence_is_not_broken_into_lines(tmp_path):
    console = plain_console()
    open_log(tmp_path, console).info("word " * 100)
    assert len(spoken(console).splitlines()) == 1


def test_silent_progress_accepts_the_same_calls_and_prints_nothing(capfd):
    progress = SilentProgress()
    progress.message("text")
    with progress.track("scan", 3) as advance:
        advance()
        advance(n=2)
    with progress.training(0, 3, 1) as update:
        update(1, loss=0.5, images_per_second=1.0)
    assert capfd.readouterr() == ("", "")
