"""Several processes encode one set of captions: real processes, real files, one of them killed, stopped or slow."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from sdxl_training.data.claims import Claims
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.text_states import TextCache, TextShape, fill_texts
from tests.latents import Silent

FORK = multiprocessing.get_context("fork")
SHAPE = TextShape(chunk=2, width=4, pooled=2)
DIFFERENT, BATCH = 90, 4
TEXTS = [f"caption {number % DIFFERENT}" for number in range(100)]
PATIENCE = 60  # seconds, of a busy machine


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("sdxl_training.data.text_states.ENCODED", BATCH)
    monkeypatch.setattr("sdxl_training.data.text_states.LOOKED_UP", 16)


class Crew:
    """Processes that encode the same captions. log: a line for each caption that goes through the encoders."""

    def __init__(self, tmp_path):
        self.folder, self.log, self.processes = tmp_path / "texts", tmp_path / "log", []
        self.log.touch()

    def start(self, name, begin=0.0, seconds=0.01):
        process = FORK.Process(target=self.work, args=(name, round(begin * len(TEXTS)), seconds), daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def work(self, name, begin, seconds):
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND)

        def encode(captions):
            os.write(log, f"{name}\n".encode() * len(captions))
            time.sleep(seconds)
            return [(torch.ones(SHAPE.chunk, SHAPE.width), torch.ones(SHAPE.pooled)) for _ in captions]

        cache, progress, claims = TextCache(self.folder, "encoders", SHAPE), Silent(), Claims(self.folder / "claims")
        order = TEXTS[begin:] + TEXTS[:begin]
        with StoreWriter(self.folder, name=name) as writer:
            fill_texts(cache, order, len(order), encode, writer, claims, progress, lambda: time.sleep(0.02))
        os._exit(not all(map(cache.has, TEXTS)) or 2 * (progress.done != progress.total))

    def encoded(self):
        """Return how many captions each process has put through its encoders."""
        return Counter(self.log.read_text().split())

    def wait_until(self, true):
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, f"{self.encoded()}"
            time.sleep(0.01)

    def join(self, *processes):
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0, f"{process.exitcode}: {self.encoded()}"

    def check(self):
        """Check that every caption is there, and was stored exactly once."""
        cache = TextCache(self.folder, "encoders", SHAPE)
        assert all(cache.read(text) is not None for text in TEXTS)
        keys_N = cache.store.origins()[0]
        assert len(np.unique(keys_N, axis=0)) == len(keys_N) == DIFFERENT


@pytest.fixture
def crew(tmp_path):
    crew = Crew(tmp_path)
    yield crew
    for process in crew.processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("apart", [True, False])
def test_processes_share_the_captions_and_return_when_all_are_there(crew, apart):
    """Also those that all begin with the same ones, as they do when started by hand."""
    crew.join(*(crew.start(f"rank{rank}", rank / 3 if apart else 0.0) for rank in range(3)))
    assert crew.encoded().total() == DIFFERENT
    assert len(crew.encoded()) == 3
    crew.check()


def test_survivors_take_over_the_captions_of_one_that_is_killed(crew):
    """Lost is the batch in flight; nothing that was stored is encoded again, and nobody waits for the dead."""
    victim = crew.start("victim", seconds=0.05)
    survivors = [crew.start(f"rank{rank}", rank / 3, seconds=0.03) for rank in (1, 2)]
    crew.wait_until(lambda: crew.encoded()["victim"] >= 2 * BATCH)
    os.kill(victim.pid, signal.SIGKILL)
    crew.join(*survivors)
    assert DIFFERENT <= crew.encoded().total() <= DIFFERENT + BATCH
    crew.check()


def test_one_that_stands_still_is_waited_for_and_taken_over_when_it_dies(crew):
    """As long as it lives nobody does its batch a second time."""
    idle = crew.start("idle", seconds=30)
    crew.wait_until(lambda: crew.encoded()["idle"] == BATCH)
    other = crew.start("other", 0.5)
    crew.wait_until(lambda: crew.encoded()["other"] == DIFFERENT - BATCH)
    other.join(0.3)
    assert other.is_alive()
    idle.kill()
    crew.join(other)
    assert crew.encoded()["other"] == DIFFERENT
    crew.check()


def test_after_all_were_killed_the_next_start_goes_on(crew):
    processes = [crew.start(f"victim{rank}", rank / 2, seconds=0.03) for rank in range(2)]
    crew.wait_until(lambda: crew.encoded().total() > DIFFERENT // 3)
    for process in processes:
        process.kill()
        process.join()
    crew.join(crew.start("next", seconds=0))
    assert crew.encoded().total() <= DIFFERENT + 2 * BATCH
    crew.check()
