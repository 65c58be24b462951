"""The schedule against its definition written out with lists, and against what must hold for any data set."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data.sampler import BatchSchedule
from sdxl_training.records import Bucket
from sdxl_training.rng import Stream, numpy_generator

SIZES = [(32, 128), (48, 80), (64, 64), (80, 48)]


@st.composite
def schedules(draw):
    """Buckets of 0..12 records with 1..3 repeats, global batches of 1..9."""
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    total = sum(counts)
    repeats = draw(st.lists(st.integers(1, 3), min_size=total, max_size=total))
    numbers = iter(draw(st.permutations(range(total))))
    buckets = {Bucket(size): list(islice(numbers, count)) for size, count in zip(SIZES, counts, strict=False)}
    return BatchSchedule(buckets, repeats, draw(st.integers(0, 2**32)), draw(st.integers(1, 9)))


def naive_epochs(buckets, repeats, seed, global_batch, epochs):
    """The definition in science of the module, word for word, with whole streams in memory."""
    steps = []
    for epoch in range(epochs):
        batches = []
        for bucket in sorted(buckets):
            slots = [(record, which) for record in buckets[bucket] for which in range(repeats[record])]
            stream = []
            for turn in range(epoch + 2):
                order = numpy_generator(seed, Stream.ORDER, turn, *bucket.size_hw).permutation(len(slots))
                stream += [(record, turn * repeats[record] + which) for record, which in (slots[i] for i in order)]
            first = epoch * len(slots) // global_batch
            end = (epoch + 1) * len(slots) // global_batch
            batches += [(bucket, tuple(stream[j * global_batch : (j + 1) * global_batch])) for j in range(first, end)]
        order = numpy_generator(seed, Stream.BUCKET_ORDER, epoch).permutation(len(batches))
        steps.append([batches[i] for i in order])
    return steps


def plain(batch):
    return batch[0], tuple((draw.record, draw.visit) for draw in batch[1])


@settings(deadline=None, max_examples=60)
@given(schedule=schedules())
def test_equals_its_definition(schedule):
    buckets, repeats, seed, global_batch = schedule.__reduce__()[1]
    buckets = {bucket: numbers for bucket, numbers in buckets.items() if numbers}
    step = 0
    for epoch, batches in enumerate(naive_epochs(buckets, repeats, seed, global_batch, 4)):
        assert schedule.steps_before_epoch(epoch) == step
        for place, batch in enumerate(batches):
            assert plain(schedule.batch_at(step)) == batch
            assert schedule.epoch_of(step) == epoch + place / len(batches)
            step += 1


@settings(deadline=None, max_examples=60)
@given(schedule=schedules(), epochs=st.integers(1, 7))
def test_nothing_is_dropped_and_nobody_is_favoured(schedule, epochs):
    buckets, repeats, _, global_batch = schedule.__reduce__()[1]
    seen = Counter()
    for step in range(schedule.steps_before_epoch(epochs)):
        bucket, draws = schedule.batch_at(step)
        assert len(draws) == global_batch
        assert {draw.record for draw in draws} <= set(buckets[bucket])
        seen.update((draw.record, draw.visit) for draw in draws)
    assert max(seen.values(), default=1) == 1, "two appearances share their randomness"
    for numbers in buckets.values():
        slots = sum(repeats[number] for number in numbers)
        taken = epochs * slots // global_batch * global_batch
        for number in numbers:
            visits = Counter(visit % repeats[number] for record, visit in seen if record == number)
            for which in range(repeats[number]):
                assert abs(visits[which] - taken / slots) < 1
                assert epochs - visits[which] <= -(-global_batch // slots)


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(), steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_seeking_equals_iterating(schedule, steps):
    fresh = pickle.loads(pickle.dumps(schedule))
    for step in range(12):
        schedule.batch_at(step)
    for step in [3, *steps]:
        assert schedule.batch_at(step) == fresh.batch_at(step)
        epoch = int(fresh.epoch_of(step))
        assert fresh.steps_before_epoch(epoch) <= step < fresh.steps_before_epoch(epoch + 1)


def two_buckets(seed: int = 0, global_batch: int = 4) -> BatchSchedule:
    buckets = {Bucket((64, 64)): range(40), Bucket((32, 128)): range(40, 51)}
    return BatchSchedule(buckets, [1] * 51, seed, global_batch)


def test_epochs_and_seeds_shuffle_differently():
    schedule = two_buckets()
    starts = [schedule.steps_before_epoch(epoch) for epoch in range(4)]
    epochs = [[schedule.batch_at(step) for step in range(a, b)] for a, b in pairwise(starts)]
    assert len({tuple(draw.record for _, draws in epoch for draw in draws) for epoch in epochs}) == 3
    assert len({tuple(bucket for bucket, _ in epoch) for epoch in epochs}) == 3
    assert schedule.batch_at(0) != two_buckets(seed=1).batch_at(0)


def test_a_bucket_smaller_than_a_batch_is_trained_with_distinct_randomness():
    schedule = BatchSchedule({Bucket((64, 64)): [0, 1, 2]}, [1, 1, 1], 0, 8)
    assert [schedule.steps_before_epoch(epoch) for epoch in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    _, draws = schedule.batch_at(0)
    assert len(set(draws)) == 8
    assert schedule.epoch_of(0) == 2.0


def test_equal_in_a_process_with_another_hash_seed():
    program = (
        "from sdxl_training.data.sampler import BatchSchedule\n"
        "from sdxl_training.records import Bucket\n"
        "s = BatchSchedule({Bucket((64, 64)): range(40), Bucket((32, 128)): range(40, 51)}, [1] * 51, 0, 4)\n"
        "print([[(d.record, d.visit) for d in s.batch_at(i)[1]] for i in range(30)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    schedule = two_buckets()
    assert printed.strip() == str([[(d.record, d.visit) for d in schedule.batch_at(i)[1]] for i in range(30)])


@pytest.mark.parametrize(
    ("buckets", "repeats", "global_batch"),
    [({}, [], 4), ({Bucket((8, 8)): []}, [], 4), ({Bucket((8, 8)): [0]}, [0], 4), ({Bucket((8, 8)): [0]}, [1], 0)],
)
def test_an_impossible_schedule_is_refused(buckets, repeats, global_batch):
    with pytest.raises(ValueError, match="at least"):
        BatchSchedule(buckets, repeats, 0, global_batch)


def test_a_million_pictures_are_sought_without_walking():
    schedule = BatchSchedule({Bucket((64, 64)): range(10**6)}, [1] * 10**6, 0, 256)
    calls = 0
    count = schedule.steps_before_epoch

    def counted(epoch):
        nonlocal calls
        calls += 1
        return count(epoch)

    schedule.steps_before_epoch = counted
    schedule.batch_at(10**9 + 7)
    assert calls < 20
