"""What loads, in which state, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_training.model import load
from sdxl_training.model.load import MINIATURE, load_sdxl, load_text_encoders
from sdxl_training.model.sdxl import SDXL
from sdxl_training.model.text import text_fingerprint
from sdxl_training.records import UserError
from tests.tiny_sdxl import tiny_pipeline

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(source: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_sdxl(str(source), seed=0, device="cpu")
    return str(caught.value)


def test_weights_are_those_of_the_folder_in_fp32(original: Path) -> None:
    sdxl = load_sdxl(str(original), seed=0, device="cpu")
    saved = load_file(original / UNET_WEIGHTS)
    assert saved.keys() == sdxl.unet.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in sdxl.unet.state_dict().items())
    assert {tensor.dtype for net in sdxl.networks.values() for tensor in net.parameters()} == {torch.float32}
    assert sdxl.source == str(original)
    assert (sdxl.vae_factor, sdxl.latent_channels) == (8, 4)


def test_only_the_unet_learns(original: Path) -> None:
    sdxl = load_sdxl(str(original), seed=0, device="cpu")
    learns = {name: {p.requires_grad for p in net.parameters()} for name, net in sdxl.networks.items()}
    assert learns == {"unet": {True}, "vae": {False}, "text_encoder": {False}, "text_encoder_2": {False}}
    assert {name for name, net in sdxl.networks.items() if net.training} == {"unet"}


def test_half_precision_files_become_fp32_weights(folder: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(folder / UNET_WEIGHTS).items()}
    save_file(halves, folder / UNET_WEIGHTS)
    unet = load_sdxl(str(folder), seed=0, device="cpu").unet
    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, halves["conv_in.weight"].float())


def test_sharded_weights_are_read(folder: Path) -> None:
    whole = load_file(folder / UNET_WEIGHTS)
    (folder / UNET_WEIGHTS).unlink()
    names = sorted(whole)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: whole[name] for name in part}, folder / "unet" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / f"{UNET_WEIGHTS}.index.json").write_text(json.dumps(index))
    unet = load_sdxl(str(folder), seed=0, device="cpu").unet
    assert all(torch.equal(whole[name], tensor) for name, tensor in unet.state_dict().items())


def test_text_encoders_alone_are_those_of_the_whole_model(folder: Path) -> None:
    """The large U-Net is not even opened."""
    state = torch.get_rng_state()
    for source in (str(folder), MINIATURE):
        whole = load_sdxl(source, seed=0, device="cpu")
        if source != MINIATURE:
            (folder / UNET_WEIGHTS).unlink()
        alone = load_text_encoders(source, "cpu")
        assert text_fingerprint(alone) == text_fingerprint(whole)
        encoders = (alone.text_encoder, alone.text_encoder_2)
        assert not any(one.training or any(p.requires_grad for p in one.parameters()) for one in encoders)
    assert torch.equal(torch.get_rng_state(), state)
    (folder / "text_encoder_2" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged or incomplete"):
        load_text_encoders(str(folder), "cpu")


@pytest.fixture
def miniature(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny folder in the miniature's place: without weights for what the miniature draws at random."""
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    monkeypatch.setattr(load, "MINIATURE_FOLDER", folder)
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_miniature_is_drawn_from_the_seed_and_disturbs_nothing(miniature: Path) -> None:
    def draw(seed: int, noise: int) -> SDXL:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        sdxl = load_sdxl("miniature", seed=seed, device="cpu")
        assert torch.equal(torch.get_rng_state(), before)
        return sdxl

    first, again, other = draw(1, noise=10), draw(1, noise=20), draw(2, noise=10)
    assert same(first.unet, again.unet)
    assert not same(first.unet, other.unet)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        assert same(first.networks[name], other.networks[name])
    assert not any(p.requires_grad for p in first.text_encoder.parameters())


def test_the_miniature_that_ships_loads() -> None:
    sdxl = load_sdxl("miniature", seed=0, device="cpu")
    assert (sdxl.source, sdxl.vae_factor, sdxl.latent_channels) == ("miniature", 8, 4)
    assert sum(p.numel() for p in sdxl.unet.parameters()) < 20e6


