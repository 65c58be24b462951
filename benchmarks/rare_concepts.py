"""Pictures with a rare colour and a rare shape, held-out ones, and prompts for them. For other benchmarks.

The rare concepts are on RARE pictures each, with some colours and backgrounds and not with others: captions of the set
are told from new ones.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from PIL import Image

from sdxl_training.data.demo_set import PALETTE, SHAPES, PictureSpec, draw_picture

RARE_COLOUR, RARE_SHAPE, RARE = "cyan", "triangle", 12
PICTURES, HELD_OUT = 960, 48  # held out: of each of PARTS
PROMPTS = 40  # of each group; where there are fewer captions each is drawn several times, from other noise
COLOURS = [colour for colour in PALETTE if colour != RARE_COLOUR]
COMMON_SHAPES = [shape for shape in SHAPES if shape != RARE_SHAPE]
CATEGORIES = {
    **dict.fromkeys(PALETTE, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **{f"{colour} background": "background" for colour in PALETTE},
}
GROUPS = ("rare colour", "rare shape", "common")
PARTS = {  # of held-out pictures: group, and whether the caption is that of a learnt picture; of common ones all are
    "rare colour, learnt captions": ("rare colour", True),
    "rare colour, new captions": ("rare colour", False),
    "rare shape, learnt captions": ("rare shape", True),
    "rare shape, new captions": ("rare shape", False),
    "common": ("common", True),
}


def write_pictures(work: Path) -> None:
    """Write the set that is learnt, and what is held out, a folder for each part."""
    _write(work / "pictures", learnt_pictures())
    choose = random.Random("held out")
    for part, (group, learnt) in PARTS.items():
        some = (_spec(choose, group) for _ in range(100 * HELD_OUT))
        _write(
            work / "held_out" / file_name(part),
            list(islice((one for one in some if is_learnt(one) is learnt), HELD_OUT)),
        )


def learnt_pictures() -> list[PictureSpec]:
    """Return what the pictures of the set show."""
    choose = random.Random("tag weighting 2")
    return [_spec(choose, _group_of(number)) for number in range(PICTURES)]


def is_learnt(spec: PictureSpec) -> bool:
    """Return whether a picture of the set has this picture's caption."""
    return caption(spec.colour, spec.shape, spec.background) in learnt_captions()


@cache
def learnt_captions() -> set[str]:
    """Return all captions of the set."""
    return {caption(spec.colour, spec.shape, spec.background) for spec in learnt_pictures()}


def _group_of(number: int) -> str:
    return "rare colour" if number < RARE else "rare shape" if number < 2 * RARE else "common"


def _spec(choose: random.Random, group: str) -> PictureSpec:
    colour = RARE_COLOUR if group == "rare colour" else choose.choice(COLOURS)
    shape = RARE_SHAPE if group == "rare shape" else choose.choice(COMMON_SHAPES)
    background = choose.choice([other for other in COLOURS if other != colour])
    offset = (choose.uniform(-0.03, 0.03), choose.uniform(-0.03, 0.03))
    return PictureSpec(colour, shape, background, radius=choose.uniform(0.34, 0.38), offset_yx=offset)


def _write(folder: Path, specs: Sequence[PictureSpec]) -> None:
    if folder.is_dir():
        return
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number, spec in enumerate(specs):
        Image.fromarray(draw_picture(spec, (64, 64))).save(unfinished / f"{number:04d}.png")
        text = caption(spec.colour, spec.shape, spec.background)
        (unfinished / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    unfinished.rename(folder)


def caption(colour: str, shape: str, background: str) -> str:
    """Return the three tags of a picture, apart from each other: "cyan, circle, red background"."""
    return f"{colour}, {shape}, {background} background"


def prompts(group: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Return prompts of a group with (object colour, background colour, shape) that the picture should show."""
    colours = [RARE_COLOUR] if group == "rare colour" else COLOURS
    shapes = [RARE_SHAPE] if group == "rare shape" else COMMON_SHAPES
    wanted = [
        (colour, background, shape)
        for colour in colours
        for shape in shapes
        for background in COLOURS
        if background != colour
    ]
    repeats = -(-PROMPTS // len(wanted))
    return [(caption(c, s, b), (c, b, s)) for c, b, s in (wanted * repeats)[:PROMPTS]]


def file_name(text: str) -> str:
    """Return a text as a name for files."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)
