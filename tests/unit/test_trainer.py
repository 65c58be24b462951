"""The loop: actions at their intervals and at the end, stopping between updates, signals given back."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_training.parallel.group import Group
from sdxl_training.records import StepStats
from sdxl_training.training import trainer as module
from sdxl_training.training.step import Run
from sdxl_training.training.stop import StopRequest, stop_on_signals
from sdxl_training.training.trainer import Every, Within, train

STATS = StepStats(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))


@dataclass
class FakeRun:
    """Only what the loop itself touches."""

    group: Group = field(default_factory=lambda: Group(0, 1, torch.device("cpu")))


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the updates that were made, in order."""
    made: list[int] = []

    def note_step(run: object, step: int, micro_batches: object) -> StepStats:
        made.append(step)
        return STATS

    monkeypatch.setattr(module, "train_step", note_step)
    return made


def run_loop(first: int, last: int, *actions: module.Action, stop: StopRequest | None = None) -> int:
    return train(cast(Run, FakeRun()), repeat([]), first, last, actions, StopRequest() if stop is None else stop)


@pytest.mark.parametrize(
    ("first", "last", "every", "worked"),
    [
        (0, 10, 5, [5, 10]),
        (0, 12, 5, [5, 10, 12]),
        (7, 12, 5, [10, 12]),
        (0, 3, 5, [3]),
        (0, 3, 1, [1, 2, 3]),
        (0, 3, 0, []),
        (10, 10, 5, []),
    ],
)
def test_work_at_each_interval_and_at_the_end(
    steps_made: list[int], first: int, last: int, every: int, worked: list[int]
) -> None:
    calls: list[int] = []
    assert run_loop(first, last, Every(every, calls.append)) == last
    assert calls == worked
    assert steps_made == list(range(first, last))


@given(first=st.integers(0, 40), more=st.integers(1, 40), every=st.integers(0, 12))
def test_never_twice_for_a_step_and_always_at_the_end(first: int, more: int, every: int) -> None:
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_step", lambda *_: STATS)
        run_loop(first, first + more, Every(every, calls.append))
    assert len(calls) == len(set(calls))
    assert (calls[-1:] == [first + more]) is (every > 0)
    assert all(first < step <= first + more for step in calls)


@given(stops=st.lists(st.integers(1, 40), max_size=4), every=st.integers(1, 12))
def test_what_training_depends_on_happens_after_the_same_updates_wherever_a_run_was_stopped(
    stops: list[int], every: int
) -> None:
    calls: list[int] = []
    ends = [0, *sorted(stops), 40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_step", lambda *_: STATS)
        for first, last in pairwise(ends):
            run_loop(first, last, Within(every, calls.append))
    assert calls == [step for step in range(1, 41) if step % every == 0]


def test_a_run_with_nothing_left_to_do_does_not_save_again(steps_made: list[int]) -> None:
    """Resumed at 437, which a stopped run saved: saving it once more could only put it at risk."""
    calls: list[int] = []
    assert run_loop(437, 437, Every(100, calls.append)) == 437
    stop = StopRequest()
    stop.note(signal.SIGTERM, None)
    assert run_loop(437, 500, Every(100, calls.append), stop=stop) == 437
    assert steps_made == calls == []


def test_actions_run_in_their_order(steps_made: list[int]) -> None:
    calls: list[str] = []
    run_loop(
        0, 3, Every(2, lambda step: calls.append(f"save {step}")), Every(1, lambda step: calls.append(f"draw {step}"))
    )
    assert calls == ["draw 1", "save 2", "draw 2", "draw 3", "save 3"]


def test_actions_see_the_steps_statistics(steps_made: list[int]) -> None:
    seen: list[tuple[int, StepStats]] = []

    class Note:
        def after_step(self, steps_done: int, stats: StepStats) -> None:
            seen.append((steps_done, stats))

        def at_end(self, steps_done: int, finished: bool) -> None:
            assert steps_done == 2
            assert finished

    run_loop(0, 2, Note())
    assert seen == [(1, STATS), (2, STATS)]


def test_a_stop_ends_after_the_update_saves_and_leaves_the_rest(steps_made: list[int]) -> None:
    stop = StopRequest()
    saved: list[int] = []
    drawn: list[int] = []

    def request(step: int) -> None:
        if step == 4:
            stop.note(signal.SIGINT, None)

    done = run_loop(
        0, 100, Every(1, request), Every(50, saved.append), Every(50, drawn.append, when_stopped=False), stop=stop
    )
    assert done == 4
    assert steps_made == [0, 1, 2, 3]
    assert saved == [4]
    assert drawn == []


def test_batches_are_taken_one_an_update(steps_made: list[int]) -> None:
    batches = iter([[]] * 5)
    train(cast(Run, FakeRun()), batches, 0, 3, [], StopRequest())
    assert len(list(batches)) == 2, "a stopped run leaves the rest to the next"


def test_first_signal_is_noted_and_a_second_ctrl_c_interrupts() -> None:
    with stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_first_signal_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    """Who sees nothing presses again, and the second Ctrl-C does not save."""
    with stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err.count("saved first") == 1
    with stop_on_signals(announce=False):
        signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_sigterm_is_patient() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"


@pytest.mark.parametrize("error", [None, ValueError])
def test_handlers_are_given_back(error: type[Exception] | None) -> None:
    def mine(number: int, frame: object) -> None:
        raise AssertionError

    original = {number: signal.signal(number, mine) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if error is None:
            with stop_on_signals():
                assert signal.getsignal(signal.SIGINT) is not mine
        else:
            with pytest.raises(error), stop_on_signals():
                raise error
        assert signal.getsignal(signal.SIGINT) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for number, handler in original.items():
            signal.signal(number, handler)
