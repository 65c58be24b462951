"""What a visit finds: a latent of the cache, pixels, or why the picture cannot be used."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from sdxl_training.data.cache import LatentCache
from sdxl_training.data.crops import Cut
from sdxl_training.data.encoding import Encoder
from sdxl_training.data.fetching import Fetch, Stored, Unencoded
from sdxl_training.data.images import UnreadablePicture, read_pixels, resize_and_crop
from sdxl_training.data.store_writer import StoreWriter
from tests.latents import Folder, Known, SharedKnown, Vae, plan_of

SIZES = [(16, 16), (20, 40), (33, 80), (16, 32)]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "pictures", SIZES)


class Rig:
    """A fetch with a cache, and an encoder that another process might have."""

    def __init__(self, folder, tmp_path, posterior="sample", cut=None):
        self.path, self.posterior = tmp_path / "cache", posterior
        self.plan = plan_of(folder.records, cut or Cut())
        self.known = Known(len(folder.records))
        self.cache = LatentCache(self.path, "vae", posterior)
        self.fetch = Fetch(folder, self.known, self.cache)

    def visit(self, number, variant=0):
        return self.fetch(self.plan.records[number], self.plan.variants[number][variant])

    def encode(self, *pictures):
        cache = LatentCache(self.path, "vae", self.posterior)
        with StoreWriter(self.path) as writer:
            return [Encoder(Vae(), torch.device("cpu"), 4, cache, writer)([one])[0] for one in pictures]


def test_what_nobody_has_encoded_comes_as_pixels(folder, tmp_path):
    rig = Rig(folder, tmp_path, cut=Cut(flip=True))
    for number, record in enumerate(folder.records):
        for variant, plan in enumerate(rig.plan.variants[number]):
            found = rig.visit(number, variant)
            assert isinstance(found, Unencoded)
            assert torch.equal(found.pixels_HWC, resize_and_crop(read_pixels(record.path), plan))
            assert (found.path, found.picture, found.sample_id) == (record.path, number, record.sample_id)
            assert (found.content, found.plan) == (folder.digest(number), plan)
        assert rig.known.known(number) == folder.digest(number)


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_what_is_encoded_is_read_and_equal_to_what_was_handed_out(folder, tmp_path, posterior):
    rig = Rig(folder, tmp_path, posterior)
    latents = rig.encode(*(rig.visit(number) for number in range(4)))
    folder.opened.clear()
    for number, latent in enumerate(latents):
        found = rig.visit(number)  # the cache has news: it is looked at once more
        assert isinstance(found, Stored)
        assert torch.equal(found.mean_CHW, latent[0])
        assert torch.equal(found.std_CHW, latent[1])
    assert folder.opened == []


def test_news_are_asked_for_only_where_something_is_missing(folder, tmp_path, monkeypatch):
    rig = Rig(folder, tmp_path)
    asked = []
    monkeypatch.setattr(rig.known, "refresh", lambda: asked.append("contents") or False)
    refresh = rig.cache.refresh
    monkeypatch.setattr(rig.cache, "refresh", lambda: asked.append("cache") or refresh())
    pixels = rig.visit(0)
    assert asked == ["contents"], "of a picture that nobody has read there is no latent"
    rig.encode(pixels)
    rig.visit(0)
    assert asked == ["contents", "contents", "cache"]
    rig.visit(0)
    assert len(asked) == 3


def test_what_another_process_has_learnt_and_encoded_is_used(folder, tmp_path):
    here = SharedKnown(4, tmp_path / "known")
    rig = Rig(folder, tmp_path)
    rig.fetch = replace(rig.fetch, contents=here)
    there = replace(rig.fetch, contents=SharedKnown(4, tmp_path / "known"))
    rig.encode(there(folder.records[2], rig.plan.plans[2]))
    folder.opened.clear()
    assert isinstance(rig.visit(2), Stored)
    assert folder.opened == []


def test_equal_pictures_share_a_latent(folder, tmp_path):
    folder.file(3).write_bytes(folder.file(0).read_bytes())
    folder.records[3] = replace(folder.records[3], size_hw=(16, 16))
    rig = Rig(folder, tmp_path)
    rig.encode(rig.visit(0))
    rig.cache.refresh()
    assert isinstance(rig.visit(3), Stored)
    assert rig.known.known(3) == rig.known.known(0)
    assert len(rig.cache.store) == 1


def test_a_file_that_changed_is_keyed_by_what_is_read(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    before = rig.visit(1)
    rig.encode(before)
    folder.add(1, SIZES[1], seed=7)
    assert isinstance(rig.visit(1), Stored), "as long as nobody reads it, it is what it was when it was indexed"
    for shard in rig.path.glob("*/*.blobs"):
        shard.write_bytes(b"")
    after = rig.visit(1)
    assert isinstance(after, Unencoded)
    assert after.content == rig.known.known(1) == folder.digest(1) != before.content
    rig.encode(after)
    assert isinstance(rig.visit(1), Stored)


def test_a_file_that_changed_to_one_that_is_encoded_is_not_decoded(folder, tmp_path, monkeypatch):
    rig = Rig(folder, tmp_path)
    rig.encode(rig.visit(1))
    rig.known.learn(1, bytes(16))
    monkeypatch.setattr("sdxl_training.data.fetching.prepare", lambda *_: pytest.fail("it was decoded"))
    rig.cache.refresh()
    assert isinstance(rig.visit(1), Stored)
    assert rig.known.known(1) == folder.digest(1)


def test_a_file_of_another_size_than_planned_is_unusable(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    folder.add(1, (24, 48))
    with pytest.raises(UnreadablePicture, match="it is no longer 20x40 as when it was indexed; start again"):
        rig.visit(1)
    assert rig.known.failure(1) == "it is no longer 20x40 as when it was indexed; start again"


@pytest.mark.parametrize(
    ("harm", "reason", "was_read"),
    [
        (lambda file: file.unlink(), "the file cannot be read: No such file", False),
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "damaged", True),
        (lambda file: file.write_bytes(b"no picture"), "picture", True),
    ],
)
def test_what_cannot_be_used_is_named_and_not_tried_again(folder, tmp_path, harm, reason, was_read):
    rig = Rig(folder, tmp_path)
    harm(folder.file(2))
    with pytest.raises(UnreadablePicture, match=reason) as first:
        rig.visit(2)
    assert rig.known.failure(2) == first.value.reason
    assert (rig.known.known(2) is not None) == was_read
    folder.opened.clear()
    with pytest.raises(UnreadablePicture) as second:
        rig.visit(2)
    assert (second.value.path, second.value.reason) == (first.value.path, first.value.reason)
    assert folder.opened == []


def test_a_failure_that_another_process_met_is_not_tried_again(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    rig.fetch = replace(rig.fetch, contents=SharedKnown(4, tmp_path / "known"))
    rig.visit(0)
    folder.opened.clear()
    SharedKnown(4, tmp_path / "known").fail(0, "its latent is not finite")
    with pytest.raises(UnreadablePicture, match="its latent is not finite"):
        rig.visit(0)
    assert folder.opened == []


def test_a_picture_that_failed_in_one_variant_is_not_shown_in_another(folder, tmp_path):
    """Else what a visit shows would depend on who came to which variant first."""
    rig = Rig(folder, tmp_path)
    rig.encode(rig.visit(0))
    rig.cache.refresh()
    rig.known.fail(0, "its latent is not finite")
    with pytest.raises(UnreadablePicture, match="its latent is not finite"):
        rig.visit(0)


def test_a_damaged_entry_is_named_and_encoded_again(folder, tmp_path, caplog):
    rig = Rig(folder, tmp_path)
    rig.encode(rig.visit(0), rig.visit(1))
    assert isinstance(rig.visit(0), Stored)
    (shard,) = rig.path.glob("*/*.blobs")
    rig.fetch = replace(rig.fetch, cache=LatentCache(rig.path, "vae"))
    shard.write_bytes(shard.read_bytes()[:10])
    found = rig.visit(1)
    assert isinstance(found, Unencoded)
    assert f"{shard}: entry" in caplog.text
    assert "encoded again" in caplog.text
    rig.encode(found)
    assert isinstance(rig.visit(1), Stored)


def test_without_a_cache_every_visit_decodes(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    fetch = replace(rig.fetch, cache=None)
    for _ in range(3):
        assert isinstance(fetch(folder.records[1], rig.plan.plans[1]), Unencoded)
    assert folder.opened == [1, 1, 1]


def test_transparent_pixels_show_the_background(tmp_path):
    folder = Folder(tmp_path / "pictures", [(16, 16)])
    folder.file(0).write_bytes(cv2.imencode(".png", np.zeros((16, 16, 4), np.uint8))[1].tobytes())
    rig = Rig(folder, tmp_path)
    found = replace(rig.fetch, background=(10, 20, 30))(folder.records[0], rig.plan.plans[0])
    assert found.pixels_HWC[3, 3].tolist() == [10, 20, 30]
