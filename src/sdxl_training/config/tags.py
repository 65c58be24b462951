"""How much a picture counts by its tags: the schema of the section `tag_weighting`. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sdxl_training.config.data import Names
from sdxl_training.config.section import Fraction, Positive, Section

Factor = Annotated[float, Field(ge=0.01, le=100)]
Widest = Annotated[float, Field(gt=1, le=100)]


class TagCategories(Section):
    """Which tags are compared with each other."""

    prefixes: Names = Field(
        default=("artist", "character", "copyright", "general", "meta", "quality", "rating", "style", "subject"),
        description="Categories that a tag may name itself, before a colon: artist:somebody.",
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="CSV, TSV or JSON file with the category of each tag, or a booru's number for it; null: none.",
    )
    tags: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        default={}, description="Category of single tags, before file and prefix, such as {smile: face}."
    )
    shares: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="How much a category counts in a picture's weight, such as {meta: 0}; others count 1."
    )


class NoStaticWeights(Section):
    """Tags count the same however frequent they are."""

    type: Literal["none"] = Field(default="none", description="Frequency does not matter.")


class FrequencyWeights(Section):
    """Frequent tags count less, rare ones more, within their category."""

    type: Literal["frequency"] = Field(default="frequency", description="Rare tags count more, within their category.")
    strength: Fraction = Field(
        default=0.5, description="Exponent of the inverse frequency: 0 changes nothing, 1 levels all frequencies."
    )
    smoothing: float = Field(default=1.0, ge=0, description="Added to every count, so that the rarest do not run away.")
    max_factor: Widest = Field(default=3.0, description="No tag counts more than this, or less than one over this.")
    min_count: int = Field(
        default=5, ge=0, description="Tags on fewer pictures are left at 1: mostly they are typing errors."
    )
    include: Names = Field(default=(), description="Patterns of the only tags that matter, such as artist:*; []: all.")
    exclude: Names = Field(default=(), description="Patterns of tags that do not matter.")
    overrides: dict[str, Factor] = Field(
        default={}, description="Factors of single tags in place of what their frequency says, such as {dragon: 2.5}."
    )


class NoDynamicWeights(Section):
    """Weights do not move during training."""

    type: Literal["none"] = Field(default="none", description="Weights do not move during training.")


class ResidualLossWeights(Section):
    """Tags whose loss is above that of others at the same noise level count more."""

    type: Literal["residual_loss"] = Field(
        default="residual_loss", description="Tags that are learnt worse than others count more."
    )
    strength: float = Field(
        default=0.5, ge=-2, le=2, description="Exponent of a tag's relative loss; below 0 favours what is learnt well."
    )
    max_factor: Widest = Field(default=1.5, description="No tag moves further than by this factor.")
    warmup_steps: int = Field(
        default=1000, ge=0, description="Steps that only watch; the weights then come in over as many again."
    )


class MetaLearnedWeights(Section):
    """Tag weights learnt so that training helps a tag-balanced batch; inspired by Jiang et al. 2022."""

    type: Literal["meta"] = Field(
        default="meta", description="Tags count more whose pictures help a tag-balanced batch of the same pictures."
    )
    learning_rate: Positive = Field(default=0.05, description="Of the tags' margins, per measurement, by Adam.")
    max_factor: Widest = Field(default=3.0, description="No tag moves further than by this factor.")
    parameters: Names = Field(
        default=("up_blocks.2.*", "conv_norm_out.*", "conv_out.*"),
        description="Patterns of the U-Net's parameters whose gradients are compared; fewer need less memory.",
    )
    probe_steps: int = Field(
        default=10, ge=1, description="Steps between two measurements; each takes as long as 1.3 steps."
    )
    warmup_steps: int = Field(
        default=1000, ge=0, description="Steps that only watch; the weights then come in over as many again."
    )


class NoTrust(Section):
    """Every caption is believed."""

    type: Literal["none"] = Field(default="none", description="Every caption is believed.")


class NullProbeTrust(Section):
    """Pictures whose caption does not help the model count less."""

    type: Literal["null_probe"] = Field(
        default="null_probe", description="Pictures whose caption helps least, among those of a tag, count less."
    )
    least: Fraction = Field(default=0.3, gt=0, description="Factor of a picture whose caption helps least.")
    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.98, description="Share of a tag's pictures that is trusted."
    )
    width: Positive = Field(default=0.005, description="How gradual the change is around that share.")
    min_probed: int = Field(default=50, ge=2, description="Probed pictures a tag needs before it judges any.")
    probe_steps: int = Field(
        default=10, ge=1, description="Steps between two probes; each costs two passes without gradients."
    )


class WeightBounds(Section):
    """What no picture's weight exceeds."""

    least: Annotated[float, Field(gt=0, le=1)] = Field(default=0.25, description="No picture counts less.")
    most: Annotated[float, Field(ge=1, le=1000)] = Field(default=4.0, description="No picture counts more.")


class TagStatistics(Section):
    """What is noted of tags during training, whether weights are on or not."""

    enabled: bool = Field(default=True, description="Whether the loss of each tag is followed; the report shows it.")
    half_life: Positive = Field(default=200.0, description="Appearances of a tag after which a loss counts half.")
    shrinkage: float = Field(
        default=20.0, ge=0, description="So many appearances with the mean loss are added to each tag, against chance."
    )
    every_steps: int = Field(default=500, ge=1, description="Steps between two entries in tags.json and trackers.")
    tracked: int = Field(default=16, ge=0, description="So many tags, evenly over frequency, get curves in trackers.")


StaticWeights = NoStaticWeights | FrequencyWeights
DynamicWeights = NoDynamicWeights | ResidualLossWeights | MetaLearnedWeights
Trust = NoTrust | NullProbeTrust


class TagWeighting(Section):
    """Weights of pictures by their tags; their mean over an epoch is 1. By default all pictures count the same."""

    categories: TagCategories = Field(default=TagCategories(), description="Tags are compared within their category.")
    static: StaticWeights = Field(
        default=NoStaticWeights(), discriminator="type", description="Weights known before training."
    )
    dynamic: DynamicWeights = Field(
        default=NoDynamicWeights(), discriminator="type", description="Weights that follow the training."
    )
    trust: Trust = Field(default=NoTrust(), discriminator="type", description="Weights by how well captions fit.")
    bounds: WeightBounds = Field(default=WeightBounds(), description="Ends of all pictures' weights.")
    emphasis: float = Field(
        default=0.0, ge=0, le=20, description="0: a picture's tags count by their mean; higher: by the rarest of them."
    )
    refresh_steps: int = Field(
        default=500, ge=1, description="Steps between two changes of weights that follow the training."
    )
    statistics: TagStatistics = Field(default=TagStatistics(), description="What is noted of tags during training.")

    @property
    def changes_weights(self) -> bool:
        """Whether any picture's weight may differ from 1."""
        return {self.static.type, self.dynamic.type, self.trust.type} != {"none"}
