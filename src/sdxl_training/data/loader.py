"""From the schedule to micro-batches on the device.

Shape legend: B samples of one micro-batch on one rank, C latent channels, H x W latent rows and columns, E the two text
encoders, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sdxl_training.data.captions import CaptionRules, draw_caption
from sdxl_training.data.crops import variant_of_visit
from sdxl_training.data.sampler import BatchSchedule, slots_of_part
from sdxl_training.records import Batch, Conditioning, CropPlan, Draw, ImageRecord, UserError
from sdxl_training.rng import Stream, numpy_generator, torch_generator

ReadLatent = Callable[[str], tuple[Tensor, Tensor]]
DrawNoise = Callable[[Tensor, int, int, int], Tensor]
"""(latent_CHW, seed, visit, sample id) -> noise_CHW, float32."""
Couple = Callable[[Tensor, Tensor, Sequence[Sequence[str]]], Tensor]
"""(latents_GCHW, noise_GCHW, tags of each caption) of a global batch -> which noise each sample gets, G integers."""
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor, Tensor | None]]
"""captions -> (ids_1_BL, ids_2_BL, weights_EBL), the last None where captions are read without weights."""
EncodeText = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""What `Tokenize` returns -> (text_BLD, pooled_BP)."""

PREFETCHED_STEPS = 2


@dataclass(frozen=True, slots=True)
class RawBatch:
    """A micro-batch as workers make it: CPU tensors, captions still as token ids.

    latents_BCHW: drawn from the posterior, scaled, fp32. noise_BCHW: fp32. ids_1_BL, ids_2_BL: token ids of the two
    text encoders. weights_EBL: the tokens' weights, fp32; None where captions have none. keep_B: False where the
    caption is dropped and stands for zeros. time_ids_B6 and weight_B: fp32.
    """

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    ids_1_BL: Tensor
    ids_2_BL: Tensor
    weights_EBL: Tensor | None
    keep_B: Tensor
    time_ids_B6: Tensor
    weight_B: Tensor
    sample_ids: tuple[int, ...]
    visits: tuple[int, ...]
    step: int
    slots: tuple[int, ...]
    global_batch: int

    def pin_memory(self) -> RawBatch:
        """Return the batch in page-locked memory, from which copies to a GPU do not block."""
        return replace(
            self,
            latents_BCHW=self.latents_BCHW.pin_memory(),
            noise_BCHW=self.noise_BCHW.pin_memory(),
            ids_1_BL=self.ids_1_BL.pin_memory(),
            ids_2_BL=self.ids_2_BL.pin_memory(),
            weights_EBL=None if self.weights_EBL is None else self.weights_EBL.pin_memory(),
            keep_B=self.keep_B.pin_memory(),
            time_ids_B6=self.time_ids_B6.pin_memory(),
            weight_B=self.weight_B.pin_memory(),
        )


