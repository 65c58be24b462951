"""Batches handed over in shared memory: none is overwritten while it is used, and nothing stays behind."""

import gc
import multiprocessing
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_training.data import workers as workers_module
from sdxl_training.data.loader import RawBatch, to_batch
from sdxl_training.data.ring import Ring
from sdxl_training.data.text_states import TextShape
from sdxl_training.data.workers import open_loader
from sdxl_training.objectives.couplings import OptimalTransport
from tests.unit.test_loader import Pixels, kept, micro_batches, no_text, same, tokenize, tokenize_with_weights, unequal

STEPS = 30  # several times round the ring


class Texts:
    """Stands for the cache of text states: they tell their caption, and batches are of different lengths."""

    variants = 2
    shape = TextShape(chunk=2, width=8, pooled=4)

    def __init__(self, chunks=1):
        self.chunks = chunks

    def read_batch(self, captions, paths):
        sums_B = torch.tensor([float(sum(map(ord, caption)) % 2000) for caption in captions], dtype=torch.float16)
        length = 2 * self.chunks * (1 + int(sums_B.sum()) % 3)
        return sums_B[:, None, None].expand(-1, length, 8).contiguous(), sums_B[:, None].expand(-1, 4)


CASES = {
    "plain": lambda: micro_batches(2, 2),
    "weights": lambda: micro_batches(2, 2, tokenize=tokenize_with_weights),
    "unequal": lambda: unequal(accumulation=4),
    "coupled": lambda: unequal(accumulation=2, couple=OptimalTransport()),
    "texts": lambda: micro_batches(2, 2, texts=Texts()),
    "texts longer than a slot": lambda: micro_batches(2, 2, texts=Texts(chunks=1000)),
    "pixels": lambda: micro_batches(2, 2, fetch=Pixels().fetch),
}


def equal(made: list[list[RawBatch]], expected: list[list[RawBatch]]) -> bool:
    def comparable(batch: RawBatch) -> RawBatch:
        """Return the batch with pixels as numbers: tensors within a mapping do not compare."""
        pixels = {b: replace(one, pixels_HWC=one.pixels_HWC.tolist()) for b, one in batch.unencoded.items()}
        return replace(batch, unencoded=pixels)

    pairs = [pair for steps in zip(made, expected, strict=True) for pair in zip(*steps, strict=True)]
    return all(same(comparable(one), comparable(other)) for one, other in pairs)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_what_workers_hand_over_is_what_the_process_makes_itself(case, workers):
    alone = list(open_loader(CASES[case](), 3, 3 + STEPS, 0, pin=False))
    made = kept(open_loader(CASES[case](), 3, 3 + STEPS, workers, pin=False))
    assert equal(made, alone)
    assert case not in ("unequal", "coupled") or len({batch.latents_BCHW.shape for (batch, *_) in alone}) == 2
    assert not case.startswith("texts") or len({batch.text_BLD.shape for step in alone for batch in step}) > 1


@pytest.mark.parametrize("slot_bytes", [64, 256])
def test_what_does_not_fit_into_a_slot_arrives_all_the_same(monkeypatch, slot_bytes):
    dataset = micro_batches(2, 2)
    assert 64 < 2 * dataset[0].latents_BCHW.nbytes <= 256, "latents and noise of the small bucket fit, and nothing else"
    monkeypatch.setattr(workers_module, "_open_ring", lambda dataset, ahead: Ring(ahead + 2, slot_bytes))
    assert equal(kept(open_loader(dataset, 0, STEPS, 2, pin=False)), list(open_loader(dataset, 0, STEPS, 0, pin=False)))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_stays_as_it_is_while_the_workers_make_all_they_may(accumulation):
    """The consumer waits at every step until the workers have nothing left to do: worse cannot happen."""
    made = multiprocessing.get_context("fork").Value("q", 0)

    def count(captions):
        with made.get_lock():
            made.value += 1
        return tokenize(captions)

    def wait_until_idle():
        before, seen = -1, made.value
        while before != seen:
            time.sleep(0.02)
            before, seen = seen, made.value

    dataset = micro_batches(2, accumulation)
    ahead = []
    for step, batches in enumerate(open_loader(replace(dataset, tokenize=count), 0, 12, 2, pin=False)):
        wait_until_idle()
        ahead.append(made.value - (step + 1) * accumulation)
        assert equal([batches], [[dataset[step * accumulation + m] for m in range(accumulation)]])
    assert max(ahead) == max(2 * 2, 2 * accumulation), "two batches a worker, and two steps"


def test_a_batch_kept_too_long_is_empty_and_not_another_batch():
    loader = open_loader(micro_batches(2, 2), 0, 12, 2, pin=False)
    raw = next(loader)
    batch = to_batch(raw[0], no_text, Pixels().encode, torch.device("cpu"))
    assert batch.latents_BCHW.shape[0] == batch.noise_BCHW.shape[0] == len(batch.weight_B) == 2
    next(loader)
    assert all(one.latents_BCHW.numel() == one.noise_BCHW.numel() == one.keep_B.numel() == 0 for one in raw)
    assert batch.latents_BCHW.numel() == batch.noise_BCHW.numel() == batch.weight_B.numel() == 0
    loader.close()


def test_pinned_batches_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr(RawBatch, "pin_memory", deepcopy)  # there may be no GPU to pin for
    made = list(open_loader(micro_batches(2, 2), 0, STEPS, 2, pin=True))
    assert equal(made, list(open_loader(micro_batches(2, 2), 0, STEPS, 0, pin=False)))


def test_a_ring_that_is_too_small_is_an_error_and_not_another_batch(monkeypatch):
    monkeypatch.setattr(workers_module, "_open_ring", lambda dataset, ahead: Ring(ahead - 1, 2**16))
    loader = open_loader(micro_batches(2, 2), 0, STEPS, 2, pin=False)
    slowly = (time.sleep(0.2) for _ in loader)
    with pytest.raises(RuntimeError, match=r"batch \d+ was overwritten by batch \d+: 3 slots are too few"):
        list(slowly)
    assert multiprocessing.active_children() == []


def test_tensors_of_a_slot_do_not_overlap_and_leave_the_other_slots_alone():
    ring = Ring(slots=2, slot_bytes=1000)
    ring._memory.fill_(255)
    slot = ring.slot(5)
    kinds = [(torch.long, (3,)), (torch.float32, (5, 7)), (torch.bool, (1,)), (torch.long, (0, 4)), (torch.half, (9,))]
    given = [slot.empty(shape, dtype).zero_() for dtype, shape in kinds]
    assert [(one.dtype, tuple(one.shape)) for one in given] == kinds
    used = sum(one.nbytes for one in given)
    assert int((ring._memory == 0).sum()) == used, "each byte belongs to one tensor"
    half = ring.slot_bytes
    assert (ring._memory[:half] == 255).all(), "batch 5 lies in the second slot"
    beyond = slot.empty((1000,))
    assert beyond.shape == (1000,)
    beyond.zero_()
    assert int((ring._memory == 0).sum()) == used


def shared_memory() -> tuple[int, int]:
    """Return how many shared mappings and open descriptors this process has."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return maps.count("/dev/zero") + maps.count("/dev/shm"), len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("steps", [1, 12])
def test_closing_leaves_neither_processes_nor_memory_behind(steps):
    before = shared_memory()
    loader = open_loader(micro_batches(2, 2, fetch=Pixels().fetch), 0, 12, 2, pin=False)
    for _ in range(steps):
        batches = next(loader)
    assert shared_memory()[0] > before[0]
    loader.close()
    assert multiprocessing.active_children() == []
    del loader, batches
    assert shared_memory() == before
