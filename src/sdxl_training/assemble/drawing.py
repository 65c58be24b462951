"""Everything that draws from or exports a finished or running run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from sdxl_training.assemble.captions import build_tokenizer
from sdxl_training.assemble.folder import RunFolder
from sdxl_training.assemble.objective import build_objective
from sdxl_training.config.load import load_config
from sdxl_training.config.schema import Config, Previews
from sdxl_training.memory.precision import autocast
from sdxl_training.model.export import export_diffusers, export_single_file, modelspec
from sdxl_training.model.latents import decode_latents
from sdxl_training.model.load import load_sdxl
from sdxl_training.model.sdxl import SDXL, with_unet_weights
from sdxl_training.model.text import encode_text
from sdxl_training.objectives import interchange
from sdxl_training.objectives.objective import Objective
from sdxl_training.records import UserError
from sdxl_training.training.checkpoint import (
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from sdxl_training.training.preview import Painter, Picture, Sampling, make_grid


@dataclass(frozen=True)
class TrainedModel:
    """A run's model as of one checkpoint."""

    config: Config
    sdxl: SDXL
    step: int
    averaged: bool


def build_painter(
    config: Config,
    sdxl: SDXL,
    model: nn.Module,
    objective: Objective,
    precision: AbstractContextManager[object],
    device: torch.device,
) -> Painter:
    """Return a painter that draws with `model`, the U-Net of `sdxl` or what wraps it, and reads prompts as captions."""
    tokenizer = build_tokenizer(config, sdxl)

    def encode_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # The encoders may have left the GPU.
        text_BLD, pooled_BP = encode_text(sdxl, *tokenizer.with_weights(prompts))
        return text_BLD.to(device), pooled_BP.to(device)

    zero_null = config.data.captions.null_mode == "zeros"
    return Painter(model, objective, encode_prompts, partial(decode_latents, sdxl.vae), precision, device, zero_null)


def sampling_of(previews: Previews) -> Sampling:
    """Return how a run draws its previews."""
    return Sampling(**{field.name: getattr(previews, field.name) for field in fields(Sampling)})


def load_trained(run_dir: Path, step: int | None = None, use_ema: bool = True, device: str = "auto") -> TrainedModel:
    """Load the model of a run: its newest checkpoint that verifies, or that of `step`; averaged weights if it has them.

    Raises UserError where the run, the checkpoint or the averaged weights do not exist.
    """
    folder = RunFolder(run_dir)
    if not folder.resolved.is_file():
        raise UserError(
            f"{run_dir}: is no run's folder, it has no {folder.resolved.name}. Give <output_dir>/<run_name>."
        )
    config = load_config(folder.resolved).config
    chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    checkpoint = load_checkpoint(_find_checkpoint(folder.checkpoints, step))
    averaged = use_ema and "average" in checkpoint.parts
    sdxl = load_sdxl(config.model.source, config.global_config.seed, chosen)
    weights = {name: value.to(chosen) for name, value in checkpoint.parts["average" if averaged else "unet"].items()}
    return TrainedModel(config, with_unet_weights(sdxl, weights), checkpoint.state.step, averaged)


def _find_checkpoint(folder: Path, step: int | None) -> Path:
    if step is not None:
        path = folder / checkpoint_name(step)
        if path.is_dir():
            return path
        there = ", ".join(str(checkpoint_step(path)) for path in list_checkpoints(folder)) or "none"
        raise UserError(f"{path}: there is no such checkpoint. Steps with a checkpoint: {there}.")
    newest, rejected = newest_checkpoint(folder)
    if newest is None:
        damaged = "".join(f"\n  {sentence}" for sentence in rejected)
        raise UserError(f"{folder}: there is no checkpoint to draw from.{damaged} Train the run first.")
    return newest


def draw_prompts(
    run_dir: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    checkpoint: int | None = None,
    use_ema: bool = True,
    device: str = "auto",
) -> list[Picture]:
    """Draw one square picture a prompt, at the run's resolution, with the run's own objective. In fp32."""
    trained = load_trained(run_dir, checkpoint, use_ema, device)
    chosen = trained.sdxl.vae.device
    objective = build_objective(trained.config, chosen)
    config, sdxl = trained.config, trained.sdxl
    painter = build_painter(config, sdxl, sdxl.unet, objective, autocast("fp32", chosen), chosen)
    side = config.data.resolution
    return painter.paint(prompts, (side, side), sampling)


def sample(
    run_dir: Path,
    prompts: Sequence[str],
    previews: Previews,
    out: Path,
    checkpoint: int | None,
    use_ema: bool,
) -> None:
    """Draw prompts to a PNG: one picture as it is, several as a grid with their prompts below."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out = {out}: pictures are written as PNG; give a name that ends in .png.")
    pictures = draw_prompts(run_dir, prompts, sampling_of(previews), checkpoint, use_ema)
    sheet = Image.fromarray(pictures[0]) if len(pictures) == 1 else make_grid(pictures, prompts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise UserError(
            f"{out}: the picture cannot be written ({error.strerror or error}). Choose another --out."
        ) from error
    if all(numpy.all(picture == 0) for picture in pictures):
        print("every picture is black: the model's latents are far outside the VAE's range")
    print(f"{out}: {len(pictures)} picture{'' if len(pictures) == 1 else 's'} drawn by {run_dir}")


def export(run_dir: Path, checkpoint: int | None, use_ema: bool, format: str, to: Path) -> None:  # noqa: A002
    """Write a run's model for other programs: a diffusers folder or one file in SDXL's original layout."""
    if format == "single_file" and to.suffix != ".safetensors":
        raise UserError(f"--to = {to}: a single file is found by its ending; give a name that ends in .safetensors.")
    trained = load_trained(run_dir, checkpoint, use_ema, device="cpu")
    config = trained.config
    objective = build_objective(config, trained.sdxl.vae.device)
    if format == "diffusers":
        scheduler, note = interchange.scheduler_config(objective), interchange.describe(objective)
        zero_null = config.data.captions.null_mode == "zeros"
        export_diffusers(trained.sdxl, scheduler, note, to, zeros_for_empty_prompt=zero_null)
    else:
        title = f"{config.global_config.run_name}, step {trained.step}"
        size_hw = (config.data.resolution, config.data.resolution)
        standard = modelspec(title, interchange.prediction_type(objective), size_hw, datetime.now(timezone.utc))
        export_single_file(
            trained.sdxl, interchange.marker_keys(objective), standard | interchange.facts(objective), to
        )
    weights = "averaged weights" if trained.averaged else "weights"
    print(f"{to}: {weights} of step {trained.step}. {interchange.describe(objective)}")
