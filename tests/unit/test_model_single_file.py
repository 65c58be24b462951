"""The tables of names: bijective for any shape of network, and loud about what they do not know."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from sdxl_training.model.sdxl import plain_name
from sdxl_training.model.single_file import PREFIXES, from_original, open_clip_table, unet_table, vae_table
from tests.tiny_sdxl import tiny_unet, tiny_vae


@st.composite
def unet_configs(draw: st.DrawFn) -> dict[str, object]:
    attends = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    layers = draw(
        st.one_of(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=len(attends), max_size=len(attends)))
    )
    down = tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends)
    up = tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends))
    return {
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": layers,
        "block_out_channels": (8,) * len(attends),
    }


@settings(max_examples=12)
@given(config=unet_configs())
def test_every_module_of_any_unet_has_its_own_place(config: dict[str, object]) -> None:
    table = unet_table(config)
    assert len(set(table.values())) == len(table)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **config,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        )
    names = set(unet.state_dict())
    assert all(any(name.startswith(f"{module}.") for module in table) for name in names)
    # Resnets whose width does not change have no shortcut; everything else in the table is in the network.
    absent = {module for module in table if not any(name.startswith(f"{module}.") for name in names)}
    assert all(module.endswith("conv_shortcut") for module in absent)


@given(levels=st.integers(1, 5), layers=st.integers(1, 3))
def test_vae_table_is_one_to_one(levels: int, layers: int) -> None:
    table = vae_table({"block_out_channels": (8,) * levels, "layers_per_block": layers})
    assert len(set(table.values())) == len(table)


@given(layers=st.integers(1, 40))
def test_open_clip_table_is_one_to_one(layers: int) -> None:
    table = open_clip_table(layers)
    assert len(set(table.values())) == len(table)


def test_unknown_names_and_blocks_are_refused() -> None:
    configs = {"unet": tiny_unet().config, "vae": tiny_vae().config}
    with pytest.raises(KeyError, match=r"input_blocks\.77"):
        from_original({PREFIXES["unet"] + "input_blocks.77.0.weight": torch.zeros(1)}, configs)
    with pytest.raises(KeyError, match="AttnDownBlock2D"):
        unet_table({**configs["unet"], "down_block_types": ("AttnDownBlock2D",) * 3})


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.mid_block.resnets.0.conv1.weight",
        "module._orig_mod.mid_block.resnets.0.conv1.weight",
        "mid_block._checkpoint_wrapped_module.resnets.0._orig_mod.conv1.weight",
        "mid_block.resnets.0.conv1.weight",
    ],
)
def test_wrapper_segments_are_removed_wherever_they_are(name: str) -> None:
    assert plain_name(name) == "mid_block.resnets.0.conv1.weight"
