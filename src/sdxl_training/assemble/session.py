"""Everything a run consists of, built in a written order: model, checkpointing, data, update, ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_training.assemble.captions import (
    build_tokenizer,
    caption_rules,
    check_captions,
    refuse_huge_weights,
)
from sdxl_training.assemble.dataset import (
    Dataset,
    fill_cache,
    latent_folder,
    name_quarantined,
    prepare_dataset,
    refuse_too_many_bad,
)
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.objective import build_coupling, build_noise, build_objective
from sdxl_training.assemble.parts import build_update
from sdxl_training.assemble.resume import check_fits, load_weights, restore
from sdxl_training.assemble.texts import fill_text_cache, move_encoders, text_folder
from sdxl_training.assemble.weighting import TagParts, build_tags
from sdxl_training.config.schema import Config
from sdxl_training.data.cache import LatentCache
from sdxl_training.data.encoding import Encoder
from sdxl_training.data.images import RESAMPLING
from sdxl_training.data.loader import MicroBatches, RawBatch, to_batch
from sdxl_training.data.sampler import slots_of_part
from sdxl_training.data.statistics import planned_pictures
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.data.workers import open_loader
from sdxl_training.memory.checkpointing import recompute_activations
from sdxl_training.memory.precision import autocast
from sdxl_training.model.latents import (
    encode_latents,
    encode_latents_exactly,
    in_tiles,
    set_up_vae,
    vae_fingerprint,
)
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import CaptionTokenizer, encode_text
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Draw, Quarantined, UserError
from sdxl_training.tracking.meters import Meter
from sdxl_training.tracking.progress import Progress
from sdxl_training.training.checkpoint import Checkpoint
from sdxl_training.training.step import Run

ENCODE_BATCH = 8  # pictures that go through the VAE at once on a GPU


@dataclass
class Session:
    """A run on this rank. Closing it seals what it wrote into the cache."""

    config: Config
    folder: RunFolder
    group: Group
    progress: Progress
    sdxl: SDXL
    dataset: Dataset
    encoder: Encoder
    writer: StoreWriter | None
    tokenizer: CaptionTokenizer
    micro_batches: MicroBatches
    run: Run
    tags: TagParts = field(default_factory=TagParts)
    meter: Meter = field(default_factory=Meter)
    started: float = field(default_factory=time.monotonic)
    data_page: str = ""
    _known_bad: dict[str, Quarantined] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """Updates of the whole run."""
        return self.config.training.max_steps

    def batches(self, first_step: int) -> Iterator[Sequence[Batch]]:
        """Yield this rank's micro-batches of each update from `first_step` on, on the device."""
        workers, pin = self.config.data.workers, self.group.device.type == "cuda"
        loader = open_loader(self.micro_batches, first_step, self.last_step, workers, pin)
        with closing(loader):
            for _ in range(first_step, self.last_step):
                with self.meter.waiting():
                    raw_batches = next(loader)
                yield [self.to_device(raw) for raw in raw_batches]

    def to_device(self, raw: RawBatch) -> Batch:
        """Return the batch on the device, captions and new pictures encoded; bad pictures are named once.

        Raises UserError where too many pictures are bad.
        """
        raw = replace(raw, weight_B=raw.weight_B * self.tags.weights.of(raw.pictures))
        batch = to_batch(raw, self._encode_text, self.encoder, self.group.device)
        self.quarantine([*raw.bad, *self.encoder.take_bad()])
        return batch

    def without_captions(self, raw: RawBatch) -> RawBatch:
        """Return the batch as it is where all its captions are dropped."""
        if self.config.data.captions.null_mode == "zeros":
            return replace(raw, keep_B=torch.zeros_like(raw.keep_B))
        return replace(raw, **self.micro_batches.read_captions([""] * len(raw.slots), [""] * len(raw.slots)))

    def _encode_text(self, *ids_and_weights: Any) -> tuple[Tensor, Tensor]:
        """Return text_BLD and pooled_BP on the device, wherever the encoders are."""
        states = encode_text(self.sdxl, *ids_and_weights)
        if self.micro_batches.texts is not None:  # lost: made again as the cache kept them
            states = states[0].half().float(), states[1].half().float()
        return states[0].to(self.group.device), states[1].to(self.group.device)

    def quarantine(self, bad: Sequence[Quarantined]) -> None:
        """Name pictures that turned out to be of no use, each once; raises UserError where there are too many."""
        new = [entry for entry in bad if entry.path not in self._known_bad]
        if not new:
            return
        self._known_bad |= {entry.path: entry for entry in new}
        name_quarantined(new, self.progress)
        everything = self.quarantined()
        if self.group.is_main:
            self.folder.write_quarantine(everything)
        refuse_too_many_bad(self.config, everything, self.dataset.found.pictures.found)

    def quarantined(self) -> list[Quarantined]:
        """Return all pictures known to be of no use, also those that workers and other processes came to."""
        self.dataset.found.contents.refresh()
        return list(({entry.path: entry for entry in self.dataset.found.quarantined()} | self._known_bad).values())

    def share_quarantine(self) -> None:
        """Name and write down what any rank has found by now; all ranks call it at once. Raises as `quarantine`."""
        self.dataset.found.contents.refresh()
        in_files = self.dataset.found.quarantined()
        names = {entry.path for entry in in_files}
        # What has no finite latent is in no file: that belongs to the VAE.
        elsewhere = self.group.gather([entry for path, entry in self._known_bad.items() if path not in names])
        self.quarantine([*in_files, *elsewhere])

    def largest_batch(self) -> list[Batch]:
        """Return micro-batches of the heaviest update, as many as an update has; for a rehearsal.

        Their captions are as long as captions get, whatever the first picture's is.
        """
        schedule = self.dataset.schedule
        bucket = schedule.heaviest_bucket
        record, samples = int(schedule.members(bucket)[0]), schedule.global_batches[bucket]
        slots = slots_of_part(samples, 0, self.micro_batches.parts)
        raw = self.micro_batches.collect([Draw(record, 0)] * len(slots), slots, samples)
        longest = [self.tokenizer.longest_caption()] * len(slots)
        ids_1_BL, ids_2_BL, weights_EBL = self.tokenizer.with_weights(longest)
        batch = self.to_device(replace(raw, ids_1_BL=ids_1_BL, ids_2_BL=ids_2_BL, weights_EBL=weights_EBL))
        return [batch] * self.config.training.accumulation

    def first_batches(self, count: int) -> list[Batch]:
        """Return `count` pictures of the heaviest update's bucket, or all of a smaller one; the same on every rank."""
        schedule = self.dataset.schedule
        bucket = schedule.heaviest_bucket
        size = schedule.global_batches[bucket] // self.micro_batches.parts
        draws = [Draw(int(record), 0) for record in schedule.members(bucket)[:count]]
        chunks = [draws[first : first + size] for first in range(0, len(draws), size)]
        return [self.to_device(self.micro_batches.collect(chunk, range(len(chunk)), len(draws))) for chunk in chunks]

    def park_encoders(self) -> None:
        """Take the text encoders off the GPU where training does: captions come from the cache."""
        if self.config.data.cache.text_variants:
            move_encoders(self.sdxl, "cpu")

    def fill(self) -> None:
        """Encode every picture, and the captions that are kept, where that is to come first."""
        if self.config.data.cache.mode == "first":
            encoder = replace(self.encoder, writer=self.writer)
            fill_cache(self.config, self.dataset, encoder, self.group, self.progress)
            self.quarantine([*self.dataset.found.quarantined(), *encoder.take_bad()])
        if self.config.data.cache.text_variants:
            self._fill_texts()

    def _fill_texts(self) -> None:
        """Encode the captions; from then on batches bring their text states, and the GPU is rid of the encoders."""
        records = self.dataset.plan.records
        move_encoders(self.sdxl, self.group.device)
        which = self.dataset.captions_name
        with open_store_writer(self.config, text_folder(self.config), self.group, self.progress) as writer:
            texts = fill_text_cache(
                self.config, records, which, self.sdxl, self.tokenizer, writer, self.group, self.progress
            )
        self.micro_batches = replace(self.micro_batches, texts=texts)
        self.park_encoders()
        self.progress.message("the text encoders left the GPU: captions come from the cache")

    def close(self) -> None:
        """Seal what was written into the cache."""
        if self.writer is not None:
            self.writer.close()


