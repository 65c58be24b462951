"""Micro-batches made ahead by worker processes, and handed over in memory that all of them share."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.util import Finalize

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sdxl_training.data.cache import LATENT_CHANNELS, LATENT_FACTOR
from sdxl_training.data.loader import MicroBatches, RawBatch
from sdxl_training.data.ring import Handed, Ring
from sdxl_training.records import Bucket, UserError

PREFETCHED_STEPS = 2  # by all workers together
PREFETCHED_BATCHES = 2  # at least, by each worker
LONGEST_TEXT = 6  # chunks to which captions of one, two and three chunks are repeated
SMALL_BYTES = 2**14  # of a sample: ids and weights of so many tokens, sizes

Steps = Generator[list[RawBatch], None, None]


def open_loader(dataset: MicroBatches, first_step: int, last_step: int, workers: int, pin: bool) -> Steps:
    """Yield the micro-batches of each step in [first_step, last_step), in order, made ahead by `workers` processes.

    A step's batches are valid until the next step is asked for: copy what is to last. With workers they lie in memory
    that is then used again, and their tensors are emptied, so that one kept too long is an error and not another batch.
    pin: copied to page-locked memory, from which copies to a GPU do not block; that memory is the batch's own.

    Closing the iterator ends the workers. Raises UserError where a picture's latent cannot be read.
    """
    steps = range(first_step, last_step)
    with closing(_made_ahead(dataset, steps, workers) if workers else _made_here(dataset, steps)) as made:
        for batches in made:
            yield [batch.pin_memory() for batch in batches] if pin else batches


def _made_here(dataset: MicroBatches, steps: range) -> Steps:
    for step in steps:
        yield [dataset[step * dataset.accumulation + micro] for micro in range(dataset.accumulation)]


def _made_ahead(dataset: MicroBatches, steps: range, workers: int) -> Steps:
    accumulation = dataset.accumulation
    each_ahead = max(PREFETCHED_BATCHES, -(-PREFETCHED_STEPS * accumulation // workers))
    ring = _open_ring(dataset, each_ahead * workers)
    loader = DataLoader(
        _Written(dataset, ring),
        batch_size=None,
        sampler=range(steps.start * accumulation, steps.stop * accumulation),
        num_workers=workers,
        prefetch_factor=each_ahead,
        multiprocessing_context=multiprocessing.get_context("fork"),
        worker_init_fn=_outlive_the_first_signal,
        generator=torch.Generator(),  # its own, so that opening a loader leaves the global generator alone
    )
    made = iter(loader)
    with _ending_workers(made):
        for _ in steps:
            handed = [_checked(each) for each in islice(made, accumulation)]
            batches = [ring.received(each) for each in handed]
            yield batches
            for each, batch in zip(handed, batches, strict=True):
                ring.forget(each, batch)


def _open_ring(dataset: MicroBatches, ahead: int) -> Ring:
    """Return room for the micro-batches of the step in use and for so many that torch lets workers make meanwhile.

    At 1024 x 1024 a sample takes 512 KiB for latents and noise, and with text states from the cache 308 KiB for each 75
    tokens. A slot has room for the longest text; what is not written to costs no memory.
    """
    text_bytes = 0 if dataset.texts is None else dataset.texts.shape.entry_bytes(LONGEST_TEXT)
    slot_bytes = max(
        samples // dataset.parts * (2 * _latent_bytes(bucket) + text_bytes + SMALL_BYTES)
        for bucket, samples in dataset.schedule.global_batches.items()
    )
    return Ring(ahead + dataset.accumulation, slot_bytes)


def _latent_bytes(bucket: Bucket) -> int:
    return LATENT_CHANNELS * math.prod(bucket.size_hw) // LATENT_FACTOR**2 * torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class _Failure:
    """A user error on its way from a worker: torch would wrap it in a traceback."""

    message: str


@dataclass(frozen=True)
class _Written(Dataset["Handed | _Failure"]):
    """Micro-batches by number, each written into its slot of the ring."""

    dataset: MicroBatches
    ring: Ring

    def __getitem__(self, position: int) -> Handed | _Failure:
        slot = self.ring.slot(position)
        try:
            return slot.hand_over(self.dataset.make(position, slot.empty))
        except UserError as error:
            return _Failure(str(error))


def _checked(made: Handed | _Failure) -> Handed:
    if isinstance(made, _Failure):
        raise UserError(made.message)
    return made


@contextmanager
def _ending_workers(made: Iterator[object]) -> Iterator[None]:
    """End the worker processes on leaving, or at the program's exit where the iterator was never closed.

    Torch leaves the first to the garbage collector, which an exception's traceback keeps waiting.
    """
    if not isinstance(made, _MultiProcessingDataLoaderIter):
        yield
        return
    # Unlike atexit, this also runs where the program is itself a child process; and before the queues by which workers
    # are told to end are closed (10), without which they would be waited for.
    end = Finalize(None, made._shutdown_workers, exitpriority=20)
    try:
        yield
    finally:
        end()


def _outlive_the_first_signal(_worker: int) -> None:
    """Let Ctrl-C and a first SIGTERM pass: they reach the whole process group while the trainer ends its update.

    A second SIGTERM ends the worker: that is how the parent gets rid of one that is stuck.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
