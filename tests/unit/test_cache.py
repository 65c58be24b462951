"""The latent cache: what a key depends on, what is missing and why, what is stored and served."""

import pickle
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.data.buckets import Fitting, plan_crop
from sdxl_training.data.cache import (
    SIDE_BITS,
    LatentCache,
    Reasons,
    plan_digest,
    plan_digests,
    projected_bytes,
)
from sdxl_training.data.crops import Cut
from sdxl_training.data.images import digest_content
from sdxl_training.data.lazy import Lazy
from sdxl_training.data.picture_plan import Columns, plan_resolutions
from sdxl_training.data.store import DamagedEntry
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import Bucket, CropPlan, ImageRecord, UserError
from tests.latents import BUCKETS, plan_of

PLAN = CropPlan((20, 40), (17, 34), (0, 1), Bucket((16, 32)))
CONTENT = digest_content(b"a picture")


def latent(seed=0, hw=(2, 4)):
    generator = torch.Generator().manual_seed(seed)
    mean_CHW = torch.randn(4, *hw, generator=generator).half()
    return mean_CHW, mean_CHW.abs() + 0.5


def put(cache, *entries):
    """Write (sample id, content, plan) entries with latents seeded by their place."""
    with StoreWriter(cache.store.folder) as writer:
        for i, (sample_id, content, plan) in enumerate(entries):
            moments = cache.moments(*latent(i, tuple(side // 8 for side in plan.bucket.size_hw)))
            writer.append(cache.key(content, plan)[None], cache.origin(sample_id, content, plan)[None], [moments])
    cache.refresh()


def contents_of(digests):
    return np.stack([np.frombuffer(digest, np.uint64) for digest in digests])


def records_of(sizes, **changes):
    return [ImageRecord(100 + i, f"/{i}.png", size, ("",), (), picture=i, **changes) for i, size in enumerate(sizes)]


CHANGES_OF_A_PLAN = [
    {"resized_hw": (18, 34)},
    {"resized_hw": (17, 35)},
    {"crop_tl": (1, 1)},
    {"crop_tl": (0, 2)},
    {"bucket": Bucket((17, 32))},
    {"bucket": Bucket((16, 33))},
    {"flipped": True},
]


def test_a_key_depends_on_all_that_the_latent_depends_on(tmp_path):
    key = LatentCache(tmp_path, "vae", "sample").key
    caches = [
        LatentCache(tmp_path, "vae 2", "sample"),
        LatentCache(tmp_path, "vae", "mean"),
        LatentCache(tmp_path, "vae", "sample", background=(0, 0, 0)),
        LatentCache(tmp_path, "vae", "sample", recipe="dali"),
    ]
    keys = [key(CONTENT, PLAN), key(digest_content(b"another"), PLAN)]
    keys += [key(CONTENT, replace(PLAN, **changes)) for changes in CHANGES_OF_A_PLAN]
    keys += [cache.key(CONTENT, PLAN) for cache in caches]
    assert len({tuple(each) for each in keys}) == 2 + len(CHANGES_OF_A_PLAN) + 4


def test_a_key_depends_on_nothing_else(tmp_path):
    """Of a picture with this content, whatever it is called, the size is known; and the same again tomorrow."""
    cache = LatentCache(tmp_path / "a", "vae")
    same = LatentCache(tmp_path / "b", "vae").key(CONTENT, replace(PLAN, original_hw=(40, 80)))
    assert (cache.key(CONTENT, PLAN) == same).all()
    assert (cache.key(bytes(16), PLAN) ^ cache.key(CONTENT, PLAN)).tobytes() == CONTENT


def test_a_change_of_the_code_changes_every_key(tmp_path, monkeypatch):
    before = LatentCache(tmp_path, "vae").key(CONTENT, PLAN)
    monkeypatch.setattr("sdxl_training.data.cache.CODE_VERSION", 99)
    assert (LatentCache(tmp_path, "vae").key(CONTENT, PLAN) != before).any()


def test_the_numbers_of_a_plan_share_no_bit_of_its_digest():
    """So different plans have different digests."""
    most = 2**SIDE_BITS - 1
    nothing = CropPlan((1, 1), (0, 0), (0, 0), Bucket((0, 0)))
    largest = [
        replace(nothing, resized_hw=(most, 0)),
        replace(nothing, resized_hw=(0, most)),
        replace(nothing, crop_tl=(most, 0)),
        replace(nothing, crop_tl=(0, most)),
        replace(nothing, bucket=Bucket((most, 0))),
        replace(nothing, bucket=Bucket((0, most))),
        replace(nothing, flipped=True),
    ]
    bits = [int.from_bytes(plan_digest(plan), "little") for plan in largest]
    assert [each.bit_count() for each in bits] == [SIDE_BITS] * 6 + [1]
    assert all(not one & other for one, other in combinations(bits, 2))
    assert plan_digest(nothing) == bytes(16)


@given(
    sizes=st.lists(st.tuples(st.integers(16, 90), st.integers(16, 90)), min_size=1, max_size=30),
    cut=st.sampled_from([Cut(), Cut(flip=True), Cut("random", variants=3, flip=True), Cut("focus", flip=True)]),
)
@settings(max_examples=60)
def test_digests_of_many_crops_are_those_of_each(sizes, cut):
    plan = plan_resolutions(records_of(sizes, focus=(0, 0, 8, 8)), [BUCKETS], Fitting("upscale"), cut)
    digests_M = plan_digests(plan.crops(slice(0, len(sizes))))
    assert digests_M.tobytes() == b"".join(plan_digest(one) for variants in plan.variants for one in variants)


@pytest.mark.parametrize(
    "cut", [Cut(), Cut(flip=True), Cut("random", variants=3), Cut("random", 2, flip=True), Cut("focus")]
)
def test_how_many_latents_are_missing_is_what_asking_for_each_finds(tmp_path, cut):
    sizes = [(16, 16), (16, 90), (20, 40), (20, 40), (33, 80)]
    plan = plan_of(records_of(sizes, focus=(0, 0, 8, 8)), cut)
    contents = [digest_content(bytes([number])) for number in range(5)]
    cache = LatentCache(tmp_path, "vae")
    everything = [(number, content, one) for number, content in enumerate(contents) for one in plan.variants[number]]
    put(cache, *everything[::2], (9, contents[0], PLAN))
    known_N = np.array([True, True, False, True, True])
    expected = [
        sum(not known or not cache.has(content, one) for one in variants)
        for content, variants, known in zip(contents, plan.variants, known_N, strict=True)
    ]
    there_N, missing_N = cache.count(contents_of(contents), known_N, plan)
    assert missing_N.tolist() == expected
    assert (there_N + missing_N).tolist() == [len(variants) for variants in plan.variants]
    assert not cache.count(contents_of(contents), ~known_N, plan)[0][known_N].any()
    assert 0 < sum(expected) < len(everything)


def test_for_a_million_centre_crops_no_plan_is_made(tmp_path):
    """What is asked of every picture are its columns; nothing here is an object a picture."""
    unasked = partial(pytest.fail, "only random crops and boxes need this")
    count = 10**5
    heights, widths = np.random.default_rng(0).integers(16, 4000, (2, count))
    pictures = Lazy(count, lambda number: pytest.fail(f"record {number} was made"))
    columns = Columns(heights, widths, np.ones(count, np.int64), unasked, unasked)
    plan = plan_resolutions(pictures, [BUCKETS], Fitting("upscale"), Cut(flip=True), columns)
    contents = np.random.default_rng(1).integers(0, 2**63, (count, 2), dtype=np.uint64)
    there_N, missing_N = LatentCache(tmp_path, "vae").count(contents, np.ones(count, bool), plan)
    assert not there_N.any()
    assert (missing_N == 2).all()


def test_what_is_read_is_what_was_made_rounded_to_half_precision(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    put(cache, (1, CONTENT, PLAN))
    mean_CHW, std_CHW = cache.read(CONTENT, PLAN)
    assert mean_CHW.dtype == std_CHW.dtype == torch.float32
    assert torch.equal(mean_CHW, latent()[0].float())
    assert torch.equal(std_CHW, latent()[1].float())
    assert cache.has(CONTENT, PLAN)
    other = digest_content(b"another")
    assert cache.read(other, PLAN) is None
    assert not cache.has(other, PLAN)


def test_means_are_stored_alone_and_do_not_serve_for_draws(tmp_path):
    means, draws = LatentCache(tmp_path, "vae", "mean"), LatentCache(tmp_path, "vae", "sample")
    put(means, (1, CONTENT, PLAN))
    assert tuple(means.store.read(0).shape) == (1, 4, 2, 4)
    mean_CHW, std_CHW = means.read(CONTENT, PLAN)
    assert torch.equal(mean_CHW, latent()[0].float())
    assert torch.equal(std_CHW, torch.zeros(4, 2, 4))
    draws.refresh()
    assert draws.read(CONTENT, PLAN) is None
    assert Reasons(draws).of(1, CONTENT, PLAN) == "stored copy unusable"


def test_a_latent_with_deviation_serves_for_its_mean(tmp_path):
    means, draws = LatentCache(tmp_path, "vae", "mean"), LatentCache(tmp_path, "vae", "sample")
    put(draws, (1, CONTENT, PLAN))
    means.refresh()
    mean_CHW, std_CHW = means.read(CONTENT, PLAN)
    assert torch.equal(mean_CHW, latent()[0].float())
    assert not std_CHW.any()
    plan = plan_of(records_of([(16, 32)]))
    put(draws, (2, CONTENT, plan.plans[0]))
    means.refresh()
    there_N, missing_N = means.count(contents_of([CONTENT]), np.array([True]), plan)
    assert (there_N.tolist(), missing_N.tolist()) == ([1], [0])


def test_an_entry_that_cannot_be_read_is_named_and_absent(tmp_path, caplog, monkeypatch):
    """A mean that is damaged: the entry with a deviation, if there is one, serves in its place."""
    means, draws = LatentCache(tmp_path, "vae", "mean"), LatentCache(tmp_path, "vae", "sample")
    put(means, (1, CONTENT, PLAN))
    put(draws, (1, CONTENT, PLAN))
    means.refresh()
    read = means.store.read

    def damaged(row):
        if row == 0:
            raise DamagedEntry(tmp_path / "0000.blobs", "ab12", "is cut short")
        return read(row)

    monkeypatch.setattr(means.store, "read", damaged)
    assert torch.equal(means.read(CONTENT, PLAN)[0], latent()[0].float())
    assert "0000.blobs: entry ab12 is cut short; its picture is encoded again" in caplog.text
    draws_only_damaged = LatentCache(tmp_path, "vae", "sample")
    for shard in tmp_path.glob("*/*.blobs"):
        shard.unlink()
    assert draws_only_damaged.read(CONTENT, PLAN) is None


def test_why_a_latent_has_to_be_made(tmp_path):
    other, plan_2 = digest_content(b"another"), replace(PLAN, crop_tl=(1, 0))
    put(LatentCache(tmp_path, "vae"), (1, CONTENT, PLAN), (1, CONTENT, plan_2), (2, other, PLAN))
    put(LatentCache(tmp_path, "vae 2"), (3, CONTENT, PLAN))
    put(LatentCache(tmp_path, "vae 2", recipe="dali"), (3, CONTENT, PLAN))
    why = Reasons(LatentCache(tmp_path, "vae")).of
    assert why(7, CONTENT, PLAN) == "new"
    assert why(1, digest_content(b"edited"), PLAN) == "picture changed"
    assert why(2, CONTENT, PLAN) == "picture changed"
    assert why(2, other, plan_2) == "size or crop changed"
    assert why(3, CONTENT, PLAN) == "VAE changed"
    assert why(1, CONTENT, PLAN) == why(1, CONTENT, plan_2) == "stored copy unusable"
    for changed in (LatentCache(tmp_path, "vae", background=(0, 0, 0)), LatentCache(tmp_path, "vae", recipe="x")):
        assert Reasons(changed).of(1, CONTENT, PLAN) == "preparation changed"
    assert Reasons(LatentCache(tmp_path, "vae 2", recipe="x")).of(3, CONTENT, PLAN) == "preparation changed"
    for changes in CHANGES_OF_A_PLAN:
        assert why(2, other, replace(PLAN, **changes)) == "size or crop changed"


def test_the_reason_of_sample_ids_beyond_63_bits_and_of_an_empty_cache(tmp_path):
    assert Reasons(LatentCache(tmp_path, "vae")).of(2**64 - 1, CONTENT, PLAN) == "new"
    put(LatentCache(tmp_path, "vae"), (2**64 - 1, CONTENT, PLAN), (0, CONTENT, PLAN))
    why = Reasons(LatentCache(tmp_path, "vae"))
    assert why.of(2**64 - 1, CONTENT, PLAN) == why.of(0, CONTENT, PLAN) == "stored copy unusable"


@pytest.mark.parametrize("cut", [Cut(), Cut(flip=True), Cut("random", variants=3)])
@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_the_projected_size_is_what_is_stored(tmp_path, cut, posterior):
    sizes = [(16, 16), (33, 33), (20, 40), (40, 20)]
    plan = plan_of(records_of(sizes), cut)
    cache = LatentCache(tmp_path, "vae", posterior)
    put(cache, *((record.sample_id, digest_content(record.path.encode()), one) for record, one in plan.prepared()))
    stored = sum(cache.store.read(row).nbytes for row in range(plan.latents()))
    projected = projected_bytes(plan, posterior)
    # Of random crops a picture may have fewer than there are in the mean: the estimate takes the mean.
    assert projected == stored if cut.position == "centre" else abs(projected / stored - 1) < 0.25


def test_it_travels_light(tmp_path):
    cache = LatentCache(tmp_path / "cache", "vae")
    put(cache, *((number, digest_content(bytes([number])), PLAN) for number in range(50)))
    packed = pickle.dumps(cache)
    assert len(packed) < 1000
    copy = pickle.loads(packed)
    assert torch.equal(copy.read(digest_content(b"\3"), PLAN)[0], latent(3)[0].float())


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache\.path: .*cache is a file"):
        LatentCache(tmp_path / "cache", "vae")


def test_files_of_others_in_the_folder_are_neither_read_nor_removed(tmp_path, caplog):
    theirs = [tmp_path / "model.safetensors", tmp_path / "notes.txt", tmp_path / "pictures" / "1.png"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    put(LatentCache(tmp_path, "vae"), (1, CONTENT, PLAN))
    assert LatentCache(tmp_path, "vae").has(CONTENT, PLAN)
    assert all(path.read_text() == "x" for path in theirs)
    assert caplog.text == ""


def test_a_picture_without_crop_and_its_like_in_another_bucket_differ(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    one, other = (plan_crop((32, 32), [bucket]) for bucket in BUCKETS)
    put(cache, (1, CONTENT, one))
    assert cache.has(CONTENT, one)
    assert not cache.has(CONTENT, other)
