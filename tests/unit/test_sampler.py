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

from sdxl_training.data.sampler import BatchSchedule, batch_sizes, slots_of_part
from sdxl_training.records import Bucket
from sdxl_training.rng import Stream, numpy_generator

SIZES = [(32, 128), (48, 80), (64, 64), (80, 48)]
GOLDEN = [[25, 17, 39, 21], [5, 3, 20, 2], [44, 43, 49, 40], [42, 40, 47, 48], [8, 6, 27, 38]]


@st.composite
def schedules(draw):
    """Buckets of 0..12 records with 1..3 repeats, global batches of 1..9, equal or different for each bucket."""
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    total = sum(counts)
    repeats = draw(st.lists(st.integers(1, 3), min_size=total, max_size=total))
    numbers = iter(draw(st.permutations(range(total))))
    buckets = {Bucket(size): list(islice(numbers, count)) for size, count in zip(SIZES, counts, strict=False)}
    sizes = st.integers(1, 9)
    global_batch = draw(sizes | st.fixed_dictionaries(dict.fromkeys(buckets, sizes)))
    return BatchSchedule(buckets, repeats, draw(st.integers(0, 2**32)), global_batch)


def size_of(global_batch, bucket: Bucket) -> int:
    return global_batch if isinstance(global_batch, int) else global_batch[bucket]


def naive_epochs(buckets, repeats, seed, global_batch, epochs):
    """The definition at the head of the module, word for word, with whole streams in memory."""
    steps = []
    for epoch in range(epochs):
        batches = []
        for bucket in sorted(buckets):
            slots = [(record, which) for record in buckets[bucket] for which in range(repeats[record])]
            stream = []
            for turn in range(epoch + 2):
                order = numpy_generator(seed, Stream.ORDER, turn, *bucket.size_hw).permutation(len(slots))
                stream += [(record, turn * repeats[record] + which) for record, which in (slots[i] for i in order)]
            size = size_of(global_batch, bucket)
            first = epoch * len(slots) // size
            end = (epoch + 1) * len(slots) // size
            batches += [(bucket, tuple(stream[j * size : (j + 1) * size])) for j in range(first, end)]
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
    step = images = 0
    for epoch, batches in enumerate(naive_epochs(buckets, repeats, seed, global_batch, 4)):
        assert schedule.steps_before_epoch(epoch) == step
        for batch in batches:
            assert plain(schedule.batch_at(step)) == batch
            assert schedule.images_before(step) == images
            assert schedule.epoch_of(step) == images / sum(repeats[n] for numbers in buckets.values() for n in numbers)
            images += len(batch[1])
            step += 1


