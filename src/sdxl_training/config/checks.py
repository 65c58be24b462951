"""Rules between settings. Each is a function from a Config to findings; all of them are reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sdxl_training.config.data import Buckets, Captions, source_kind
from sdxl_training.config.objective import FlowMatching
from sdxl_training.config.objective_checks import OBJECTIVE_CHECKS
from sdxl_training.config.problems import Finding
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.config.tags import ResidualLossWeights


def sides_are_multiples_of_the_step(config: Config) -> Iterator[Finding]:
    """Every bucket lies on the grid of step_px, so its limits must, too."""
    data = config.data
    if data.buckets.generator == "list":
        return
    step = data.buckets.step_px
    sides = {
        "data.resolution": data.resolution,
        "data.buckets.min_side_px": data.buckets.min_side_px,
        "data.buckets.max_side_px": data.buckets.max_side_px,
    }
    for place, side in sides.items():
        if side is not None and side % step:
            nearest = max(step, round(side / step) * step)
            text = f"must be a multiple of data.buckets.step_px = {step}; nearest: {nearest}"
            yield Finding(place, text, ("data.buckets.step_px",))


def sides_enclose_the_resolution(config: Config) -> Iterator[Finding]:
    """The square bucket is one of the buckets."""
    data = config.data
    if data.buckets.generator == "list":
        return
    low, high = data.buckets.min_side_px, data.buckets.max_side_px
    if low is not None and low > data.resolution:
        text = f"must be at most data.resolution = {data.resolution}, the side of the square bucket"
        yield Finding("data.buckets.min_side_px", text, ("data.resolution",))
    if high is not None and high < data.resolution:
        text = f"must be at least data.resolution = {data.resolution}, the side of the square bucket"
        yield Finding("data.buckets.max_side_px", text, ("data.resolution",))


def warmup_fits_the_run(config: Config) -> Iterator[Finding]:
    """A warm-up longer than the run would never reach the learning rate that was asked for."""
    training = config.training
    if training.schedule.warmup_steps > training.max_steps:
        text = f"must be at most training.max_steps = {training.max_steps}; shorten the warm-up or train longer"
        yield Finding("training.schedule.warmup_steps", text, ("training.max_steps",))


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


def bucket_lists_fit(config: Config) -> Iterator[Finding]:
    """Sizes come from one place, and lie on one grid."""
    data, buckets = config.data, config.data.buckets
    if (buckets.generator == "list") != bool(buckets.sizes):
        text = (
            "needs generator: list" if buckets.sizes else "must hold at least one [height, width] for generator: list"
        )
        yield Finding("data.buckets.sizes", text, ("data.buckets.generator",))
    for name in ("step_px", "min_side_px", "max_side_px"):
        # Only other values than the defaults: a resolved configuration has those written out.
        if buckets.generator == "list" and getattr(buckets, name) != Buckets.model_fields[name].default:
            text = "has no effect with generator: list, where sizes says all; delete this line"
            yield Finding(f"data.buckets.{name}", text, ("data.buckets.generator",))
    if buckets.generator == "list" and data.lower_resolutions:
        text = "has no effect with generator: list; put all sizes into the list"
        yield Finding("data.lower_resolutions", text, ("data.buckets.generator",))
    if buckets.resolutions == "each" and not data.lower_resolutions:
        text = "needs data.lower_resolutions: with one resolution each is the largest"
        yield Finding("data.buckets.resolutions", text, ("data.lower_resolutions",))
    for number, side in enumerate(data.lower_resolutions):
        if side >= data.resolution or side % buckets.step_px:
            text = f"must be below data.resolution = {data.resolution}, and a multiple of step_px = {buckets.step_px}"
            yield Finding(f"data.lower_resolutions.{number}", text, ("data.resolution", "data.buckets.step_px"))
    if buckets.generator == "sdxl":
        for side in (data.resolution, *data.lower_resolutions):
            if side % (16 * buckets.step_px):
                text = f"sdxl at {side} needs a step_px that divides {side / 16:g}; choose one, or generator: area"
                yield Finding("data.buckets.generator", text, ("data.resolution", "data.buckets.step_px"))


def crop_variants_differ(config: Config) -> Iterator[Finding]:
    """Only random crops differ from each other."""
    crop = config.data.crop
    for name, changed in (("variants", crop.variants > 1), ("seed", crop.seed != 0)):
        if not changed or crop.position == "random":
            continue
        text = f"has no effect with position: {crop.position}; set position: random, or delete this line"
        yield Finding(f"data.crop.{name}", text, ("data.crop.position",))


def random_crops_differ_between_visits(config: Config) -> Iterator[Finding]:
    """One random crop that is kept is the same off-centre cut at every visit."""
    crop, mode = config.data.crop, config.data.cache.mode
    if crop.position == "random" and crop.variants == 1 and mode != "none":
        text = (
            f"is one random crop for ever, since data.cache.mode: {mode} keeps its latent; keep several, of which "
            "visits take turns, or set data.cache.mode: none, which cuts anew at each visit"
        )
        yield Finding("data.crop.variants", text, ("data.crop.position", "data.cache.mode"))


def rules_for_tags_find_tags(config: Config) -> Iterator[Finding]:
    """Prose has no tags to keep or to drop, unless a template shows those beside it.

    Only more than the defaults is refused: a resolved configuration has those written out.
    """
    captions, place = config.data.captions, "data.captions"
    if captions.kind == "tags" or any("{tags}" in template for template in captions.templates):
        return
    for knob in ("keep_first", "tag_dropout"):
        if getattr(captions, knob) > Captions.model_fields[knob].default:
            text = "has no effect with kind: prose and no template with {tags}; delete this line"
            yield Finding(f"{place}.{knob}", text, (f"{place}.kind", f"{place}.templates"))


def a_batch_of_pixels_holds_a_picture(config: Config) -> Iterator[Finding]:
    """A micro-batch that is counted in pixels still holds one picture of the square bucket, or of any in a list."""
    pixels, buckets = config.training.pixels_per_batch, config.data.buckets
    least, what, place = config.data.resolution**2, "data.resolution squared", "data.resolution"
    if buckets.generator == "list":
        place = "data.buckets.sizes"
        least, what = max((height * width for height, width in buckets.sizes), default=0), f"the largest of {place}"
    if pixels is not None and pixels < least:
        yield Finding("training.pixels_per_batch", f"must be at least {what} = {least}, one picture", (place,))


def a_micro_batch_is_counted_once(config: Config) -> Iterator[Finding]:
    """A micro-batch is counted in pictures or in pixels; only another value than the default is refused."""
    training = config.training
    changed = training.batch_size != type(training).model_fields["batch_size"].default
    if training.pixels_per_batch is not None and changed:
        text = "has no effect beside training.pixels_per_batch; delete one of the two lines"
        yield Finding("training.batch_size", text, ("training.pixels_per_batch",))


def latents_come_first_where_noise_needs_them(config: Config) -> Iterator[Finding]:
    """A coupling compares noise with latents before a batch reaches the device."""
    mode, coupling = config.data.cache.mode, config.training.coupling.type
    if coupling != "independent" and mode != "first":
        text = f"needs every latent beforehand; set data.cache.mode: first (it is {mode}), or type: independent"
        yield Finding("training.coupling.type", text, ("data.cache.mode",))


def cache_settings_take_effect(config: Config) -> Iterator[Finding]:
    """Without a cache there is nothing to compress or to place; DALI works only where all is encoded first."""
    cache, backend = config.data.cache, config.data.preprocessing.backend
    if cache.mode == "none" and cache.compression != "none":
        yield Finding("data.cache.compression", "has no effect with mode: none; delete this line", ("data.cache.mode",))
    if backend == "dali" and cache.mode != "first":
        text = f"works only with data.cache.mode: first (it is {cache.mode}), where pictures are prepared in bulk"
        yield Finding("data.preprocessing.backend", text, ("data.cache.mode",))


def texts_are_encoded_first(config: Config) -> Iterator[Finding]:
    """Text states are made once, before training, when the text encoders leave the GPU."""
    cache = config.data.cache
    if cache.text_variants and cache.mode != "first":
        text = f"needs data.cache.mode: first (it is {cache.mode}), since captions are encoded beforehand; or set 0"
        yield Finding("data.cache.text_variants", text, ("data.cache.mode",))


def source_settings_take_effect(config: Config) -> Iterator[Finding]:
    """Columns are a table's; a table names the pictures of a folder."""
    for number, source in enumerate(config.data.sources):
        columns, place, kind = source.columns, f"data.sources.{number}", source_kind(source)
        others = (f"{place}.type", f"{place}.path")
        is_kind = f"type: {kind}" if source.type == kind else f"type: {kind} (by the path's ending)"
        if (columns.image or columns.captions or columns.tags) and source.table is None and kind != "parquet":
            yield Finding(f"{place}.columns", f"has no effect with {is_kind} and no table", others)
        if source.table is not None and kind != "folder":
            yield Finding(f"{place}.table", f"names the pictures of a folder; with {is_kind} delete this line", others)


