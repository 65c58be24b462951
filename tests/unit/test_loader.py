"""The loader: the same bits however many processes make them and however an update is split; coupled noise."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from sdxl_training.data.buckets import plan_crop
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.crops import Cut
from sdxl_training.data.fetching import Stored, Unencoded
from sdxl_training.data.images import UnreadablePicture
from sdxl_training.data.loader import MicroBatches, RawBatch, to_batch
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.data.workers import _outlive_the_first_signal, open_loader
from sdxl_training.objectives.couplings import ConditionalTransport, OptimalTransport
from sdxl_training.objectives.noise import Noise
from sdxl_training.records import Bucket, ImageRecord, Quarantined, UserError

BUCKETS = [Bucket((16, 16)), Bucket((16, 32))]
SIZES = [(16, 16), (20, 40)]
RECORDS = [
    ImageRecord(1000 + i, f"/p/{i}.png", SIZES[i % 3 == 0], (", ".join(tags),), tags, 1 + i % 2, picture=i)
    for i in range(17)
    for tags in [tuple(f"t{i}{k}" for k in range(5))]
]
PLANS = [plan_crop(record.size_hw, BUCKETS) for record in RECORDS]


class Latents:
    """Stands for the cache: a latent's mean is its picture's number. `bad` pictures cannot be used."""

    def __init__(self, *bad: int, mean: float | None = None, std: float = 0.5):
        self.bad, self.mean, self.std = bad, mean, std

    def __call__(self, record, plan):
        if record.picture in self.bad:
            raise UnreadablePicture(record.path, "it is damaged")
        height, width = plan.bucket.size_hw
        mean = record.picture if self.mean is None else self.mean
        mean_CHW = torch.full((4, height // 8, width // 8), float(mean))
        return Stored(mean_CHW, torch.full_like(mean_CHW, self.std))


def tokenize(captions):
    ids = [[ord(c) for c in caption.ljust(40)] for caption in captions]
    return torch.tensor(ids), torch.tensor(ids) + 1, None


def tokenize_with_weights(captions):
    """Every token's weight tells its caption and its encoder."""
    ids_1_BL, ids_2_BL, _ = tokenize(captions)
    weights_EBL = torch.stack([ids_1_BL, ids_2_BL]).float() / 100
    return ids_1_BL, ids_2_BL, weights_EBL


def micro_batches(batch_size=4, accumulation=1, rank=0, world_size=1, seed=3, **changes) -> MicroBatches:
    members = {bucket: [i for i, plan in enumerate(PLANS) if plan.bucket == bucket] for bucket in BUCKETS}
    repeats = [record.repeats for record in RECORDS]
    schedule = BatchSchedule(members, repeats, seed, batch_size * accumulation * world_size)
    arguments = {
        "schedule": schedule,
        "records": RECORDS,
        "variants": [(plan,) for plan in PLANS],
        "weights": [1 + i / 100 for i in range(17)],
        "fetch": Latents(),
        "draw_noise": Noise(),
        "tokenize": tokenize,
        "rules": [CaptionRules(shuffle=True, tag_dropout=0.2, caption_dropout=0.3)],
        "seed": seed,
        "accumulation": accumulation,
        "rank": rank,
        "world_size": world_size,
    }
    return MicroBatches(**(arguments | changes))


