"""Rules between objective, levels, weights and noise: what cannot work, what has no effect, what to say beforehand.

The notes are of the whole configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from sdxl_training.config.levels import (
    SDXL_SIGMA_MAX,
    SDXL_SIGMA_MIN,
    AdaptiveDensity,
    CosMapDensity,
    FixedLevelShift,
    HistogramDensity,
    KarrasDensity,
    LevelDensity,
    LogitNormalDensity,
    LogNormalSigmaDensity,
    PerBucketLevelShift,
)
from sdxl_training.config.objective import (
    CleanPrediction,
    ConditionalTransportCoupling,
    DebiasedKohyaLossWeight,
    DebiasedLossWeight,
    Edm,
    Epsilon,
    FlowMatching,
    MinSnrLossWeight,
    NearestOfCoupling,
    OptimalTransportCoupling,
    P2LossWeight,
    SigmoidLossWeight,
    SoftMinSnrLossWeight,
    VPrediction,
    min_snr_terminal,
    trains_pure_noise,
)
from sdxl_training.config.problems import Finding
from sdxl_training.config.schema import Config, Training
from sdxl_training.config.tags import NoDynamicWeights, NoTrust, TagWeighting

OBJECTIVE = "training.objective"
UNBOUNDED_SIGMAS = (1e-4, 1e4)
"""Ends of what flow_matching and edm train: flow times 1e-4 away from 0 and 1."""


def _densities(training: Training) -> Iterator[tuple[str, LevelDensity]]:
    """Yield the level density and, where it is adaptive, its base; each with its place."""
    place, density = "training.level_density", training.level_density
    yield place, density
    if isinstance(density, AdaptiveDensity):
        yield f"{place}.base", density.base


def karras_ends_make_an_interval(config: Config) -> Iterator[Finding]:
    """The rho-schedule goes up, and stays on SDXL's table where the objective has no levels beyond it."""
    training = config.training
    for place, density in _densities(training):
        if not isinstance(density, KarrasDensity):
            continue
        low, high = density.sigma_min, density.sigma_max
        if low >= high:
            yield Finding(f"{place}.sigma_min", f"must be below sigma_max = {high:g}", (f"{place}.sigma_max",))
        if isinstance(training.objective, (FlowMatching, Edm)):
            for name, sigma in (("sigma_min", low), ("sigma_max", high)):
                if not UNBOUNDED_SIGMAS[0] <= sigma <= UNBOUNDED_SIGMAS[1]:
                    ends = f"from {UNBOUNDED_SIGMAS[0]:g} to {UNBOUNDED_SIGMAS[1]:g}"
                    yield Finding(f"{place}.{name}", f"must lie in what {training.objective.type} trains, {ends}")
            continue
        reason = f"that is where the noise schedule of {training.objective.type} ends; use flow_matching or edm"
        if low < SDXL_SIGMA_MIN * 0.999:
            yield Finding(f"{place}.sigma_min", f"must be at least {SDXL_SIGMA_MIN}: {reason}", (OBJECTIVE,))
        if high > SDXL_SIGMA_MAX * 1.001 and not trains_pure_noise(training.objective):
            yield Finding(f"{place}.sigma_max", f"must be at most {SDXL_SIGMA_MAX}: {reason}", (OBJECTIVE,))


def histograms_can_be_drawn_from(config: Config) -> Iterator[Finding]:
    """A histogram needs a mass that is finite and not zero."""
    for place, density in _densities(config.training):
        if isinstance(density, HistogramDensity) and not 0 < sum(density.bars) < math.inf:
            text = "cannot be brought to probability 1: the bars' sum must be above 0 and finite; raise one of them"
            yield Finding(f"{place}.bars", text)


def sigmoid_weights_stay_bounded(config: Config) -> Iterator[Finding]:
    """It divides by the density, which an empty bar makes 0 next to levels that are drawn."""
    training = config.training
    for place, density in _densities(training):
        empty = isinstance(density, HistogramDensity) and 0 in density.bars
        if empty and isinstance(training.loss_weight, SigmoidLossWeight):
            text = "cannot be sigmoid with empty bars in the histogram: it divides by the density; raise them above 0"
            yield Finding("training.loss_weight.type", text, (f"{place}.bars",))
    if isinstance(training.level_shift, PerBucketLevelShift) and isinstance(training.loss_weight, SigmoidLossWeight):
        text = "cannot be sigmoid with a shift per_bucket: it divides by the density, of which each bucket has its own"
        yield Finding("training.loss_weight.type", f"{text}; use a fixed shift", ("training.level_shift.type",))