@settings(deadline=None, max_examples=60)
@given(schedule=schedules(), epochs=st.integers(1, 7))
def test_nothing_is_dropped_and_nobody_is_favoured(schedule, epochs):
    buckets, repeats, _, global_batch = schedule.__reduce__()[1]
    seen = Counter()
    for step in range(schedule.steps_before_epoch(epochs)):
        bucket, draws = schedule.batch_at(step)
        assert len(draws) == size_of(global_batch, bucket)
        assert {draw.record for draw in draws} <= set(buckets[bucket])
        seen.update((draw.record, draw.visit) for draw in draws)
    assert max(seen.values(), default=1) == 1, "two appearances share their randomness"
    for bucket, numbers in buckets.items():
        slots, size = sum(repeats[number] for number in numbers), size_of(global_batch, bucket)
        taken = epochs * slots // size * size
        for number in numbers:
            visits = Counter(visit % repeats[number] for record, visit in seen if record == number)
            for which in range(repeats[number]):
                assert abs(visits[which] - taken / slots) < 1
                assert 0 <= epochs - visits[which] <= -(-size // slots), "more than one batch behind"


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(), steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_seeking_equals_iterating(schedule, steps):
    fresh = pickle.loads(pickle.dumps(schedule))
    for step in range(12):
        schedule.batch_at(step)
    for step in [3, *steps]:
        assert schedule.batch_at(step) == fresh.batch_at(step)
        # What is carried over is less than a batch a bucket.
        behind = sum(fresh.global_batches.values()) / fresh.images_per_epoch
        epochs = fresh.epoch_of(step)
        assert fresh.steps_before_epoch(int(epochs)) <= step <= fresh.steps_before_epoch(int(epochs + behind) + 1)


@settings(deadline=None, max_examples=40)
@given(
    schedule=schedules(),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    pixels=st.integers(1, 4 * 64 * 64),
)
def test_the_parts_of_an_update_are_disjoint_equal_and_complete(schedule, accumulation, world_size, pixels):
    buckets, repeats, seed, _ = schedule.__reduce__()[1]
    parts = accumulation * world_size
    shared = BatchSchedule(buckets, repeats, seed, batch_sizes(buckets, pixels, parts))
    for step in range(20):
        bucket, draws = shared.batch_at(step)
        micro_batches = [[draws[slot] for slot in slots_of_part(len(draws), part, parts)] for part in range(parts)]
        assert [draw for micro_batch in micro_batches for draw in micro_batch] == list(draws)
        assert len(set(draws)) == len(draws)
        assert len({len(micro_batch) for micro_batch in micro_batches}) == 1
        assert len(micro_batches[0]) == len(draws) / parts == max(1, pixels // (bucket.size_hw[0] * bucket.size_hw[1]))


def test_parts_that_are_not_equal_are_refused():
    with pytest.raises(ValueError, match="7 pictures cannot be shared equally among 2"):
        slots_of_part(7, 0, 2)


@settings(deadline=None, max_examples=40)
@given(schedule=schedules(), size=st.integers(1, 9))
def test_equal_batches_for_all_buckets_are_one_number(schedule, size):
    buckets, repeats, seed, _ = schedule.__reduce__()[1]
    one, each = (BatchSchedule(buckets, repeats, seed, given) for given in (size, dict.fromkeys(buckets, size)))
    assert one.global_batches == each.global_batches == dict.fromkeys(one.buckets, size)
    assert one.steps_per_epoch == each.steps_per_epoch == pytest.approx(one.images_per_epoch / size)
    for step in range(30):
        assert one.batch_at(step) == each.batch_at(step)
        assert one.images_before(step) == size * step


def test_the_sequence_is_the_one_that_checkpoints_were_written_under():
    """A resumed run counts on it: numbers from the release in which all batches had one size."""
    schedule = two_buckets()
    drawn = [[draw.record for draw in schedule.batch_at(step)[1]] for step in (0, 1, 2, 12, 10**6)]
    assert drawn == GOLDEN
    assert [schedule.steps_before_epoch(epoch) for epoch in (1, 2, 3, 10**6)] == [12, 25, 38, 12750000]
    assert schedule.epoch_of(10**6) == pytest.approx(4 * 10**6 / 51)


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
    assert (schedule.epoch_of(0), schedule.epoch_of(1)) == (0, 8 / 3)


def test_epochs_are_counted_in_pictures():
    two = BatchSchedule({Bucket((64, 64)): [0, 1]}, [1, 1], 0, 4)
    assert two.epoch_of(4) == 8
    quarter = BatchSchedule({Bucket((64, 64)): range(97)}, [1] * 97, 0, 4)
    assert quarter.steps_per_epoch == 24.25
    assert quarter.epoch_of(4) == pytest.approx(4 / 24.25)


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
    [
        ({}, [], 4),
        ({Bucket((8, 8)): []}, [], 4),
        ({Bucket((8, 8)): [0]}, [0], 4),
        ({Bucket((8, 8)): [0]}, [1], 0),
        ({Bucket((8, 8)): [0]}, [1], {Bucket((8, 8)): 0}),
    ],
)
def test_an_impossible_schedule_is_refused(buckets, repeats, global_batch):
    with pytest.raises(ValueError, match="at least"):
        BatchSchedule(buckets, repeats, 0, global_batch)


@pytest.mark.parametrize("global_batch", [256, {Bucket((32, 128)): 7, Bucket((64, 64)): 256}])
def test_a_million_pictures_are_sought_without_walking(global_batch):
    buckets = {Bucket((64, 64)): range(10, 10**6), Bucket((32, 128)): range(10)}
    schedule = BatchSchedule(buckets, [1] * 10**6, 0, global_batch)
    calls = 0
    count = schedule.steps_before_epoch

    def counted(epoch):
        nonlocal calls
        calls += 1
        return count(epoch)

    schedule.steps_before_epoch = counted
    schedule.batch_at(10**9 + 7)
    assert calls < 20
