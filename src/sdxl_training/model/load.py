"""Reading SDXL: the miniature, a diffusers folder, or a model of the Hugging Face hub.

Everything is checked before it is trusted: a folder's parts, the shapes its configurations promise each other, every
weight file's length, and that no weight is missing. What does not fit is refused by name.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from sdxl_training.model.architecture import architecture_problems, tokenizer_problems
from sdxl_training.model.sdxl import SDXL, TextEncoders, TextParts
from sdxl_training.records import UserError
from sdxl_training.rng import Stream, derive_seed, torch_generator

MINIATURE = "miniature"
MINIATURE_FOLDER = Path(__file__).parent / "miniature"

# The miniature's text encoders are random but always the same: a checkpoint must find those it was trained with.
TEXT_ENCODER_SEED = 20231
EMBEDDING_STD = 0.7

UNET_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "model.safetensors"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WEIGHT_FILES = {"unet": UNET_FILE, "vae": UNET_FILE, "text_encoder": TEXT_FILE, "text_encoder_2": TEXT_FILE}
TEXT_SHAPE = (77, 768 + 1280, 1280)
"""Tokens of a chunk, text width and pooled text width of SDXL itself."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILES = (
    "model_index.json",
    *(f"{part}/*.{kind}" for part in PARTS for kind in ("json", "txt")),
    *(f"{part}/{file}" for part, file in WEIGHT_FILES.items()),
    *(f"{part}/{Path(file).stem}-*-of-*.safetensors" for part, file in WEIGHT_FILES.items()),
)


def load_sdxl(source: str, seed: int, device: torch.device | str) -> SDXL:
    """Return the SDXL model that `source` names, in fp32 on `device`: "miniature", a diffusers folder or a hub id.

    The U-Net is ready to train; text encoders and VAE are frozen. Only the miniature's U-Net depends on `seed`: it is
    drawn from it, since the miniature ships without trained weights. Torch's global generator is left as it was.
    Raises UserError where the source is missing, incomplete, damaged or no SDXL model.
    """
    disable_progress_bar()  # theirs would break into ours
    if source == MINIATURE:
        return _finish(_read_miniature(seed), device)
    folder = _find_folder(source)
    _check_parts(folder)
    _check_configs(folder)
    for part in WEIGHT_FILES:
        _check_weight_files(folder / part)
    sdxl = _read_folder(folder, source)
    _check_tokenizers(sdxl, folder)
    return _finish(sdxl, device)


def is_local(source: str) -> bool:
    """Return whether a model can be read without fetching anything; a hub id counts as not, cached or not."""
    return source == MINIATURE or Path(source).expanduser().is_dir()


def load_vae(source: str, device: torch.device | str) -> AutoencoderKL:
    """Return the frozen VAE of the model that `source` names, in fp32 on `device`; nothing else of it is read.

    Raises UserError as `load_sdxl` does.
    """
    disable_progress_bar()
    folder = MINIATURE_FOLDER if source == MINIATURE else _find_folder(source)
    if source != MINIATURE:
        _check_parts(folder)
    _check_configs(folder)
    return _read_vae(folder).to(device).requires_grad_(False).eval()


def load_text_encoders(source: str, device: torch.device | str) -> TextEncoders:
    """Return the frozen text encoders of the model that `source` names, in fp32 on `device`; nothing else is read.

    Raises UserError as `load_sdxl` does.
    """
    disable_progress_bar()
    folder = MINIATURE_FOLDER if source == MINIATURE else _find_folder(source)
    if source != MINIATURE:
        _check_parts(folder)
    _check_configs(folder)
    text = _draw_text_encoders(folder) if source == MINIATURE else _read_text_encoders(folder)
    _check_tokenizers(text, folder)
    for encoder in (text.text_encoder, text.text_encoder_2):
        encoder.to(device).requires_grad_(False).eval()
    return text


def load_text_shape(source: str) -> tuple[int, int, int]:
    """Return tokens of a chunk, text width and pooled text width of a model; only configurations are read.

    Raises UserError as `load_sdxl` does.
    """
    folder = MINIATURE_FOLDER if source == MINIATURE else _find_folder(source)
    if source != MINIATURE:
        _check_parts(folder)
    _check_configs(folder)
    first, second = (_read_json(folder / part / "config.json") for part in ("text_encoder", "text_encoder_2"))
    one, other = CLIPTextConfig.from_dict(first), CLIPTextConfig.from_dict(second)
    return one.max_position_embeddings, one.hidden_size + other.hidden_size, other.projection_dim


