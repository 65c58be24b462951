"""The demo picture set: coloured shapes on coloured backgrounds, generated from a seed.

Every picture is drawn from signed distances (negative inside the shape), so edges are smooth at any size and the
pixels depend on nothing but the seed. Object colour, background colour and shape can be read back from the pixels;
`benchmarks/demo_quality.py` judges a trained model that way.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_training.records import SizeHW, UserError

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]
RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (225, 35, 35),
    "blue": (30, 65, 230),
    "green": (30, 165, 55),
    "yellow": (245, 220, 45),
    "purple": (170, 40, 190),
    "cyan": (50, 205, 225),
}
SHAPES = ("circle", "square", "triangle")
RADIUS_OF_SIZE = {"large": (0.34, 0.38), "medium": (0.26, 0.29), "small": (0.19, 0.21)}
SIZE_SHARES = (0.72, 0.19, 0.09)
EXTRA_SHARES = {"shaded": 0.30, "striped": 0.12, "dotted": 0.06, "outlined": 0.04, "glossy": 0.02}
PICTURE_SIZES_HW: dict[SizeHW, float] = {
    (128, 128): 0.40,
    (144, 112): 0.16,
    (112, 144): 0.16,
    (160, 96): 0.12,
    (96, 160): 0.11,
    (192, 80): 0.03,
    (80, 192): 0.02,
}
FILE_KINDS = {"png": 0.5, "jpg": 0.3, "webp": 0.2}

COMBINATIONS = tuple(
    (colour, shape, background)
    for colour, shape, background in product(PALETTE, SHAPES, PALETTE)
    if colour != background
)
EVERY_COMBINATION_AT_LEAST = 4
MANIFEST_NAME = ".demo-set.json"
GENERATOR_VERSION = 1


@dataclass(frozen=True, slots=True)
class PictureSpec:
    """What one picture shows. Lengths are shares of the shorter side; `offset_yx` is measured from the middle."""

    colour: str
    shape: str
    background: str
    size: str = "large"
    radius: float = 0.36
    offset_yx: tuple[float, float] = (0.0, 0.0)
    extras: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Object tag first, background tag second, then what may stand in any order."""
        return (f"{self.colour} {self.shape}", f"{self.background} background", self.size, *self.extras)

    @property
    def caption(self) -> str:
        """The tags as they stand in the caption file."""
        return ", ".join(self.tags)


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """What `write_demo_set` left in `folder`; `already_there` says that nothing had to be written."""

    folder: Path
    pictures: int
    broken: int
    already_there: bool


def draw_picture(spec: PictureSpec, size_hw: SizeHW) -> Pixels:
    """Draw `spec` at `size_hw` (height, width) in pixels; returns uint8 RGB of shape (height, width, 3)."""
    short_px = min(size_hw)
    middle_y, middle_x = (
        (side - 1) / 2 + offset * short_px for side, offset in zip(size_hw, spec.offset_yx, strict=True)
    )
    rows, columns = np.mgrid[0 : size_hw[0], 0 : size_hw[1]].astype(np.float64)
    y, x = rows - middle_y, columns - middle_x
    radius_px = spec.radius * short_px
    distance = _signed_distance(spec.shape, y, x, radius_px)

    ground = np.broadcast_to(np.array(PALETTE[spec.background], np.float64), (*size_hw, 3))
    if "striped" in spec.extras:
        ground = _blend(ground, 0.0, 0.12 * _coverage(np.cos(2 * np.pi * (rows + columns) / (0.25 * short_px))))
    if "dotted" in spec.extras:
        ground = _blend(ground, 255.0, 0.35 * _coverage(_corner_dots_distance(rows, columns, size_hw)))

    paint = np.broadcast_to(np.array(PALETTE[spec.colour], np.float64), (*size_hw, 3))
    if "shaded" in spec.extras:
        paint = _blend(paint, 0.0, 0.22 * np.clip(0.5 + 0.5 * y / radius_px, 0.0, 1.0))
    if "outlined" in spec.extras:
        paint = _blend(paint, 0.0, 0.3 * _coverage(-distance - 0.1 * radius_px))
    if "glossy" in spec.extras:
        paint = _blend(paint, 255.0, 0.3 * _coverage(np.hypot(y + 0.25 * radius_px, x) - 0.12 * radius_px))

    cover = _coverage(distance)[..., None]
    return np.rint(cover * paint + (1.0 - cover) * ground).astype(np.uint8)


def draw_specs(seed: int, pictures: int) -> list[PictureSpec]:
    """Choose what `pictures` pictures show: every combination several times, the rest with long-tailed frequencies."""
    choose = random.Random(f"demo set {GENERATOR_VERSION} {seed}")
    assured = list(COMBINATIONS) * EVERY_COMBINATION_AT_LEAST
    weights = [
        _zipf(PALETTE, colour) * _zipf(SHAPES, shape) * _zipf(PALETTE, ground) for colour, shape, ground in COMBINATIONS
    ]
    chosen = assured[:pictures] + choose.choices(COMBINATIONS, weights, k=max(0, pictures - len(assured)))
    choose.shuffle(chosen)
    return [_dress(choose, *combination) for combination in chosen]