def same(one: RawBatch, other: RawBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(RawBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def kept(loader) -> list[list[RawBatch]]:
    """Return all steps of a loader, whose memory is used again."""
    return [deepcopy(batches) for batches in loader]


def joined(batches: list[RawBatch]) -> RawBatch:
    """Return the micro-batches of one update as one, in the order of the global batch."""
    assert len({batch.step for batch in batches}) == 1
    assert {batch.global_batch for batch in batches} == {sum(len(batch.slots) for batch in batches)}
    parts = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(RawBatch)}
    del parts["step"], parts["global_batch"], parts["unencoded"]
    weights = parts.pop("weights_EBL")
    whole = {
        name: None if part[0] is None else torch.cat(part) if isinstance(part[0], torch.Tensor) else sum(part, ())
        for name, part in parts.items()
    }
    whole["weights_EBL"] = None if weights[0] is None else torch.cat(weights, dim=1)
    return RawBatch(**whole, step=batches[0].step, global_batch=batches[0].global_batch)


@pytest.fixture(scope="module")
def alone():
    return kept(open_loader(micro_batches(2, 2), 0, 12, workers=0, pin=False))


def test_a_batch_is_complete_and_right(alone):
    for step, micro in enumerate(alone):
        assert len(micro) == 2
        bucket, draws = micro_batches(2, 2).schedule.batch_at(step)
        batch = joined(micro)
        assert batch.latents_BCHW.shape == (4, 4, bucket.size_hw[0] // 8, bucket.size_hw[1] // 8)
        assert batch.latents_BCHW.dtype == batch.time_ids_B6.dtype == batch.weight_B.dtype == torch.float32
        assert batch.keep_B.dtype == torch.bool
        assert batch.visits == tuple(draw.visit for draw in draws)
        assert (batch.step, batch.slots, batch.global_batch) == (step, (0, 1, 2, 3), 4)
        assert batch.noise_BCHW.shape == batch.latents_BCHW.shape
        assert batch.noise_BCHW.dtype == torch.float32
        for b, draw in enumerate(draws):
            assert batch.sample_ids[b] == RECORDS[draw.record].sample_id
            assert batch.time_ids_B6[b].tolist() == list(PLANS[draw.record].time_ids)
            latent_CHW, sample_id = batch.latents_BCHW[b], batch.sample_ids[b]
            assert torch.equal(batch.noise_BCHW[b], Noise()(latent_CHW, 3, draw.visit, sample_id))
            assert batch.weight_B[b].item() == pytest.approx(1 + draw.record / 100)
            text = "".join(map(chr, batch.ids_1_BL[b].tolist()))
            tags = {tag.strip() for tag in text.split(",") if tag.strip()}
            assert tags <= set(RECORDS[draw.record].tags)
            assert batch.keep_B[b] or not tags


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(alone, workers):
    made = kept(open_loader(micro_batches(2, 2), 0, 12, workers=workers, pin=False))
    assert len(made) == 12
    assert all(same(joined(a), joined(b)) for a, b in zip(alone, made, strict=True))
    assert multiprocessing.active_children() == []


def test_starting_in_the_middle_is_the_same_as_arriving_there(alone):
    made = kept(open_loader(micro_batches(2, 2), 7, 12, workers=1, pin=False))
    assert all(same(joined(a), joined(b)) for a, b in zip(alone[7:], made, strict=True))


SPLITS = pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]
)


@SPLITS
def test_splitting_an_update_does_not_change_its_samples(alone, batch_size, accumulation, world_size):
    loaders = [
        open_loader(micro_batches(batch_size, accumulation, rank, world_size), 0, 12, workers=0, pin=False)
        for rank in range(world_size)
    ]
    for whole, *shares in zip(alone, *loaders, strict=True):
        parts = [share[m] for m in range(accumulation) for share in shares]
        assert same(joined(parts), joined(whole))


def test_a_visit_draws_afresh_and_latents_follow_the_posterior():
    dataset = micro_batches(4, rules=[CaptionRules()])
    noise, drawn = [], {}
    for step in range(400):
        batch = dataset[step]
        for b, sample_id in enumerate(batch.sample_ids):
            noise.append(((batch.latents_BCHW[b] - (sample_id - 1000)) / 0.5).flatten())
            drawn[sample_id, batch.visits[b]] = noise[-1]
    every = torch.cat(noise)
    assert abs(every.mean()) < 5 / len(every) ** 0.5
    assert abs(every.std() - 1) < 5 / (2 * len(every)) ** 0.5
    assert len({tuple(values.tolist()) for values in drawn.values()}) == len(drawn) == 1600