def _read_miniature(seed: int) -> SDXL:
    folder = MINIATURE_FOLDER
    _check_configs(folder)
    with torch.random.fork_rng(devices=[]):  # building a module draws weights, even those replaced at once
        torch.manual_seed(derive_seed(seed, Stream.INITIAL_WEIGHTS))
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    sdxl = _put_together(unet, _read_vae(folder), _draw_text_encoders(folder), MINIATURE)
    _check_tokenizers(sdxl, folder)
    return sdxl


def _draw_text_encoders(folder: Path) -> TextEncoders:
    with torch.random.fork_rng(devices=[]):
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
    _draw_weights(text_encoder, number=1)
    _draw_weights(text_encoder_2, number=2)
    return TextEncoders(text_encoder, text_encoder_2, *_read_tokenizers(folder))


def _put_together(unet: UNet2DConditionModel, vae: AutoencoderKL, text: TextEncoders, source: str) -> SDXL:
    return SDXL(unet, vae, text.text_encoder, text.text_encoder_2, text.tokenizer, text.tokenizer_2, source)


@torch.no_grad()
def _draw_weights(encoder: nn.Module, number: int) -> None:
    """Fill text encoder `number` with weights that depend on nothing but their names and shapes.

    Not transformers' own initialisation: a checkpoint of the miniature must find the encoders it was trained with after
    any upgrade. Embeddings are as large as the states around them, so that words and places stay told apart.
    """
    for name, parameter in encoder.named_parameters():
        place = zlib.crc32(name.removeprefix("text_model.").encode())
        if parameter.ndim < 2:  # norms and biases
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            std = EMBEDDING_STD if "embedding" in name else parameter.shape[1] ** -0.5
            words = torch_generator(TEXT_ENCODER_SEED, Stream.INITIAL_WEIGHTS, number, place)
            parameter.copy_(std * torch.randn(parameter.shape, generator=words))


def _read_folder(folder: Path, source: str) -> SDXL:
    return _put_together(_read_unet(folder), _read_vae(folder), _read_text_encoders(folder), source)


def _read_text_encoders(folder: Path) -> TextEncoders:
    for part in ("text_encoder", "text_encoder_2"):
        _check_weight_files(folder / part)
    return TextEncoders(
        _read_text_encoder(CLIPTextModel, folder / "text_encoder"),
        _read_text_encoder(CLIPTextModelWithProjection, folder / "text_encoder_2"),
        *_read_tokenizers(folder),
    )


def _finish(sdxl: SDXL, device: torch.device | str) -> SDXL:
    for network in sdxl.networks.values():
        network.to(device).requires_grad_(False).eval()
    sdxl.unet.requires_grad_(True).train()
    return sdxl