def open_session(
    config: Config, folder: RunFolder, group: Group, progress: Progress, checkpoint: Checkpoint | None
) -> Session:
    """Load the model, find the data and build the update; with a checkpoint, as it was when that was saved."""
    training = config.training
    sdxl = load_sdxl(config.model.source, config.global_config.seed, group.device)
    set_up_vae(sdxl.vae, config.model.vae_precision, config.model.vae_tiling)
    if checkpoint is not None:
        load_weights(sdxl, checkpoint)
    if training.memory.gradient_checkpointing:
        recompute_activations(sdxl.unet)
    dataset = prepare_dataset(config, group, progress, vae_fingerprint(sdxl.vae), group)
    _refuse_other_data(dataset.fingerprint, group)
    tokenizer = build_tokenizer(config, sdxl)
    if group.is_main:
        folder.write_quarantine(())
        if dataset.found.duplicates:
            folder.write_duplicates(dataset.found.duplicate_lines())
        refuse_huge_weights(caption_rules(config), dataset.found.pictures, planned_pictures(dataset.plan))
        check_captions(config, tokenizer, dataset.plan.records, progress)
    objective = build_objective(config, group.device)
    tags = build_tags(config, dataset.found, group.device)
    run = Run(
        model=group.wrap(sdxl.unet),
        objective=objective,
        update=build_update(config, sdxl.unet, objective.uncertainty, group.device),
        precision=autocast(training.precision, group.device),
        group=group,
        seed=config.global_config.seed,
        watch=tags.watch,
    )
    if checkpoint is not None:
        check_fits(checkpoint, config, dataset.fingerprint)
        restore(run, tags, checkpoint, progress)
    writer = open_writer(config, dataset, group, progress)
    # Pictures that arrive without a latent are prepared on the CPU: where the cache is of other pixels, they stay out.
    keep = dataset.preparer is None or dataset.preparer.recipe == RESAMPLING
    encoder = build_encoder(sdxl.vae, group.device, dataset.cache, writer if keep else None)
    batches = _micro_batches(config, group, tokenizer, dataset)
    session = Session(config, folder, group, progress, sdxl, dataset, encoder, writer, tokenizer, batches, run, tags)
    session.quarantine(dataset.found.quarantined())
    return session