def test_the_seed_changes_latents_noise_and_captions():
    one, other = micro_batches(seed=1), micro_batches(seed=2, schedule=micro_batches(seed=1).schedule)
    assert one[0].sample_ids == other[0].sample_ids
    assert not torch.equal(one[0].latents_BCHW, other[0].latents_BCHW)
    assert not torch.equal(one[0].noise_BCHW, other[0].noise_BCHW)
    assert not all(torch.equal(one[p].ids_1_BL, other[p].ids_1_BL) for p in range(5))


def test_a_visit_has_its_own_noise_which_is_not_the_posteriors():
    noise = {}
    for step in range(100):
        batch = micro_batches(4)[step]
        for b, sample_id in enumerate(batch.sample_ids):
            noise[sample_id, batch.visits[b]] = batch.noise_BCHW[b]
            posterior = (batch.latents_BCHW[b] - (sample_id - 1000)) / 0.5
            assert not torch.allclose(posterior, batch.noise_BCHW[b], atol=0.1)
    assert len({tuple(values.flatten().tolist()) for values in noise.values()}) == len(noise) == 400


# --- variants and batches of several sizes ---------------------------------------------------------------------------


def test_a_picture_shows_its_variants_in_turns_each_with_its_own_latent_and_sizes():
    """A wide picture and its mirrored twin; latents are named so that their values say which one was read."""
    variants = [Cut(flip=True).plans(record.size_hw, plan.bucket) for record, plan in zip(RECORDS, PLANS, strict=True)]
    variants = [(one, replace(twin, crop_tl=(0, 1))) for one, twin in variants]  # so that sizes tell them apart, too

    def fetch(record, plan):
        stored = Latents(std=0)(record, plan)
        return replace(stored, mean_CHW=stored.mean_CHW + 100 * plan.flipped)

    dataset = micro_batches(variants=variants, fetch=fetch, seed=5)
    shown = {}
    for step in range(60):
        batch = dataset[step]
        for b, (sample_id, visit) in enumerate(zip(batch.sample_ids, batch.visits, strict=True)):
            which, number = divmod(int(batch.latents_BCHW[b].unique()), 100)
            assert number == sample_id - 1000
            assert batch.time_ids_B6[b].tolist() == list(variants[number][which].time_ids)
            shown[sample_id, visit] = which
    assert len({tuple(one.time_ids) for pair in variants for one in pair}) > len(set(SIZES))
    for (sample_id, visit), which in shown.items():
        assert shown.get((sample_id, visit + 1), 1 - which) == 1 - which, "the variants take turns"
    first = [shown[record.sample_id, 0] for record in RECORDS]
    assert 0 < sum(first) < 17, "pictures do not all begin with the same variant"


def unequal(accumulation=1, rank=0, world_size=1, **changes) -> MicroBatches:
    """Return micro-batches of an update of 8 pictures in the small bucket and of 4 in the wide one."""
    members = {bucket: [i for i, plan in enumerate(PLANS) if plan.bucket == bucket] for bucket in BUCKETS}
    schedule = BatchSchedule(
        members, [record.repeats for record in RECORDS], 3, dict(zip(BUCKETS, (8, 4), strict=True))
    )
    return micro_batches(1, accumulation, rank, world_size, schedule=schedule, **changes)


@pytest.mark.parametrize("couple", [None, OptimalTransport()])
@pytest.mark.parametrize(("accumulation", "world_size"), [(4, 1), (2, 2), (1, 4), (2, 1)])
def test_updates_of_several_sizes_are_split_equally(couple, accumulation, world_size):
    whole = unequal(couple=couple)
    ranks = [unequal(accumulation, rank, world_size, couple=couple) for rank in range(world_size)]
    sizes = set()
    for step in range(12):
        parts = [rank[step * accumulation + m] for m in range(accumulation) for rank in ranks]
        assert len({len(part.slots) for part in parts}) == 1
        assert same(joined(parts), whole[step])
        sizes.add((whole[step].latents_BCHW.shape[-1], whole[step].global_batch))
    assert sizes == {(2, 8), (4, 4)}


