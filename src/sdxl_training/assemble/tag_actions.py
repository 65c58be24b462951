"""What a run does about tags between updates: measure, change the weights, write down how tags fare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from sdxl_training.assemble.session import Session
from sdxl_training.config.tags import MetaLearnedWeights, NullProbeTrust
from sdxl_training.data.loader import RawBatch
from sdxl_training.data.sampler import slots_of_part
from sdxl_training.records import Batch, Draw, UserError
from sdxl_training.rng import Stream, derive_seed, numpy_generator
from sdxl_training.tracking.tracker import Trackers
from sdxl_training.training.probes import Probe, caption_gains, inner_products
from sdxl_training.training.trainer import Action, Every, Within
from sdxl_training.weighting.balanced import balanced_odds, draw_one_bucket
from sdxl_training.weighting.margins import TagMargins
from sdxl_training.weighting.tag_lists import Integers, Numbers
from sdxl_training.weighting.tag_table import TagFigures, tag_figures
from sdxl_training.weighting.trust import CaptionGains
from sdxl_training.weighting.watch import TagWatch

PROBE_VISITS, META_VISITS = 2**40, 2**41  # of ordinary and of balanced batches; those of training are far below
TAGS_WRITTEN = 1000  # the most frequent ones; of a million, all would be a hundred megabytes


def tag_actions(session: Session, trackers: Trackers) -> list[Action]:
    """Return what is done after updates, in this order, before anything is saved."""
    section, tags = session.config.tag_weighting, session.tags
    actions: list[Action] = [_each(steps, probe) for steps, probe in tag_probes(session)]
    if tags.weights.moves:
        actions.append(Within(section.refresh_steps, tags.weights.refresh))
    if tags.counts is not None and section.statistics.enabled and session.group.is_main:
        actions.append(Every(section.statistics.every_steps, _writer(session, trackers, section.statistics.tracked)))
    return actions


def rehearse_probes(session: Session) -> None:
    """Make every probe once and forget what it found: what fails or does not fit the memory must not do so later."""
    for _, probe in tag_probes(session):
        learner = probe.learner
        before = {name: value.copy() for name, value in learner.state().items()}
        probe(0)
        learner.load(before)


def tag_probes(session: Session) -> list[tuple[int, CaptionProbe | MarginProbe]]:
    """Return what measures, and every how many steps. Raises UserError for parameters that the U-Net does not have."""
    section, tags, seed = session.config.tag_weighting, session.tags, session.config.global_config.seed
    probes: list[tuple[int, CaptionProbe | MarginProbe]] = []
    if tags.gains is not None and isinstance(section.trust, NullProbeTrust):
        probes.append((section.trust.probe_steps, CaptionProbe(session, tags.gains, seed)))
    if tags.margins is not None and isinstance(section.dynamic, MetaLearnedWeights):
        learn = MarginProbe(session, tags.margins, section.dynamic.parameters, seed)
        probes.append((section.dynamic.probe_steps, learn))
    return probes


def _each(steps: int, probe: Callable[[int], None]) -> Within:
    """Return what makes probe number 1, 2, ... every so many steps."""
    return Within(steps, lambda steps_done: probe(steps_done // steps))


def figures_now(session: Session) -> TagFigures | None:
    """Return what there is to say of each tag now; None without tags. This waits for the device."""
    tags = session.tags
    if tags.counts is None:
        return None
    counts = tags.counts
    residuals = tags.watch.residuals() if isinstance(tags.watch, TagWatch) else None
    weight_P = tags.weights.all_of(len(counts.lists))
    columns = (counts.pictures_K, counts.images_K, counts.share_P, weight_P)
    return tag_figures(counts.lists, *columns, residuals, counts.static_K)


def _writer(session: Session, trackers: Trackers, tracked: int) -> Callable[[int], None]:
    def write(steps_done: int) -> None:
        figures = figures_now(session)
        if figures is None:
            return
        _write_file(session, steps_done, figures)
        curves: dict[str, float] = {}
        for row in figures.rows(figures.spread_over_frequency(tracked)):
            curves[f"tag_relative_loss/{row.tag}"] = row.relative_loss
            curves[f"tag_trend/{row.tag}"] = row.trend
            curves[f"tag_weight/{row.tag}"] = row.weight
        trackers.beside(steps_done, curves)

    return write


def _write_file(session: Session, steps_done: int, figures: TagFigures) -> None:
    """Write tags.json; where that cannot be, say so: the run does not depend on it."""
    path = session.folder.path / "tags.json"
    rows = [asdict(row) for row in figures.most_frequent(TAGS_WRITTEN)]
    said = {"step": steps_done, "tags_in_all": len(figures.lists.names_K), "tags": rows}
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        session.progress.message(f"step {steps_done}: {path} cannot be written: {error.strerror or error}")


class CaptionProbe:
    """Measures how much captions help, on a batch of its own."""

    def __init__(self, session: Session, gains: CaptionGains, seed: int) -> None:
        self._session, self.learner, self._seed = session, gains, seed

    def __call__(self, number: int) -> None:
        """Measure batch `number`; all ranks learn of all samples."""
        raw = probe_batch(self._session, self._seed, number)
        batch = self._session.to_device(raw)
        null = self._session.to_device(self._session.without_captions(raw)).conditioning
        gain_B, level_B = caption_gains(_probe(self._session), batch, null)
        picture_G, (level_G, gain_G) = _everywhere(self._session, batch, [level_B.double(), gain_B.double()])
        told_G = picture_G >= 0
        self.learner.see(picture_G[told_G], level_G[told_G].astype(np.int64), gain_G[told_G])


class MarginProbe:
    """Moves the tags' margins by which samples of a batch help a tag-balanced one.

    patterns: names of the U-Net's parameters whose gradients are compared.
    """

    def __init__(self, session: Session, margins: TagMargins, patterns: Sequence[str], seed: int) -> None:
        self._session, self.learner, self._seed = session, margins, seed
        self._parameters = _chosen(session.sdxl.unet, patterns)
        self._odds_N = balanced_odds(margins.lists, session.dataset.plan.picture_N)

    def __call__(self, number: int) -> None:
        """Measure batch `number`; all ranks learn of all samples."""
        session = self._session
        batch = session.to_device(probe_batch(session, self._seed, number))
        meta = session.to_device(self.meta_batch(number))
        group = session.group
        inner_B = inner_products(
            _probe(session), self._parameters, batch, meta, lambda value: group.sum(value) / group.world_size
        )
        picture_G, (weight_G, inner_G) = _everywhere(session, batch, [batch.weight_B.double(), inner_B.double()])
        told_G = picture_G >= 0
        self.learner.learn(picture_G[told_G], weight_G[told_G], inner_G[told_G])

    def meta_batch(self, number: int) -> RawBatch:
        """Return this rank's share of a batch in which all tags are drawn as often.

        Its bucket need not be that of the ordinary batch: gradients are compared, not samples.
        """
        schedule = self._session.dataset.schedule
        members = [schedule.members(bucket) for bucket in schedule.buckets]
        counts = [schedule.global_batches[bucket] for bucket in schedule.buckets]
        generator = numpy_generator(self._seed, Stream.META_BATCH, number)
        records = draw_one_bucket(self._odds_N, members, counts, generator)
        return _share(self._session, records.tolist(), META_VISITS, number)


def probe_batch(session: Session, seed: int, number: int) -> RawBatch:
    """Return this rank's share of a batch as training draws them, with noise of its own."""
    schedule = session.dataset.schedule
    several_epochs = max(1, round(8 * schedule.steps_per_epoch))
    _, draws = schedule.batch_at(derive_seed(seed, Stream.PROBE, number) % several_epochs)
    return _share(session, [draw.record for draw in draws], PROBE_VISITS, number)


