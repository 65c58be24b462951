"""What makes a set of networks an SDXL base model that this trainer can train, as sentences about what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CLIPTextConfig, CLIPTokenizer

# A CLIP configuration that says 2 is from before the value meant anything: the end of text is then the largest id.
LEGACY_EOS_ID = 2
LATENT_CHANNELS, VAE_FACTOR = 4, 8


def architecture_problems(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_1: CLIPTextConfig, text_2: CLIPTextConfig
) -> list[str]:
    """Return one sentence for every way the four configurations are not SDXL's or do not fit each other."""
    return [*_unet_problems(unet, text_1, text_2), *_vae_problems(unet, vae), *_text_problems(text_1, text_2)]


def tokenizer_problems(tokenizer: CLIPTokenizer, encoder: CLIPTextConfig, name: str) -> list[str]:
    """Return one sentence for every way a tokenizer does not fit its text encoder."""
    problems = []
    made, read = tokenizer.model_max_length, encoder.max_position_embeddings
    if made != read:
        problems.append(f"{name} makes {made} tokens where its encoder reads {read}")
    if len(tokenizer) > encoder.vocab_size:
        problems.append(f"{name} knows {len(tokenizer)} tokens, its encoder {encoder.vocab_size}")
    if encoder.eos_token_id not in (LEGACY_EOS_ID, tokenizer.eos_token_id):
        problems.append(
            f"{name} ends texts with token {tokenizer.eos_token_id}, its encoder looks for {encoder.eos_token_id}"
        )
    return problems


def _unet_problems(unet: Mapping[str, Any], text_1: CLIPTextConfig, text_2: CLIPTextConfig) -> Iterator[str]:
    kind = unet.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        yield f"unet is a {kind}, not a UNet2DConditionModel"
        return
    if unet.get("addition_embed_type") != "text_time":
        yield (
            f"unet has addition_embed_type = {unet.get('addition_embed_type')} where SDXL has text_time "
            "(Stable Diffusion 1 and 2 have none)"
        )
        return
    width, needed = unet.get("cross_attention_dim", 1280), text_1.hidden_size + text_2.hidden_size
    if width != needed:
        yield (
            f"unet has cross_attention_dim = {width} but the text encoders give {text_1.hidden_size} + "
            f"{text_2.hidden_size} = {needed} (the SDXL refiner has 1280, SDXL base 2048)"
        )
    pooled, size = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim") or 0
    if pooled != text_2.projection_dim + 6 * size:
        yield (
            f"unet has projection_class_embeddings_input_dim = {pooled} but SDXL base's six sizes and pooled text give "
            f"{text_2.projection_dim} + 6 * {size} = {text_2.projection_dim + 6 * size}"
        )


def _vae_problems(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Iterator[str]:
    channels = vae.get("latent_channels", 4)
    found = (unet.get("in_channels", 4), unet.get("out_channels", 4))
    if found != (channels, channels):
        yield (
            f"unet takes {found[0]} channels and gives {found[1]} where the VAE's latents have {channels} "
            "(inpainting models take 9)"
        )
    factor = 2 ** (len(vae.get("block_out_channels", ())) - 1)
    if (channels, factor) != (LATENT_CHANNELS, VAE_FACTOR):
        yield (
            f"the VAE makes {channels} channels at 1/{factor} of the size where SDXL's makes {LATENT_CHANNELS} at "
            f"1/{VAE_FACTOR}"
        )
    for name in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(name):
            yield (
                f"the VAE sets {name}: its latents are normalised otherwise than SDXL's, and training would silently "
                "use other latents than the model was made with"
            )


def _text_problems(text_1: CLIPTextConfig, text_2: CLIPTextConfig) -> Iterator[str]:
    lengths = (text_1.max_position_embeddings, text_2.max_position_embeddings)
    if lengths[0] != lengths[1]:
        yield f"the text encoders read {lengths[0]} and {lengths[1]} tokens; SDXL needs the same number"