def test_miniature_refuses_a_damaged_vae(miniature: Path) -> None:
    file = miniature / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refusal("miniature")


@pytest.mark.parametrize("source", ["/no/such/folder", "./models/missing", "a/b/c", "sdxl"])
def test_missing_folder(source: str) -> None:
    message = refusal(source)
    assert f"model.source = {source}" in message
    assert "there is no such folder" in message
    assert "hub id" in message


def test_hub_id_that_is_not_here_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(source: str, **_: object) -> str:
        asked.append(source)
        raise ConnectionError("Cannot reach the hub\nlong trace")

    monkeypatch.setattr(load, "snapshot_download", unreachable)
    message = refusal("stabilityai/stable-diffusion-xl-base-1.0")
    assert asked == ["stabilityai/stable-diffusion-xl-base-1.0"]
    assert "Cannot reach the hub)" in message
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir FOLDER" in message


def test_hub_id_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE  # tests/conftest.py: nothing is fetched
    assert "hf download" in refusal("nobody/no-such-model-7f3a")


def test_hub_model_is_read_from_the_folder_it_was_fetched_to(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def fetched(source: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(original)

    monkeypatch.setattr(load, "snapshot_download", fetched)
    assert load_sdxl("owner/name", seed=0, device="cpu").source == "owner/name"
    wanted = {str(f.relative_to(original)) for f in original.rglob("*.safetensors")}
    assert wanted <= set(patterns)
    assert not any("fp16" in pattern or pattern.startswith("*") for pattern in patterns)


def test_single_file_says_how_to_convert(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "from_single_file" in refusal(file)


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "is a file" in refusal(tmp_path / "notes.txt")


def test_folder_without_a_unet(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    message = refusal(folder)
    assert "lacks unet" in message
    assert "text_encoder_2" in message  # what a complete folder has


def test_stable_diffusion_1_folder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_2")
    shutil.rmtree(folder / "tokenizer_2")
    message = refusal(folder)
    assert "lacks text_encoder_2, tokenizer_2" in message
    assert "Stable Diffusion 1 or 2" in message


def test_refiner_folder(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    assert "refiner" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"addition_embed_type": None}, "addition_embed_type = None"),
        ("unet", {"cross_attention_dim": 24}, "16 + 24 = 40"),
        ("unet", {"projection_class_embeddings_input_dim": 60}, "20 + 6 * 8 = 68"),
        ("unet", {"in_channels": 9}, "inpainting"),
        ("unet", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ("vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_mean"),
        ("vae", {"shift_factor": 0.1159}, "shift_factor"),
        ("text_encoder_2", {"max_position_embeddings": 13}, "12 and 13 tokens"),
    ],
)
def test_networks_that_do_not_fit(folder: Path, part: str, change: dict[str, Any], words: str) -> None:
    edit_json(folder / part / "config.json", **change)
    message = refusal(folder)
    assert words in message
    assert str(folder) in message


def test_tokenizers_must_fit_their_encoders(folder: Path) -> None:
    edit_json(folder / "text_encoder_2" / "config.json", eos_token_id=49407)
    assert "tokenizer_2 ends texts with token 81, its encoder looks for 49407" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_truncated_weights_are_named(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = refusal(folder)
    assert str(file) in message
    assert "damaged or incomplete" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_missing_weight_is_never_left_random(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    gone = sorted(weights)[-1]
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, file, metadata={"format": "pt"})
    message = refusal(folder)
    assert f"{folder / part}" in message
    assert "1 missing" in message
    assert gone.removeprefix("text_model.") in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_another_shape(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[-1]
    save_file({**weights, name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    message = refusal(folder)
    assert str(folder / part) in message
    assert "1 of another shape" in message


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_an_unknown_weight_is_not_dropped(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    save_file({**load_file(file), "adapter.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    assert "1 unknown (first: adapter.weight)" in refusal(folder)


def test_only_other_weight_files(folder: Path) -> None:
    (folder / UNET_WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    message = refusal(folder)
    assert "found only diffusion_pytorch_model.fp16.safetensors" in message


def test_unreadable_configuration(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")
    assert str(folder / "vae" / "config.json") in refusal(folder)


def test_missing_tokenizer_files(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    assert str(folder / "tokenizer") in refusal(folder)
