"""Rules between settings. Each is a function from a Config to findings; all of them are reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sdxl_training.config.schema import (
    Config,
    Epsilon,
    FlowMatching,
    LogitNormalDensity,
    MinSnrLossWeight,
    VPrediction,
    cache_folder,
)


class Finding(NamedTuple):
    """A broken rule: the place to mend, the sentence, and the other places it was judged by."""

    place: str
    text: str
    others: tuple[str, ...] = ()


def sides_are_multiples_of_the_step(config: Config) -> Iterator[Finding]:
    """Every bucket lies on the grid of step_px, so its limits must, too."""
    data = config.data
    step = data.buckets.step_px
    sides = {
        "data.resolution": data.resolution,
        "data.buckets.min_side_px": data.buckets.min_side_px,
        "data.buckets.max_side_px": data.buckets.max_side_px,
    }
    for place, side in sides.items():
        if side % step:
            nearest = max(step, round(side / step) * step)
            text = f"must be a multiple of data.buckets.step_px = {step}; nearest: {nearest}"
            yield Finding(place, text, ("data.buckets.step_px",))


def sides_enclose_the_resolution(config: Config) -> Iterator[Finding]:
    """The square bucket is one of the buckets."""
    data = config.data
    low, high = data.buckets.min_side_px, data.buckets.max_side_px
    if low > data.resolution:
        text = f"must be at most data.resolution = {data.resolution}, the side of the square bucket"
        yield Finding("data.buckets.min_side_px", text, ("data.resolution",))
    if high < data.resolution:
        text = f"must be at least data.resolution = {data.resolution}, the side of the square bucket"
        yield Finding("data.buckets.max_side_px", text, ("data.resolution",))


def warmup_fits_the_run(config: Config) -> Iterator[Finding]:
    """A warm-up longer than the run would never reach the learning rate that was asked for."""
    training = config.training
    if training.schedule.warmup_steps > training.max_steps:
        text = f"must be at most training.max_steps = {training.max_steps}; shorten the warm-up or train longer"
        yield Finding("training.schedule.warmup_steps", text, ("training.max_steps",))


def density_fits_the_objective(config: Config) -> Iterator[Finding]:
    """A logit-normal density is one of flow time."""
    training = config.training
    if isinstance(training.level_density, LogitNormalDensity) and not isinstance(training.objective, FlowMatching):
        text = (
            f"needs training.objective.type = flow_matching, not {training.objective.type}: "
            "it is a density of flow time; use uniform"
        )
        yield Finding("training.level_density.type", text, ("training.objective.type",))


def minimum_takes_effect(config: Config) -> Iterator[Finding]:
    """Only the floor policy reads the least weight."""
    weight = config.training.loss_weight
    if not isinstance(weight, MinSnrLossWeight) or weight.terminal == "floor":
        return
    if weight.minimum != MinSnrLossWeight.model_fields["minimum"].default:
        text = "has no effect unless training.loss_weight.terminal = floor; set that, or delete this line"
        yield Finding("training.loss_weight.minimum", text, ("training.loss_weight.terminal",))


def terminal_policy_means_something(config: Config) -> Iterator[Finding]:
    """Each policy for SNR 0 needs an objective that has what it changes."""
    objective, weight = config.training.objective, config.training.loss_weight
    if not isinstance(weight, MinSnrLossWeight):
        return
    place, needed = "training.loss_weight.terminal", ("training.objective.type",)
    if weight.terminal == "plus_one" and isinstance(objective, Epsilon):
        yield Finding(place, "is not defined for epsilon, whose levels all have signal left; use official", needed)
    trains_exactly_zero = isinstance(objective, VPrediction) and objective.zero_terminal_snr
    if weight.terminal == "official_patched" and not trains_exactly_zero:
        text = "has no effect: it changes SNR exactly 0, which only v_prediction with zero_terminal_snr trains"
        yield Finding(place, f"{text}; use official or plus_one", needed)


def run_and_cache_lie_apart(config: Config) -> Iterator[Finding]:
    """A run's folder must not be the cache's."""
    run = Path(config.global_config.output_dir).expanduser() / config.global_config.run_name
    if run == Path(cache_folder(config)):
        text = "makes the run's folder the latent cache's; choose another name, or another data.cache.path"
        yield Finding("global_config.run_name", text, ("global_config.output_dir", "data.cache.path"))


def previews_have_prompts(config: Config) -> Iterator[Finding]:
    """A grid of no pictures cannot be drawn."""
    previews = config.global_config.previews
    if previews.every_steps and not previews.prompts:
        text = "must hold at least one prompt; to draw no previews set global_config.previews.every_steps = 0"
        yield Finding("global_config.previews.prompts", text, ("global_config.previews.every_steps",))


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    sides_are_multiples_of_the_step,
    sides_enclose_the_resolution,
    warmup_fits_the_run,
    density_fits_the_objective,
    minimum_takes_effect,
    terminal_policy_means_something,
    run_and_cache_lie_apart,
    previews_have_prompts,
)


def findings(config: Config) -> list[Finding]:
    """Return every broken rule between settings."""
    return [finding for check in CHECKS for finding in check(config)]


def notes(config: Config) -> list[str]:
    """Return what is legal but worth a sentence before a long run."""
    objective, weight = config.training.objective, config.training.loss_weight
    if not (isinstance(objective, VPrediction) and objective.zero_terminal_snr):
        return []
    if isinstance(weight, MinSnrLossWeight) and weight.terminal == "official":
        return [
            "training.loss_weight.terminal = official weighs SNR 0 with exactly 0, so the level that zero_terminal_snr "
            "adds is not trained; plus_one trains it."
        ]
    return []
