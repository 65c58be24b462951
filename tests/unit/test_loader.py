"""The loader: the same bits however many processes make them and however an update is split."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from sdxl_training.data.buckets import plan_crop
from sdxl_training.data.captions import CaptionRules
from sdxl_training.data.loader import MicroBatches, RawBatch, _outlive_the_first_signal, open_loader, to_batch
from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.records import Bucket, ImageRecord, UserError

BUCKETS = [Bucket((16, 16)), Bucket((16, 32))]
SIZES = [(16, 16), (20, 40)]
RECORDS = [
    ImageRecord(1000 + i, f"/p/{i}.png", SIZES[i % 3 == 0], "", "", tuple(f"t{i}{k}" for k in range(5)), 1 + i % 2)
    for i in range(17)
]
PLANS = [plan_crop(record.size_hw, BUCKETS) for record in RECORDS]


class Latents:
    """Stands for the cache; `bad` cannot be read."""

    def __init__(self, bad: str | None = None):
        self.bad = bad

    def __call__(self, key):
        if key == self.bad:
            raise KeyError(key)
        height, width = PLANS[int(key)].bucket.size_hw
        mean_CHW = torch.full((4, height // 8, width // 8), float(key))
        return mean_CHW, torch.full_like(mean_CHW, 0.5)


def tokenize(captions):
    ids = [[ord(c) for c in caption.ljust(40)] for caption in captions]
    return torch.tensor(ids), torch.tensor(ids) + 1


def micro_batches(batch_size=4, accumulation=1, rank=0, world_size=1, seed=3, **changes) -> MicroBatches:
    members = {bucket: [i for i, plan in enumerate(PLANS) if plan.bucket == bucket] for bucket in BUCKETS}
    repeats = [record.repeats for record in RECORDS]
    schedule = BatchSchedule(members, repeats, seed, batch_size * accumulation * world_size)
    arguments = {
        "schedule": schedule,
        "records": RECORDS,
        "plans": PLANS,
        "keys": [str(i) for i in range(17)],
        "weights": [1 + i / 100 for i in range(17)],
        "read_latent": Latents(),
        "tokenize": tokenize,
        "rules": CaptionRules(shuffle=True, tag_dropout=0.2, caption_dropout=0.3),
        "seed": seed,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "rank": rank,
        "world_size": world_size,
    }
    return MicroBatches(**(arguments | changes))


def same(one: RawBatch, other: RawBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(RawBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def joined(batches: list[RawBatch]) -> RawBatch:
    parts = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(RawBatch)}
    return RawBatch(
        **{
            name: torch.cat(part) if isinstance(part[0], torch.Tensor) else sum(part, ())
            for name, part in parts.items()
        }
    )


@pytest.fixture(scope="module")
def alone():
    return list(open_loader(micro_batches(2, 2), 0, 12, workers=0, pin=False))


def test_a_batch_is_complete_and_right(alone):
    for step, micro in enumerate(alone):
        assert len(micro) == 2
        bucket, draws = micro_batches(2, 2).schedule.batch_at(step)
        batch = joined(micro)
        assert batch.latents_BCHW.shape == (4, 4, bucket.size_hw[0] // 8, bucket.size_hw[1] // 8)
        assert batch.latents_BCHW.dtype == batch.time_ids_B6.dtype == batch.weight_B.dtype == torch.float32
        assert batch.keep_B.dtype == torch.bool
        assert batch.visits == tuple(draw.visit for draw in draws)
        for b, draw in enumerate(draws):
            assert batch.sample_ids[b] == RECORDS[draw.record].sample_id
            assert batch.time_ids_B6[b].tolist() == list(PLANS[draw.record].time_ids)
            assert batch.weight_B[b].item() == pytest.approx(1 + draw.record / 100)
            text = "".join(map(chr, batch.ids_1_BL[b].tolist()))
            tags = {tag.strip() for tag in text.split(",") if tag.strip()}
            assert tags <= set(RECORDS[draw.record].tags)
            assert batch.keep_B[b] or not tags


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(alone, workers):
    made = list(open_loader(micro_batches(2, 2), 0, 12, workers=workers, pin=False))
    assert len(made) == 12
    assert all(same(joined(a), joined(b)) for a, b in zip(alone, made, strict=True))
    assert multiprocessing.active_children() == []


def test_starting_in_the_middle_is_the_same_as_arriving_there(alone):
    made = list(open_loader(micro_batches(2, 2), 7, 12, workers=1, pin=False))
    assert all(same(joined(a), joined(b)) for a, b in zip(alone[7:], made, strict=True))


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)])
def test_splitting_an_update_does_not_change_its_samples(alone, batch_size, accumulation, world_size):
    loaders = [
        open_loader(micro_batches(batch_size, accumulation, rank, world_size), 0, 12, workers=0, pin=False)
        for rank in range(world_size)
    ]
    for whole, *shares in zip(alone, *loaders, strict=True):
        parts = [share[m] for m in range(accumulation) for share in shares]
        assert same(joined(parts), joined(whole))


def test_a_visit_draws_afresh_and_latents_follow_the_posterior():
    dataset = micro_batches(4, rules=CaptionRules())
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


def test_the_seed_changes_latents_and_captions():
    one, other = micro_batches(seed=1), micro_batches(seed=2, schedule=micro_batches(seed=1).schedule)
    assert one[0].sample_ids == other[0].sample_ids
    assert not torch.equal(one[0].latents_BCHW, other[0].latents_BCHW)
    assert not all(torch.equal(one[p].ids_1_BL, other[p].ids_1_BL) for p in range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_is_named_in_one_sentence(workers):
    with pytest.raises(UserError) as caught:
        list(open_loader(micro_batches(read_latent=Latents("5")), 0, 20, workers=workers, pin=False))
    assert str(caught.value) == "/p/5.png: its cached latent cannot be read: '5'"
    assert multiprocessing.active_children() == []


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
    made = [next(loader)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    made += list(loader)
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


def test_opening_a_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(open_loader(micro_batches(), 0, 2, workers=0, pin=False))
    assert torch.equal(before, torch.get_rng_state())


def test_a_split_that_does_not_fit_the_schedule_is_refused():
    with pytest.raises(ValueError, match="the schedule draws 4 samples a step, the ranks take 8"):
        replace(micro_batches(4), accumulation=2)


def test_dropped_captions_become_zeros_and_keep_their_sizes():
    raw = next(raw for raw in map(micro_batches().__getitem__, range(50)) if 0 < raw.keep_B.sum() < 4)

    def encode_text(ids_1_BL, ids_2_BL):
        text_BLD = torch.stack([ids_1_BL, ids_2_BL], -1).float()
        return text_BLD, text_BLD.mean(1)

    batch = to_batch(raw, encode_text, torch.device("cpu"))
    text_BLD, pooled_BP = encode_text(raw.ids_1_BL, raw.ids_2_BL)
    for b, keep in enumerate(raw.keep_B.tolist()):
        assert torch.equal(batch.conditioning.text_BLD[b], text_BLD[b] * keep)
        assert torch.equal(batch.conditioning.pooled_BP[b], pooled_BP[b] * keep)
    assert torch.equal(batch.conditioning.time_ids_B6, raw.time_ids_B6)
    assert torch.equal(batch.latents_BCHW, raw.latents_BCHW)
    assert torch.equal(batch.weight_B, raw.weight_B)
    assert (batch.sample_ids, batch.visits) == (raw.sample_ids, raw.visits)
