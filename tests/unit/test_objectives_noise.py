"""Noise: a function of the sample alone, standard normal unless shaped, and shaped with a variance that is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_training.objectives.noise import InputNoise, Noise
from sdxl_training.rng import Stream, torch_generator

SHAPED = {
    "plain": Noise(),
    "offset": Noise(offset=0.1),
    "pyramid": Noise(pyramid=0.5),
    "nearest": Noise(nearest_of=3),
    "all": Noise(offset=0.1, pyramid=0.5, nearest_of=3),
}
every_noise = pytest.mark.parametrize("noise", SHAPED.values(), ids=SHAPED)


def draw_many(noise: Noise, count: int, *shape: int) -> Tensor:
    """Return the noise of samples 0, 1, ... whose latents are zero."""
    return torch.stack([noise(torch.zeros(shape), 0, 0, sample_id) for sample_id in range(count)])


def latent(sample_id: int, *shape: int) -> Tensor:
    return torch.randn(shape or (4, 8, 6), generator=torch.Generator().manual_seed(sample_id))


@every_noise
def test_noise_is_a_function_of_seed_visit_and_sample(noise: Noise) -> None:
    x0_CHW = latent(1)
    first = noise(x0_CHW, 7, 2, 11)
    noise(latent(2), 7, 0, 12)
    torch.randn(5)  # neither other samples nor the global generator have a say
    assert torch.equal(noise(x0_CHW, 7, 2, 11), first)
    others = [noise(x0_CHW, *key) for key in ((8, 2, 11), (7, 3, 11), (7, 2, 12), (7, 11, 2))]
    assert all(float((other - first).abs().mean()) > 0.7 for other in others)
    assert len({float(value.sum()) for value in (first, *others)}) == 5


@every_noise
def test_noise_is_float32_and_can_be_written_in_place(noise: Noise) -> None:
    x0_CHW, out_CHW = latent(1), torch.full((4, 8, 6), float("nan"))
    expected = noise(x0_CHW, 7, 2, 11)
    assert noise(x0_CHW, 7, 2, 11, out=out_CHW) is out_CHW
    assert torch.equal(out_CHW, expected)
    assert noise(x0_CHW.bfloat16(), 7, 2, 11).dtype == torch.float32


def test_default_noise_is_the_generators_standard_normal_to_the_bit() -> None:
    generator = torch_generator(7, Stream.NOISE, 2, 11)
    assert torch.equal(Noise()(torch.empty(4, 128, 128), 7, 2, 11), torch.randn(4, 128, 128, generator=generator))
    assert torch.equal(Noise(0.0, 0.0, 1)(latent(1), 7, 2, 11), Noise()(latent(1), 7, 2, 11))


def test_default_noise_is_normal_and_independent_between_samples() -> None:
    noise = draw_many(Noise(), 400, 4, 16, 16).flatten(1).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((noise**power).mean()) - moment) < 5 * math.sqrt(variance / count), power
    correlation = noise @ noise.T / noise.shape[1]
    off_diagonal = correlation - correlation.diagonal().diag()
    assert float(off_diagonal.abs().max()) < 6 / math.sqrt(noise.shape[1])


# --- offset ----------------------------------------------------------------------------------------------------------


def test_offset_adds_one_normal_number_a_channel_and_nothing_else() -> None:
    plain = draw_many(Noise(), 500, 4, 3, 5)
    for offset in (0.05, 0.7):
        added = (draw_many(Noise(offset=offset), 500, 4, 3, 5) - plain) / offset
        torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-4)
        z = added[:, :, 0, 0]
        assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
        assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / z.numel())
        correlation = (z[:, :, None, None] * plain).mean(dim=0)
        assert float(correlation.abs().max()) < 5 / math.sqrt(500)
        between_channels = (z.T @ z / len(z)).fill_diagonal_(0)
        assert float(between_channels.abs().max()) < 5 / math.sqrt(500)


@pytest.mark.parametrize("offset", [0.05, 0.1])
def test_offset_raises_the_gain_of_the_mean_as_the_oracle_says(oracles: dict[str, Any], offset: float) -> None:
    """At 1024 pixels; and pixels have variance 1 + o^2, which the gain of the mean hardly shows in."""
    noise = draw_many(Noise(offset=offset), 250, 4, 128, 128)
    gain = float((noise.mean(dim=(2, 3)) * 128).std())
    assert gain == pytest.approx(oracles["offset_noise_dc_gain_1024"][str(offset)], rel=5 / math.sqrt(2 * 1000))
    assert float(noise.var(dim=(2, 3)).mean()) == pytest.approx(1, rel=1e-2), "within a picture nothing changes"


def test_offset_gives_pixels_variance_one_plus_its_square() -> None:
    noise = draw_many(Noise(offset=0.8, pyramid=0.5), 4000, 4, 2, 2)
    assert float(noise.square().mean()) == pytest.approx(1 + 0.8**2, rel=0.05)


# --- pyramid ---------------------------------------------------------------------------------------------------------


def pyramid_covariance(amplitude: float, height: int, width: int) -> Tensor:
    """Return the exact covariance of all pairs of pixels: two share a level's number where they share its cell."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    covariance, variance, cell, level = torch.eye(height * width), 1.0, 2, 1
    while cell // 2 < max(height, width):
        same = (rows[:, None] // cell == rows // cell) & (columns[:, None] // cell == columns // cell)
        covariance += amplitude ** (2 * level) * same
        variance += amplitude ** (2 * level)
        cell, level = 2 * cell, level + 1
    return covariance / variance


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (1, 1), (2, 8)])
def test_pyramid_has_unit_variance_and_the_covariance_of_its_cells(height: int, width: int) -> None:
    expected = pyramid_covariance(0.7, height, width)
    assert torch.allclose(expected.diagonal(), torch.ones(height * width))
    noise = draw_many(Noise(pyramid=0.7), 6000, 2, height, width).transpose(0, 1).flatten(0, 1).flatten(1)
    covariance = noise.T @ noise / len(noise)
    assert float((covariance - expected).abs().max()) < 5 * math.sqrt(2 / len(noise))


