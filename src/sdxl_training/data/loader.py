"""From the schedule to micro-batches on the device.

Shape legend: B samples of one micro-batch on one rank, C latent channels, H x W latent rows and columns, E the two text
encoders, L tokens, D text width, P pooled text width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sdxl_training.data.cache import LATENT_CHANNELS, LATENT_FACTOR, Posterior
from sdxl_training.data.captions import CaptionRules, draw_caption
from sdxl_training.data.crops import variant_of_visit
from sdxl_training.data.fetching import Stored, Unencoded
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.sampler import BatchSchedule, slots_of_part
from sdxl_training.data.text_states import TextCache, caption_of_visit
from sdxl_training.records import Batch, Conditioning, CropPlan, Draw, ImageRecord, Quarantined, UserError
from sdxl_training.rng import Stream, numpy_generator, torch_generator

FetchLatent = Callable[[ImageRecord, CropPlan], Stored | Unencoded]
DrawNoise = Callable[[Tensor, int, int, int, Tensor], Tensor]
"""(latent_CHW, seed, visit, sample id, out_CHW) -> noise_CHW, float32, written into `out_CHW`."""
Couple = Callable[[Tensor, Tensor, Sequence[Sequence[str]]], Tensor]
"""(latents_GCHW, noise_GCHW, tags of each caption) of a global batch -> which noise each sample gets, G integers."""
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor, Tensor | None]]
"""captions -> (ids_1_BL, ids_2_BL, weights_EBL), the last None where captions are read without weights."""
EncodeText = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""What `Tokenize` returns -> (text_BLD, pooled_BP)."""
EncodePixels = Callable[[Sequence[Unencoded]], Sequence[tuple[Tensor, Tensor] | None]]
"""pictures of one bucket -> mean_CHW and std_CHW of each, fp32, on the device; None where it has no finite latent."""
Empty = Callable[[Sequence[int]], Tensor]
"""shape -> float32 to be written to: where a batch's latents and noise are to lie."""


