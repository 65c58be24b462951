"""Everything a run consists of, built in a written order: model, checkpointing, data, update, ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from sdxl_training.assemble.captions import build_tokenizer, caption_rules, check_captions
from sdxl_training.assemble.dataset import Dataset, prepare_dataset
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.objective import build_coupling, build_noise, build_objective
from sdxl_training.assemble.parts import build_update
from sdxl_training.assemble.resume import check_fits, load_weights, restore
from sdxl_training.config.schema import Config
from sdxl_training.data.loader import MicroBatches, open_loader, to_batch
from sdxl_training.data.sampler import slots_of_part
from sdxl_training.memory.checkpointing import recompute_activations
from sdxl_training.memory.precision import autocast
from sdxl_training.model.latents import encode_latents, vae_fingerprint
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import CaptionTokenizer, encode_text
from sdxl_training.parallel.group import Group
from sdxl_training.records import Batch, Draw
from sdxl_training.tracking.meters import Meter
from sdxl_training.tracking.progress import Progress
from sdxl_training.training.checkpoint import Checkpoint
from sdxl_training.training.step import Run


@dataclass
class Session:
    """A run on this rank."""

    config: Config
    folder: RunFolder
    group: Group
    progress: Progress
    sdxl: SDXL
    dataset: Dataset
    tokenizer: CaptionTokenizer
    micro_batches: MicroBatches
    run: Run
    meter: Meter = field(default_factory=Meter)
    started: float = field(default_factory=time.monotonic)

    @property
    def last_step(self) -> int:
        """Updates of the whole run."""
        return self.config.training.max_steps

    def batches(self, first_step: int) -> Iterator[Sequence[Batch]]:
        """Yield this rank's micro-batches of each update from `first_step` on, on the device."""
        device, encode = self.group.device, partial(encode_text, self.sdxl)
        workers = self.config.data.workers
        loader = open_loader(self.micro_batches, first_step, self.last_step, workers, pin=device.type == "cuda")
        with closing(loader):
            for _ in range(first_step, self.last_step):
                with self.meter.waiting():
                    raw_batches = next(loader)
                yield [to_batch(raw, encode, device) for raw in raw_batches]

    def largest_batch(self) -> list[Batch]:
        """Return micro-batches of the heaviest update, as many as an update has; for a rehearsal.

        Their captions are as long as captions get, whatever the first picture's is.
        """
        bucket = self.dataset.heaviest_bucket
        record, samples = self.dataset.plan.by_bucket[bucket][0], self.dataset.schedule.global_batches[bucket]
        slots = slots_of_part(samples, 0, self.micro_batches.parts)
        raw = self.micro_batches.collect([Draw(record, 0)] * len(slots), slots, samples)
        longest = [self.tokenizer.longest_caption()] * len(slots)
        ids_1_BL, ids_2_BL, weights_EBL = self.tokenizer.with_weights(longest)
        raw = replace(raw, ids_1_BL=ids_1_BL, ids_2_BL=ids_2_BL, weights_EBL=weights_EBL)
        batch = to_batch(raw, partial(encode_text, self.sdxl), self.group.device)
        return [batch] * self.config.training.accumulation

    def first_batches(self, count: int) -> list[Batch]:
        """Return `count` pictures of the largest bucket, or all of a smaller one; the same on every rank."""
        bucket = self.dataset.heaviest_bucket
        size = self.dataset.schedule.global_batches[bucket] // self.micro_batches.parts
        draws = [Draw(record, 0) for record in self.dataset.plan.by_bucket[bucket][:count]]
        encode, device = partial(encode_text, self.sdxl), self.group.device
        chunks = [draws[first : first + size] for first in range(0, len(draws), size)]
        raw_batches = [self.micro_batches.collect(chunk, range(len(chunk)), len(draws)) for chunk in chunks]
        return [to_batch(raw, encode, device) for raw in raw_batches]


def open_session(
    config: Config, folder: RunFolder, group: Group, progress: Progress, checkpoint: Checkpoint | None, dry_run: bool
) -> Session:
    """Load the model, prepare the data and build the update; with a checkpoint, as it was when that was saved.

    A dry run prepares only the pictures of one batch of the largest bucket.
    """
    training = config.training
    sdxl = load_sdxl(config.model.source, config.global_config.seed, group.device)
    if checkpoint is not None:
        load_weights(sdxl, checkpoint)
    if training.memory.gradient_checkpointing:
        recompute_activations(sdxl.unet)
    encode, fingerprint = partial(encode_latents, sdxl.vae), vae_fingerprint(sdxl.vae)
    dataset = prepare_dataset(config, group, progress, encode, fingerprint, one_batch=dry_run)
    tokenizer = build_tokenizer(config, sdxl)
    if group.is_main:
        folder.write_quarantine(dataset.quarantined)
        check_captions(config, tokenizer, dataset.plan.records, progress)
    objective = build_objective(config, group.device)
    run = Run(
        model=group.wrap(sdxl.unet),
        objective=objective,
        update=build_update(config, sdxl.unet, objective.uncertainty, group.device),
        precision=autocast(training.precision, group.device),
        group=group,
        seed=config.global_config.seed,
    )
    if checkpoint is not None:
        check_fits(checkpoint, config, dataset.fingerprint)
        restore(run, checkpoint, progress)
    micro_batches = _micro_batches(config, group, tokenizer, dataset)
    return Session(config, folder, group, progress, sdxl, dataset, tokenizer, micro_batches, run)


def _micro_batches(config: Config, group: Group, tokenizer: CaptionTokenizer, dataset: Dataset) -> MicroBatches:
    return MicroBatches(
        schedule=dataset.schedule,
        records=dataset.plan.records,
        variants=dataset.plan.variants,
        keys=dataset.keys,
        weights=[1.0] * len(dataset.keys),
        read_latent=dataset.cache.read,
        draw_noise=build_noise(config),
        couple=build_coupling(config),
        tokenize=tokenizer.with_weights,
        rules=caption_rules(config),
        seed=config.global_config.seed,
        accumulation=config.training.accumulation,
        rank=group.rank,
        world_size=group.world_size,
    )