def test_pyramid_is_normalised_by_a_constant_and_not_by_the_sample() -> None:
    """Undo the constant: what is left over the plain noise is the same within every cell of 2 x 2 pixels."""
    amplitude, shape = 0.6, (4, 16, 16)
    variance = sum(amplitude ** (2 * level) for level in range(5))
    plain, noise = draw_many(Noise(), 5, *shape), draw_many(Noise(pyramid=amplitude), 5, *shape)
    coarse = noise * math.sqrt(variance) - plain
    cells = coarse.unflatten(3, (8, 2)).unflatten(2, (8, 2))
    torch.testing.assert_close(cells, cells[:, :, :, :1, :, :1].expand_as(cells), rtol=0, atol=1e-5)
    numbers, repeated = cells[:, :, :, 0, :, 0].flatten(1), plain.flatten(1)[:, : 4 * 8 * 8]
    correlation = (numbers * repeated).mean() / (numbers.std() * repeated.std())
    assert abs(float(correlation)) < 5 / math.sqrt(numbers.numel()), "from the noise's generator they would be its own"
    assert float(noise.flatten(1).std(dim=1).sub(1).abs().min()) > 1e-4, "no sample's variance is forced to 1"
    assert float(coarse.mean(dim=(2, 3)).abs().max()) > 0.05, "down to one pixel"


def test_a_vanishing_amplitude_is_plain_noise() -> None:
    plain = draw_many(Noise(), 3, 4, 8, 8)
    assert torch.equal(draw_many(Noise(pyramid=0.0), 3, 4, 8, 8), plain)
    torch.testing.assert_close(draw_many(Noise(pyramid=1e-6), 3, 4, 8, 8), plain, rtol=0, atol=1e-5)


# --- nearest of several ----------------------------------------------------------------------------------------------


def test_the_nearest_of_all_candidates_is_kept() -> None:
    for sample_id in range(20):
        x0_CHW = latent(sample_id, 4, 8, 8)
        generator = torch_generator(3, Stream.NOISE, 0, sample_id)
        candidates = [
            torch.randn(4, 8, 8, generator=generator),
            *torch.randn(6, 4, 8, 8, generator=generator).unbind(),
        ]
        kept = Noise(nearest_of=7)(x0_CHW, 3, 0, sample_id)
        distances = [float((candidate - x0_CHW).norm()) for candidate in candidates]
        assert torch.equal(kept, candidates[distances.index(min(distances))])


def test_the_nearest_leans_toward_the_picture() -> None:
    """Of 64: the mean of the largest of 64 normals, 2.346, times the share of the distance that is the direction.

    The distance varies by 2 <x0, eps> (variance 4 n for n unit numbers) and by |eps|^2 (variance 2 n).
    """
    along, shorter = [], []
    for sample_id in range(150):
        x0_CHW = latent(sample_id, 4, 12, 12)
        kept = Noise(nearest_of=64)(x0_CHW, 3, 0, sample_id)
        along.append(float((kept * x0_CHW).sum() / x0_CHW.norm()))
        shorter.append(float(kept.norm()) / math.sqrt(kept.numel()))
    expected = 2.346 * math.sqrt(4 / 6)
    assert sum(along) / 150 == pytest.approx(expected, abs=0.25)
    assert 0.94 < sum(shorter) / 150 < 0.99


# --- input perturbation ----------------------------------------------------------------------------------------------


def test_input_noise_is_the_samples_own_and_apart_from_its_noise() -> None:
    ids, visits = [3, 4, 5], [0, 1, 0]
    eps_BCHW = torch.stack([Noise()(torch.empty(4, 8, 8), 9, v, i) for v, i in zip(visits, ids, strict=True)])
    assert InputNoise()(eps_BCHW, 9, visits, ids) is eps_BCHW
    xi_BCHW = (InputNoise(0.25)(eps_BCHW, 9, visits, ids) - eps_BCHW) / 0.25
    alone = (InputNoise(0.25)(eps_BCHW[1:2], 9, [1], [4]) - eps_BCHW[1:2]) / 0.25
    assert torch.equal(alone, xi_BCHW[1:2])
    assert abs(float(xi_BCHW.square().mean()) - 1) < 5 * math.sqrt(2 / xi_BCHW.numel())
    assert abs(float((xi_BCHW * eps_BCHW).mean())) < 5 / math.sqrt(xi_BCHW.numel())
    with pytest.raises(ValueError, match="zip"):
        InputNoise(0.25)(eps_BCHW, 9, [0], ids)