@dataclass(frozen=True, slots=True)
class RawBatch:
    """A micro-batch as workers make it: CPU tensors, captions as token ids or, from the cache, as text states.

    latents_BCHW: drawn from the posterior, scaled, fp32; where `unencoded` has pixels instead, the standard normal
    numbers of that draw. noise_BCHW: fp32. ids_1_BL, ids_2_BL: token ids of the two text encoders. weights_EBL: the
    tokens' weights, fp32; None where captions have none. text_BLD, pooled_BP: fp16; where they are given there are no
    ids. keep_B: False where the caption is dropped and stands for zeros. pictures: their numbers; tagged: the same, -1
    where the caption is dropped or empty. time_ids_B6, weight_B: fp32. unencoded: pictures without a latent, by place
    in the batch. bad: pictures that turned out to be unusable, each replaced by its neighbour.
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
    pictures: tuple[int, ...] = ()
    tagged: tuple[int, ...] = ()
    unencoded: Mapping[int, Unencoded] = field(default_factory=dict)
    bad: tuple[Quarantined, ...] = ()
    text_BLD: Tensor | None = None
    pooled_BP: Tensor | None = None

    def pin_memory(self) -> RawBatch:
        """Return a copy in page-locked memory, from which copies to a GPU do not block."""
        tensors = [one.name for one in fields(self) if isinstance(getattr(self, one.name), Tensor)]
        pinned: dict[str, Any] = {name: getattr(self, name).pin_memory() for name in tensors}
        return replace(self, **pinned)


@dataclass(frozen=True, slots=True)
class Sample:
    """A draw that can be trained: its record, how it is prepared, and its pixels where the cache has no latent."""

    draw: Draw
    record: ImageRecord
    plan: CropPlan
    unencoded: Unencoded | None


@dataclass(frozen=True)
class MicroBatches(Dataset[RawBatch]):
    """Micro-batch number step * accumulation + m of one rank, by number; made the same by any process.

    Micro-batch m of rank r takes slots [(m W + r) B, (m W + r + 1) B) of the global batch, so the split into
    micro-batches and ranks never changes which samples an update sees. B may differ between buckets.

    records, variants and weights are parallel: picture, the ways in which it is prepared, its loss weight. rules: how
    captions vary, for each source. With `couple`, noise changes hands within the global batch; each process then reads
    all its latents. needs_latents: the noise depends on the latents, so all must be in the cache. posterior: whether a
    visit draws from the VAE's distribution or takes its mean. texts: where text states are found; captions then are
    those that it keeps, and are tokenised only where some are lost.

    A picture that cannot be decoded is replaced by the next one of its bucket that can, so a batch is always full and,
    since what can be decoded is a property of the pictures, always the same.
    """

    schedule: BatchSchedule
    records: Sequence[ImageRecord]
    variants: Sequence[Sequence[CropPlan]]
    weights: Sequence[float] | NDArray[np.float32]
    fetch: FetchLatent
    draw_noise: DrawNoise
    tokenize: Tokenize
    rules: Sequence[CaptionRules]
    seed: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    couple: Couple | None = None
    needs_latents: bool = False
    posterior: Posterior = "sample"
    texts: TextCache | None = None
    _coupled: dict[int, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)
    _bad: dict[int, Quarantined] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for samples in self.schedule.global_batches.values():
            slots_of_part(samples, 0, self.parts)

    @property
    def parts(self) -> int:
        """Return how many micro-batches of all ranks make an update."""
        return self.accumulation * self.world_size

    def __getitem__(self, position: int) -> RawBatch:
        """Return micro-batch `position`; raises UserError, naming the picture, where a latent cannot be used."""
        return self.make(position, torch.empty)

    def make(self, position: int, empty: Empty) -> RawBatch:
        """Return micro-batch `position` with latents and noise in memory from `empty`, but for coupled noise."""
        step, micro = divmod(position, self.accumulation)
        _, draws = self.schedule.batch_at(step)
        slots = slots_of_part(len(draws), micro * self.world_size + self.rank, self.parts)
        noise_BCHW = None if self.couple is None else self._coupled_noise(step, draws)[slots.start : slots.stop]
        batch = self.collect([draws[slot] for slot in slots], slots, len(draws), step, noise_BCHW, empty)
        self._refuse_unencoded(batch)
        return batch

    def collect(
        self,
        draws: Sequence[Draw],
        slots: Sequence[int],
        global_batch: int,
        step: int = 0,
        noise_BCHW: Tensor | None = None,
        empty: Empty = torch.empty,
    ) -> RawBatch:
        """Return the batch of these draws, all of one bucket; each with its own noise where none is given."""
        known_bad = len(self._bad)
        samples, latents_BCHW = self._samples(draws, empty)
        captions = [self._caption(sample) for sample in samples]
        return RawBatch(
            latents_BCHW=latents_BCHW,
            noise_BCHW=self._noise(samples, latents_BCHW, empty) if noise_BCHW is None else noise_BCHW,
            **self.read_captions([caption or "" for caption in captions], [sample.record.path for sample in samples]),
            keep_B=torch.tensor([caption is not None for caption in captions]),
            time_ids_B6=torch.tensor([sample.plan.time_ids for sample in samples], dtype=torch.float32),
            weight_B=torch.tensor([self.weights[sample.draw.record] for sample in samples], dtype=torch.float32),
            sample_ids=tuple(sample.record.sample_id for sample in samples),
            visits=tuple(sample.draw.visit for sample in samples),
            step=step,
            slots=tuple(slots),
            global_batch=global_batch,
            pictures=tuple(sample.record.picture for sample in samples),
            tagged=tuple(one.record.picture if told else -1 for one, told in zip(samples, captions, strict=True)),
            unencoded={b: one.unencoded for b, one in enumerate(samples) if one.unencoded is not None},
            bad=tuple(self._bad.values())[known_bad:],
        )

    def _samples(self, draws: Sequence[Draw], empty: Empty) -> tuple[list[Sample], Tensor]:
        """Return the samples of these draws and latents_BCHW. What is read of one is let go before the next is read."""
        height, width = (side // LATENT_FACTOR for side in self.variants[draws[0].record][0].bucket.size_hw)
        latents_BCHW = empty((len(draws), LATENT_CHANNELS, height, width))
        samples = [self._sample(draw, out_CHW) for draw, out_CHW in zip(draws, latents_BCHW, strict=True)]
        return samples, latents_BCHW

    def _noise(self, samples: Sequence[Sample], latents_BCHW: Tensor, empty: Empty) -> Tensor:
        noise_BCHW = empty(latents_BCHW.shape)
        for sample, latent_CHW, noise_CHW in zip(samples, latents_BCHW, noise_BCHW, strict=True):
            self.draw_noise(latent_CHW, self.seed, sample.draw.visit, sample.record.sample_id, noise_CHW)
        return noise_BCHW

    def _coupled_noise(self, step: int, draws: Sequence[Draw]) -> Tensor:
        """Return the global batch's noise in its new order; kept for the step's other micro-batches."""
        if self.couple is None:
            raise ValueError("there is no coupling")
        if step not in self._coupled:
            samples, latents_GCHW = self._samples(draws, torch.empty)
            noise_GCHW = self._noise(samples, latents_GCHW, torch.empty)
            tags = [sample.record.tags for sample in samples]
            self._coupled.clear()
            self._coupled[step] = noise_GCHW[self.couple(latents_GCHW, noise_GCHW, tags)]
        return self._coupled[step]

    def _refuse_unencoded(self, batch: RawBatch) -> None:
        if self.needs_latents and batch.unencoded:
            first = next(iter(batch.unencoded.values()))
            raise UserError(
                f"{first.path}: its latent is not in the cache, and the noise of this run depends on it. Start "
                "the same command again: what is missing is then encoded first. If it is named again, the VAE makes no "
                "finite latent of it: take the picture out, or use another model.vae_precision."
            )

    def _sample(self, draw: Draw, out_CHW: Tensor) -> Sample:
        """Return the draw, or with the same visit the next picture of its bucket that can be used; write its latent."""
        for number in self._from(draw.record):
            record = self.records[number]
            if record.picture in self._bad:
                continue
            variants = self.variants[number]
            plan = variants[variant_of_visit(self.seed, record.sample_id, draw.visit, len(variants))]
            try:
                fetched = self.fetch(record, plan)
            except UnreadablePicture as error:
                self._bad[record.picture] = Quarantined(record.path, error.reason)
                continue
            self._write(fetched, record, draw.visit, out_CHW)
            unencoded = fetched if isinstance(fetched, Unencoded) else None
            return Sample(Draw(number, draw.visit), record, plan, unencoded)
        bucket = self.variants[draw.record][0].bucket
        first = self._bad[self.records[draw.record].picture]
        raise UserError(
            f"data.sources: no picture of bucket {bucket} can be used; the first: {first.path}: {first.reason}. "
            "Replace the pictures, or give other folders."
        )

    def _from(self, record: int) -> Iterator[int]:
        """Yield the records of a bucket in order, beginning with this one and going round."""
        yield record
        members = self.schedule.members(self.variants[record][0].bucket)
        place = int(np.searchsorted(members, record))
        yield from (int(members[(place + i) % len(members)]) for i in range(1, len(members)))

    def _caption(self, sample: Sample) -> str | None:
        record, visit, rules = sample.record, sample.draw.visit, self.rules[sample.record.source]
        if self.texts is not None:
            return caption_of_visit(record, rules, self.seed, visit, self.texts.variants)
        generator = numpy_generator(self.seed, Stream.CAPTION, visit, record.sample_id)
        return draw_caption(record.captions, rules, generator, record.tags)

    def read_captions(self, captions: list[str], paths: Sequence[str]) -> dict[str, Any]:
        """Return what a RawBatch has of captions, text states or tokens; paths: of their pictures, for messages."""
        states = None if self.texts is None else self.texts.read_batch(captions, paths)
        if states is None:
            return dict(zip(("ids_1_BL", "ids_2_BL", "weights_EBL"), self.tokenize(captions), strict=True))
        text_BLD, pooled_BP = states
        no_ids = dict.fromkeys(("ids_1_BL", "ids_2_BL"), torch.empty(len(captions), 0, dtype=torch.int64))
        return {**no_ids, "weights_EBL": None, "text_BLD": text_BLD, "pooled_BP": pooled_BP}

    def _write(self, fetched: Stored | Unencoded, record: ImageRecord, visit: int, out_CHW: Tensor) -> None:
        """Write a latent, or for a picture without one the standard normal numbers that will make it a draw.

        Where it is the mean that counts, these are zeros.
        """
        if self.posterior == "sample":
            generator = torch_generator(self.seed, Stream.POSTERIOR, visit, record.sample_id)
            torch.randn(out_CHW.shape, generator=generator, out=out_CHW)
        if isinstance(fetched, Unencoded):
            if self.posterior == "mean":
                out_CHW.zero_()
            return
        if self.posterior == "sample":
            torch.addcmul(fetched.mean_CHW, fetched.std_CHW, out_CHW, out=out_CHW)
        else:
            out_CHW.copy_(fetched.mean_CHW)
        if not out_CHW.sum().isfinite():  # as good as asking each value, and twenty times as fast
            raise UserError(
                f"{record.path}: its cached latent holds values that are not finite. Delete the cache, so that it is "
                "encoded anew, or take the picture out of the data set."
            )


def to_batch(raw: RawBatch, encode_text: EncodeText, encode_pixels: EncodePixels, device: torch.device) -> Batch:
    """Copy a micro-batch to the device; encode its captions and pictures there, where that is not done yet.

    Captions that keep_B drops get zero text and zero pooled text, SDXL's own null conditioning
    (`force_zeros_for_empty_prompt` in its diffusers pipeline); their size conditioning stays. A picture without a
    finite latent gets weight 0 and is no longer among `tagged`: its loss, of noise alone, says nothing of its tags.
    """
    keep_B = raw.keep_B.to(device, non_blocking=True)
    text_BLD, pooled_BP = _text_states(raw, encode_text, device)
    conditioning = Conditioning(
        text_BLD=torch.where(keep_B[:, None, None], text_BLD, torch.zeros_like(text_BLD)),
        pooled_BP=torch.where(keep_B[:, None], pooled_BP, torch.zeros_like(pooled_BP)),
        time_ids_B6=raw.time_ids_B6.to(device, non_blocking=True),
    )
    latents_BCHW = raw.latents_BCHW.to(device, non_blocking=True)
    weight_B = raw.weight_B.to(device, non_blocking=True)
    lost: set[int] = set()
    if raw.unencoded:
        latents_BCHW, weight_B = latents_BCHW.clone(), weight_B.clone()
        for b, latent in zip(raw.unencoded, encode_pixels(list(raw.unencoded.values())), strict=True):
            if latent is None:
                weight_B[b] = 0.0
                lost.add(b)
            else:
                latents_BCHW[b] = torch.addcmul(latent[0], latent[1], latents_BCHW[b])
    return Batch(
        latents_BCHW=latents_BCHW,
        noise_BCHW=raw.noise_BCHW.to(device, non_blocking=True),
        conditioning=conditioning,
        weight_B=weight_B,
        sample_ids=raw.sample_ids,
        visits=raw.visits,
        step=raw.step,
        slots=raw.slots,
        global_batch=raw.global_batch,
        tagged=tuple(-1 if b in lost else picture for b, picture in enumerate(raw.tagged)),
    )


def _text_states(raw: RawBatch, encode_text: EncodeText, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return text_BLD and pooled_BP, fp32, on the device."""
    if raw.text_BLD is not None and raw.pooled_BP is not None:
        text_BLD, pooled_BP = (half.to(device, non_blocking=True).float() for half in (raw.text_BLD, raw.pooled_BP))
        return text_BLD, pooled_BP
    return encode_text(
        raw.ids_1_BL.to(device, non_blocking=True),
        raw.ids_2_BL.to(device, non_blocking=True),
        None if raw.weights_EBL is None else raw.weights_EBL.to(device, non_blocking=True),
    )