# --- captions --------------------------------------------------------------------------------------------------------


def texts(batch: RawBatch) -> list[str]:
    return ["".join(map(chr, row)).rstrip() for row in batch.ids_1_BL.tolist()]


def test_every_source_has_its_own_rules():
    records = [replace(record, source=i % 2) for i, record in enumerate(RECORDS)]
    rules = [CaptionRules(front=("first",)), CaptionRules(front=("second",), caption_dropout=1.0)]
    dataset = micro_batches(records=records, rules=rules)
    seen = set()
    for step in range(20):
        batch = dataset[step]
        for sample_id, text, keep in zip(batch.sample_ids, texts(batch), batch.keep_B.tolist(), strict=True):
            source = sample_id % 2
            first = f"first, {records[sample_id - 1000].captions[0]}"[:40]
            assert (text, keep) == ((first, True), ("", False))[source]
            seen.add(source)
    assert seen == {0, 1}


def test_a_visit_draws_among_the_alternatives_and_the_tags_beside_them():
    records = [replace(record, captions=("a fox", "b, fox"), tags=("x", "y")) for record in RECORDS]
    rules = [CaptionRules(kind="prose", templates=("{caption} | {tags}",), shuffle=True)]
    dataset = micro_batches(records=records, rules=rules)
    seen = {text for step in range(20) for text in texts(dataset[step])}
    assert seen == {f"{fox} | {tags}" for fox in ("a fox", "b, fox") for tags in ("x, y", "y, x")}


def test_a_caption_that_is_dropped_may_be_the_empty_string():
    dataset = micro_batches(rules=[CaptionRules(caption_dropout=0.5, null_mode="empty_string")])
    batches = [dataset[step] for step in range(10)]
    assert all(batch.keep_B.all() for batch in batches)
    empty = sum(text == "" for batch in batches for text in texts(batch))
    assert 0 < empty < 40


@pytest.mark.parametrize("workers", [0, 1])
def test_weights_reach_the_encoders_with_their_tokens(workers):
    whole = micro_batches(4, tokenize=tokenize_with_weights)
    halves = kept(open_loader(micro_batches(2, 2, tokenize=tokenize_with_weights), 0, 4, workers, pin=False))
    given = []

    def encode_text(ids_1_BL, ids_2_BL, weights_EBL):
        given.append((ids_1_BL, ids_2_BL, weights_EBL))
        return torch.zeros(*ids_1_BL.shape, 3), torch.zeros(len(ids_1_BL), 5)

    for step, parts in enumerate(halves):
        assert same(joined(parts), whole[step])
        to_batch(whole[step], encode_text, Pixels().encode, torch.device("cpu"))
        ids_1_BL, ids_2_BL, weights_EBL = given[-1]
        assert torch.equal(ids_1_BL, whole[step].ids_1_BL)
        assert torch.equal(weights_EBL, torch.stack([ids_1_BL, ids_2_BL]).float() / 100)


# --- coupling --------------------------------------------------------------------------------------------------------

COUPLINGS = {"optimal": OptimalTransport(), "conditional": ConditionalTransport(1.0)}
every_coupling = pytest.mark.parametrize("couple", COUPLINGS.values(), ids=COUPLINGS)
NEAR = {"fetch": Latents(mean=0, std=1)}
"""Latents that do not differ by their pictures' numbers, so that the posterior's draw decides who is near."""


@every_coupling
def test_a_coupling_moves_noise_and_nothing_else(couple):
    plain, coupled = micro_batches(4, **NEAR), micro_batches(4, couple=couple, **NEAR)
    moved = 0
    for step in range(12):
        one, other = plain[step], coupled[step]
        assert same(replace(other, noise_BCHW=one.noise_BCHW), one), "latents, ids, captions: as without a coupling"
        order = [
            next(i for i, noise in enumerate(one.noise_BCHW) if torch.equal(noise, other.noise_BCHW[b]))
            for b in range(4)
        ]
        assert sorted(order) == [0, 1, 2, 3]
        moved += order != [0, 1, 2, 3]
        kept = (one.latents_BCHW - one.noise_BCHW).square().sum()
        assert (other.latents_BCHW - other.noise_BCHW).square().sum() <= kept + 1e-3 or couple is not COUPLINGS[
            "optimal"
        ]
    assert moved > 6