def _find_folder(source: str) -> Path:
    """Return the local folder of `source`, fetching it from the hub where it is a hub id and no folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in {".safetensors", ".ckpt", ".pt"}:
        raise UserError(
            f"model.source = {source}: single files are read from a later version on. Convert it to a folder with "
            f"diffusers: StableDiffusionXLPipeline.from_single_file({source!r}).save_pretrained('FOLDER'), and give "
            "that folder."
        )
    if path.exists():
        raise UserError(f"model.source = {source} is a file; give the folder of a diffusers SDXL model.")
    if not HUB_ID.fullmatch(source):
        raise UserError(
            f"model.source = {source}: there is no such folder. Give a diffusers SDXL folder, a hub id "
            "(owner/name), or miniature."
        )
    return _fetch_from_hub(source)


def _fetch_from_hub(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.source = {source}: there is no such folder here, and the model hub did not deliver a model of "
            f"that name ({reason}). Check the spelling and the network, sign in with `hf auth login` if the model is "
            f"gated, or fetch it on another machine with `hf download {source} --local-dir FOLDER` and give the folder."
        ) from error


def _check_parts(folder: Path) -> None:
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if not missing:
        return
    if "unet" not in missing and "text_encoder_2" in missing:
        hint = "A folder with one text encoder is Stable Diffusion 1 or 2."
    elif "unet" not in missing and "text_encoder" in missing:
        hint = "A folder with only the second text encoder is the SDXL refiner."
    else:
        hint = f"A diffusers SDXL folder has {', '.join(PARTS)}."
    raise UserError(f"model.source = {folder}: lacks {', '.join(missing)}. {hint} Give a complete SDXL base model.")


def _check_configs(folder: Path) -> None:
    unet, vae, text_1, text_2 = (_read_json(folder / part / "config.json") for part in WEIGHT_FILES)
    problems = architecture_problems(unet, vae, CLIPTextConfig.from_dict(text_1), CLIPTextConfig.from_dict(text_2))
    _refuse(folder, problems)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise UserError(
            f"model.source = {folder} is no SDXL base model: {'; '.join(problems)}. Give a complete SDXL base model."
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Fetch or export the model again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} should hold one JSON object. Fetch or export the model again.")
    return content


def _check_weight_files(part: Path) -> None:
    """Open every weight file's header: it also compares the file's length with what the header promises."""
    files = _weight_files(part)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or incomplete ({error}). Fetch or export the model again.") from error


def _weight_files(part: Path) -> list[Path]:
    name = WEIGHT_FILES[part.name]
    if (part / name).is_file():
        return [part / name]
    index = part / f"{name}.index.json"
    if index.is_file():
        return sorted({part / shard for shard in _read_json(index).get("weight_map", {}).values()})
    others = sorted(file.name for file in part.iterdir() if file.suffix in {".safetensors", ".bin", ".ckpt"})
    found = (
        f"found only {', '.join(others)}; half-precision and pickled files are not read" if others else "it is empty"
    )
    raise UserError(f"{part} lacks {name} ({found}). Give a folder with the full-precision safetensors weights.")


def _read_unet(folder: Path) -> UNet2DConditionModel:
    # Built without memory and filled by assignment: initialising 2.6 billion weights only to replace them takes
    # a minute and twice the memory.
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder / "unet"):
        weights.update(load_file(file))
    weights = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    expected = unet.state_dict()
    _check_weights(
        folder / "unet",
        missing=expected.keys() - weights.keys(),
        unknown=weights.keys() - expected.keys(),
        misshapen=(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape),
    )
    unet.load_state_dict(weights, assign=True)
    return unet


def _read_vae(folder: Path) -> AutoencoderKL:
    _check_weight_files(folder / "vae")
    vae, found = AutoencoderKL.from_pretrained(
        folder / "vae",
        torch_dtype=torch.float32,
        low_cpu_mem_usage=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported, and refused below
        output_loading_info=True,
    )
    _check_loading(folder / "vae", found)
    return vae


def _read_text_encoder(kind: type[nn.Module], part: Path) -> Any:
    encoder, found = kind.from_pretrained(  # type: ignore[attr-defined]
        part,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_loading(part, found)
    return encoder


def _read_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    pair = []
    for name in ("tokenizer", "tokenizer_2"):
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise UserError(f"{folder / name} lacks tokenizer.json or vocab.json. Fetch or export the model again.")
        try:
            pair.append(CLIPTokenizer.from_pretrained(folder / name))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}). Fetch or export the model again.") from error
    return pair[0], pair[1]


def _check_tokenizers(text: TextParts, folder: Path) -> None:
    problems = [
        *tokenizer_problems(text.tokenizer, text.text_encoder.config, "tokenizer"),
        *tokenizer_problems(text.tokenizer_2, text.text_encoder_2.config, "tokenizer_2"),
    ]
    _refuse(folder, problems)


def _check_loading(part: Path, found: Mapping[str, Any]) -> None:
    # Weights a text model does not have are left over from a larger CLIP; weights it lacks would be random.
    unknown = () if part.name.startswith("text") else found["unexpected_keys"]
    misshapen = [entry[0] for entry in found["mismatched_keys"]]
    _check_weights(part, missing=found["missing_keys"], unknown=unknown, misshapen=misshapen)


def _check_weights(part: Path, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]) -> None:
    """Refuse what the libraries only warn of: a missing weight would be left random, an unknown one dropped."""
    groups = {"missing": sorted(missing), "unknown": sorted(unknown), "of another shape": sorted(misshapen)}
    found = [f"{len(names)} {group} (first: {names[0]})" for group, names in groups.items() if names]
    if found:
        raise UserError(
            f"{part}: the weights do not fit its config.json: {', '.join(found)}. Fetch or export the model again."
        )