def write_demo_set(folder: Path, seed: int, pictures: int = 720) -> DemoSummary:
    """Write `pictures` pictures with captions, and three broken files, into `folder`: all of it or nothing.

    Equal arguments give equal bytes. A folder that already holds this very set is left as it is.

    Raises UserError where `folder` holds anything else.
    """
    manifest = {"generator": GENERATOR_VERSION, "seed": seed, "pictures": pictures}
    if _holds(folder, manifest):
        return DemoSummary(folder, pictures, len(_BROKEN), already_there=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: holds something other than the complete demo pictures of seed {seed} ({pictures} "
            "pictures), and files are never overwritten; name an empty or new folder, or remove this one yourself"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name a folder that you may write to"
        ) from error
    try:
        _write_files(unfinished, seed, pictures, manifest)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:  # another process (a second rank) may have finished the same set first
        if not _holds(folder, manifest):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return DemoSummary(folder, pictures, len(_BROKEN), already_there=False)


def _write_files(folder: Path, seed: int, pictures: int, manifest: dict[str, int]) -> None:
    choose = random.Random(f"demo files {GENERATOR_VERSION} {seed}")
    for number, spec in enumerate(draw_specs(seed, pictures)):
        (size_hw,) = choose.choices(list(PICTURE_SIZES_HW), list(PICTURE_SIZES_HW.values()))
        (kind,) = choose.choices(list(FILE_KINDS), list(FILE_KINDS.values()))
        _write_pair(folder / f"{number:04d}.{kind}", encode_picture(draw_picture(spec, size_hw), kind), spec.caption)
    for name, (content, caption) in _BROKEN.items():
        _write_pair(folder / name, content, caption)
    names = sorted(path.name for path in folder.iterdir())
    (folder / MANIFEST_NAME).write_text(json.dumps({**manifest, "files": names}) + "\n", encoding="utf-8")


def encode_picture(pixels: Pixels, kind: str) -> bytes:
    """Compress uint8 RGB pixels as `kind`: png, jpg or webp."""
    buffer = io.BytesIO()
    options = {"png": {}, "jpg": {"quality": 92, "subsampling": 0}, "webp": {"quality": 92}}[kind]
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind], **options)
    return buffer.getvalue()


def _write_pair(path: Path, content: bytes, caption: str) -> None:
    path.write_bytes(content)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def _holds(folder: Path, manifest: dict[str, int]) -> bool:
    """Say whether `folder` has this set's manifest and all the files that it names."""
    try:
        found = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        names = found.pop("files")
    except (OSError, ValueError, AttributeError, KeyError):
        return False
    return bool(found == manifest) and all((folder / name).is_file() for name in names)


def _dress(choose: random.Random, colour: str, shape: str, background: str) -> PictureSpec:
    (size,) = choose.choices(list(RADIUS_OF_SIZE), SIZE_SHARES)
    return PictureSpec(
        colour,
        shape,
        background,
        size,
        radius=choose.uniform(*RADIUS_OF_SIZE[size]),
        offset_yx=(choose.uniform(-0.03, 0.03), choose.uniform(-0.03, 0.03)),
        extras=tuple(extra for extra, share in EXTRA_SHARES.items() if choose.random() < share),
    )


def _zipf(names: dict[str, RGB] | tuple[str, ...], name: str) -> float:
    return 1.0 / (1 + list(names).index(name))


def _signed_distance(shape: str, y: Plane, x: Plane, radius_px: float) -> Plane:
    """Distance in pixels to the outline of a shape whose bounding box is about two radii wide; negative inside."""
    distance: dict[str, Plane] = {
        "circle": np.hypot(y, x) - radius_px,
        "square": np.maximum(np.abs(y), np.abs(x)) - 0.92 * radius_px,
        # Upright and as high as wide; (2, -1) / sqrt(5) is the normal of its right side.
        "triangle": np.maximum(y - radius_px, (2.0 * np.abs(x) - y - radius_px) / np.sqrt(5.0)),
    }
    return distance[shape]


def _corner_dots_distance(rows: Plane, columns: Plane, size_hw: SizeHW) -> Plane:
    short_px = min(size_hw)
    from_corner_y = np.minimum(rows, size_hw[0] - 1 - rows)
    from_corner_x = np.minimum(columns, size_hw[1] - 1 - columns)
    return np.hypot(from_corner_y - 0.1 * short_px, from_corner_x - 0.1 * short_px) - 0.04 * short_px


def _coverage(distance: Plane) -> Plane:
    """Share of each pixel that lies inside, for an edge that is one pixel wide."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def _blend(image: Plane, grey: float, amount: Plane) -> Plane:
    return image + amount[..., None] * (grey - image)


_TRUNCATED_SPEC = PictureSpec("red", "circle", "blue")
_BROKEN = {
    "broken-truncated.jpg": (
        encode_picture(draw_picture(_TRUNCATED_SPEC, (128, 128)), "jpg")[:1500],
        _TRUNCATED_SPEC.caption,
    ),
    "broken-empty.png": (b"", "green square, red background, large"),
    "broken-text.png": (b"This is a sentence and not a picture.\n", "blue triangle, yellow background, large"),
}
