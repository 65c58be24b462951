"""Filling the cache: everything encoded once, whatever is there, breaks, changes, fills up, or dies meanwhile."""

import os
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from sdxl_training.data.cache import LatentCache
from sdxl_training.data.claims import Claims
from sdxl_training.data.crops import Cut
from sdxl_training.data.encoding import NOT_FINITE, Encoder
from sdxl_training.data.filling import Fill, FillReport
from sdxl_training.data.images import read_pixels, resize_and_crop, to_model_range
from sdxl_training.data.preparing import CpuPreparer
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import Quarantined, UserError
from tests.latents import Folder, Known, Silent, Vae, plan_of

SIZES = [(16, 16) if number % 3 else (20, 40) for number in range(10)]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "pictures", SIZES)


@pytest.fixture
def pieces_of(monkeypatch):
    return lambda latents: monkeypatch.setattr("sdxl_training.data.filling.PIECE", latents)


def never_wait():
    pytest.fail("there was nobody to wait for")


class Rig:
    """One process that fills a cache."""

    def __init__(self, folder, tmp_path, *, vae=None, cut=None, posterior="sample", fingerprint="vae", known=None):
        self.folder, self.path = folder, tmp_path / "cache"
        self.vae = vae or Vae()
        self.plan = plan_of(folder.records, cut or Cut())
        self.known = known or Known(len(folder.records))
        self.fingerprint, self.posterior = fingerprint, posterior
        self.preparer = CpuPreparer(2)
        self.claims = Claims(tmp_path / "claims")
        self.progress = Silent()
        self.on_full, self.wait_for_room = never_wait, never_wait

    def fill(self, **changes):
        self.cache = LatentCache(self.path, self.fingerprint, self.posterior)
        with StoreWriter(self.path, on_full=lambda *_: self.on_full(), wait=lambda: self.wait_for_room()) as writer:
            self.encoder = Encoder(self.vae, CPU, 4, self.cache, writer)
            parts = {"claims": self.claims, "wait": never_wait, "threads": 2, "preparer": self.preparer} | changes
            fill = Fill(self.plan, self.folder, self.known, self.cache, self.encoder, **parts)
            return fill.run(self.progress)

    def stored(self):
        """Return the latent of every record's every variant as a reader finds it, None where there is none."""
        cache = LatentCache(self.path, self.fingerprint, self.posterior)
        return [cache.read(self.folder.digest(record.picture), plan) for record, plan in self.plan.prepared()]

    def check(self, *without):
        """Check that every picture's latent is there and right, but for the pictures `without`."""
        for (record, plan), found in zip(self.plan.prepared(), self.stored(), strict=True):
            if record.picture in without:
                assert found is None
                continue
            mean, std = Vae()(to_model_range(resize_and_crop(read_pixels(record.path), plan))[None])
            assert torch.equal(found[0], mean[0].half().float())
            assert torch.equal(found[1], std[0].half().float())

    def entries(self):
        """Return the number of times each distinct key was ever written."""
        keys = LatentCache(self.path, self.fingerprint).store.origins()[0]
        return Counter(map(bytes, keys))


def fail_for(folder, number, vae, value=float("nan")):
    """A VAE that is lost on one picture."""
    plan = plan_of(folder.records).plans[number]
    victim = to_model_range(resize_and_crop(read_pixels(str(folder.file(number))), plan))

    def encode(pixels_BCHW):
        mean_BCHW, std_BCHW = vae(pixels_BCHW)
        for b, each in enumerate(pixels_BCHW):
            if torch.equal(each, victim):
                mean_BCHW[b] = value
        return mean_BCHW, std_BCHW

    return encode