def shifted_levels_exist(config: Config) -> Iterator[Finding]:
    """A factor on sigma leads beyond SDXL's noisiest level, where epsilon has none."""
    training, shift = config.training, config.training.level_shift
    upward = isinstance(shift, PerBucketLevelShift) or (isinstance(shift, FixedLevelShift) and shift.factor > 1)
    if upward and not trains_pure_noise(training.objective):
        text = (
            f"moves levels beyond sigma {SDXL_SIGMA_MAX}, where this objective's schedule ends; "
            "use an objective that reaches pure noise (zero_terminal_snr: true, flow_matching or edm), or none"
        )
        yield Finding("training.level_shift.type", text, (OBJECTIVE,))


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
    place, needed = "training.loss_weight.terminal", (f"{OBJECTIVE}.type",)
    if weight.terminal == "plus_one" and isinstance(objective, Epsilon):
        yield Finding(place, "is not defined for epsilon, whose levels all have signal left; use official", needed)
    trains_exactly_zero = isinstance(objective, (VPrediction, CleanPrediction)) and objective.zero_terminal_snr
    if weight.terminal == "official_patched" and not trains_exactly_zero:
        text = "has no effect: it changes SNR exactly 0, which only zero_terminal_snr trains"
        yield Finding(place, f"{text}; use official or plus_one", needed)


def kohya_weight_is_defined(config: Config) -> Iterator[Finding]:
    """sd-scripts has its debiased weight for two objectives."""
    objective, weight = config.training.objective, config.training.loss_weight
    if isinstance(weight, DebiasedKohyaLossWeight) and not isinstance(objective, (Epsilon, VPrediction)):
        text = f"is defined for epsilon and v_prediction, not for {objective.type}; use debiased"
        yield Finding("training.loss_weight.type", text, (f"{OBJECTIVE}.type",))


def nearest_noise_does_not_leak(config: Config) -> Iterator[Finding]:
    """Where nothing but noise is left, noise that leans toward the picture gives the picture away."""
    training = config.training
    if isinstance(training.coupling, NearestOfCoupling) and trains_pure_noise(training.objective):
        text = (
            "keeps noise that leans toward the picture, so pure noise, which this objective trains, tells the network "
            "what sampling will not; use optimal_transport or independent, or an objective without SNR 0"
        )
        yield Finding("training.coupling.type", text, (OBJECTIVE,))


def table_choice_takes_effect(config: Config) -> Iterator[Finding]:
    """Some labels come from no table, so the choice of table changes nothing."""
    objective = config.training.objective
    place = f"{OBJECTIVE}.zero_terminal_snr"
    if isinstance(objective, FlowMatching) and objective.mode == "raw" and not objective.zero_terminal_snr:
        yield Finding(place, "has no effect with mode: raw, whose labels are 1000 t; delete this line", (OBJECTIVE,))
    if isinstance(objective, Edm) and objective.label == "c_noise" and objective.zero_terminal_snr:
        yield Finding(place, "has no effect with label: c_noise; delete this line", (OBJECTIVE,))


OBJECTIVE_CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    karras_ends_make_an_interval,
    histograms_can_be_drawn_from,
    sigmoid_weights_stay_bounded,
    shifted_levels_exist,
    minimum_takes_effect,
    terminal_policy_means_something,
    kohya_weight_is_defined,
    nearest_noise_does_not_leak,
    table_choice_takes_effect,
)


# --- notes -----------------------------------------------------------------------------------------------------------


def notes(config: Config) -> list[str]:
    """Return what is legal but worth a sentence before a long run."""
    training = config.training
    return [
        *_untrained_terminal(training),
        *_redundant_noise(training),
        *_clamped(training),
        *_lone_pictures(training),
        *_idle_tag_settings(config.tag_weighting),
        *_late_tag_weights(config),
    ]


