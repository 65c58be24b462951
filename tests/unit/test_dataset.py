"""Pictures on disk become a data set: variants, batches by pixels, and what a checkpoint remembers of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxl_training.assemble.dataset import Dataset, arithmetic, prepare_dataset
from sdxl_training.config.schema import Config
from sdxl_training.parallel.group import Group
from sdxl_training.records import Bucket, UserError
from sdxl_training.tracking.progress import SilentProgress

IMAGES_A_STEP = "images a step (batch_size x accumulation x processes)"
SQUARE, WIDE = Bucket((64, 64)), Bucket((32, 64))
SMALL = {"generator": "list", "sizes": [[64, 64], [32, 64]]}


def encode(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for a VAE: 8x8 blocks averaged."""
    mean_BCHW = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
    return mean_BCHW, mean_BCHW.abs() * 0.1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures near the square and four that are twice as wide as high."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(10):
        size_hw = (64, 72) if number < 6 else (64, 128)
        Image.fromarray(generator.integers(0, 256, (*size_hw, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture, {number}")
    return folder


def dataset_of(
    pictures: Path, output: Path, training: dict[str, Any] | None = None, one_batch: bool = False, **data: Any
) -> tuple[Config, Dataset]:
    values = {
        "global_config": {"output_dir": str(output)},
        "training": {"batch_size": 2, "accumulation": 2, **(training or {})},
        "data": {"sources": [{"path": str(pictures)}], "resolution": 64, "buckets": SMALL, **data},
    }
    config, group = Config.model_validate(values), Group(0, 1, torch.device("cpu"))
    return config, prepare_dataset(config, group, SilentProgress(), encode, "vae", one_batch)


def digest(values: Sequence[object]) -> str:
    """Return the digest that runs before there were variants have in their checkpoints."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        found.update(json.dumps(value).encode() + b"\n")
    return found.hexdigest()


def test_the_fingerprint_of_a_constant_batch_is_what_it_was(pictures: Path, tmp_path: Path) -> None:
    """Of runs from before variants and batches by pixels: the number itself, and one key a picture."""
    _, dataset = dataset_of(pictures, tmp_path)
    assert list(dataset.fingerprint) == [
        "global_config.seed",
        IMAGES_A_STEP,
        "which pictures there are",
        "the pictures' content, size, crop or VAE",
        "captions",
        "repeats",
    ]
    assert dataset.fingerprint[IMAGES_A_STEP] == "4"
    assert all(len(keys) == 1 for keys in dataset.keys)
    assert dataset.fingerprint["the pictures' content, size, crop or VAE"] == digest([key for (key,) in dataset.keys])
    assert dataset.fingerprint["repeats"] == digest([1] * 10)
    captions = [[[f"picture, {number}"], ["picture", str(number)]] for number in range(10)]
    assert dataset.fingerprint["captions"] == digest(captions)


def changed_by(folder: Path, output: Path, change: Callable[[], object], **data: Any) -> set[str]:
    """Return the parts of the fingerprint that a change of the pictures' folder changes."""
    before, _, after = dataset_of(folder, output, **data)[1], change(), dataset_of(folder, output, **data)[1]
    return {name for name, value in before.fingerprint.items() if after.fingerprint[name] != value}


def test_every_alternative_is_part_of_the_fingerprint(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    lines = {"captions": {"alternatives": "lines"}}
    assert changed_by(folder, tmp_path, lambda: None, **lines) == set()
    write = (folder / "3.txt").write_text
    assert changed_by(folder, tmp_path, lambda: write("picture, 3\nanother"), **lines) == {"captions"}
    assert changed_by(folder, tmp_path, lambda: write("picture, 3\nanother one"), **lines) == {"captions"}
    prose = {"captions": {"kind": "prose"}}
    assert changed_by(folder, tmp_path, lambda: write("picture; 3"), **prose) == {"captions"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": {"templates": ["{tags}"]}}, r"data\.captions\.templates: .* none of the 10 pictures has any"),
        ({"training": {"coupling": {"type": "conditional_transport"}}}, r"training\.coupling\.type = conditional_"),
    ],
)
def test_what_asks_for_tags_that_prose_does_not_have_is_refused(
    pictures: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    kept = {"training": changes.get("training")}
    dataset_of(pictures, tmp_path, **kept, captions=changes.get("captions", {}))
    with pytest.raises(UserError, match=words):
        dataset_of(pictures, tmp_path, **kept, captions={"kind": "prose", **changes.get("captions", {})})


def test_batches_by_pixels_differ_between_buckets_and_have_a_fingerprint(pictures: Path, tmp_path: Path) -> None:
    """4096 pixels are one square picture or two half as large; 8192 are two or four."""
    config, dataset = dataset_of(pictures, tmp_path, {"pixels_per_batch": 4096})
    assert dataset.schedule.global_batches == {WIDE: 4, SQUARE: 2}
    assert arithmetic(config, dataset.schedule, 1).endswith("= 2 to 4 images a step, by bucket")
    _, larger = dataset_of(pictures, tmp_path, {"pixels_per_batch": 8192})
    assert larger.schedule.global_batches == {WIDE: 8, SQUARE: 4}
    seen = [each.fingerprint[IMAGES_A_STEP] for each in (dataset, larger, dataset_of(pictures, tmp_path)[1])]
    assert len(set(seen)) == 3
    assert dataset.fingerprint.keys() == larger.fingerprint.keys()


def test_the_heaviest_update_has_the_most_pixels_not_the_largest_bucket(pictures: Path, tmp_path: Path) -> None:
    _, by_pictures = dataset_of(pictures, tmp_path)
    assert by_pictures.heaviest_bucket == SQUARE
    _, by_pixels = dataset_of(pictures, tmp_path, {"pixels_per_batch": 6144})
    assert by_pixels.plan.largest_bucket == SQUARE
    assert by_pixels.heaviest_bucket == WIDE  # three of 2048 pixels, but only one of 4096


@pytest.mark.parametrize("flip", [False, True])
def test_every_variant_is_encoded_under_a_name_of_its_own(pictures: Path, tmp_path: Path, flip: bool) -> None:
    _, plain = dataset_of(pictures, tmp_path)
    crop = {"position": "random", "variants": 3, "flip": flip}
    _, dataset = dataset_of(pictures, tmp_path, crop=crop)
    for keys, variants in zip(dataset.keys, dataset.plan.variants, strict=True):
        assert len(keys) == len(set(keys)) == len(variants)
        assert all(key in dataset.cache for key in keys)
    assert max(map(len, dataset.keys)) == (6 if flip else 3)
    assert plain.schedule.images_per_epoch == dataset.schedule.images_per_epoch == 10
    changed = {name for name, value in plain.fingerprint.items() if dataset.fingerprint[name] != value}
    assert changed == {"the pictures' content, size, crop or VAE"}


def test_a_picture_of_which_one_variant_is_lost_is_left_out_whole(pictures: Path, tmp_path: Path) -> None:
    first: list[Tensor] = []

    def fails_once(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        mean_BCHW, std_BCHW = encode(pixels_BCHW)
        first[:] = first or [pixels_BCHW[0]]
        for b, pixels_CHW in enumerate(pixels_BCHW):
            if pixels_CHW.shape == first[0].shape and torch.equal(pixels_CHW, first[0]):
                mean_BCHW[b] = float("nan")
        return mean_BCHW, std_BCHW

    values = {
        "global_config": {"output_dir": str(tmp_path)},
        "data": {"sources": [{"path": str(pictures)}], "resolution": 64, "buckets": SMALL, "crop": {"flip": True}},
    }
    config, group = Config.model_validate(values), Group(0, 1, torch.device("cpu"))
    dataset = prepare_dataset(config, group, SilentProgress(), fails_once, "vae")
    (bad,) = dataset.quarantined
    assert len(dataset.plan.records) == len(dataset.keys) == 9
    assert bad.path not in {record.path for record in dataset.plan.records}
    assert all(len(keys) == 2 and all(key in dataset.cache for key in keys) for keys in dataset.keys)


def test_one_batch_is_as_large_as_its_bucket_says(pictures: Path, tmp_path: Path) -> None:
    _, dataset = dataset_of(pictures, tmp_path, {"pixels_per_batch": 4096}, one_batch=True)
    assert len(dataset.plan.records) == 2
    assert dataset.schedule.global_batches == {SQUARE: 2}
