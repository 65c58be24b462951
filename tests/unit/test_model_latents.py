"""Pixels to latents and back, and the fingerprint that a latent cache is keyed by."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from sdxl_training.model.latents import (
    decode_latents,
    encode_latents,
    encode_latents_exactly,
    in_tiles,
    set_up_vae,
    vae_fingerprint,
)
from tests.tiny_sdxl import tiny_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_vae().eval()


PIXELS_BCHW = torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_shapes_and_precision(vae: AutoencoderKL) -> None:
    mean_BCHW, std_BCHW = encode_latents(vae, PIXELS_BCHW)
    assert mean_BCHW.shape == std_BCHW.shape == (5, 4, 2, 4)
    assert (std_BCHW > 0).all()
    pixels_BCHW = decode_latents(vae, mean_BCHW)
    assert pixels_BCHW.shape == PIXELS_BCHW.shape
    assert mean_BCHW.dtype == std_BCHW.dtype == pixels_BCHW.dtype == torch.float32
    assert not mean_BCHW.requires_grad
    assert pixels_BCHW.abs().max() <= 1


def test_latents_scale_with_the_scaling_factor(vae: AutoencoderKL) -> None:
    doubled = copy.deepcopy(vae)
    doubled.register_to_config(scaling_factor=2 * vae.config.scaling_factor)
    once, twice = encode_latents(vae, PIXELS_BCHW), encode_latents(doubled, PIXELS_BCHW)
    torch.testing.assert_close(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[1], 2 * once[1])
    torch.testing.assert_close(decode_latents(doubled, twice[0]), decode_latents(vae, once[0]))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_small_batches_decode_to_the_same_pictures(vae: AutoencoderKL, batch_size: int) -> None:
    latents_BCHW = 0.5 * torch.randn(5, 4, 2, 4, generator=torch.Generator().manual_seed(1))
    expected = decode_latents(vae, latents_BCHW, batch_size=5)
    found = decode_latents(vae, latents_BCHW, batch_size=batch_size)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_autocast_around_it_changes_nothing(vae: AutoencoderKL) -> None:
    plain = encode_latents(vae, PIXELS_BCHW)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encode_latents(vae, PIXELS_BCHW)
        decoded = decode_latents(vae, plain[0])
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(decoded, decode_latents(vae, plain[0]))


def test_fp16_is_refused_and_bf16_is_not(vae: AutoencoderKL) -> None:
    half = copy.deepcopy(vae).half()
    with pytest.raises(ValueError, match="fp16"):
        encode_latents(half, PIXELS_BCHW)
    with pytest.raises(ValueError, match="fp16"):
        decode_latents(half, torch.zeros(1, 4, 2, 2))
    assert encode_latents(copy.deepcopy(vae).bfloat16(), PIXELS_BCHW)[0].dtype == torch.float32


def test_fingerprint_is_of_weights_configuration_and_precision(vae: AutoencoderKL) -> None:
    fingerprint = vae_fingerprint(vae)
    assert fingerprint == vae_fingerprint(copy.deepcopy(vae))
    moved = copy.deepcopy(vae)
    moved.register_to_config(_name_or_path="/another/place")
    assert vae_fingerprint(moved) == fingerprint

    nudged = copy.deepcopy(vae)
    nudged.decoder.conv_out.bias.data[0] += 1e-6
    rescaled = copy.deepcopy(vae)
    rescaled.register_to_config(scaling_factor=0.18215)
    prints = [vae_fingerprint(other) for other in (nudged, rescaled, copy.deepcopy(vae).bfloat16())]
    assert len({fingerprint, *prints}) == 4


def test_settings_of_the_vae_change_its_fingerprint_and_little_else(vae: AutoencoderKL) -> None:
    plain = copy.deepcopy(vae)
    assert vae_fingerprint(set_up_vae(plain, "fp32", tiling=False)) == vae_fingerprint(vae)
    half, tiled = copy.deepcopy(vae), copy.deepcopy(vae)
    prints = {
        vae_fingerprint(each) for each in (plain, set_up_vae(half, "bf16", False), set_up_vae(tiled, "fp32", True))
    }
    assert len(prints) == 3
    mean_BCHW, _ = encode_latents(vae, PIXELS_BCHW)
    assert (encode_latents(half, PIXELS_BCHW)[0] - mean_BCHW).abs().max() < 0.1 * mean_BCHW.std()
    exact_BCHW, _ = encode_latents_exactly(half, PIXELS_BCHW)
    assert half.dtype == torch.bfloat16
    assert torch.equal(exact_BCHW, encode_latents(copy.deepcopy(half).float(), PIXELS_BCHW)[0])


def test_tiles_see_what_the_whole_picture_sees(vae: AutoencoderKL) -> None:
    tiled = set_up_vae(copy.deepcopy(vae), "fp32", tiling=True)
    tiled.tile_sample_min_size, tiled.tile_latent_min_size = 64, 8
    pixels_1CHW = torch.nn.functional.interpolate(PIXELS_BCHW[:1], (96, 160), mode="bicubic", align_corners=False)
    whole, parts = encode_latents(vae, pixels_1CHW)[0], encode_latents(tiled, pixels_1CHW)[0]
    assert parts.shape == whole.shape == (1, 4, 12, 20)
    assert not torch.equal(parts, whole)
    assert (parts - whole).abs().mean() < 0.5 * whole.std()


@pytest.mark.parametrize("tiled", [False, True])
def test_tiles_for_a_while_leave_the_vae_as_it_was(vae: AutoencoderKL, tiled: bool) -> None:
    own = set_up_vae(copy.deepcopy(vae), "fp32", tiled)
    always = set_up_vae(copy.deepcopy(vae), "fp32", tiling=True)
    for each in (own, always):
        each.tile_sample_min_size, each.tile_latent_min_size = 64, 8
    pixels_1CHW = torch.nn.functional.interpolate(PIXELS_BCHW[:1], (96, 160))
    before, tiles = encode_latents(own, pixels_1CHW)[0], encode_latents(always, pixels_1CHW)[0]
    with in_tiles(own):
        assert torch.equal(encode_latents(own, pixels_1CHW)[0], tiles)
    assert torch.equal(encode_latents(own, pixels_1CHW)[0], before)
    assert torch.equal(before, tiles) == tiled
    assert own.use_tiling == tiled
