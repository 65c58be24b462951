"""From the section tag_weighting and the pictures found to what watches tags and weighs pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdxl_training.assemble.dataset import FoundPictures
from sdxl_training.assemble.sources import INDEX_FOLDER
from sdxl_training.config.schema import Config, cache_folder
from sdxl_training.config.tags import (
    FrequencyWeights,
    MetaLearnedWeights,
    NoDynamicWeights,
    NullProbeTrust,
    ResidualLossWeights,
    TagWeighting,
)
from sdxl_training.data.tag_cache import kept_tag_column
from sdxl_training.data.tag_categories import categories_of, read_categories
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import Progress
from sdxl_training.training.checkpoint import Checkpoint
from sdxl_training.weighting.margins import MarginRule, TagMargins
from sdxl_training.weighting.normaliser import Bounds
from sdxl_training.weighting.picture_weights import EQUAL_WEIGHTS, PictureWeights, Ramp, TagTerm, Weights
from sdxl_training.weighting.residuals import ResidualRule, TagResiduals
from sdxl_training.weighting.static import FrequencyRule, static_log_weights, tags_that_matter
from sdxl_training.weighting.tag_lists import Numbers, TagLists
from sdxl_training.weighting.trust import CaptionGains, TrustRule
from sdxl_training.weighting.watch import NO_WATCH, TagWatch, Watch

WHICH = "which"
"""Name under which a saved state says of which tags it is."""


@dataclass(frozen=True)
class TagCounts:
    """The tags of a run's pictures and how often an epoch shows them.

    share_P: how often a picture is drawn in an epoch times the weight of its source; 0 where it is left out.
    images_K: images of an epoch with the tag. pictures_K: pictures with it. static_K: log weight by frequency;
    static_P: of the pictures, before they are brought to mean 1.
    """

    lists: TagLists
    share_P: Numbers
    images_K: Numbers
    pictures_K: Numbers
    static_K: Numbers
    static_P: Numbers


@dataclass(frozen=True)
class TagParts:
    """What a run has of tags: None, or a do-nothing twin, where it has none."""

    counts: TagCounts | None = None
    watch: Watch = NO_WATCH
    weights: Weights = EQUAL_WEIGHTS
    margins: TagMargins | None = None
    gains: CaptionGains | None = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that has to be saved, by part of a checkpoint."""
        states = {"tag_residuals": self.watch.state(), "picture_weights": self.weights.state()}
        for name, part in (("tag_margins", self.margins), ("caption_gains", self.gains)):
            states[name] = {key: torch.from_numpy(value.copy()) for key, value in part.state().items()} if part else {}
        which = None if self.counts is None else _which(self.counts.lists)
        return {name: state | ({WHICH: which} if state and which is not None else {}) for name, state in states.items()}

    def restore(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Put a saved state back; what is new, or was of other tags, begins here, and that is said."""
        begins = [name for name in self.state() if not self._load(name, dict(checkpoint.parts.get(name, {})))]
        if begins:
            which = " and no ".join(begins)
            progress.message(f"tag_weighting: the checkpoint has no {which} of these tags; new ones begin")
        self.weights.resume(checkpoint.state.step, anew=bool(begins))

    def _load(self, name: str, saved: dict[str, Tensor]) -> bool:
        """Return whether the part is as it was saved, or has no state."""
        now = self.state()[name]
        if not now:
            return True
        which = saved.pop(WHICH, None)
        if which is None or not torch.equal(which, now.pop(WHICH)) or now.keys() != saved.keys():
            return False
        if any(now[key].shape != saved[key].shape for key in now):
            return False
        as_arrays: Mapping[str, Numbers] = {key: value.numpy() for key, value in saved.items()}
        if name == "tag_residuals":
            self.watch.load(saved)
        elif name == "picture_weights":
            self.weights.load(saved)
        elif name == "tag_margins" and self.margins is not None:
            self.margins.load(as_arrays)
        elif self.gains is not None:
            self.gains.load(as_arrays)
        return True


def build_tags(config: Config, found: FoundPictures, device: torch.device) -> TagParts:
    """Return what a run has of tags. Raises UserError for settings that fit no tag."""
    section = config.tag_weighting
    if not (section.statistics.enabled or section.changes_weights):
        return TagParts()
    counts = count_tags(config, found)
    if not len(counts.lists.names_K):
        return TagParts()
    residuals = TagResiduals(counts.lists, ResidualRule(section.statistics.half_life, section.statistics.shrinkage))
    watch = TagWatch(residuals, device) if section.statistics.enabled else NO_WATCH
    margins = gains = None
    if isinstance(section.dynamic, MetaLearnedWeights):
        margins = TagMargins(counts.lists, MarginRule(section.dynamic.learning_rate, section.dynamic.max_factor))
    if isinstance(section.trust, NullProbeTrust):
        trust = section.trust
        gains = CaptionGains(counts.lists, TrustRule(trust.least, trust.quantile, trust.width, trust.min_probed))
    if not section.changes_weights:
        return TagParts(counts, watch)
    term: TagTerm | None = margins
    if isinstance(section.dynamic, ResidualLossWeights) and isinstance(watch, TagWatch):
        term = ResidualTerm(watch, section.dynamic.strength, section.dynamic.max_factor)
    ramp = Ramp(0 if isinstance(section.dynamic, NoDynamicWeights) else section.dynamic.warmup_steps)
    bounds = Bounds(section.bounds.least, section.bounds.most)
    weights = PictureWeights(counts.lists, counts.share_P, counts.static_P, bounds, term, gains, ramp)
    return TagParts(counts, watch, weights, margins, gains)


@dataclass(frozen=True)
class ResidualTerm:
    """The log weights of tags by their residual losses so far."""

    watch: TagWatch
    strength: float
    max_factor: float

    def log_weights(self) -> Numbers:
        """Return D of each tag; this waits for the device."""
        return self.watch.residuals().log_weights(self.strength, self.max_factor)


def count_tags(config: Config, found: FoundPictures) -> TagCounts:
    """Return tags, categories, counts and static weights. Raises UserError where weights are wanted and no tag is."""
    section, plan = config.tag_weighting, found.plan
    added = [(*source.add_tags.front, *source.add_tags.back) for source in config.data.sources]
    column = kept_tag_column(Path(cache_folder(config)) / INDEX_FOLDER, found.pictures, added)
    if not len(column.names_K) and section.changes_weights:
        raise UserError(
            f"tag_weighting: none of the {len(found.pictures)} pictures has a tag, so there is nothing to weigh by. "
            "Set data.captions.kind: tags where captions are tags, give tags beside prose, or set static, dynamic and "
            "trust to type: none."
        )
    lists = TagLists.of(
        column.names_K,
        _categories(section, column.names_K),
        column.offsets,
        column.tag_T,
        dict(section.categories.shares),
        section.emphasis,
    )
    absent = [name for name in section.categories.shares if name not in lists.categories]
    if absent and len(lists.names_K):
        raise UserError(
            f"tag_weighting.categories.shares: no tag is of category {' or '.join(absent)}; there are "
            f"{', '.join(lists.categories)}. Correct the name, or delete it."
        )
    pictures = len(found.pictures)
    images_P = np.bincount(plan.picture_N, plan.repeats.astype(np.float64), minlength=pictures)
    drawn_N = plan.repeats * found.pictures.weights(plan).astype(np.float64)
    share_P = np.bincount(plan.picture_N, drawn_N, minlength=pictures).astype(np.float64)
    images_K, pictures_K = lists.count(images_P), lists.count((images_P > 0).astype(np.float64))
    static_K, static_P = np.zeros(len(lists.names_K)), np.zeros(pictures)
    if isinstance(section.static, FrequencyWeights):
        rule = FrequencyRule(**section.static.model_dump(exclude={"type"}))
        static_K = static_log_weights(lists.names_K, images_K, pictures_K, lists.category_K, rule)
        some = bool(rule.include or rule.exclude)
        static_P = (lists.only(tags_that_matter(lists.names_K, rule)) if some else lists).spread(static_K)
    return TagCounts(lists, share_P, images_K, pictures_K, static_K, static_P)


def _categories(section: TagWeighting, names: Sequence[str]) -> list[str]:
    said = section.categories
    table = read_categories(Path(said.file).expanduser()) if said.file else {}
    return categories_of(names, said.tags, table, said.prefixes)


def _which(lists: TagLists) -> Tensor:
    digest = hashlib.blake2b("\0".join(lists.names_K).encode("utf-8", "surrogateescape"), digest_size=16).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.int64)
