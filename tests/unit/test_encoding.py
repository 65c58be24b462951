"""Pixels become latents: batched, checked, stored batch by batch, and handed out as the cache gives them back."""

import logging
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from sdxl_training.data.cache import LatentCache
from sdxl_training.data.encoding import NOT_FINITE, Encoder, encode_finite
from sdxl_training.data.fetching import Unencoded
from sdxl_training.data.images import digest_content, to_model_range
from sdxl_training.data.store_writer import StoreWriter
from sdxl_training.records import Bucket, CropPlan, Quarantined, UserError
from tests.latents import Vae

CPU = torch.device("cpu")
PLAN = CropPlan((16, 32), (16, 32), (0, 0), Bucket((16, 32)))


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (16, 32, 3), np.uint8)
    content = digest_content(pixels.tobytes())
    return Unencoded(torch.from_numpy(pixels), f"/{number}.png", number, 100 + number, content, PLAN)


PICTURES = [picture(number) for number in range(7)]


def alone(one):
    """What the stand-in makes of a picture, rounded to half precision and widened again."""
    mean_BCHW, std_BCHW = Vae()(to_model_range(one.pixels_HWC)[None])
    return mean_BCHW[0].half().float(), std_BCHW[0].half().float()


def overflowing(victim, value, moment, vae=None):
    """A VAE that makes a value of this picture's latent infinite, or too large for 16 bit."""
    vae = vae or Vae()
    pixels_CHW = to_model_range(victim.pixels_HWC)

    def encode(pixels_BCHW):
        moments = vae(pixels_BCHW)
        for b, each_CHW in enumerate(pixels_BCHW):
            if torch.equal(each_CHW, pixels_CHW):
                moments[moment][b, 0, 0, 0] = value
        return moments

    return encode


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_pictures_are_encoded_in_batches_and_in_order(batch_size, batches):
    vae = Vae()
    latents = Encoder(vae, CPU, batch_size)(PICTURES)
    assert [shape[0] for shape in vae.shapes] == batches
    for one, latent in zip(PICTURES, latents, strict=True):
        assert [moment.dtype for moment in latent] == [torch.float32] * 2
        torch.testing.assert_close(latent, alone(one), rtol=0, atol=0)


def test_nothing_is_encoded_for_no_pictures(tmp_path):
    vae, cache = Vae(), LatentCache(tmp_path, "vae")
    with StoreWriter(tmp_path) as writer:
        assert Encoder(vae, CPU, 4, cache, writer)([]) == []
    assert vae.shapes == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("posterior", ["sample", "mean"])
def test_what_is_handed_out_is_what_the_cache_gives_back(tmp_path, posterior):
    cache = LatentCache(tmp_path, "vae", posterior)
    with StoreWriter(tmp_path) as writer:
        latents = Encoder(Vae(scale=3.3), CPU, 3, cache, writer)(PICTURES)
    cache.refresh()
    for one, latent in zip(PICTURES, latents, strict=True):
        stored = cache.read(one.content, one.plan)
        assert all(torch.equal(*pair) for pair in zip(latent, stored, strict=True))
        assert latent[1].any() == (posterior == "sample")


