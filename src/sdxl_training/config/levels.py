"""Which noise levels are trained: the schema of level density and resolution shift. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from sdxl_training.config.section import Positive, Section

SDXL_SIGMA_MIN, SDXL_SIGMA_MAX = 0.0291672, 14.6146412
"""Ends of SDXL's own schedule."""


# --- level density ---------------------------------------------------------------------------------------------------


class UniformDensity(Section):
    """Every noise level equally often."""

    type: Literal["uniform"] = Field(default="uniform", description="Every timestep, or flow time, equally often.")


class LogitNormalDensity(Section):
    """Flow time t = sigmoid(normal) (Esser et al. 2024, equation 19)."""

    type: Literal["logit_normal"] = Field(default="logit_normal", description="Flow time = sigmoid of a normal number.")
    mean: float = Field(default=0.0, description="Mean of the normal number; above 0 means more noise.")
    std: Positive = Field(default=1.0, description="Standard deviation of the normal number.")


class LogNormalSigmaDensity(Section):
    """ln sigma normal (Karras et al. 2022): logit_normal by its other name, with EDM's numbers."""

    type: Literal["log_normal_sigma"] = Field(default="log_normal_sigma", description="ln sigma is a normal number.")
    mean: float = Field(default=-1.2, description="Mean of ln sigma; EDM's P_mean.")
    std: Positive = Field(default=1.2, description="Standard deviation of ln sigma; EDM's P_std.")


class ModeDensity(Section):
    """Esser et al. 2024, equation 20."""

    type: Literal["mode"] = Field(default="mode", description="Flow time with heavy tails.")
    scale: float = Field(default=1.29, ge=-1, le=1.75, description="Above 0 prefers the middle, below 0 the ends.")


class CosMapDensity(Section):
    """Esser et al. 2024, equation 21."""

    type: Literal["cosmap"] = Field(default="cosmap", description="The levels of a cosine schedule.")


class KarrasDensity(Section):
    """Uniform on the rho-schedule of Karras et al. 2022."""

    type: Literal["karras"] = Field(default="karras", description="sigma^(1/rho) is uniform between two ends.")
    sigma_min: Positive = Field(default=SDXL_SIGMA_MIN, description="The cleanest level's sigma; SDXL's own.")
    sigma_max: Positive = Field(default=SDXL_SIGMA_MAX, description="The noisiest level's sigma; SDXL's own.")
    rho: float = Field(
        default=7.0, ge=0.1, le=1000, description="1 is uniform in sigma; the higher, the more low noise."
    )


class HistogramDensity(Section):
    """Bars drawn by the user."""

    type: Literal["histogram"] = Field(default="histogram", description="Bars of equal width, cleanest first.")
    bars: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Strict(False)] = Field(
        default=(1.0, 1.0),
        min_length=2,
        description="Heights over the timesteps, or flow time; only their ratios matter.",
    )


PlainDensity = (
    UniformDensity
    | LogitNormalDensity
    | LogNormalSigmaDensity
    | ModeDensity
    | CosMapDensity
    | KarrasDensity
    | HistogramDensity
)


class AdaptiveDensity(Section):
    """Dynamic noise scheduling by importance sampling (Nichol & Dhariwal 2021)."""

    type: Literal["adaptive"] = Field(
        default="adaptive", description="Levels whose loss is large are drawn more often and count less for it."
    )
    base: PlainDensity = Field(
        default=UniformDensity(), discriminator="type", description="The density whose expected gradient is kept."
    )
    bins: int = Field(default=32, ge=2, le=1000, description="Bins of equal probability under the base.")
    warmup_samples: int = Field(default=20, ge=1, description="Losses every bin must have seen before any is favoured.")
    decay: float = Field(default=0.99, gt=0, lt=1, description="Share of the second moment that survives a loss.")
    uniform_share: float = Field(
        default=0.1, gt=0, le=1, description="Share of draws left as in the base; 1 / this bounds a sample's factor."
    )
    every_steps: int = Field(default=50, ge=1, description="Steps between two changes of the draw.")


# --- level shift -----------------------------------------------------------------------------------------------------


class NoLevelShift(Section):
    """Levels as the density draws them."""

    type: Literal["none"] = Field(default="none", description="Levels as the density draws them.")


class FixedLevelShift(Section):
    """t' = alpha t / (1 + (alpha - 1) t) (Esser et al. 2024, equation 23), which is sigma times alpha."""

    type: Literal["fixed"] = Field(default="fixed", description="sigma times one factor.")
    factor: Positive = Field(default=3.0, description="The factor; 3 in the released scheduler of SD3.")


class PerBucketLevelShift(Section):
    """The factor grows with the side of the picture."""

    type: Literal["per_bucket"] = Field(
        default="per_bucket", description="sigma times factor * sqrt(height * width) / reference_px."
    )
    factor: Positive = Field(default=1.0, description="The factor for pictures of reference_px by reference_px.")
    reference_px: int = Field(default=1024, ge=8, description="Side of the square picture the factor is meant for.")


LevelDensity = PlainDensity | AdaptiveDensity
LevelShift = NoLevelShift | FixedLevelShift | PerBucketLevelShift