@dataclass(frozen=True)
class MicroBatches(Dataset[RawBatch]):
    """Micro-batch number step * accumulation + m of one rank, by number; made the same by any process.

    Micro-batch m of rank r takes slots [(m W + r) B, (m W + r + 1) B) of the global batch, so the split into
    micro-batches and ranks never changes which samples an update sees. B may differ between buckets.

    records, variants, keys and weights are parallel: picture, the ways in which it is prepared, their latents' names
    for `read_latent`, its loss weight. rules: how captions vary, for each source. With `couple`, noise changes hands
    within the global batch; each process then reads all its latents.
    """

    schedule: BatchSchedule
    records: Sequence[ImageRecord]
    variants: Sequence[Sequence[CropPlan]]
    keys: Sequence[Sequence[str]]
    weights: Sequence[float]
    read_latent: ReadLatent
    draw_noise: DrawNoise
    tokenize: Tokenize
    rules: Sequence[CaptionRules]
    seed: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    couple: Couple | None = None
    _coupled: dict[int, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for samples in self.schedule.global_batches.values():
            slots_of_part(samples, 0, self.parts)

    @property
    def parts(self) -> int:
        """Return how many micro-batches of all ranks make an update."""
        return self.accumulation * self.world_size

    def __getitem__(self, position: int) -> RawBatch:
        """Return micro-batch `position`; raises UserError, naming the picture, where a latent cannot be used."""
        step, micro = divmod(position, self.accumulation)
        _, draws = self.schedule.batch_at(step)
        slots = slots_of_part(len(draws), micro * self.world_size + self.rank, self.parts)
        noise_BCHW = None if self.couple is None else self._coupled_noise(step, draws)[slots.start : slots.stop]
        return self.collect([draws[slot] for slot in slots], slots, len(draws), step, noise_BCHW)

    def collect(
        self,
        draws: Sequence[Draw],
        slots: Sequence[int],
        global_batch: int,
        step: int = 0,
        noise_BCHW: Tensor | None = None,
    ) -> RawBatch:
        """Return the batch of these draws, all of one bucket; each with its own noise where none is given."""
        captions = [self._caption(draw) for draw in draws]
        ids_1_BL, ids_2_BL, weights_EBL = self.tokenize([caption or "" for caption in captions])
        latents_BCHW = torch.stack([self._latent(draw) for draw in draws])
        return RawBatch(
            latents_BCHW=latents_BCHW,
            noise_BCHW=self._noise(draws, latents_BCHW) if noise_BCHW is None else noise_BCHW,
            ids_1_BL=ids_1_BL,
            ids_2_BL=ids_2_BL,
            weights_EBL=weights_EBL,
            keep_B=torch.tensor([caption is not None for caption in captions]),
            time_ids_B6=torch.tensor([self._plan(draw).time_ids for draw in draws], dtype=torch.float32),
            weight_B=torch.tensor([self.weights[draw.record] for draw in draws], dtype=torch.float32),
            sample_ids=tuple(self.records[draw.record].sample_id for draw in draws),
            visits=tuple(draw.visit for draw in draws),
            step=step,
            slots=tuple(slots),
            global_batch=global_batch,
        )

    def _noise(self, draws: Sequence[Draw], latents_BCHW: Tensor) -> Tensor:
        noise = [
            self.draw_noise(latent_CHW, self.seed, draw.visit, self.records[draw.record].sample_id)
            for draw, latent_CHW in zip(draws, latents_BCHW, strict=True)
        ]
        return torch.stack(noise)

    def _coupled_noise(self, step: int, draws: Sequence[Draw]) -> Tensor:
        """Return the global batch's noise in its new order; kept for the step's other micro-batches."""
        if self.couple is None:
            raise ValueError("there is no coupling")
        if step not in self._coupled:
            latents_GCHW = torch.stack([self._latent(draw) for draw in draws])
            noise_GCHW = self._noise(draws, latents_GCHW)
            tags = [self.records[draw.record].tags for draw in draws]
            self._coupled.clear()
            self._coupled[step] = noise_GCHW[self.couple(latents_GCHW, noise_GCHW, tags)]
        return self._coupled[step]

    def _caption(self, draw: Draw) -> str | None:
        record = self.records[draw.record]
        generator = numpy_generator(self.seed, Stream.CAPTION, draw.visit, record.sample_id)
        return draw_caption(record.captions, self.rules[record.source], generator, record.tags)

    def _variant(self, draw: Draw) -> int:
        count = len(self.variants[draw.record])
        return variant_of_visit(self.seed, self.records[draw.record].sample_id, draw.visit, count)

    def _plan(self, draw: Draw) -> CropPlan:
        return self.variants[draw.record][self._variant(draw)]

    def _latent(self, draw: Draw) -> Tensor:
        """Draw a latent_CHW from the picture's posterior."""
        record = self.records[draw.record]
        try:
            mean_CHW, std_CHW = self.read_latent(self.keys[draw.record][self._variant(draw)])
        except (KeyError, OSError, UserError) as error:
            raise UserError(f"{record.path}: its cached latent cannot be read: {error}") from error
        generator = torch_generator(self.seed, Stream.POSTERIOR, draw.visit, record.sample_id)
        latent_CHW = mean_CHW + std_CHW * torch.randn(mean_CHW.shape, generator=generator)
        if not latent_CHW.isfinite().all():
            raise UserError(
                f"{record.path}: its cached latent holds values that are not finite. Delete the cache, so that it is "
                "encoded anew, or take the picture out of the data set."
            )
        return latent_CHW


@dataclass(frozen=True, slots=True)
class _Failure:
    """A user error on its way from a worker: torch would wrap it in a traceback."""

    message: str


@dataclass(frozen=True)
class _Guarded(Dataset["RawBatch | _Failure"]):
    dataset: MicroBatches

    def __getitem__(self, position: int) -> RawBatch | _Failure:
        try:
            return self.dataset[position]
        except UserError as error:
            return _Failure(str(error))


def open_loader(
    dataset: MicroBatches, first_step: int, last_step: int, workers: int, pin: bool
) -> Generator[list[RawBatch], None, None]:
    """Yield the micro-batches of each step in [first_step, last_step), in order, made ahead by `workers` processes.

    Closing the iterator ends the workers. Raises UserError where a picture's latent cannot be read.
    """
    accumulation = dataset.accumulation
    loader = DataLoader(
        _Guarded(dataset),
        batch_size=None,
        sampler=range(first_step * accumulation, last_step * accumulation),
        num_workers=workers,
        prefetch_factor=PREFETCHED_STEPS * accumulation if workers else None,
        multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
        worker_init_fn=_outlive_the_first_signal,
        pin_memory=pin,
        generator=torch.Generator(),  # its own, so that opening a loader leaves the global generator alone
    )
    made = iter(loader)
    with _ending_workers(made):
        for _ in range(first_step, last_step):
            yield [_checked(batch) for batch in islice(made, accumulation)]


@contextmanager
def _ending_workers(made: Iterator[object]) -> Iterator[None]:
    """End the worker processes on leaving, or at the program's exit where the iterator was never closed.

    Torch leaves the first to the garbage collector, which an exception's traceback keeps waiting.
    """
    if not isinstance(made, _MultiProcessingDataLoaderIter):
        yield
        return
    # Unlike atexit, this also runs where the program is itself a child process.
    end = Finalize(None, made._shutdown_workers, exitpriority=0)
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


def _checked(batch: RawBatch | _Failure) -> RawBatch:
    if isinstance(batch, _Failure):
        raise UserError(batch.message)
    return batch


def to_batch(raw: RawBatch, encode_text: EncodeText, device: torch.device) -> Batch:
    """Copy a micro-batch to the device and encode its captions there.

    Captions that keep_B drops get zero text and zero pooled text, SDXL's own null conditioning
    (`force_zeros_for_empty_prompt` in its diffusers pipeline); their size conditioning stays.
    """
    keep_B = raw.keep_B.to(device, non_blocking=True)
    text_BLD, pooled_BP = encode_text(
        raw.ids_1_BL.to(device, non_blocking=True),
        raw.ids_2_BL.to(device, non_blocking=True),
        None if raw.weights_EBL is None else raw.weights_EBL.to(device, non_blocking=True),
    )
    conditioning = Conditioning(
        text_BLD=torch.where(keep_B[:, None, None], text_BLD, torch.zeros_like(text_BLD)),
        pooled_BP=torch.where(keep_B[:, None], pooled_BP, torch.zeros_like(pooled_BP)),
        time_ids_B6=raw.time_ids_B6.to(device, non_blocking=True),
    )
    return Batch(
        latents_BCHW=raw.latents_BCHW.to(device, non_blocking=True),
        noise_BCHW=raw.noise_BCHW.to(device, non_blocking=True),
        conditioning=conditioning,
        weight_B=raw.weight_B.to(device, non_blocking=True),
        sample_ids=raw.sample_ids,
        visits=raw.visits,
        step=raw.step,
        slots=raw.slots,
        global_batch=raw.global_batch,
    )
