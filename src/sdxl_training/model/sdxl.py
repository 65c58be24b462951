"""SDXL as one object: the U-Net that learns and the three frozen networks around it.

Legend: B samples, C latent channels, H x W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_training.records import Conditioning

# Path segments that torch puts into parameter names when a module is compiled, replicated, sharded or checkpointed.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class TextParts(Protocol):
    """What makes text states of captions: both encoders and their tokenizers. An SDXL has them, among others."""

    @property
    def text_encoder(self) -> CLIPTextModel:
        """The first encoder."""

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        """The second encoder, which also makes the pooled text."""

    @property
    def tokenizer(self) -> CLIPTokenizer:
        """The first encoder's tokenizer."""

    @property
    def tokenizer_2(self) -> CLIPTokenizer:
        """The second encoder's tokenizer."""


@dataclass(frozen=True, slots=True)
class TextEncoders:
    """The text encoders of an SDXL model and their tokenizers, without the rest of it; frozen."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer


@dataclass(frozen=True, slots=True)
class SDXL:
    """The networks and tokenizers of one SDXL model. `source` is what the user named it by.

    Only `unet` is trained. The two text encoders and the autoencoder are frozen, in evaluation mode.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    source: str

    @property
    def networks(self) -> dict[str, Any]:
        """The four networks by their folder names."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
        }

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell along one side: 8 for SDXL."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 4 for SDXL."""
        return int(self.vae.config.latent_channels)


def predict(unet: nn.Module, x_BCHW: Tensor, labels_B: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the U-Net's raw output (B, C, H, W) for noisy latents and their noise-level labels (0 to 999, fp32).

    The size conditioning goes in as fp32: its sinusoids resolve single pixels only there.
    """
    extra = {"text_embeds": conditioning.pooled_BP, "time_ids": conditioning.time_ids_B6.float()}
    output: tuple[Tensor] = unet(
        x_BCHW, labels_B, encoder_hidden_states=conditioning.text_BLD, added_cond_kwargs=extra, return_dict=False
    )
    return output[0]


def plain_name(name: str) -> str:
    """Return a parameter's name without the segments that compile, DDP, FSDP or checkpoint wrappers add."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPER_SEGMENTS)


def plain_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the detached state of a network under its unwrapped names; the tensors still share its memory.

    Raises ValueError where two names become one.
    """
    state = network.state_dict()
    plain = {plain_name(name): tensor.detach() for name, tensor in state.items()}
    if len(plain) != len(state):
        raise ValueError("two parameters have the same name once wrapper prefixes are removed")
    return plain


def with_unet_weights(sdxl: SDXL, weights: Mapping[str, Tensor]) -> SDXL:
    """Return `sdxl` with a fresh, unwrapped U-Net that holds `weights` (an average or a checkpoint) without copying.

    Wrapper prefixes in the names are removed. Raises RuntimeError (from torch) naming missing, unknown or misshapen
    tensors.
    """
    config = unwrapped(sdxl.unet).config
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    # Detached: assigned parameters would be the very ones in training, and freezing them would end it.
    plain = {plain_name(name): tensor.detach() for name, tensor in weights.items()}
    unet.load_state_dict(plain, strict=True, assign=True)
    return replace(sdxl, unet=unet.requires_grad_(False).eval())


def unwrapped(network: Any) -> Any:
    """Return the network inside torch.compile and DDP wrappers."""
    while True:
        inner = next((network._modules[name] for name in ("_orig_mod", "module") if name in network._modules), None)
        if inner is None:
            return network
        network = inner