def test_an_entry_says_what_it_was_made_from(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    with StoreWriter(tmp_path) as writer:
        Encoder(Vae(), CPU, 4, cache, writer)(PICTURES[:2])
    cache.refresh()
    origins = cache.store.origins()[1]
    assert origins["sample_id"].tolist() == [100, 101]
    assert origins["content"].tobytes() == PICTURES[0].content + PICTURES[1].content


@pytest.mark.parametrize("with_cache", [False, True])
def test_without_a_writer_nothing_is_stored(tmp_path, with_cache):
    cache = LatentCache(tmp_path, "vae") if with_cache else None
    latents = Encoder(Vae(), CPU, 4, cache)(PICTURES)
    torch.testing.assert_close(latents[5], alone(PICTURES[5]), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_is_on_disk_before_the_next_is_encoded(tmp_path):
    """So a crash loses at most the batch in flight."""
    cache, there, vae = LatentCache(tmp_path, "vae"), [], Vae()

    def encode(pixels_BCHW):
        cache.refresh()
        there.append(len(cache.store))
        if len(there) == 3:
            raise KeyboardInterrupt
        return vae(pixels_BCHW)

    with StoreWriter(tmp_path) as writer, pytest.raises(KeyboardInterrupt):
        Encoder(encode, CPU, 3, cache, writer)(PICTURES)
    assert there == [0, 3, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65520.0, -1e5])
@pytest.mark.parametrize("moment", [0, 1])
def test_what_is_not_finite_in_half_precision_is_tried_alone_then_quarantined(tmp_path, value, moment):
    vae, cache = Vae(), LatentCache(tmp_path, "vae")
    with StoreWriter(tmp_path) as writer:
        encoder = Encoder(overflowing(PICTURES[4], value, moment, vae), CPU, 3, cache, writer)
        latents = encoder(PICTURES)
    assert [latent is None for latent in latents] == [number == 4 for number in range(7)]
    assert [shape[0] for shape in vae.shapes] == [3, 3, 1, 1]
    assert encoder.take_bad() == [Quarantined("/4.png", NOT_FINITE)]
    assert encoder.take_bad() == []
    cache.refresh()
    assert [cache.has(one.content, one.plan) for one in PICTURES] == [number != 4 for number in range(7)]


def test_the_largest_half_is_finite():
    (latent,) = Encoder(overflowing(PICTURES[0], 65504.0, 0), CPU, 3)(PICTURES[:1])
    assert latent[0].max() == 65504


def test_a_failure_that_depends_on_the_batch_is_cured_by_the_retry():
    vae = Vae()

    def overflows_in_batches(pixels_BCHW):
        mean_BCHW, std_BCHW = vae(pixels_BCHW)
        return (mean_BCHW * float("nan") if len(pixels_BCHW) > 1 else mean_BCHW), std_BCHW

    encoder = Encoder(overflows_in_batches, CPU, 3)
    for one, latent in zip(PICTURES, encoder(PICTURES), strict=True):
        torch.testing.assert_close(latent, alone(one), rtol=0, atol=0)
    assert encoder.take_bad() == []


def test_only_what_failed_is_tried_again():
    """The others keep what the batch gave them, whatever it is that they would get alone."""
    seen = []

    def encode(pixels_BCHW):
        seen.append(len(pixels_BCHW))
        mean_BCHW = torch.full((len(pixels_BCHW), 4, 2, 4), float(len(seen)))
        if len(seen) == 1:
            mean_BCHW[1] = float("nan")
        return mean_BCHW, torch.ones_like(mean_BCHW)

    latents = encode_finite(encode, torch.zeros(3, 3, 16, 32))
    assert seen == [3, 1]
    assert [latent[0].max() for latent in latents] == [1, 2, 1]


def test_a_batch_without_finite_latents_writes_nothing(tmp_path):
    cache = LatentCache(tmp_path, "vae")
    with StoreWriter(tmp_path) as writer:
        encoder = Encoder(Vae(scale=float("inf")), CPU, 4, cache, writer)
        assert encoder(PICTURES) == [None] * 7
    assert [bad.path for bad in encoder.bad] == [one.path for one in PICTURES]
    assert list(tmp_path.iterdir()) == []


def test_pixels_travel_as_bytes_and_latents_come_back_to_the_device():
    """On the device `meta` nothing can be computed, so what arrives there is seen."""
    arrived = []

    def encode(pixels_BCHW):
        arrived.append((pixels_BCHW.device.type, pixels_BCHW.dtype))
        return Vae()(torch.zeros(pixels_BCHW.shape))

    (latent,) = Encoder(encode, torch.device("meta"), 4)(PICTURES[:1])
    assert arrived == [("meta", torch.float32)]
    assert [moment.device.type for moment in latent] == ["meta"] * 2


def test_what_is_not_finite_in_half_precision_is_encoded_again_in_fp32() -> None:
    """The VAE in bf16 says infinity for one picture; in fp32 it does not."""
    alone = []

    def encode(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_BCHW = pixels_BCHW[:, :1, ::8, ::8].clone()
        mean_BCHW[mean_BCHW > 1] = float("inf")
        return mean_BCHW, torch.zeros_like(mean_BCHW)

    def exactly(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alone.append(len(pixels_BCHW))
        return pixels_BCHW[:, :1, ::8, ::8], torch.zeros(len(pixels_BCHW), 1, 1, 1)

    pixels_BCHW = torch.tensor([0.0, 2.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    latents = encode_finite(encode, pixels_BCHW, exactly)
    assert [None if latent is None else latent[0].item() for latent in latents] == [0.0, 2.0, 1.0]
    assert alone == [1]


# A device without room


class Full:
    """A VAE on a device with room for so many pictures at once; in tiles, a picture takes a quarter of its room."""

    def __init__(self, room: float, scale: float = 1.0):
        self.vae, self.room, self.tiled = Vae(scale), room, False
        self.refused: list[int] = []

    def __call__(self, pixels_BCHW):
        if len(pixels_BCHW) * (0.25 if self.tiled else 1.0) > self.room:
            self.refused.append(len(pixels_BCHW))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.vae(pixels_BCHW)

    @contextmanager
    def in_tiles(self):
        self.tiled = True
        try:
            yield
        finally:
            self.tiled = False


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("room", range(1, 8))
def test_batches_are_halved_until_there_is_room_and_nothing_else_changes(tmp_path, caplog, batch_size, room):
    vae, cache = Full(room), LatentCache(tmp_path, "vae")
    with StoreWriter(tmp_path) as writer:
        encoder = Encoder(vae, CPU, batch_size, cache, writer, in_tiles=vae.in_tiles)
        latents = encoder(PICTURES)
        refused = len(vae.refused)
        encoder(PICTURES)
    for one, latent in zip(PICTURES, latents, strict=True):
        torch.testing.assert_close(latent[0], alone(one)[0], rtol=1e-3, atol=1e-3)
    assert len(vae.refused) == refused, "the second time it is known what fits"
    assert len(said(caplog)) == (refused > 0)
    assert all(words in text for text in said(caplog) for words in (f"{batch_size} pictures of 16x32", "from now on"))
    cache.refresh()
    assert [cache.has(one.content, one.plan) for one in PICTURES] == [True] * 7


def test_a_picture_that_does_not_fit_alone_goes_in_tiles_and_the_others_do_not(caplog):
    vae = Full(0.5)
    encoder = Encoder(vae, CPU, 3, in_tiles=vae.in_tiles)
    latents = encoder(PICTURES)
    for one, latent in zip(PICTURES, latents, strict=True):
        torch.testing.assert_close(latent, alone(one), rtol=0, atol=0)
    assert [text for text in said(caplog) if "in tiles" in text] == [text for text in said(caplog) if "/0.png" in text]
    assert len(said(caplog)) == 2, "that the batch is smaller, and the tiles, each once"
    vae.room = 1.0
    vae.refused.clear()
    encoder(PICTURES)
    assert vae.refused == []
    assert not vae.tiled


def test_the_retry_in_fp32_has_its_room_looked_after_as_well():
    """What is not finite is tried again in fp32, which takes more room: in tiles, if that is what it needs."""
    vae, exactly = Full(8, scale=float("nan")), Full(0.5)
    encoder = Encoder(vae, CPU, 2, exactly=exactly, in_tiles=exactly.in_tiles)
    for one, latent in zip(PICTURES, encoder(PICTURES), strict=True):
        torch.testing.assert_close(latent, alone(one), rtol=0, atol=0)


@pytest.mark.parametrize("tiles", [False, True])
def test_a_picture_for_which_there_is_no_room_at_all_ends_with_a_sentence(tmp_path, tiles):
    cache, vae = LatentCache(tmp_path, "vae"), Full(0.1)
    with StoreWriter(tmp_path) as writer:
        encoder = Encoder(vae, CPU, 3, cache, writer, in_tiles=vae.in_tiles if tiles else None)
        with pytest.raises(UserError, match=r"/0.png: the device has no room .* 16x32") as caught:
            encoder(PICTURES)
    assert ("Set model.vae_tiling: true" in str(caught.value)) == (not tiles)
    assert "model.vae_precision: bf16" in str(caught.value)
    assert ("and in tiles" in str(caught.value)) == tiles
