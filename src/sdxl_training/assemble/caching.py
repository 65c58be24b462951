"""Filling the cache without training, and checking what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch
from rich.console import Console

from sdxl_training.assemble.captions import build_tokenizer, check_captions
from sdxl_training.assemble.dataset import (
    Dataset,
    fill_cache,
    latent_folder,
    name_quarantined,
    prepare_dataset,
    refuse_too_many_bad,
)
from sdxl_training.assemble.session import build_encoder, open_store_writer, open_writer
from sdxl_training.assemble.texts import fill_text_cache, text_folder
from sdxl_training.config.load import LoadedConfig
from sdxl_training.config.schema import Config
from sdxl_training.data.store import Store
from sdxl_training.model.latents import set_up_vae, vae_fingerprint
from sdxl_training.model.load import load_text_encoders, load_vae
from sdxl_training.parallel.group import Group, own_device
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import ConsoleProgress, Progress, SilentProgress, open_log


@contextmanager
def _in_a_full_memory() -> Iterator[None]:
    """Say in a sentence that the device has no room for the models themselves; raises UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}). End other programs there, or set "
            "global_config.device: cpu; what was encoded before is kept."
        ) from error


@_in_a_full_memory()
def cache(loaded: LoadedConfig, verify: bool) -> None:
    """Encode every picture of the configuration that the cache lacks, and where text states are kept every caption.

    verify: read every entry first.

    Under torchrun, or started several times, on one machine or several that share the folder, the processes share the
    work through files alone: none waits for another, and whatever one that dies has left is done by the others. Raises
    UserError where the configuration keeps no latents.
    """
    config = loaded.config
    if config.data.cache.mode == "none":
        raise UserError(
            "data.cache.mode = none: nothing is kept, so there is nothing to fill. Set it to first or ahead."
        )
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    group = Group(rank, processes, own_device(config.global_config.device))
    console = Console()
    if group.is_main:
        open_log(None, console)
    progress: Progress = ConsoleProgress(console) if group.is_main else SilentProgress()
    if verify and group.is_main:
        verify_cache(config, progress)
    vae = set_up_vae(load_vae(config.model.source, group.device), config.model.vae_precision, config.model.vae_tiling)
    dataset = prepare_dataset(config, group, progress, vae_fingerprint(vae))
    writer = open_writer(config, dataset, group, progress)
    if writer is None:
        raise ValueError("a cache without a writer")
    with closing(writer):
        encoder = build_encoder(vae, group.device, dataset.cache, writer)
        fill_cache(config, dataset, encoder, group, progress)
    quarantined = [*dataset.found.quarantined(), *encoder.take_bad()]
    name_quarantined(quarantined, progress)
    refuse_too_many_bad(config, quarantined, dataset.found.pictures.found)
    if config.data.cache.text_variants:
        cache_texts(config, dataset, group, progress)


def cache_texts(config: Config, dataset: Dataset, group: Group, progress: Progress) -> None:
    """Encode the captions of all pictures that the cache lacks; of the model only the text encoders are read."""
    text, records = load_text_encoders(config.model.source, group.device), dataset.plan.records
    tokenizer = build_tokenizer(config, text)
    if group.is_main:
        check_captions(config, tokenizer, records, progress)
    with open_store_writer(config, text_folder(config), group, progress) as writer:
        fill_text_cache(config, records, dataset.captions_name, text, tokenizer, writer, group, progress)


def verify_cache(config: Config, progress: Progress) -> None:
    """Read every entry of the cache and name those that are damaged; they are made again when needed."""
    folders = {"latents": latent_folder(config)}
    if config.data.cache.text_variants:
        folders["text states"] = text_folder(config)
    for what, folder in folders.items():
        store = Store(folder)
        with progress.track(f"reading all {what}", store.recorded) as advance:
            damaged = store.verify(advance)
        for damage in damaged:
            progress.message(str(damage))
        progress.message(f"{len(store)} {what} are whole" + ("" if damaged else "; none is damaged"))
