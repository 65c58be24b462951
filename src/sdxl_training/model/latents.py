"""Pixels to latents and back. Latents are always scaled; pixels are always in [-1, 1].

Legend: B samples, C channels (3 of pixels, 4 of latents), H x W rows and columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean_BCHW, std_BCHW) of the scaled latents in fp32; x0 = mean + std * n with n ~ N(0, I).

    Runs in the VAE's own precision whatever autocast is around it: SDXL's VAE overflows in fp16, so that is refused
    (ValueError).
    """
    _refuse_fp16(vae)
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return posterior.mean.float() * scale, posterior.std.float() * scale


def encode_latents_exactly(vae: AutoencoderKL, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `encode_latents` does, computed in fp32 whatever the VAE's own precision; it has that again after."""
    own = vae.dtype
    try:
        return encode_latents(vae.to(torch.float32), pixels_BCHW)
    finally:
        vae.to(own)


@contextmanager
def in_tiles(vae: AutoencoderKL) -> Iterator[None]:
    """Let pictures larger than the VAE's own size pass through it in tiles meanwhile; then it is as it was."""
    tiled = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        if not tiled:
            vae.disable_tiling()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents_BCHW: Tensor, batch_size: int = 4) -> Tensor:
    """Return pixels (B, 3, H * factor, W * factor) in [-1, 1], fp32, decoding `batch_size` latents at a time.

    Raises ValueError for a VAE in fp16.
    """
    _refuse_fp16(vae)
    unscaled = latents_BCHW.to(vae.device, torch.float32) / vae.config.scaling_factor
    with torch.autocast(vae.device.type, enabled=False):
        parts = [vae.decode(part.to(vae.dtype)).sample.float() for part in unscaled.split(batch_size)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def set_up_vae(vae: AutoencoderKL, precision: Literal["fp32", "bf16"], tiling: bool) -> AutoencoderKL:
    """Return the VAE in its precision; with tiling, pictures larger than its own size pass through it in tiles.

    Tiles save memory and cost a little exactness where they meet.
    """
    if precision == "bf16":
        vae.to(dtype=torch.bfloat16)
    if tiling:
        vae.enable_tiling()
    return vae


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """Return a BLAKE2b digest (32 hex digits) of settings, precision and weights: equal only if latents are."""
    digest = hashlib.blake2b(digest_size=16)
    # Names with an underscore are bookkeeping: the folder it came from, the library's version.
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    if vae.use_tiling:
        digest.update(f"tiles of {vae.tile_sample_min_size}, overlap {vae.tile_overlap_factor}".encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_fp16(vae: AutoencoderKL) -> None:
    if vae.dtype == torch.float16:
        raise ValueError("SDXL's VAE overflows in fp16: keep it in fp32 or bf16")
