"""The judge reads generated pictures right, and says so when they are wrong."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from sdxl_training.data.demo_set import PICTURE_SIZES_HW, PictureSpec, draw_picture, draw_specs


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "demo_quality.py"
    spec = importlib.util.spec_from_file_location("demo_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quality = _load()


def wanted(spec: PictureSpec) -> tuple[str, str, str]:
    return spec.colour, spec.background, spec.shape


@pytest.mark.parametrize("size_hw", [*PICTURE_SIZES_HW, (64, 64), (48, 80), (80, 48)])
def test_clean_pictures_are_read_right(size_hw: tuple[int, int]) -> None:
    specs = [spec for spec in draw_specs(seed=11, pictures=250) if spec.size != "small"]
    right = [quality.judge_picture(draw_picture(spec, size_hw)) == wanted(spec) for spec in specs]
    assert np.mean(right) >= 0.99


def test_downscaled_noisy_pictures_are_read_right() -> None:
    noise = np.random.Generator(np.random.Philox(1))
    right = []
    for spec in draw_specs(seed=12, pictures=200):
        small = cv2.resize(draw_picture(spec, (128, 128)), (64, 64), interpolation=cv2.INTER_AREA)
        noisy = np.clip(small + noise.normal(0, 12, small.shape), 0, 255).astype(np.uint8)
        right.append(quality.judge_picture(noisy) == wanted(spec))
    assert np.mean(right) >= 0.97


def test_a_flat_picture_shows_nothing() -> None:
    flat = np.full((64, 64, 3), (225, 35, 35), np.uint8)
    assert quality.judge_picture(flat) == ("red", "red", "nothing")


def test_prompts_cover_colours_shapes_and_backgrounds_evenly() -> None:
    prompts = quality.prompts()
    assert len(prompts) == len(set(prompts)) == 72
    assert prompts[0][0].count(", ") == 2
    objects, grounds, shapes = (Counter(reading[part] for _, reading in prompts) for part in range(3))
    assert set(objects.values()) == {12}
    assert set(shapes.values()) == {24}
    assert set(grounds.values()) <= {11, 12, 13}


def test_accuracies_are_counted_per_question() -> None:
    pictures = [draw_picture(PictureSpec("red", "circle", "blue"), (64, 64))] * 4
    asked = [
        ("red", "blue", "circle"),
        ("green", "blue", "circle"),
        ("red", "green", "square"),
        ("red", "green", "square"),
    ]
    assert quality.accuracies(pictures, asked) == {"object_colour": 0.75, "background_colour": 0.5, "shape": 0.5}


def test_the_grid_keeps_the_order() -> None:
    pictures = [np.full((2, 3, 3), number, np.uint8) for number in range(6)]
    grid = quality.picture_grid(pictures, columns=3)
    assert grid.shape == (4, 9, 3)
    assert grid[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