@every_coupling
@SPLITS
def test_a_coupling_spans_the_global_batch_however_it_is_split(couple, batch_size, accumulation, world_size):
    """One of the splits has micro-batches of one sample: noise that only changed hands within them would stay."""
    whole = kept(open_loader(micro_batches(4, couple=couple, **NEAR), 0, 8, workers=0, pin=False))
    loaders = [
        open_loader(
            micro_batches(batch_size, accumulation, rank, world_size, couple=couple, **NEAR),
            0,
            8,
            workers=rank,
            pin=False,
        )
        for rank in range(world_size)
    ]
    for (expected,), *shares in zip(whole, *loaders, strict=True):
        assert same(joined([share[m] for m in range(accumulation) for share in shares]), expected)


def test_a_coupled_batch_does_not_depend_on_what_was_asked_before():
    """The noise of one step is kept for its other micro-batches: it must not be taken for another step's, or seed's."""
    dataset = micro_batches(1, 4, couple=OptimalTransport(), **NEAR)
    fresh = [micro_batches(1, 4, couple=OptimalTransport(), **NEAR)[position] for position in range(16)]
    for position in (0, 1, 13, 2, 5, 4, 0, 15, 3):
        assert same(dataset[position], fresh[position])
    other_seed = replace(dataset, seed=4)
    assert same(
        other_seed[3], micro_batches(1, 4, couple=OptimalTransport(), seed=4, schedule=dataset.schedule, **NEAR)[3]
    )


