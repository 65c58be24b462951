"""Does the trained miniature draw what the caption says? Reads it back from the pixels.

    python benchmarks/demo_quality.py --run runs/miniature --out grid.png

Draws 72 prompts sampled evenly over the 90 combinations of object colour, shape and background colour, and prints the
share of right object colours, background colours and shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_training.assemble import draw_prompts
from sdxl_training.assemble.drawing import sampling_of
from sdxl_training.config.schema import Previews
from sdxl_training.data.demo_set import COMBINATIONS, PALETTE

Pixels = NDArray[np.uint8]
Reading = tuple[str, str, str]  # object colour, background colour, shape

COLOURS = tuple(PALETTE)
PALETTE_C3 = np.array(list(PALETTE.values()), np.float64)
# Area over area of the bounding box: square 1, circle pi/4, triangle 1/2; the limits lie half-way between.
SQUARE_ABOVE, CIRCLE_ABOVE = (1 + np.pi / 4) / 2, (np.pi / 4 + 1 / 2) / 2
PROMPTED = tuple(
    combination for number, combination in enumerate(COMBINATIONS) if number % 5 != (number // 5) % 5
)  # one background of five left out for each colour and shape, another one each time: 72 of 90


def judge_picture(pixels_HW3: Pixels) -> Reading:
    """Read (object colour, background colour, shape) from a uint8 RGB picture with one object near its middle."""
    height, width = pixels_HW3.shape[:2]
    short = min(height, width)
    ring = max(1, short // 24)
    inner = np.zeros((height, width), bool)
    inner[ring:-ring, ring:-ring] = True
    reach = max(1, round(0.07 * short))
    centre = pixels_HW3[height // 2 - reach : height // 2 + reach, width // 2 - reach : width // 2 + reach]
    object_N3, ground_N3 = centre.reshape(-1, 3), pixels_HW3[~inner]
    mask = _nearer(pixels_HW3, np.median(object_N3, axis=0), np.median(ground_N3, axis=0))
    return _commonest_colour(object_N3), _commonest_colour(ground_N3), shape_of_mask(mask)


def shape_of_mask(mask_HW: NDArray[np.bool_]) -> str:
    """Name the shape of the mask's largest connected part by the share of its bounding box that it fills.

    The mask is opened by 2x2 pixels first: a hair on the outline would stretch the box.
    """
    opened = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8))
    stats = cv2.connectedComponentsWithStats(opened, connectivity=4)[2][1:]
    if len(stats) == 0:
        return "nothing"
    largest = stats[stats[:, cv2.CC_STAT_AREA].argmax()]
    filled = largest[cv2.CC_STAT_AREA] / (largest[cv2.CC_STAT_WIDTH] * largest[cv2.CC_STAT_HEIGHT])
    if filled > SQUARE_ABOVE:
        return "square"
    return "circle" if filled > CIRCLE_ABOVE else "triangle"


def accuracies(pictures: Sequence[Pixels], wanted: Sequence[Reading]) -> dict[str, float]:
    """Share of pictures whose object colour, background colour and shape are read as wanted."""
    right_N3 = np.array([np.equal(judge_picture(pixels), want) for pixels, want in zip(pictures, wanted, strict=True)])
    object_colour, background, shape = (float(share) for share in right_N3.mean(axis=0))
    return {"object_colour": object_colour, "background_colour": background, "shape": shape}


def prompts() -> list[tuple[str, Reading]]:
    """Return the 72 prompts with what the picture should show."""
    return [
        (f"{colour} {shape}, {background} background, large", (colour, background, shape))
        for colour, shape, background in PROMPTED
    ]


def picture_grid(pictures: Sequence[Pixels], columns: int = 12) -> Pixels:
    """Lay pictures of one size out in rows."""
    rows = [np.concatenate(pictures[start : start + columns], axis=1) for start in range(0, len(pictures), columns)]
    return np.concatenate(rows, axis=0)


def _nearer(pixels_HW3: Pixels, this_3: NDArray[np.float64], that_3: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mark the pixels whose colour is nearer to `this_3` than to `that_3`."""
    to_this, to_that = (np.square(pixels_HW3 - colour_3).sum(axis=-1) for colour_3 in (this_3, that_3))
    return np.asarray(to_this < to_that)


def _commonest_colour(pixels_N3: Pixels) -> str:
    nearest_N = np.square(pixels_N3[:, None] - PALETTE_C3).sum(axis=-1).argmin(axis=1)
    return COLOURS[int(np.bincount(nearest_N).argmax())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run whose newest checkpoint draws")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise")
    parser.add_argument("--out", type=Path, help="write the pictures as one grid, 12 a row")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    arguments = parser.parse_args()

    texts, wanted = zip(*prompts(), strict=True)
    settings = {"steps": arguments.steps, "guidance": arguments.guidance, "seed": arguments.seed}
    pictures = draw_prompts(arguments.run, list(texts), sampling_of(Previews(**settings)))
    scores = accuracies(pictures, wanted)
    if arguments.out:
        Image.fromarray(picture_grid(pictures)).save(arguments.out)
    if arguments.json:
        print(json.dumps({"prompts": len(texts), **settings, **scores}))
    else:
        print(
            ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in scores.items()),
            f"({len(texts)} prompts)",
        )


if __name__ == "__main__":
    main()
