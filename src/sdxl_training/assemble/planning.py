"""What a run would do, before it does anything; and the demo's pictures."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from sdxl_training.assemble.cache_state import CacheState
from sdxl_training.assemble.captions import TOKENS_OF_A_CHUNK, caption_rules
from sdxl_training.assemble.dataset import (
    FoundPictures,
    build_schedule,
    find_pictures,
    latent_folder,
    open_latents,
    open_preparer,
)
from sdxl_training.assemble.plan_report import (
    CAPTIONS_COUNTED,
    PlanReport,
    build_plan_report,
    caption_figures,
)
from sdxl_training.assemble.texts import text_folder
from sdxl_training.config.load import LoadedConfig
from sdxl_training.config.schema import Config
from sdxl_training.data.cache import LatentCache, Reasons, projected_bytes
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.contact_sheet import draw_sheet, worst_crop_cells, write_sheet
from sdxl_training.data.demo_set import write_demo_set
from sdxl_training.data.remote import shown
from sdxl_training.data.statistics import (
    BatchParts,
    crop_lines,
    evenly_spread,
    planned_pictures,
    source_table,
    tag_table,
    tags_of,
)
from sdxl_training.data.text_states import TextShape
from sdxl_training.data.text_states import projected_bytes as projected_text_bytes
from sdxl_training.model.latents import set_up_vae, vae_fingerprint
from sdxl_training.model.load import TEXT_SHAPE, is_local, load_text_shape, load_vae
from sdxl_training.model.text import plain_text
from sdxl_training.parallel.group import own_device
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import ConsoleProgress, open_log

UNUSABLE = "cannot be used"
REASONED = (
    4_000  # records that lack a latent and are asked why (a second); of more, so many evenly spread speak for all
)


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """What else a plan writes, where it is wanted: the worst crops (PNG), a line of JSON each picture, each group."""

    sheet: Path | None = None
    crops: Path | None = None
    duplicates: Path | None = None


def plan(loaded: LoadedConfig, as_json: bool, files: PlanFiles) -> None:
    """Print images, buckets, crops, captions, steps and cache; reads headers and captions only.

    as_json: everything, for programs. Raises UserError where a file cannot be written, or would be of nothing.
    """
    data = loaded.config.data
    if files.duplicates is not None and data.duplicates == data.near_duplicates == "keep":
        raise UserError(
            f"--duplicates = {files.duplicates}: none are looked for with data.duplicates and data.near_duplicates = "
            "keep. Set one of them to warn or drop, also by --set data.duplicates=warn."
        )
    console = Console(stderr=as_json)  # so that the JSON is all there is on the standard output
    open_log(None, console)
    progress = ConsoleProgress(console)
    found = find_pictures(loaded.config, progress)
    report = make_report(loaded.config, found)
    if as_json:
        print(report.to_json(), end="")
    else:
        said = report.text().encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if files.crops is not None:
        write_lines(crop_lines(found.plan), files.crops, "--crops")
        progress.message(f"what becomes of each picture: {files.crops}")
    if files.duplicates is not None:
        write_lines(found.duplicate_lines(), files.duplicates, "--duplicates")
        progress.message(f"pictures that are there several times: {files.duplicates}")
    if files.sheet is None:
        return
    sheet = worst_crops(loaded.config, found)
    if sheet is None:
        progress.message("no picture is cut, so there is no contact sheet")
        return
    write_sheet(sheet, files.sheet)
    progress.message(f"the worst crops: {files.sheet}")


def make_report(
    config: Config, found: FoundPictures, most: int | None = None, cache: LatentCache | None = None
) -> PlanReport:
    """Return all that is known of a run's data before it begins.

    most: pictures whose tags and captions are counted; None: all tags. cache: that of the run, where it is open.
    """
    training, captions, processes = config.training, config.data.captions, int(os.environ.get("WORLD_SIZE", "1"))
    read = parse_weights if captions.weights else plain_text
    numbers = planned_pictures(found.plan)
    if most is not None:
        numbers = evenly_spread(numbers, most)
    return build_plan_report(
        plan=found.plan,
        schedule=build_schedule(config, found.plan, processes),
        parts=BatchParts(
            training.batch_size, training.pixels_per_batch, training.accumulation, processes, training.max_steps
        ),
        sources=source_table(found.pictures, found.plan, [shown(source.path) for source in config.data.sources]),
        quarantined=found.quarantined(),
        uncaptioned=found.pictures.left_out,
        captions=caption_figures(
            config.model.source,
            found.pictures,
            found.plan,
            caption_rules(config),
            captions.max_tokens // TOKENS_OF_A_CHUNK,
            read,
            CAPTIONS_COUNTED if most is None else most,
        ),
        tags=None if captions.kind == "prose" else tag_table(tags_of(found.pictures, numbers)),
        cache=cache_state(config, found, cache),
    )


def worst_crops(config: Config, found: FoundPictures) -> Image.Image | None:
    """Draw the contact sheet of the worst crops; None where no picture is cut."""
    if not found.plan.worst_crops(1):
        return None
    cells = worst_crop_cells(found.plan, found.pictures.read)
    return draw_sheet(cells, background=config.data.preprocessing.background)


def write_lines(lines: Iterable[str], file: Path, option: str) -> None:
    """Write lines to the file that an option names. Raises UserError where it cannot be written."""
    try:
        with file.open("w", encoding="utf-8") as opened:
            opened.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise UserError(
            f"{option} = {file}: cannot be written ({error.strerror or error}). Give a file in a folder that is there "
            "and can be written."
        ) from error


def cache_state(config: Config, found: FoundPictures, cache: LatentCache | None = None) -> CacheState | None:
    """Return what the cache holds of a plan and what must be encoded, and why; None where nothing is kept."""
    mode, source = config.data.cache.mode, config.model.source
    if mode == "none":
        return None
    folder = latent_folder(config)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    latents = found.plan.latents()
    state = CacheState(
        folder=str(folder),
        mode=mode,
        latents=latents,
        bytes_when_full=projected_bytes(found.plan, config.data.cache.posterior),
        bytes_free=shutil.disk_usage(there).free,
        unknown=f"the VAE of model.source = {source} is not on this machine, and a plan fetches nothing",
        text_bytes=text_bytes(config, len(found.plan.records)),
        text_bytes_there=sum(file.stat().st_size for file in text_folder(config).glob("*/*")),
    )
    if cache is None and not is_local(source):
        return state
    if cache is None:
        try:
            recipe = recipe_here(config)
        except UserError as error:
            return replace(state, unknown=f"a run cannot prepare its pictures on this machine: {error}")
        vae = set_up_vae(load_vae(source, "cpu"), config.model.vae_precision, config.model.vae_tiling)
        cache = open_latents(config, vae_fingerprint(vae), recipe)
    to_encode = why_encode(cache, found)
    latents -= to_encode.pop(UNUSABLE, 0)  # nobody will ever make those
    return replace(state, latents=latents, there=latents - sum(to_encode.values()), to_encode=to_encode, unknown="")


def recipe_here(config: Config) -> str:
    """Return how a run on this machine would make the pixels of its latents; raises UserError where it could not."""
    # Only bulk that comes first may be prepared on a GPU: all else is planned where there is none.
    bulk = config.data.cache.mode == "first" and config.data.preprocessing.backend != "cpu"
    device = own_device(config.global_config.device) if bulk else torch.device("cpu")
    preparer = open_preparer(config, device)
    if preparer is None:
        raise ValueError("no latents are kept")
    with closing(preparer):
        return preparer.recipe


def text_bytes(config: Config, records: int) -> int:
    """Return the most that the text states of so many records take on disk; 0 where none are kept."""
    variants, chunks = config.data.cache.text_variants, config.data.captions.max_tokens // TOKENS_OF_A_CHUNK
    if not variants:
        return 0
    source = config.model.source
    shape = load_text_shape(source) if is_local(source) else TEXT_SHAPE
    return projected_text_bytes(records, variants, chunks, TextShape(*shape))


def why_encode(cache: LatentCache, found: FoundPictures) -> dict[str, int]:
    """Return how many latents the cache lacks, by reason; under UNUSABLE those of pictures that cannot be used."""
    plan = found.plan
    digests_P2, known_P, failed_P = found.contents.columns()
    known_N, failed_N = known_P[plan.picture_N], failed_P[plan.picture_N]
    lacking_N = cache.missing(digests_P2[plan.picture_N], known_N, plan)
    why = Counter(
        {UNUSABLE: int(lacking_N[failed_N].sum()), "not read yet": int(lacking_N[~known_N & ~failed_N].sum())}
    )
    asked = np.flatnonzero((lacking_N > 0) & known_N & ~failed_N)
    spread = evenly_spread(asked, REASONED)
    reasons = Reasons(cache)
    found_why: Counter[str] = Counter()
    for number in spread.tolist():
        record, content = plan.records[number], digests_P2[plan.picture_N[number]].tobytes()
        variants = [one for one in plan.variants[number] if not cache.has(content, one)]
        found_why.update(reasons.of(record.sample_id, content, one) for one in variants)
    for reason, count in found_why.items():
        why[reason] += round(count * len(asked) / len(spread))
    return {reason: count for reason, count in why.items() if count}


def write_demo_data(to: Path, seed: int, pictures: int) -> None:
    """Write the demo's picture set and say what was written."""
    summary = write_demo_set(to, seed, pictures)
    done = "already there" if summary.already_there else "written"
    print(f"{summary.folder}: {summary.pictures} pictures with captions and {summary.broken} broken files, {done}")