def _share(session: Session, records: Sequence[int], visits: int, number: int) -> RawBatch:
    """Return this rank's share of batch `number` of these records.

    No sample shares its visit with another, of this batch or of any other: noise in common would make gradients alike.
    """
    batches, group = session.micro_batches, session.group
    slots = slots_of_part(len(records), group.rank, batches.parts)
    first = visits + number * session.dataset.schedule.global_batch
    draws = [Draw(records[slot], first + slot) for slot in slots]
    return batches.collect(draws, slots, len(records), step=first)  # the step decides on strata, as the visit on noise


def _probe(session: Session) -> Probe:
    return Probe(session.sdxl.unet, session.run.objective, session.run.precision, session.run.seed)


def _everywhere(session: Session, batch: Batch, numbers: Sequence[Tensor]) -> tuple[Integers, list[Numbers]]:
    """Return the picture and these numbers of the samples of all ranks; picture -1 where nothing is told of tags."""
    group, parts = session.group, session.micro_batches.parts
    table = torch.zeros(1 + len(numbers), batch.global_batch // parts * group.world_size, dtype=torch.float64)
    own = slice(group.rank * len(batch.slots), (group.rank + 1) * len(batch.slots))
    table[0, own] = torch.tensor(batch.tagged, dtype=torch.float64)
    for row, number_B in enumerate(numbers, 1):
        table[row, own] = number_B.cpu()
    picture_G, *rest = group.sum(table).numpy()
    return picture_G.astype(np.int64), rest


def _chosen(unet: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the trained parameters that a pattern names. Raises UserError for a pattern that names none."""
    named = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    lost = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
    if lost:
        parts = sorted({name.split(".")[0] for name in named})
        raise UserError(
            f"tag_weighting.dynamic.parameters: no parameter of the U-Net is called {' or '.join(lost)}; names begin "
            f"with {', '.join(parts)}. Correct the pattern, or delete it."
        )
    return [named[name] for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)]
