"""The five sections of a configuration file: every knob once, with its default, its range and one sentence.

`src/config.yaml` and `config.schema.json` are written from this file by `python -m sdxl_training.config`.
A family is a union over `type`: only the chosen type's fields are legal. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from sdxl_training.config.data import Data, Source
from sdxl_training.config.levels import LevelDensity, LevelShift, NoLevelShift, UniformDensity
from sdxl_training.config.objective import (
    Coupling,
    Epsilon,
    IndependentCoupling,
    LossShape,
    LossWeight,
    MeanSquaredShape,
    NoiseShape,
    NoLossWeight,
    Objective,
    Preset,
)
from sdxl_training.config.section import Fraction, Section
from sdxl_training.config.tags import TagWeighting

Sampler = Literal["euler", "ddim", "heun", "dpmpp_2m"]
Grid = Literal["auto", "native", "trailing", "karras", "linear"]
Beta = Annotated[float, Field(ge=0, lt=1)]
FOLDER_NAME = r"^[^\s./\\][^/\\\x00-\x1f]*$"
DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?)$"


# --- global_config ---------------------------------------------------------------------------------------------------


class Checkpoints(Section):
    """Saving and what is kept."""

    every_steps: int = Field(
        default=500, ge=1, description="Steps between two checkpoints; one more is saved at the end."
    )
    keep_last: int = Field(default=3, ge=1, description="Number of checkpoints kept; older ones are deleted.")


PREVIEW_PROMPTS = (
    "a photo of a red fox in the snow, sharp focus",
    "an oil painting of a harbour at dawn",
    "portrait of an old sailor, soft window light",
)


class Previews(Section):
    """Pictures drawn during training, always from the same noise."""

    every_steps: int = Field(default=500, ge=0, description="Steps between two preview grids; 0 turns previews off.")
    prompts: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)] = Field(
        default=PREVIEW_PROMPTS, description="One picture of the grid for each prompt."
    )
    steps: int = Field(default=28, ge=1, le=1000, description="Sampler steps of one picture.")
    sampler: Sampler = Field(
        default="euler", description="How a step is made; ddim is euler by its other name, heun evaluates twice."
    )
    grid: Grid = Field(
        default="auto", description="Noise levels that are visited; auto is what the objective is usually drawn with."
    )
    shift: float = Field(
        default=1.0, ge=0.01, le=100, description="Factor on sigma in the linear grid; above 1 dwells on noise."
    )
    guidance: float = Field(
        default=5.0, ge=1, le=1000, description="Classifier-free guidance scale; 1 means no guidance."
    )
    guidance_rescale: Fraction = Field(
        default=0.0, description="Share of guidance's gain in contrast that is taken back (Lin et al. 2023)."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the noise the pictures start from.")


class Tracking(Section):
    """Numbers written during training."""

    log_every_steps: int = Field(
        default=10, ge=1, description="Steps between two lines of metrics.jsonl and the console."
    )
    tensorboard: bool = Field(default=True, description="Whether the metrics are written for TensorBoard, too.")


class GlobalConfig(Section):
    """Where a run lives and what it leaves behind."""

    seed: int = Field(default=0, ge=0, description="Seed of all randomness: noise, levels, captions, order.")
    output_dir: str = Field(default="runs", min_length=1, description="Folder that holds the folders of all runs.")
    run_name: str = Field(
        default="my_run",
        pattern=FOLDER_NAME,
        json_schema_extra={"in_words": "a plain folder name: no / or \\, no leading dot or space"},
        description="Name of this run's folder in output_dir.",
    )
    device: str = Field(
        default="auto",
        pattern=DEVICE,
        json_schema_extra={"in_words": "auto, cpu, cuda or cuda:N with a number N"},
        description="Where to train: auto, cpu, cuda or cuda:N.",
    )
    checkpoints: Checkpoints = Field(default=Checkpoints(), description="When the complete state is saved.")
    previews: Previews = Field(
        default=Previews(), description="Pictures drawn while training, always from the same noise."
    )
    tracking: Tracking = Field(default=Tracking(), description="Metrics and where they are written.")


# --- model -----------------------------------------------------------------------------------------------------------


class NoAdapter(Section):
    """The weights themselves are trained."""

    type: Literal["none"] = Field(default="none", description="Full fine-tuning.")


class Model(Section):
    """What is trained."""

    source: str = Field(
        default="stabilityai/stable-diffusion-xl-base-1.0",
        min_length=1,
        description="miniature, a diffusers folder, or a hub id.",
    )
    train: Annotated[tuple[Literal["unet"], ...], Strict(False)] = Field(
        default=("unet",), min_length=1, max_length=1, description="Parts whose weights change."
    )
    adapter: NoAdapter = Field(
        default=NoAdapter(), description="Small extra weights trained in place of the model's own."
    )
    vae_precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of the VAE; fp16 overflows. Another one encodes pictures anew."
    )
    vae_tiling: bool = Field(
        default=False,
        description="Whether large pictures pass through the VAE in tiles: less memory, a little less exact.",
    )


# --- training --------------------------------------------------------------------------------------------------------


class AdamW(Section):
    """AdamW (Loshchilov & Hutter 2019)."""

    type: Literal["adamw"] = Field(default="adamw", description="AdamW.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate, reached after the warm-up.")
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Field(
        default=(0.9, 0.999), description="Decay of the running means of gradient and squared gradient."
    )
    epsilon: float = Field(default=1e-8, gt=0, description="Added to the denominator of the update.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay, times the learning rate.")


class Sgd(Section):
    """Stochastic gradient descent: for comparing runs number by number."""

    type: Literal["sgd"] = Field(default="sgd", description="Stochastic gradient descent, for comparing runs.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate, reached after the warm-up.")
    momentum: Fraction = Field(default=0.0, description="Share of the last update that is kept.")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 penalty added to the gradient.")


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine down to final_fraction at max_steps."""

    type: Literal["cosine"] = Field(default="cosine", description="Linear warm-up, then half a cosine.")
    warmup_steps: int = Field(default=200, ge=0, description="Steps of linear warm-up.")
    final_fraction: Fraction = Field(default=0.0, description="Learning rate at max_steps as a share of the peak.")


