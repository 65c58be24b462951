"""`cache` where there is a GPU: what it fills is what training and `plan` look for; memory that is full."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_training.assemble import caching, dataset, session
from sdxl_training.assemble.planning import make_report
from sdxl_training.config.load import LoadedConfig, load_config
from sdxl_training.data.preparing import CpuPreparer
from sdxl_training.parallel.group import Group
from sdxl_training.records import UserError
from sdxl_training.tracking.progress import SilentProgress
from tests.integration.conftest import Trainer

GROUP = Group(0, 1, torch.device("cpu"))


class OnGpu(CpuPreparer):
    """Stands for DALI on a GPU: its pixels are not those of the CPU."""

    recipe = "dali-gpu"


@pytest.fixture(autouse=True)
def settled(pictures: Path) -> None:
    """What is learnt of files that were written a moment ago is not trusted at the next start: let them be older."""
    for path in pictures.iterdir():
        os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the recipe of each preparer that is opened from now on, where `auto` takes DALI."""
    opened: list[str] = []

    def choose(name: str, cuda_device: int | None, *, batch_size: int, background: tuple[int, int, int]) -> CpuPreparer:
        preparer = (CpuPreparer if name == "cpu" else OnGpu)(1, background)
        opened.append(preparer.recipe)
        return preparer

    monkeypatch.setattr(dataset, "choose_backend", choose)
    return opened


def to_encode(trainer: Trainer, mode: str) -> dict[str, int]:
    """Return what a plan says must be encoded."""
    config = configured(trainer, mode).config
    state = make_report(config, dataset.find_pictures(config, SilentProgress())).cache
    assert state is not None
    assert state.unknown == ""
    return dict(state.to_encode)


def configured(trainer: Trainer, mode: str) -> LoadedConfig:
    return load_config(trainer.config, [f"global_config.output_dir={trainer.output}", f"data.cache.mode={mode}"])


def unmade_visits(trainer: Trainer, mode: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many visits of a run of this mode would find no latent."""
    config, seen = configured(trainer, mode).config, []
    with monkeypatch.context() as patched:
        patched.setattr(caching, "fill_cache", lambda _config, prepared, *_: seen.append(prepared))
        caching.cache(configured(trainer, mode), verify=False)
    (prepared,) = seen
    digests_P2, known_P, failed_P = prepared.found.contents.columns()
    missing_N = prepared.cache.missing(
        digests_P2[prepared.plan.picture_N], known_P[prepared.plan.picture_N], prepared.plan
    )
    assert config.data.cache.mode == mode
    return int(missing_N[~failed_P[prepared.plan.picture_N]].sum())


@pytest.mark.parametrize(("mode", "recipe"), [("ahead", "cpu"), ("first", "gpu")])
def test_a_plan_and_a_run_find_what_cache_has_filled(
    trainer: Trainer, with_gpu: list[str], monkeypatch: pytest.MonkeyPatch, mode: str, recipe: str
) -> None:
    caching.cache(configured(trainer, mode), verify=False)
    assert {name.endswith("gpu") for name in with_gpu} == {recipe == "gpu"}
    assert to_encode(trainer, mode) == {}
    assert unmade_visits(trainer, mode, monkeypatch) == 0
    other = "first" if mode == "ahead" else "ahead"
    assert set(to_encode(trainer, other)) == {"preparation changed"}, "else the recipes would not matter"


def test_a_plan_where_the_run_could_not_prepare_its_pictures_says_so(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made for another machine: the rest of it holds."""

    def refuse(*_: object, **__: object) -> Callable[..., object]:
        raise UserError("NVIDIA DALI cannot be imported.")

    monkeypatch.setattr(dataset, "choose_backend", refuse)
    config = configured(trainer, "first").config
    report = make_report(config, dataset.find_pictures(config, SilentProgress()))
    assert report.cache is not None
    assert report.cache.unknown.endswith("NVIDIA DALI cannot be imported.")


@pytest.mark.parametrize("room", [2, 0])
def test_cache_makes_do_with_little_memory_or_says_that_it_cannot(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    whole, shapes = session.encode_latents, []

    def encode(vae: AutoencoderKL, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(len(pixels_BCHW))
        if len(pixels_BCHW) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(vae, pixels_BCHW)

    monkeypatch.setattr(session, "encode_latents", encode)
    monkeypatch.setattr(session, "encode_batch", lambda _: 8)
    if room:
        caching.cache(configured(trainer, "ahead"), verify=False)
        assert max(shapes) > room
        assert to_encode(trainer, "ahead") == {}
    else:
        with pytest.raises(UserError, match="even alone and in tiles"):
            caching.cache(configured(trainer, "ahead"), verify=False)


def test_cache_says_that_there_is_no_room_for_the_vae_itself(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> AutoencoderKL:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 320.00 MiB.\nMore lines.")

    monkeypatch.setattr(caching, "load_vae", load)
    with pytest.raises(UserError, match=r"320\.00 MiB\.\)\. End other programs there, .* is kept\.$"):
        caching.cache(configured(trainer, "ahead"), verify=False)
