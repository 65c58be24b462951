"""Which picture sizes there are: SDXL's own, generated ones, a user's list; at one resolution or at several.

Sizes are (height, width) in pixels. Every generator takes (resolution, step_px, min_side_px, max_side_px) and returns
sorted buckets whose sides are multiples of `step_px` within [min_side_px, max_side_px].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sdxl_training.records import Bucket, SizeHW, UserError

LATENT_FACTOR = 8
SDXL_RESOLUTION = 1024
SDXL_SIZES: tuple[SizeHW, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip
SDXL_GRID = 64  # all its sides are multiples of this


def sdxl_buckets(resolution: int, step_px: int, min_side_px: int, max_side_px: int) -> tuple[Bucket, ...]:
    """Return SDXL's own 40 training sizes (Podell et al. 2023, Appendix I), scaled by resolution / 1024.

    Raises UserError where that is not a multiple of `step_px`: sizes are never rounded to others.
    """
    if SDXL_GRID * resolution % (SDXL_RESOLUTION * step_px):
        grid = SDXL_GRID * resolution / SDXL_RESOLUTION
        raise UserError(
            f"data.buckets: SDXL's sizes at resolution {resolution} are multiples of {grid:g}, which step_px = "
            f"{step_px} does not divide. Set a step_px that does, or choose the sizes `area`."
        )
    scaled = [
        (height * resolution // SDXL_RESOLUTION, width * resolution // SDXL_RESOLUTION) for height, width in SDXL_SIZES
    ]
    inside = {size_hw for size_hw in scaled if min_side_px <= min(size_hw) and max(size_hw) <= max_side_px}
    return _sorted_buckets(inside, step_px, min_side_px, max_side_px)


def area_buckets(resolution: int, step_px: int, min_side_px: int, max_side_px: int) -> tuple[Bucket, ...]:
    """Return for each height the widest width of at most `resolution`² pixels, and the same lying on its side.

    With (1024, 64, 512, 2048) these are 33 of SDXL's 40. Raises UserError when no size fits.
    """
    sizes = _widest_sizes(resolution**2, step_px, min_side_px, max_side_px)
    return _sorted_buckets(sizes, step_px, min_side_px, max_side_px)


def novelai_buckets(resolution: int, step_px: int, min_side_px: int, max_side_px: int) -> tuple[Bucket, ...]:
    """Return NovelAI's sizes: as `area_buckets` with half as much area again, and the square of the resolution.

    Published for (512, 64, 256, 1024), with at most 512 x 768 pixels (NovelAI, aspect ratio bucketing, 2022). Raises
    UserError when no size fits.
    """
    sizes = _widest_sizes(3 * resolution**2 // 2, step_px, min_side_px, max_side_px)
    if resolution % step_px == 0 and min_side_px <= resolution <= max_side_px:
        sizes.add((resolution, resolution))
    return _sorted_buckets(sizes, step_px, min_side_px, max_side_px)


Generator = Callable[[int, int, int, int], tuple[Bucket, ...]]
GENERATORS: Mapping[str, Generator] = {"sdxl": sdxl_buckets, "area": area_buckets, "novelai": novelai_buckets}


def listed_buckets(sizes: Sequence[Sequence[int]]) -> tuple[Bucket, ...]:
    """Return the buckets of a list of [height, width], each once; raises UserError where a size cannot be encoded."""
    for number, size in enumerate(sizes):
        if len(size) != 2 or any(side < LATENT_FACTOR or side % LATENT_FACTOR for side in size):
            raise UserError(
                f"data.buckets.sizes.{number} = {list(size)}: must be [height, width], each a multiple of "
                f"{LATENT_FACTOR} pixels. Write for example [1216, 832]."
            )
    if not sizes:
        raise UserError("data.buckets.sizes: the list is empty. Give at least one [height, width].")
    return tuple(sorted({Bucket((height, width)) for height, width in sizes}))


def buckets_at_resolutions(
    generate: Generator, resolutions: Sequence[int], step_px: int, min_side_px: int, max_side_px: int
) -> tuple[tuple[Bucket, ...], ...]:
    """Return the buckets of each resolution, the largest resolution first.

    The limits of the sides hold for the largest; at a smaller one they shrink in proportion, so every resolution has
    about the same shapes.
    """
    largest = max(resolutions)
    return tuple(
        generate(
            resolution,
            step_px,
            -(-min_side_px * resolution // (largest * step_px)) * step_px,
            max_side_px * resolution // (largest * step_px) * step_px,
        )
        for resolution in sorted(set(resolutions), reverse=True)
    )


def _widest_sizes(area_px: int, step_px: int, min_side_px: int, max_side_px: int) -> set[SizeHW]:
    first = -(-min_side_px // step_px) * step_px
    sizes: set[SizeHW] = set()
    for height in range(first, max_side_px + 1, step_px):
        width = min(area_px // height, max_side_px) // step_px * step_px
        if width >= min_side_px:
            sizes |= {(height, width), (width, height)}
    return sizes


def _sorted_buckets(sizes: set[SizeHW], step_px: int, min_side_px: int, max_side_px: int) -> tuple[Bucket, ...]:
    if not sizes:
        raise UserError(
            f"data.buckets: no size fits: sides must be multiples of {step_px} between {min_side_px} and {max_side_px} "
            "with no more pixels than the resolution allows. Lower min_side_px or step_px, or raise data.resolution."
        )
    return tuple(Bucket(size_hw) for size_hw in sorted(sizes))