def followed_losses_are_there(config: Config) -> Iterator[Finding]:
    """Weights that follow the losses of tags need somebody who notes them."""
    section = config.tag_weighting
    if isinstance(section.dynamic, ResidualLossWeights) and not section.statistics.enabled:
        text = "needs tag_weighting.statistics.enabled: true, which follows the losses of tags; set that, or type: none"
        yield Finding("tag_weighting.dynamic.type", text, ("tag_weighting.statistics.enabled",))


def preview_grid_fits_the_objective(config: Config) -> Iterator[Finding]:
    """A shift is one of the linear grid; timesteps are of those objectives that have a table."""
    previews, objective = config.global_config.previews, config.training.objective
    place = "global_config.previews"
    linear = previews.grid == "linear" or (previews.grid == "auto" and isinstance(objective, FlowMatching))
    if previews.shift != 1 and not linear:
        text = f"has no effect with grid: {previews.grid} and {objective.type}; use grid: linear, or delete this line"
        yield Finding(f"{place}.shift", text, (f"{place}.grid",))
    if previews.grid in ("native", "trailing") and isinstance(objective, FlowMatching) and objective.mode == "raw":
        text = "counts in SDXL's timesteps, which flow_matching in mode raw does not have; use linear or karras"
        yield Finding(f"{place}.grid", text, ("training.objective",))


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    sides_are_multiples_of_the_step,
    sides_enclose_the_resolution,
    warmup_fits_the_run,
    *OBJECTIVE_CHECKS,
    run_and_cache_lie_apart,
    previews_have_prompts,
    preview_grid_fits_the_objective,
    bucket_lists_fit,
    crop_variants_differ,
    random_crops_differ_between_visits,
    rules_for_tags_find_tags,
    a_batch_of_pixels_holds_a_picture,
    a_micro_batch_is_counted_once,
    latents_come_first_where_noise_needs_them,
    cache_settings_take_effect,
    texts_are_encoded_first,
    source_settings_take_effect,
    followed_losses_are_there,
)


def findings(config: Config) -> list[Finding]:
    """Return every broken rule between settings."""
    return [finding for check in CHECKS for finding in check(config)]