def test_a_coupling_sees_all_tags_of_the_pictures_in_their_order():
    seen = []

    def couple(latents_GCHW, noise_GCHW, tags):
        seen.append((latents_GCHW, noise_GCHW, tags))
        return torch.tensor([1, 2, 3, 0])

    coupled, plain = micro_batches(2, 2, couple=couple), micro_batches(4)[0]
    batch = joined([coupled[0], coupled[1]])
    ((latents_GCHW, noise_GCHW, tags),) = seen  # once for both micro-batches
    assert torch.equal(latents_GCHW, plain.latents_BCHW)
    assert torch.equal(noise_GCHW, plain.noise_BCHW)
    assert tags == [RECORDS[sample_id - 1000].tags for sample_id in plain.sample_ids]
    assert torch.equal(batch.noise_BCHW, noise_GCHW[[1, 2, 3, 0]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_refused_by_name(value):
    def fetch(record, plan):
        stored = Latents()(record, plan)
        bad_CHW = stored.mean_CHW.index_fill(0, torch.tensor([2]), value)
        return replace(stored, mean_CHW=bad_CHW) if record.picture == 5 else stored

    with pytest.raises(UserError, match=r"^/p/5.png: its cached latent holds values that are not finite"):
        list(open_loader(micro_batches(fetch=fetch), 0, 20, workers=0, pin=False))


# --- pictures that cannot be used, and pictures that are not encoded yet ---------------------------------------------


def neighbour(number: int, bad: tuple[int, ...]) -> int:
    """Return the next picture of the same bucket, going round, that is not bad."""
    members = [i for i in range(17) if PLANS[i].bucket == PLANS[number].bucket]
    after = members[members.index(number) :] + members[: members.index(number)]
    return next(i for i in after if i not in bad)


@pytest.mark.parametrize("bad", [(5,), (15, 0), (3, 6, 9, 12, 15)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_replaced_by_its_neighbour_and_named(alone, bad, workers):
    made = kept(open_loader(micro_batches(2, 2, fetch=Latents(*bad)), 0, 12, workers=workers, pin=False))
    named = set()
    for step, (before, after) in enumerate(zip(alone, made, strict=True)):
        draws = micro_batches(2, 2).schedule.batch_at(step)[1]
        batch = joined(after)
        assert [sample_id - 1000 for sample_id in batch.sample_ids] == [neighbour(draw.record, bad) for draw in draws]
        assert batch.visits == tuple(draw.visit for draw in draws)
        for b, (one, other) in enumerate(zip(joined(before).sample_ids, batch.sample_ids, strict=True)):
            if one == other:
                assert torch.equal(joined(before).latents_BCHW[b], batch.latents_BCHW[b]), "the others stay as they are"
            assert batch.weight_B[b].item() == pytest.approx(1 + (other - 1000) / 100)
        named |= set(batch.bad)
    assert named == {Quarantined(f"/p/{number}.png", "it is damaged") for number in bad}


def test_what_is_bad_does_not_depend_on_what_was_asked_before():
    dataset = micro_batches(1, 4, fetch=Latents(3, 5))
    fresh = [micro_batches(1, 4, fetch=Latents(3, 5))[position] for position in range(16)]
    for position in (0, 1, 13, 2, 5, 4, 0, 15, 3):
        assert same(replace(dataset[position], bad=()), replace(fresh[position], bad=()))


def test_a_bucket_without_a_usable_picture_ends_the_run_by_name():
    bad = [i for i in range(17) if PLANS[i].bucket == BUCKETS[1]]
    with pytest.raises(
        UserError, match=r"no picture of bucket 16x32 can be used; the first: /p/\d+.png: it is damaged"
    ):
        list(open_loader(micro_batches(fetch=Latents(*bad)), 0, 20, workers=2, pin=False))
    assert multiprocessing.active_children() == []


class Pixels:
    """Every second picture is not encoded yet; encoding it gives what `Latents` says, `bad` ones have no latent."""

    def __init__(self, *bad: int):
        self.bad = bad

    def fetch(self, record, plan):
        if record.picture % 2:
            return Latents()(record, plan)
        pixels_HWC = torch.full((*plan.bucket.size_hw, 3), record.picture, dtype=torch.uint8)
        return Unencoded(pixels_HWC, record.path, record.picture, record.sample_id, bytes(16), plan)

    def encode(self, pictures):
        found = []
        for one in pictures:
            stored = Latents()(RECORDS[int(one.pixels_HWC[0, 0, 0])], one.plan)
            found.append(None if one.picture in self.bad else (stored.mean_CHW, stored.std_CHW))
        return found


def no_text(ids_1_BL, ids_2_BL, weights_EBL):
    return ids_1_BL[..., None].float(), ids_2_BL.float()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_encoded_on_arrival_are_what_the_cache_would_give(alone, workers):
    made = kept(open_loader(micro_batches(2, 2, fetch=Pixels().fetch), 0, 12, workers=workers, pin=False))
    for expected, raw in zip(itertools.chain(*alone), itertools.chain(*made), strict=True):
        assert set(raw.unencoded) == {b for b, sample_id in enumerate(raw.sample_ids) if sample_id % 2 == 0}
        batch = to_batch(raw, no_text, Pixels().encode, torch.device("cpu"))
        assert torch.equal(batch.latents_BCHW, expected.latents_BCHW)
        assert torch.equal(batch.noise_BCHW, expected.noise_BCHW)
        assert torch.equal(batch.weight_B, expected.weight_B)


def test_a_picture_without_a_finite_latent_has_no_weight_and_tells_nothing_of_its_tags():
    batches = micro_batches(fetch=Pixels().fetch, rules=[CaptionRules(caption_dropout=0.3)])
    for raw in map(batches.__getitem__, range(12)):
        batch = to_batch(raw, no_text, Pixels(4).encode, torch.device("cpu"))
        for b, sample_id in enumerate(raw.sample_ids):
            assert batch.weight_B[b] == (0 if sample_id == 1004 else raw.weight_B[b])
            assert batch.tagged[b] == (-1 if sample_id == 1004 or not raw.keep_B[b] else sample_id - 1000)
        assert batch.latents_BCHW.isfinite().all()
        assert (raw.weight_B > 0).all(), "the batch of the loader stays as it was"


def test_noise_that_depends_on_latents_refuses_to_go_on_without_them():
    with pytest.raises(
        UserError, match=r"^/p/\d+.png: its latent is not in the cache, and the noise of this run depends"
    ):
        list(open_loader(micro_batches(fetch=Pixels().fetch, needs_latents=True), 0, 4, workers=0, pin=False))


def test_a_mistake_of_ours_is_not_hidden():
    def broken(captions):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        list(open_loader(micro_batches(tokenize=broken), 0, 2, workers=1, pin=False))
    assert multiprocessing.active_children() == []


def test_leaving_early_leaves_no_process_behind():
    loader = open_loader(micro_batches(), 0, 10**9, workers=2, pin=False)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_group_does_not_cost_the_update(alone, number):
    loader = open_loader(micro_batches(2, 2), 0, 12, workers=2, pin=False)
    made = deepcopy([next(loader)])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    made += kept(loader)
    assert all(same(joined(a), joined(b)) for a, b in zip(alone, made, strict=True))
    assert multiprocessing.active_children() == []


def test_a_second_sigterm_ends_a_worker():
    ready = multiprocessing.get_context("fork").Event()

    def work():
        _outlive_the_first_signal(0)
        ready.set()
        time.sleep(60)

    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    ready.wait()
    worker.terminate()
    worker.join(0.1)
    assert worker.is_alive()
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM


def test_a_program_that_never_closes_its_loader_still_ends():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_loader as t\n"
        "sys.kept = t.open_loader(t.micro_batches(), 0, 10**9, workers=2, pin=False); next(sys.kept); sys.exit(3)"
    )
    here = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", program, here], timeout=60, check=False).returncode == 3


def test_work_is_done_in_other_processes(tmp_path):
    def note(captions):
        (tmp_path / str(os.getpid())).touch()
        return tokenize(captions)

    list(open_loader(micro_batches(tokenize=note), 0, 6, workers=2, pin=False))
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / str(os.getpid())).exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_opening_a_loader_leaves_the_global_generator_alone(workers):
    before = torch.get_rng_state()
    list(open_loader(micro_batches(), 0, 2, workers, pin=False))
    assert torch.equal(before, torch.get_rng_state())


def test_a_split_that_does_not_fit_the_schedule_is_refused():
    with pytest.raises(ValueError, match="4 pictures cannot be shared equally among 3 micro-batches"):
        replace(micro_batches(4), accumulation=3)


def test_dropped_captions_become_zeros_and_keep_their_sizes():
    raw = next(raw for raw in map(micro_batches().__getitem__, range(50)) if 0 < raw.keep_B.sum() < 4)

    def encode_text(ids_1_BL, ids_2_BL, weights_EBL):
        assert weights_EBL is None
        text_BLD = torch.stack([ids_1_BL, ids_2_BL], -1).float()
        return text_BLD, text_BLD.mean(1)

    batch = to_batch(raw, encode_text, Pixels().encode, torch.device("cpu"))
    text_BLD, pooled_BP = encode_text(raw.ids_1_BL, raw.ids_2_BL, None)
    for b, keep in enumerate(raw.keep_B.tolist()):
        assert torch.equal(batch.conditioning.text_BLD[b], text_BLD[b] * keep)
        assert torch.equal(batch.conditioning.pooled_BP[b], pooled_BP[b] * keep)
    assert torch.equal(batch.conditioning.time_ids_B6, raw.time_ids_B6)
    assert torch.equal(batch.latents_BCHW, raw.latents_BCHW)
    assert torch.equal(batch.noise_BCHW, raw.noise_BCHW)
    assert torch.equal(batch.weight_B, raw.weight_B)
    assert (batch.sample_ids, batch.visits) == (raw.sample_ids, raw.visits)
    assert (batch.step, batch.slots, batch.global_batch) == (raw.step, raw.slots, raw.global_batch)
