"""The latent cache: keys, reuse, damage, crashes, and pictures that cannot be encoded."""

import json
import os
import pickle
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_training.data import index as index_module
from sdxl_training.data.buckets import plan_crop
from sdxl_training.data.cache import LatentCache, cache_items, fill, latent_key, projected_bytes
from sdxl_training.data.crops import Cut
from sdxl_training.data.images import hash_content, read_pixels, resize_and_crop, to_model_range
from sdxl_training.data.shards import Origin, ShardWriter
from sdxl_training.records import Bucket, ImageRecord, UserError

BUCKETS = [Bucket((16, 16)), Bucket((16, 32))]


class Silent:
    def __init__(self):
        self.total = self.done = 0

    @contextmanager
    def track(self, description, total):
        self.total += total

        def advance(n):
            self.done += n

        yield advance


class Encoder:
    """Stands for a VAE: 8x8 blocks averaged; remembers the batches it got."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels_BCHW):
        assert pixels_BCHW.dtype == torch.float32
        assert pixels_BCHW.abs().max() <= 1
        self.shapes.append(tuple(pixels_BCHW.shape))
        mean_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8) * self.scale
        return mean_BCHW, mean_BCHW.abs() * 0.1 + 0.01


def make_record(folder: Path, number: int, size_hw=(16, 16), seed: int | None = None) -> ImageRecord:
    path = folder / f"{number}.png"
    noise = np.random.default_rng(number if seed is None else seed).integers(0, 256, (*size_hw, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return ImageRecord(number, str(path), size_hw, hash_content(path.read_bytes()), ("a",), ("a",))


@pytest.fixture
def records(tmp_path):
    return [make_record(tmp_path, number, (16, 16) if number % 3 else (20, 40)) for number in range(10)]


def items_of(records, vae="vae"):
    return cache_items([(record, plan_crop(record.size_hw, BUCKETS)) for record in records], vae)


def filled(folder, items, encode=None, posterior="sample", **options):
    cache = LatentCache(folder, posterior)
    report = fill(cache, items, encode or Encoder(), Silent(), **{"batch_size": 4, **options})
    return cache, report


def expected(item):
    pixels_CHW = to_model_range(resize_and_crop(read_pixels(item.record.path), item.plan))
    return tuple(moment[0].half().float() for moment in Encoder()(pixels_CHW[None]))


def test_every_picture_is_encoded_once_and_read_back(records, tmp_path):
    items, encoder, progress = items_of(records), Encoder(), Silent()
    cache = LatentCache(tmp_path / "cache")
    report = fill(cache, items, encoder, progress, batch_size=4)
    assert report.describe() == "0 latents reused, 10 encoded: 10 new"
    assert sorted(encoder.shapes) == [(2, 3, 16, 16), (4, 3, 16, 16), (4, 3, 16, 32)]
    assert (progress.done, progress.total) == (10, 10)
    for item in items:
        mean_CHW, std_CHW = cache.read(item.key)
        assert mean_CHW.dtype == std_CHW.dtype == torch.float32
        torch.testing.assert_close((mean_CHW, std_CHW), expected(item), rtol=0, atol=0)


def test_a_second_fill_encodes_nothing_and_opens_no_picture(records, tmp_path):
    filled(tmp_path / "cache", items_of(records))
    for record in records:
        Path(record.path).unlink()
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    _, report = filled(tmp_path / "cache", items_of(records), encode=None)
    assert report.describe() == "10 latents reused, 0 encoded"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before


def test_the_report_says_why(records, tmp_path):
    filled(tmp_path / "cache", items_of(records[:8]))
    changed = [make_record(tmp_path, 1, seed=77), *records[2:]]
    plans = [plan_crop(record.size_hw, BUCKETS) for record in changed]
    plans[1] = replace(plans[1], resized_hw=(18, 18), crop_tl=(1, 1))
    items = cache_items(zip(changed, plans, strict=True), "vae")
    items[2] = replace(items[2], key=latent_key(changed[2], plans[2], "other vae"))
    _, report = filled(tmp_path / "cache", items)
    assert report.encoded == {"new": 2, "picture changed": 1, "size or crop changed": 1, "VAE changed": 1}
    assert report.reused == 4
    assert report.describe().startswith("4 latents reused, 5 encoded: 1 VAE changed, 2 new, 1 picture changed")


def test_the_key_depends_on_all_that_the_latent_depends_on_and_nothing_else(records):
    record, plan = records[0], plan_crop(records[0].size_hw, BUCKETS)
    key = latent_key(record, plan, "vae")
    changes = [
        latent_key(replace(record, content_hash="0" * 32), plan, "vae"),
        latent_key(record, replace(plan, resized_hw=(17, 34)), "vae"),
        latent_key(record, replace(plan, crop_tl=(0, 1)), "vae"),
        latent_key(record, replace(plan, bucket=Bucket((16, 16))), "vae"),
        latent_key(record, replace(plan, flipped=True), "vae"),
        latent_key(record, plan, "vae 2"),
    ]
    assert len({key, *changes}) == 7
    moved = replace(record, path="/elsewhere.png", sample_id=99, captions=("b",), tags=("b",), repeats=4)
    assert latent_key(moved, plan, "vae") == key


def test_a_mirrored_twin_is_a_latent_of_its_own(records, tmp_path):
    record = records[0]
    variants = Cut(flip=True).plans(record.size_hw, BUCKETS[1])
    items = cache_items([(record, plan) for plan in variants], "vae")
    cache, report = filled(tmp_path / "cache", items)
    assert report.encoded == {"new": 2}
    (one_CHW, _), (twin_CHW, _) = (cache.read(item.key) for item in items)
    assert not torch.equal(one_CHW, twin_CHW)
    torch.testing.assert_close(twin_CHW.flip(-1), one_CHW, rtol=1e-3, atol=1e-3)  # this encoder's blocks mirror exactly


def test_every_missing_variant_of_a_picture_is_encoded_and_named(records, tmp_path):
    """Three crops of one picture, of which the first is there: the reason of each further one is its own."""
    record, cut = records[0], Cut("random", variants=3)
    items = cache_items([(record, plan) for plan in cut.plans(record.size_hw, BUCKETS[0], record.sample_id)], "vae")
    assert len({item.key for item in items}) == 3
    folder = tmp_path / "cache"
    filled(folder, items[:1])
    cache, report = filled(folder, items)
    assert (report.reused, sum(report.encoded.values())) == (1, 2)
    assert report.encoded == {"size or crop changed": 2}
    assert all(item.key in cache for item in items)
    Path(record.path).write_bytes(b"no picture")
    _, report = filled(tmp_path / "other", items)
    assert {bad.path for bad in report.quarantined} == {record.path}


def test_equal_pictures_share_a_latent(tmp_path):
    twins = [make_record(tmp_path, number, seed=1) for number in range(3)]
    cache, report = filled(tmp_path / "cache", items_of(twins))
    assert len(cache) == 1
    assert report.describe() == "2 latents reused, 1 encoded: 1 new"


def test_shards_are_bounded_and_all_are_read(records, tmp_path, monkeypatch):
    items = items_of(records)
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (100,))  # bytes: three small latents or two wide ones
    cache, _ = filled(tmp_path / "cache", items)
    shards = list((tmp_path / "cache").glob("*.safetensors"))
    assert len(shards) >= 4
    for item in items:
        assert torch.equal(cache.read(item.key)[0], expected(item)[0])
    names = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert names == {".safetensors", ".json"}, "temporary files are left"


def damage_flip(shard: Path):
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    time.sleep(0.02)  # beyond the clock tick of the file system's time stamps
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-5]), "bytes instead of"),
        (damage_flip, "does not match its checksum"),
        (lambda shard: shard.with_suffix(".json").write_text('{"posterior"'), "its manifest cannot be read"),
        (lambda shard: shard.with_suffix(".json").write_text("[]"), "its manifest cannot be read"),
    ],
)
def test_a_damaged_shard_is_named_and_its_pictures_encoded_again(records, tmp_path, harm, reason, caplog):
    folder = tmp_path / "cache"
    filled(folder, items_of(records[:6]), writer="good")
    filled(folder, items_of(records), writer="bad")
    (shard,) = folder.glob("bad-*.safetensors")
    harm(shard)
    cache = LatentCache(folder)
    assert len(cache) == 6
    assert f"{shard}: " in caplog.text
    assert reason in caplog.text
    report = fill(cache, items_of(records), Encoder(), Silent(), batch_size=4)
    known = "new" if "manifest" in reason else "stored copy unusable"
    assert (report.reused, report.encoded) == (6, {known: 4})
    caplog.clear()
    fresh = LatentCache(folder)
    assert len(fresh) == 10
    assert caplog.text == ""
    for item in items_of(records):
        assert torch.equal(fresh.read(item.key)[0], expected(item)[0])


def test_files_of_others_in_the_folder_are_neither_read_nor_removed(records, tmp_path, caplog):
    """A folder of models: each has a safetensors file and a description in JSON beside it."""
    theirs = {name: tmp_path / name for name in ("my-model.json", "my-model.safetensors", "0123456789abcdef.json")}
    for path in theirs.values():
        path.write_text("{}")
    filled(tmp_path, items_of(records))
    assert all(path.read_text() == "{}" for path in theirs.values())
    assert caplog.text == ""
    assert len(LatentCache(tmp_path)) == 10


def test_a_copied_cache_is_checked_once_and_then_trusted(records, tmp_path, monkeypatch):
    filled(tmp_path / "cache", items_of(records))
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    os.utime(shard, (1, 1))
    assert len(LatentCache(tmp_path / "cache")) == 10
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    assert len(LatentCache(tmp_path / "cache")) == 10


def test_a_shard_without_manifest_does_not_exist(records, tmp_path, monkeypatch):
    """The process dies between shard and manifest: nothing is listed, and the next run starts over."""
    folder = tmp_path / "cache"
    original = index_module.write_atomically

    def dies(path, payload):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        original(path, payload)

    monkeypatch.setattr("sdxl_training.data.shards.write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        filled(folder, items_of(records))
    monkeypatch.undo()
    assert len(LatentCache(folder)) == 0
    assert filled(folder, items_of(records))[1].encoded == {"new": 10}
    assert len(list(folder.glob("*.safetensors"))) == 1, "the orphan had the same content and name"


def test_an_interrupt_keeps_what_was_encoded(records, tmp_path):
    encoder = Encoder()

    def interrupted(pixels_BCHW):
        if len(encoder.shapes) == 2:
            raise KeyboardInterrupt
        return encoder(pixels_BCHW)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", items_of(records), interrupted)
    cache, report = filled(tmp_path / "cache", items_of(records))
    assert (report.reused, report.encoded) == (6, {"new": 4})
    assert len(cache) == 10


def test_undecodable_and_changed_files_are_quarantined_by_name(records, tmp_path):
    cut = Path(records[1].path)
    cut.write_bytes(cut.read_bytes()[:-200])
    records[1] = replace(records[1], content_hash=hash_content(cut.read_bytes()))
    make_record(tmp_path, 4, seed=123)  # after the scan
    Path(records[6].path).unlink()
    progress = Silent()
    cache = LatentCache(tmp_path / "cache")
    report = fill(cache, items_of(records), Encoder(), progress, batch_size=4)
    reasons = {Path(bad.path).name: bad.reason for bad in report.quarantined}
    assert set(reasons) == {"1.png", "4.png", "6.png"}
    assert reasons["1.png"].startswith("the picture is damaged")
    assert reasons["4.png"] == "the file changed after it was scanned; start again"
    assert reasons["6.png"].startswith("the file cannot be read")
    assert report.encoded == {"new": 7}
    assert report.reused == 0
    assert report.describe().endswith("; 3 pictures quarantined")
    assert (progress.done, progress.total) == (10, 10)
    assert [item.key in cache for item in items_of(records)] == [name not in "146" for name in "0123456789"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("moment", [0, 1])
def test_what_is_not_finite_in_half_precision_is_tried_alone_and_then_quarantined(records, tmp_path, value, moment):
    items = items_of(records)
    culprit = to_model_range(resize_and_crop(read_pixels(records[1].path), items[1].plan))
    encoder = Encoder()

    def encode(pixels_BCHW):
        moments = encoder(pixels_BCHW)
        for b, pixels_CHW in enumerate(pixels_BCHW):
            if pixels_CHW.shape == culprit.shape and torch.equal(pixels_CHW, culprit):
                moments[moment][b, 0, 0, 0] = value
        return moments

    cache, report = filled(tmp_path / "cache", items, encode)
    (bad,) = report.quarantined
    assert bad.path == records[1].path
    assert "not finite" in bad.reason
    assert len(cache) == 9
    assert encoder.shapes.count((1, 3, 16, 16)) == 1
    assert all(torch.isfinite(torch.cat(cache.read(item.key))).all() for item in items if item.key in cache)


def test_a_transient_failure_of_a_batch_is_cured_by_the_retry(records, tmp_path):
    encoder = Encoder()

    def overflows_in_batches(pixels_BCHW):
        mean_BCHW, std_BCHW = encoder(pixels_BCHW)
        return (mean_BCHW * float("nan") if len(pixels_BCHW) > 1 else mean_BCHW), std_BCHW

    cache, report = filled(tmp_path / "cache", items_of(records), overflows_in_batches)
    assert report.quarantined == ()
    assert all(torch.equal(cache.read(item.key)[0], expected(item)[0]) for item in items_of(records))


def test_means_only(records, tmp_path):
    items = items_of(records)
    cache, _ = filled(tmp_path / "means", items, posterior="mean")
    mean_CHW, std_CHW = cache.read(items[0].key)
    assert torch.equal(mean_CHW, expected(items[0])[0])
    assert torch.equal(std_CHW, torch.zeros_like(mean_CHW))
    assert len(LatentCache(tmp_path / "means", "sample")) == 0, "means alone cannot be sampled from"
    _, report = filled(tmp_path / "means", items, posterior="sample")
    assert report.encoded == {"stored copy unusable": 10}
    assert filled(tmp_path / "means", items, posterior="mean")[1].reused == 10


def test_the_projected_size_is_what_is_stored(records, tmp_path):
    items = items_of(records)
    for posterior in ("sample", "mean"):
        filled(tmp_path / posterior, items, posterior=posterior)
        (shard,) = (tmp_path / posterior).glob("*.safetensors")
        header = int.from_bytes(shard.read_bytes()[:8], "little")
        stored = shard.stat().st_size - 8 - header
        assert projected_bytes([item.plan for item in items], posterior, channels=3) == stored


def test_ranks_write_side_by_side(records, tmp_path):
    items = items_of(records)
    first, second = LatentCache(tmp_path / "cache"), LatentCache(tmp_path / "cache")
    fill(first, items[::2], Encoder(), Silent(), batch_size=4, writer="rank0")
    fill(second, items[1::2], Encoder(), Silent(), batch_size=4, writer="rank1")
    first.refresh()
    assert len(first) == len(second) == 10


def test_it_travels_light(records, tmp_path):
    cache, _ = filled(tmp_path / "cache", items_of(records))
    cache.read(items_of(records)[0].key)
    packed = pickle.dumps(cache)
    assert len(packed) < 400
    copy = pickle.loads(packed)
    assert torch.equal(copy.read(items_of(records)[3].key)[0], cache.read(items_of(records)[3].key)[0])


def test_a_full_disk_is_a_sentence_and_keeps_earlier_shards(records, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    filled(folder, items_of(records[:4]))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"No space left on device.*Free some space, or set data\.cache\.path"):
        filled(folder, items_of(records))
    monkeypatch.undo()
    assert len(LatentCache(folder)) == 4


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache\.path: .*cache is a file"):
        LatentCache(tmp_path / "cache")


def test_a_vanished_shard_is_named(records, tmp_path):
    cache, _ = filled(tmp_path / "cache", items_of(records))
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.unlink()
    with pytest.raises(UserError, match="has vanished"):
        cache.read(items_of(records)[0].key)


def test_the_manifest_is_plain_and_complete(records, tmp_path):
    items = items_of(records)
    filled(tmp_path / "cache", items)
    (path,) = (tmp_path / "cache").glob("rank0-*.json")
    content = json.loads(path.read_text())
    assert set(content["entries"]) == {item.key for item in items}
    assert Origin(*content["entries"][items[0].key]) == Origin(0, records[0].content_hash, "16x32+0+0>16x32")
