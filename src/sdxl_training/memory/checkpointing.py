"""Activation checkpointing: keep a block's input, compute the rest again in backward (Chen et al. 2016)."""

from __future__ import annotations

from diffusers import UNet2DConditionModel


def recompute_activations(unet: UNet2DConditionModel) -> None:
    """Recompute every down, middle and up block in backward: a third more compute for far fewer saved activations."""
    unet.enable_gradient_checkpointing()