def _untrained_terminal(training: Training) -> Iterator[str]:
    """Weights that vanish with SNR."""
    objective, weight = training.objective, training.loss_weight
    if not trains_pure_noise(objective):
        return
    if isinstance(weight, MinSnrLossWeight) and min_snr_terminal(objective, weight) == "official":
        yield (
            "training.loss_weight.terminal = official weighs SNR 0 with exactly 0, so the level that pure noise "
            "adds is not trained; plus_one trains it."
        )
    if isinstance(weight, (SoftMinSnrLossWeight, DebiasedLossWeight, P2LossWeight, SigmoidLossWeight)):
        yield (
            f"training.loss_weight.type = {weight.type} goes to 0 with SNR, so pure noise, from which every picture is "
            "drawn, is hardly trained; none, min_snr with terminal: plus_one, snr_trunc and edm train it."
        )


def _redundant_noise(training: Training) -> Iterator[str]:
    """Two cures of one illness."""
    for knob in ("offset", "pyramid"):
        if getattr(training.noise, knob) and trains_pure_noise(training.objective):
            yield (
                f"training.noise.{knob} and an objective that trains pure noise cure the same thing, pictures that "
                "cannot become dark or bright; together they overshoot. Set one of them off."
            )


def _clamped(training: Training) -> Iterator[str]:
    """Densities with tails that SDXL's schedule does not have."""
    if isinstance(training.objective, (FlowMatching, Edm)):
        return
    for place, density in _densities(training):
        cleaner, noisier = _shares_outside(density)
        if trains_pure_noise(training.objective):
            noisier = 0.0
        for share, end in ((cleaner, "cleaner than SDXL's cleanest"), (noisier, "noisier than SDXL's noisiest")):
            if share >= 0.001:
                yield f"{place}.type = {density.type}: {share:.1%} of its levels are {end} and are trained at that one."


def _shares_outside(density: LevelDensity) -> tuple[float, float]:
    """Return the shares of a density below and above SDXL's own levels, 0 where it has no tails worth a word."""
    low, high = math.log(SDXL_SIGMA_MIN), math.log(SDXL_SIGMA_MAX)
    if isinstance(density, (LogitNormalDensity, LogNormalSigmaDensity)):
        scale = density.std * math.sqrt(2)
        return 0.5 * math.erfc((density.mean - low) / scale), 0.5 * math.erfc((high - density.mean) / scale)
    if isinstance(density, CosMapDensity):
        return 2 / math.pi * math.atan(SDXL_SIGMA_MIN), 1 - 2 / math.pi * math.atan(SDXL_SIGMA_MAX)
    return 0.0, 0.0


def _lone_pictures(training: Training) -> Iterator[str]:
    """What is shared out among the pictures of a step, and there is one."""
    counted = training.pixels_per_batch is None  # by pixels the number differs between buckets
    if not counted or training.batch_size * training.accumulation > 1:
        return
    if isinstance(training.coupling, (OptimalTransportCoupling, ConditionalTransportCoupling)):
        yield "training.coupling: a process alone with one picture a step has no noise to exchange."
    if training.stratified_levels:
        yield "training.stratified_levels: with one picture a step there is one stratum, which changes nothing."


def _idle_tag_settings(section: TagWeighting) -> Iterator[str]:
    """What shapes the weights of pictures where nothing gives them any."""
    followed = not (isinstance(section.dynamic, NoDynamicWeights) and isinstance(section.trust, NoTrust))
    idle = [] if section.changes_weights else ["bounds", "emphasis", "categories.shares"]
    idle += [] if followed else ["refresh_steps"]
    changed = {
        "bounds": section.bounds != TagWeighting().bounds,
        "emphasis": section.emphasis != TagWeighting().emphasis,
        "categories.shares": bool(section.categories.shares),
        "refresh_steps": section.refresh_steps != TagWeighting().refresh_steps,
    }
    needed = "dynamic and trust are" if section.changes_weights else "static, dynamic and trust are all"
    for knob in idle:
        if changed[knob]:
            yield f"tag_weighting.{knob} has no effect: {needed} of type none."


def _late_tag_weights(config: Config) -> Iterator[str]:
    """Weights that follow the training, and come when it is over."""
    section, last = config.tag_weighting, config.training.max_steps
    if isinstance(section.dynamic, NoDynamicWeights):
        return
    warmup = section.dynamic.warmup_steps
    if 2 * warmup > last:
        yield (
            f"tag_weighting.dynamic.warmup_steps = {warmup}: its weights begin at step {warmup} and count fully from "
            f"step {2 * warmup}; the run ends at step {last}, so they never {'do' if warmup < last else 'begin'}."
        )