def _refuse_other_data(fingerprint: dict[str, str], group: Group) -> None:
    """Raise UserError on every rank where they do not all see the same data: each would draw in an order of its own."""
    everywhere = group.gather([fingerprint])
    differing = [name for name in fingerprint if len({each[name] for each in everywhere}) > 1]
    if differing:
        raise UserError(
            f"data.sources: the processes of this run do not see the same data; what differs: {', '.join(differing)}. "
            "Give all machines the same files and the same configuration, and one data.cache.path that they share."
        )


def encode_batch(device: torch.device) -> int:
    """Return how many pictures go through the VAE at once.

    On the CPU, where several at once are no faster, each goes alone: the last bits of a latent depend on how many are
    encoded with it, and that on how far ahead workers are and on what a crash left.
    """
    return 1 if device.type == "cpu" else ENCODE_BATCH


def build_encoder(
    vae: AutoencoderKL, device: torch.device, cache: LatentCache | None, writer: StoreWriter | None
) -> Encoder:
    """Return what encodes pictures on this rank."""
    return Encoder(
        partial(encode_latents, vae),
        device,
        encode_batch(device),
        cache,
        writer,
        exactly=partial(encode_latents_exactly, vae),
        in_tiles=partial(in_tiles, vae),
    )


def open_writer(config: Config, dataset: Dataset, group: Group, progress: Progress) -> StoreWriter | None:
    """Return what writes latents into the cache on this rank, if there is one."""
    if dataset.cache is None:
        return None
    return open_store_writer(config, latent_folder(config), group, progress)


def open_store_writer(config: Config, folder: Path, group: Group, progress: Progress) -> StoreWriter:
    """Return what writes into a folder of the cache on this rank, and says when the disk is full."""

    def say_full(full: Path, error: OSError) -> None:
        progress.message(
            f"{full}: {error.strerror}. The run waits; free some space and it goes on, what was stored is kept."
        )

    return StoreWriter(folder, config.data.cache.compression, say_full, name=f"rank{group.rank}")


def _micro_batches(config: Config, group: Group, tokenizer: CaptionTokenizer, dataset: Dataset) -> MicroBatches:
    return MicroBatches(
        schedule=dataset.schedule,
        records=dataset.plan.records,
        variants=dataset.variants,
        weights=dataset.found.pictures.weights(dataset.plan),
        fetch=dataset.fetch,
        draw_noise=build_noise(config),
        couple=build_coupling(config),
        needs_latents=config.training.coupling.type != "independent",
        posterior=config.data.cache.posterior,
        tokenize=tokenizer.with_weights,
        rules=caption_rules(config),
        seed=config.global_config.seed,
        accumulation=config.training.accumulation,
        rank=group.rank,
        world_size=group.world_size,
    )
