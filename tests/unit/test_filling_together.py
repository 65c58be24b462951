"""Several processes fill one cache: real processes, real files, one of them killed, stopped or slow."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from sdxl_training.data.cache import LatentCache
from sdxl_training.data.claims import Claims
from sdxl_training.data.crops import Cut
from sdxl_training.data.encoding import Encoder
from sdxl_training.data.filling import Fill
from sdxl_training.data.preparing import CpuPreparer
from sdxl_training.data.store_writer import StoreWriter
from tests.latents import Folder, SharedKnown, Silent, Vae, plan_of

FORK = multiprocessing.get_context("fork")
COUNT, PIECE, BATCH = 96, 4, 2
PATIENCE = 60  # seconds, of a busy machine


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("sdxl_training.data.filling.PIECE", PIECE)
    monkeypatch.setattr("sdxl_training.data.filling.WAIT_SECONDS", 0.05)


class Crew:
    """Processes that fill a cache with the same pictures. log: a line for each picture that goes through a VAE."""

    def __init__(self, tmp_path, sizes=None, cut=None):
        self.folder = Folder(tmp_path / "pictures", sizes or [(16, 16) if n % 3 else (20, 40) for n in range(COUNT)])
        self.plan = plan_of(self.folder.records, cut or Cut())
        self.path, self.processes = tmp_path, []
        (tmp_path / "log").touch()

    def start(self, name, start=0.0, seconds=0.01):
        process = FORK.Process(target=self.work, args=(name, start, seconds), daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def work(self, name, start, seconds):
        log = os.open(self.path / "log", os.O_WRONLY | os.O_APPEND)
        vae = Vae()

        def encode(pixels_BCHW):
            os.write(log, f"{name}\n".encode() * len(pixels_BCHW))
            time.sleep(seconds)
            return vae(pixels_BCHW)

        known, cache = SharedKnown(len(self.folder.records), self.path / "known"), LatentCache(self.cache, "vae")
        progress = Silent()
        with StoreWriter(self.cache, name=name) as writer, Claims(self.cache / "claims") as claims:
            encoder = Encoder(encode, torch.device("cpu"), BATCH, cache, writer)
            fill = Fill(self.plan, self.folder, known, cache, encoder, CpuPreparer(2), claims, start)
            fill.run(progress)
        contents_P, known_P, failed_P = known.columns()
        _, missing_P = cache.count(contents_P, known_P, self.plan)
        os._exit(bool(missing_P[~failed_P].any()) or 2 * (progress.done != progress.total))

    @property
    def cache(self):
        return self.path / "cache"

    def encoded(self):
        """Return how many pictures each process has put through its VAE."""
        return Counter((self.path / "log").read_text().split())

    def stored(self):
        return len(LatentCache(self.cache, "vae").store)

    def wait_until(self, true):
        end = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < end, f"{self.encoded()}, {self.stored()} stored"
            time.sleep(0.01)

    def join(self, *processes):
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0, f"{process.exitcode}: {self.encoded()}, {self.stored()} stored"

    def check(self):
        """Check that every latent is there, and was written exactly once."""
        cache = LatentCache(self.cache, "vae")
        for record, plan in self.plan.prepared():
            assert cache.has(self.folder.digest(record.picture), plan)
        keys_N = cache.store.origins()[0]
        assert len(np.unique(keys_N, axis=0)) == len(keys_N) == self.plan.latents()


@pytest.fixture
def crew(tmp_path):
    crew = Crew(tmp_path)
    yield crew
    for process in crew.processes:
        process.kill()
        process.join()


def test_processes_share_the_work_and_return_when_all_is_there(crew):
    processes = [crew.start(f"rank{rank}", rank / 3) for rank in range(3)]
    crew.join(*processes)
    assert crew.encoded().total() == COUNT
    assert len(crew.encoded()) == 3
    crew.check()


@pytest.mark.parametrize("batches", [1, 5])
def test_survivors_take_over_the_work_of_one_that_is_killed(crew, batches):
    """Lost is the batch in flight, and nothing that was stored is made again."""
    victim = crew.start("victim", 0.0, seconds=0.05)
    survivors = [crew.start(f"rank{rank}", rank / 3, seconds=0.03) for rank in (1, 2)]
    crew.wait_until(lambda: crew.encoded()["victim"] >= batches * BATCH)
    os.kill(victim.pid, signal.SIGKILL)
    crew.join(*survivors)
    encoded = crew.encoded()
    assert COUNT <= encoded.total() <= COUNT + BATCH
    assert encoded["victim"] < COUNT
    crew.check()


def test_of_all_but_one_killed_the_last_ends_it(crew):
    victims = [crew.start(f"victim{rank}", rank / 4, seconds=0.05) for rank in range(3)]
    survivor = crew.start("survivor", 0.75)
    crew.wait_until(lambda: len(crew.encoded()) == 4)
    for victim in victims:
        victim.kill()
    crew.join(survivor)
    assert crew.encoded().total() <= COUNT + 3 * BATCH
    crew.check()


def test_after_all_were_killed_the_next_start_goes_on(crew):
    processes = [crew.start(f"victim{rank}", rank / 2, seconds=0.02) for rank in range(2)]
    crew.wait_until(lambda: crew.encoded().total() > COUNT // 3)
    for process in processes:
        process.kill()
        process.join()
    before = crew.stored()
    assert before >= COUNT // 3 - 3 * BATCH
    crew.join(crew.start("next"))
    assert crew.encoded()["next"] == COUNT - before
    crew.check()


def test_a_process_that_is_stopped_keeps_nobody_from_the_rest(crew):
    """The others end all but what it has claimed, and return when it is done."""
    slow = crew.start("slow", 0.0, seconds=0.05)
    crew.wait_until(lambda: crew.encoded()["slow"] > 0)
    os.kill(slow.pid, signal.SIGSTOP)
    others = [crew.start(f"rank{rank}", rank / 3) for rank in (1, 2)]
    crew.wait_until(lambda: crew.stored() >= COUNT - 2 * PIECE)
    time.sleep(0.3)
    assert [process.exitcode for process in others] == [None, None]
    os.kill(slow.pid, signal.SIGCONT)
    crew.join(slow, *others)
    assert crew.encoded().total() == COUNT
    assert crew.encoded()["slow"] <= 3 * PIECE
    crew.check()


def test_a_slow_process_does_little(crew):
    slow, quick = crew.start("slow", 0.0, seconds=0.4), crew.start("quick", 0.5, seconds=0.005)
    crew.join(slow, quick)
    assert crew.encoded()["slow"] < crew.encoded()["quick"] / 2
    crew.check()


def test_pictures_that_cannot_be_used_keep_nobody(crew):
    for number in (3, 4, 50):
        crew.folder.file(number).write_bytes(b"no picture")
    crew.folder.file(70).unlink()
    crew.join(*(crew.start(f"rank{rank}", rank / 2) for rank in range(2)))
    known = SharedKnown(COUNT, crew.path / "known")
    known.refresh()
    assert set(known.reasons) == {3, 4, 50, 70}
    assert crew.encoded().total() == COUNT - 4


def test_variants_are_shared_out_too(tmp_path):
    crew = Crew(tmp_path, [(16, 40)] * 20, Cut("random", variants=3, flip=True))
    crew.join(*(crew.start(f"rank{rank}", rank / 2) for rank in range(2)))
    assert crew.encoded().total() == crew.plan.latents()
    crew.check()


def test_one_that_comes_late_finds_it_done(crew):
    crew.join(crew.start("first", seconds=0))
    crew.join(crew.start("late"))
    assert set(crew.encoded()) == {"first"}
    crew.check()