class ConstantSchedule(Section):
    """Linear warm-up, then constant."""

    type: Literal["constant"] = Field(default="constant", description="Linear warm-up, then constant.")
    warmup_steps: int = Field(default=200, ge=0, description="Steps of linear warm-up.")


class NoEma(Section):
    """No second set of weights."""

    type: Literal["none"] = Field(default="none", description="No averaged weights.")


class ExponentialEma(Section):
    """Exponential moving average of the weights."""

    type: Literal["exponential"] = Field(default="exponential", description="Exponential moving average.")
    decay: float = Field(default=0.9999, gt=0, lt=1, description="Share of the average that survives a step.")


class Memory(Section):
    """What is traded for memory."""

    gradient_checkpointing: bool = Field(default=True, description="Recompute activations in backward to save memory.")


class Ddp(Section):
    """Every process holds the whole model."""

    type: Literal["ddp"] = Field(default="ddp", description="Every process holds the whole model.")


Optimizer = AdamW | Sgd
Schedule = CosineSchedule | ConstantSchedule
Ema = NoEma | ExponentialEma


class Training(Section):
    """How the model is trained. A step is one optimizer update."""

    preset: Preset | None = Field(
        default=None,
        description="A published recipe that fills in what is not set here: nai_v3, nyaflow, sd3_flow, edm, sdxl_base.",
    )
    objective: Objective = Field(
        default=Epsilon(),
        discriminator="type",
        description="What the U-Net learns to predict. The default is what SDXL base predicts, so that fine-tuning "
        "begins where the base ended; a switch needs accept_mismatch and a longer training.",
    )
    level_density: LevelDensity = Field(
        default=UniformDensity(), discriminator="type", description="How often each noise level is trained."
    )
    level_shift: LevelShift = Field(
        default=NoLevelShift(), discriminator="type", description="A factor on sigma, for large pictures."
    )
    stratified_levels: bool = Field(
        default=False, description="Whether the levels of an update are spread evenly over the density."
    )
    loss_weight: LossWeight = Field(
        default=NoLossWeight(),
        discriminator="type",
        description="How much each noise level counts. none is the objective as published; min_snr keeps the easy "
        "low-noise levels from drowning the others.",
    )
    loss_shape: LossShape = Field(
        default=MeanSquaredShape(), discriminator="type", description="What becomes of one element's error."
    )
    noise: NoiseShape = Field(default=NoiseShape(), description="Noise that is not plain standard normal.")
    coupling: Coupling = Field(
        default=IndependentCoupling(), discriminator="type", description="Which noise belongs to which picture."
    )
    optimizer: Optimizer = Field(
        default=AdamW(), discriminator="type", description="What turns gradients into updates."
    )
    schedule: Schedule = Field(
        default=CosineSchedule(), discriminator="type", description="Learning rate over the run."
    )
    batch_size: int = Field(default=4, ge=1, description="Pictures per process and micro-batch.")
    pixels_per_batch: Annotated[int, Field(ge=64)] | None = Field(
        default=None,
        description="Pixels per process and micro-batch in place of batch_size, so that small buckets take more "
        "pictures; null: batch_size counts.",
    )
    accumulation: int = Field(default=1, ge=1, description="Micro-batches whose gradients make one step.")
    max_steps: int = Field(default=10000, ge=1, description="Steps of the whole run, resumed or not.")
    precision: Literal["bf16", "fp32", "fp16"] = Field(
        default="bf16", description="Arithmetic of the network; weights stay fp32."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Gradients are clipped to this global norm; null: never."
    )
    max_skipped_in_a_row: int = Field(
        default=10, ge=1, description="Non-finite steps in a row that end the run; single ones are skipped."
    )
    ema: Ema = Field(
        default=ExponentialEma(), discriminator="type", description="Averaged weights, used for previews and export."
    )
    memory: Memory = Field(default=Memory(), description="What is traded for memory.")
    parallel: Ddp = Field(default=Ddp(), description="How several processes share the work.")


# --- the whole --------------------------------------------------------------------------------------------------------


class Config(Section):
    """A configuration file."""

    global_config: GlobalConfig = Field(
        default=GlobalConfig(), description="Where a run lives and what it leaves behind."
    )
    model: Model = Field(default=Model(), description="What is trained.")
    training: Training = Field(default=Training(), description="How it is trained. A step is one optimizer update.")
    data: Data = Field(description="Which pictures, at what sizes, with what captions.")
    tag_weighting: TagWeighting = Field(default=TagWeighting(), description="Weights of pictures by their tags.")


def cache_folder(config: Config) -> str:
    """Return the folder of the latent cache, or the one that null stands for."""
    return str(Path(config.data.cache.path or Path(config.global_config.output_dir) / "cache").expanduser())


def default_values() -> dict[str, Any]:
    """Return all defaults as nested plain values; `data.sources` is missing because it has none."""
    values = Config(data=Data(sources=(Source(path="anywhere"),))).model_dump()
    del values["data"]["sources"]
    return values