def test_every_picture_is_encoded_once_and_read_back(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    assert rig.fill().describe() == "0 latents reused, 10 encoded: 10 new"
    assert sorted(rig.vae.shapes) == [(2, 3, 16, 16), (4, 3, 16, 16), (4, 3, 16, 32)]
    assert sorted(folder.opened) == list(range(10))
    assert (rig.progress.done, rig.progress.total) == (10, 10)
    assert [rig.known.known(number) for number in range(10)] == [folder.digest(number) for number in range(10)]
    rig.check()


def test_a_second_fill_opens_no_picture_and_writes_nothing(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    rig.fill()
    rig.check()
    for record in folder.records:
        folder.file(record.picture).unlink()
    before = sorted(tmp_path.rglob("*"))
    again = Rig(folder, tmp_path, known=rig.known)
    again.claims = Claims(tmp_path / "claims of nothing")
    assert again.fill().describe() == "10 latents reused, 0 encoded"
    assert sorted(tmp_path.rglob("*")) == before
    assert again.progress.total == 0


def test_what_is_there_but_nobody_remembers_is_read_and_not_decoded(folder, tmp_path):
    """The index was lost: digests are learnt again, latents are found."""
    Rig(folder, tmp_path).fill()
    rig = Rig(folder, tmp_path)
    rig.preparer = lambda jobs: [pytest.fail("it was decoded") for _ in jobs]
    assert rig.fill().describe() == "0 latents reused, 0 encoded; 10 more by other processes or for equal pictures"
    assert rig.vae.shapes == []
    assert rig.known.is_known.all()


@pytest.mark.parametrize("latents", [1, 3, 64])
def test_the_report_says_why(folder, tmp_path, pieces_of, latents):
    pieces_of(latents)
    rig = Rig(folder, tmp_path)
    rig.plan = rig.plan.subset(range(8))
    rig.fill()
    folder.add(1, SIZES[1], seed=77)
    rig.known.is_known[1] = False  # another file: nothing is known of it
    folder.records[2] = folder.add(2, (16, 40))
    folder.file(2).write_bytes(folder.file(2).read_bytes())
    rig.known.is_known[2] = False
    rig.plan = plan_of(folder.records)
    report = rig.fill()
    assert report.encoded == {"new": 2, "picture changed": 2}
    assert report.describe() == "6 latents reused, 4 encoded: 2 new, 2 picture changed"
    rig.check()
    report = Rig(folder, tmp_path, fingerprint="vae 2", known=rig.known).fill()
    assert report.describe() == "0 latents reused, 10 encoded: 10 VAE changed"
    assert Rig(folder, tmp_path, known=rig.known).fill().reused == 10, "the other VAE's latents are still there"


def test_another_crop_is_another_latent(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    rig.fill()
    flipped = Rig(folder, tmp_path, known=rig.known, cut=Cut(flip=True))
    assert flipped.fill().describe() == "10 latents reused, 10 encoded: 10 size or crop changed"
    flipped.check()


@pytest.mark.parametrize("cut", [Cut(flip=True), Cut("random", variants=3), Cut("random", 2, flip=True)])
@pytest.mark.parametrize("latents", [4, 64])
def test_every_variant_is_encoded_and_its_picture_read_once(tmp_path, cut, pieces_of, latents):
    pieces_of(latents)
    folder = Folder(tmp_path / "pictures", [(33, 90), (60, 33), (16, 16), (20, 40)])
    rig = Rig(folder, tmp_path, cut=cut)
    count = rig.plan.latents()
    assert rig.fill().encoded == {"new": count}
    assert sorted(folder.opened) == [0, 1, 2, 3]
    assert set(rig.entries().values()) == {1}
    assert len(rig.entries()) == count
    rig.check()


@pytest.mark.parametrize("latents", [1, 2, 64])
def test_equal_pictures_share_a_latent(tmp_path, pieces_of, latents):
    """In one piece, in the piece that is encoded while the next is decoded, and long after."""
    pieces_of(latents)
    folder = Folder(tmp_path / "pictures", [(16, 16)] * 9)
    for number in (1, 2, 5, 8):
        folder.add(number, (16, 16), seed=5)
    rig = Rig(folder, tmp_path)
    report = rig.fill()
    assert report.describe() == "0 latents reused, 6 encoded: 6 new; 3 more by other processes or for equal pictures"
    assert sum(shape[0] for shape in rig.vae.shapes) == 6
    assert rig.progress.done == rig.progress.total == 9
    rig.check()


@pytest.mark.parametrize("latents", [1, 64])
def test_of_equal_pictures_without_finite_latent_none_is_waited_for(tmp_path, pieces_of, latents):
    pieces_of(latents)
    folder = Folder(tmp_path / "pictures", [(16, 16)] * 4)
    for number in (1, 2):
        folder.add(number, (16, 16), seed=5)
    rig = Rig(folder, tmp_path, vae=fail_for(folder, 1, Vae()))
    assert rig.fill().encoded == {"new": 2}
    assert rig.known.reasons == {}
    assert rig.progress.done == rig.progress.total == 4


def test_what_cannot_be_used_is_quarantined_by_name(folder, tmp_path):
    file = folder.file(1)
    file.write_bytes(file.read_bytes()[:-200])
    folder.add(4, (18, 36))  # after it was indexed
    folder.file(6).unlink()
    rig = Rig(folder, tmp_path)
    report = rig.fill()
    assert set(rig.known.reasons) == {1, 4, 6}
    assert "damaged" in rig.known.reasons[1]
    assert rig.known.reasons[4] == "it is no longer 16x16 as when it was indexed; start again"
    assert rig.known.reasons[6].startswith("the file cannot be read")
    assert [rig.known.known(number) is not None for number in (1, 4, 6)] == [True, True, False]
    assert report == FillReport(0, {"new": 7}, 0)
    assert (rig.progress.done, rig.progress.total) == (10, 10)
    folder.opened.clear()
    assert rig.fill() == FillReport(7)
    assert folder.opened == []


def test_a_file_that_changed_since_it_was_indexed_is_keyed_by_what_is_read(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    for number in range(10):
        rig.known.learn(number, folder.digest(number))
    folder.add(4, SIZES[4], seed=1)
    rig.fill()
    assert rig.known.known(4) == folder.digest(4)
    rig.check()


def test_what_has_no_finite_latent_is_named_and_blames_the_vae_not_the_picture(folder, tmp_path):
    vae = Vae()
    rig = Rig(folder, tmp_path, vae=fail_for(folder, 4, vae))
    assert rig.fill().encoded == {"new": 9}
    assert rig.known.reasons == {}
    assert rig.encoder.take_bad() == [Quarantined(folder.records[4].path, NOT_FINITE)]
    rig.check(4)
    rig.vae = vae
    assert rig.fill() == FillReport(9, {"new": 1}, 0)
    rig.check()


def test_when_nothing_can_be_used_it_ends(folder, tmp_path):
    for number in range(10):
        folder.file(number).write_bytes(b"")
    rig = Rig(folder, tmp_path)
    assert rig.fill() == FillReport(0)
    assert len(rig.known.reasons) == 10
    assert sorted(folder.opened) == list(range(10)), "what is wrong with one is wrong with all that are equal"
    assert rig.fill() == FillReport(0)


def test_of_a_piece_only_what_is_missing_is_opened(folder, tmp_path):
    """Not what is known to be of no use, nor what is there."""
    rig = Rig(folder, tmp_path)
    rig.plan = rig.plan.subset([0, 1, 2, 3])
    rig.fill()
    rig.plan = plan_of(folder.records)
    rig.known.fail(7, "it was damaged when somebody tried")
    folder.opened.clear()
    assert rig.fill().encoded == {"new": 5}
    assert sorted(folder.opened) == [4, 5, 6, 8, 9]
    rig.check(7)


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_with_deviation_serve_as_means(folder, tmp_path, posterior):
    rig = Rig(folder, tmp_path, posterior=posterior)
    rig.fill()
    means = Rig(folder, tmp_path, posterior="mean", known=rig.known)
    assert means.fill() == FillReport(10)
    draws = Rig(folder, tmp_path, posterior="sample", known=rig.known)
    assert draws.fill().encoded == ({} if posterior == "sample" else {"stored copy unusable": 10})


def cut_short(shard):
    shard.write_bytes(shard.read_bytes()[:70])


def flip_bit(shard):
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    time.sleep(0.02)  # beyond the clock tick of the file system's time stamps
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "lost", "named"),
    [(os.unlink, 10, "is missing"), (cut_short, 9, "is damaged"), (flip_bit, 1, "is damaged")],
)
def test_damaged_and_missing_entries_are_named_and_encoded_again(folder, tmp_path, harm, lost, named, caplog):
    rig = Rig(folder, tmp_path)
    rig.fill()
    (shard,) = rig.path.glob("*/*.blobs")
    harm(shard)
    assert rig.fill().describe() == f"{10 - lost} latents reused, {lost} encoded: {lost} stored copy unusable"
    assert f"{shard} {named}" in caplog.text
    rig.check()


def test_an_interrupt_keeps_what_was_stored_and_frees_the_claims(folder, tmp_path, pieces_of):
    pieces_of(2)
    vae = Vae()

    def interrupted(pixels_BCHW):
        if len(vae.shapes) == 2:
            raise KeyboardInterrupt
        return vae(pixels_BCHW)

    rig = Rig(folder, tmp_path, vae=interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.fill()
    rig.vae = Vae()
    report = rig.fill()
    assert (report.reused, report.encoded, report.shared) == (4, {"new": 6}, 0)
    assert set(rig.entries().values()) == {1}
    rig.check()


def test_a_full_disk_is_said_once_waited_for_and_gone_on_with(folder, tmp_path, pieces_of, monkeypatch):
    pieces_of(2)
    rig, events, pwrite = Rig(folder, tmp_path), [], os.pwrite
    full = {"writes": 0}

    def write(file, data, offset):
        full["writes"] += 1
        if full["writes"] > 6 and "room" not in events:
            raise OSError(28, "No space left on device")
        return pwrite(file, data, offset)

    def wait():
        events.append("room" if len(events) == 3 else "waited")

    monkeypatch.setattr(os, "pwrite", write)
    rig.on_full, rig.wait_for_room = lambda: events.append("full"), wait
    assert rig.fill().encoded == {"new": 10}
    assert events == ["full", "waited", "waited", "room"]
    assert set(rig.entries().values()) == {1}
    rig.check()


def test_a_folder_that_cannot_be_written_is_a_sentence(folder, tmp_path):
    rig = Rig(folder, tmp_path)
    rig.claims = Claims(folder.file(0) / "claims")
    with pytest.raises(UserError, match=r"data\.cache\.path: .* cannot be written"):
        rig.fill()


class Gauge:
    """A preparer that knows how many pieces' pixels are in memory: those it gave out, and the one it is at."""

    def __init__(self):
        self.preparer, self.alive, self.most, self.calls = CpuPreparer(2), set(), 0, 0
        self.lock = threading.Lock()

    def __call__(self, jobs):
        with self.lock:
            self.calls += 1
            piece = self.calls
            self.alive.add(piece)
        time.sleep(0.005)
        self.most = max(self.most, len(self.alive))
        prepared = self.preparer(jobs)
        for tensors in prepared:
            for tensor in tensors:
                weakref.finalize(tensor, self.alive.discard, piece)
        return prepared


@pytest.mark.parametrize("pause", [0, 0.01])
def test_no_more_than_two_pieces_are_in_memory(tmp_path, pieces_of, pause):
    pieces_of(1)
    folder = Folder(tmp_path / "pictures", [(16, 16)] * 12)
    gauge, vae = Gauge(), Vae()

    def slow(pixels_BCHW):
        time.sleep(pause)
        gauge.most = max(gauge.most, len(gauge.alive))
        return vae(pixels_BCHW)

    rig = Rig(folder, tmp_path, vae=slow)
    rig.preparer = gauge
    rig.fill()
    assert gauge.calls == 12
    assert gauge.most == 2
    assert gauge.alive <= {12}


def test_while_a_piece_is_encoded_the_next_is_decoded(folder, tmp_path, pieces_of):
    pieces_of(2)
    prepared, vae, rig = threading.Semaphore(0), Vae(), Rig(folder, tmp_path)
    prepare, calls = rig.preparer, []

    def preparer(jobs):
        calls.append(len(jobs))
        prepared.release()
        return prepare(jobs)

    def encode(pixels_BCHW):
        if len(vae.shapes) < 4:
            for _ in range(2 if not vae.shapes else 1):
                assert prepared.acquire(timeout=20), "the next piece was not begun"
        return vae(pixels_BCHW)

    rig.vae, rig.preparer = encode, preparer
    rig.fill()
    assert calls == [2, 2, 2, 2, 2]


def test_one_thread_alone_has_to_do_with_what_is_shared(folder, tmp_path, pieces_of, monkeypatch):
    pieces_of(2)
    rig, here = Rig(folder, tmp_path), threading.get_ident()
    folder.file(3).unlink()
    folder.file(4).write_bytes(b"")

    class Watched(Known):
        def __getattribute__(self, name):
            assert threading.get_ident() == here
            return super().__getattribute__(name)

    rig.known = Watched(10)
    refresh = LatentCache.refresh

    def watched_refresh(cache):
        assert threading.get_ident() == here
        return refresh(cache)

    monkeypatch.setattr(LatentCache, "refresh", watched_refresh)
    rig.fill()
    assert set(rig.known.reasons) == {3, 4}


@pytest.mark.parametrize("cut", [Cut(), Cut(flip=True)])
def test_pieces_hold_every_record_once_each_of_one_bucket(tmp_path, cut):
    folder = Folder(tmp_path / "pictures", SIZES * 20)
    rig = Rig(folder, tmp_path, cut=cut)
    fill = Fill(rig.plan, folder, rig.known, LatentCache(rig.path, "vae"), None, rig.preparer, rig.claims)
    pieces = fill._pieces()
    assert sorted(np.concatenate(pieces).tolist()) == list(range(200))
    size = 32 if cut.flip else 64
    for piece in pieces:
        assert isinstance(piece, np.ndarray)
        assert len(set(rig.plan.bucket_N[piece])) == 1
        assert len(piece) <= size
    assert len(pieces) == sum(-(-len(members) // size) for members in rig.plan.by_bucket.values())


def test_processes_begin_apart(tmp_path, pieces_of):
    pieces_of(1)
    folder = Folder(tmp_path / "pictures", [(16, 16)] * 8)
    for start, order in [(0.0, [0, 1, 2, 3, 4, 5, 6, 7]), (0.25, [2, 3, 4, 5, 6, 7, 0, 1]), (0.9, [7, *range(7)])]:
        folder.opened.clear()
        rig = Rig(folder, tmp_path, fingerprint=f"vae {start}")
        rig.fill(start=start)
        assert folder.opened == order


# Other processes


class Others(Claims):
    """Claims of which other processes have some."""

    def __init__(self, path, *pieces):
        super().__init__(path)
        self.taken = set(pieces)
        self.asked = []

    def take(self, piece):
        self.asked.append(piece)
        return piece not in self.taken and super().take(piece)


def test_what_another_process_has_claimed_is_left_to_it_and_waited_for(tmp_path, pieces_of):
    pieces_of(2)
    folder = Folder(tmp_path / "pictures", [(16, 16)] * 8)
    rig, other = Rig(folder, tmp_path), Rig(folder, tmp_path)
    rig.claims = Others(tmp_path / "claims", 1, 2)
    waited = []

    def wait():
        waited.append(sorted(rig.folder.opened))
        if len(waited) == 2:  # the other process is done with one of its pieces, and learns what it has read
            other.plan = rig.plan.subset([2, 3])
            other.claims = Claims(tmp_path / "other claims")
            other.fill()
            rig.known.digests[2:4], rig.known.is_known[2:4] = other.known.digests[2:4], True
        if len(waited) == 3:  # the other one dies
            rig.claims.taken.clear()

    report = rig.fill(wait=wait)
    assert waited[:2] == [[0, 1, 6, 7], [0, 1, 6, 7]]
    assert len(waited) == 3
    assert report == FillReport(0, {"new": 6}, 2)
    assert (rig.progress.done, rig.progress.total) == (8, 8)
    assert set(rig.entries().values()) == {1}
    assert rig.claims.asked == [0, 1, 2, 3, 1, 2, 1, 2, 1, 2, 2]
    rig.check()


def test_where_there_are_no_locks_what_others_did_still_counts(folder, tmp_path, pieces_of, monkeypatch):
    pieces_of(2)

    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    rig = Rig(folder, tmp_path)
    rig.fill()
    assert set(rig.entries().values()) == {1}
    rig.check()
