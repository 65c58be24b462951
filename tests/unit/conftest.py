"""A U-Net of SDXL's kind that is small enough to run hundreds of steps in a test, and batches for it.

Imports stand inside the fixtures: a run of the configuration tests alone must not pay for torch and diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sdxl_training.records import Batch


@pytest.fixture(scope="session")
def oracles() -> dict[str, Any]:
    """Golden numbers, computed in float64 by a program that shares no code with this one."""
    return json.loads((Path(__file__).parents[1] / "oracles.json").read_text())


@pytest.fixture(scope="session")
def make_tiny_unet() -> Callable[[], UNet2DConditionModel]:
    """Build a U-Net with SDXL's conditioning and a few ten thousand parameters, always with the same weights."""
    import torch
    from diffusers import UNet2DConditionModel

    def make() -> UNet2DConditionModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(4, 8),
                layers_per_block=1,
                norm_num_groups=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=8,
                attention_head_dim=2,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=8 + 6 * 4,
            )

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Build a batch whose every sample is a function of its id alone, and its noise of id and visit.

    slots: the samples' places in the global batch of update `step`; as they come where none are given. global_batch:
    how many samples that has; these alone where it is not given.
    """
    import torch

    from sdxl_training.objectives.noise import Noise
    from sdxl_training.records import Batch, Conditioning

    def make(
        sample_ids: Sequence[int],
        weights: Sequence[float] | None = None,
        visits: Sequence[int] | None = None,
        step: int = 0,
        slots: Sequence[int] | None = None,
        noise: Noise | None = None,
        global_batch: int | None = None,
    ) -> Batch:
        visits = visits or [0] * len(sample_ids)
        generators = [torch.Generator().manual_seed(1000 + sample_id) for sample_id in sample_ids]
        latents_BCHW = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
        draw = noise or Noise()
        each = zip(latents_BCHW, visits, sample_ids, strict=True)
        return Batch(
            latents_BCHW=latents_BCHW,
            noise_BCHW=torch.stack([draw(latent_CHW, 0, visit, sample_id) for latent_CHW, visit, sample_id in each]),
            conditioning=Conditioning(
                text_BLD=torch.stack([torch.randn(3, 8, generator=generator) for generator in generators]),
                pooled_BP=torch.stack([torch.randn(8, generator=generator) for generator in generators]),
                time_ids_B6=torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * len(sample_ids)),
            ),
            weight_B=torch.tensor(weights or [1.0] * len(sample_ids)),
            sample_ids=tuple(sample_ids),
            visits=tuple(visits),
            step=step,
            slots=tuple(range(len(sample_ids)) if slots is None else slots),
            global_batch=len(sample_ids) if global_batch is None else global_batch,
        )

    return make
