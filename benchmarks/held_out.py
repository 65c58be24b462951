"""How well does a run's model denoise pictures it has never seen? For other benchmarks; not run by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from sdxl_training.assemble.captions import build_tokenizer
from sdxl_training.assemble.dataset import find_pictures
from sdxl_training.assemble.drawing import load_trained
from sdxl_training.assemble.objective import build_objective
from sdxl_training.config.load import load_config
from sdxl_training.data.images import read_pixels, resize_and_crop, to_model_range
from sdxl_training.model.latents import encode_latents
from sdxl_training.model.text import encode_text
from sdxl_training.objectives.noise import Noise
from sdxl_training.records import Batch, Conditioning
from sdxl_training.tracking.progress import SilentProgress
from sdxl_training.training.mismatch import relative_errors

SEED = 1234


def held_out_batches(run: Path, pictures: Path) -> list[Batch]:
    """Return the pictures of a folder as batches of one bucket each, encoded and captioned by the run's own model."""
    config = load_config(run / "config.resolved.yaml", [f"data.sources=[{{path: {pictures}}}]"]).config
    plan = find_pictures(config, SilentProgress()).plan
    sdxl = load_trained(run, device="cpu").sdxl
    tokenizer = build_tokenizer(config, sdxl)
    batches = []
    for members in plan.by_bucket.values():
        # The demo set has a few that cannot be read.
        whole = [i for i in members if not Path(plan.records[i].path).name.startswith("broken")]
        records, plans = ([parallel[i] for i in whole] for parallel in (plan.records, plan.plans))
        pixels = [to_model_range(resize_and_crop(read_pixels(r.path), p)) for r, p in zip(records, plans, strict=True)]
        latents_BCHW, _ = encode_latents(sdxl.vae, torch.stack(pixels))
        text_BLD, pooled_BP = encode_text(sdxl, *tokenizer.with_weights([record.captions[0] for record in records]))
        time_ids_B6 = torch.tensor([one.time_ids for one in plans], dtype=torch.float32)
        noise = [Noise()(x0, SEED, 0, record.sample_id) for x0, record in zip(latents_BCHW, records, strict=True)]
        batches.append(
            Batch(
                latents_BCHW=latents_BCHW,
                noise_BCHW=torch.stack(noise),
                conditioning=Conditioning(text_BLD, pooled_BP, time_ids_B6),
                weight_B=torch.ones(len(records)),
                sample_ids=tuple(record.sample_id for record in records),
                visits=(0,) * len(records),
                step=0,
                slots=tuple(range(len(records))),
                global_batch=len(records),
            )
        )
    return batches


@torch.no_grad()
def relative_errors_by_level(
    run: Path, batches: Sequence[Batch], sigmas: Sequence[float], checkpoint: int | None = None, use_ema: bool = True
) -> dict[float, float]:
    """Return, for each sigma, the mean error of the clean latent over what the best linear filter leaves of it."""
    trained = load_trained(run, checkpoint, use_ema, device="cpu")
    objective = build_objective(trained.config, torch.device("cpu"))
    errors = {}
    for sigma in sigmas:
        of_batches = []
        for batch in batches:
            log_sigma_B = torch.full((len(batch.visits),), math.log(sigma), dtype=torch.float64)
            of_batches.append(relative_errors(trained.sdxl.unet, (objective.path, objective.head), batch, log_sigma_B))
        errors[sigma] = float(torch.cat(of_batches).mean())
    return errors
