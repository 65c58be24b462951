"""Which pictures, at what sizes, with what captions: the schema of the section `data`. Nothing here imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, Strict

from sdxl_training.config.section import Fraction, Section

EXTENSION = r"^\.[A-Za-z0-9_]+$"
TAR = re.compile(r"\.(?:tar|tgz|tbz2|txz|tar\.\w+)$")  # compressed ones are refused, but as what they are
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)]
Level = Annotated[int, Field(ge=0, le=255)]
Side = Annotated[int, Field(ge=8, multiple_of=8)]
Tag = Annotated[
    str, Field(pattern=r"^\S(?:.*\S)?$", json_schema_extra={"in_words": "text in one line without blanks at its ends"})
]
Template = Annotated[
    str,
    Field(
        pattern=r"^[^{}]*(?:\{(?:caption|tags)\}[^{}]*)+$",
        json_schema_extra={"in_words": "text with {caption} or {tags} in it, in quotes, and no other braces"},
    ),
]


class AddTags(Section):
    """Tags around every caption of a source, which never drop out."""

    front: Annotated[tuple[Tag, ...], Strict(False)] = Field(
        default=(), description="Tags before every caption; the same ones further back are left out."
    )
    back: Annotated[tuple[Tag, ...], Strict(False)] = Field(
        default=(), description="Tags after every caption; the same ones further ahead are left out."
    )


class TableColumns(Section):
    """What columns are called; null or empty: found by their usual names."""

    image: str | None = Field(default=None, min_length=1, description="Column of file names or picture bytes.")
    captions: Names = Field(default=(), description="Columns of captions; several are alternatives.")
    tags: str | None = Field(default=None, min_length=1, description="Column of tags beside the captions.")


class Only(Section):
    """Which pictures of a source take part; without a limit all do."""

    names: Names = Field(default=(), description="Patterns of names, such as cats/*.png; a star matches slashes, too.")
    except_names: Names = Field(default=(), description="Patterns of names that are left out.")
    any_tag: Names = Field(default=(), description="Tags of which a picture must have at least one.")
    no_tag: Names = Field(default=(), description="Tags of which a picture must have none.")
    min_side_px: int = Field(default=0, ge=0, description="Least length of the shorter side in pixels.")


class Source(Section):
    """One place with pictures and captions."""

    path: str = Field(
        min_length=1,
        description="Folder with pictures, tar files, Parquet files with pictures, or an address such as s3://...",
    )
    type: Literal["auto", "folder", "tar", "parquet"] = Field(
        default="auto", description="What is there; auto: by the path's ending, a folder of pictures where it has none."
    )
    table: str | None = Field(
        default=None, min_length=1, description="JSONL, CSV or Parquet file with names and captions of the pictures."
    )
    columns: TableColumns = Field(
        default=TableColumns(), description="What the columns of a table, or of Parquet files, are called."
    )
    repeats: int = Field(default=1, ge=1, description="Times each picture is drawn in an epoch.")
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="Weight of its losses; over all pictures the mean is kept at 1."
    )
    only: Only = Field(default=Only(), description="Which of its pictures take part.")
    add_tags: AddTags = Field(default=AddTags(), description="Tags around every caption that never drop out.")


def source_kind(source: Source) -> Literal["folder", "tar", "parquet"]:
    """Return what is there: as told, or by the path's ending."""
    if source.type != "auto":
        return source.type
    path = source.path.lower()
    if TAR.search(path):
        return "tar"
    return "parquet" if path.endswith(".parquet") else "folder"


class Buckets(Section):
    """Picture sizes; all pictures of a step share one."""

    generator: Literal["area", "sdxl", "novelai", "list"] = Field(
        default="area",
        description="Which sizes there are: area fills resolution x resolution pixels, sdxl is SDXL's own 40, novelai "
        "its published rule, list your own.",
    )
    sizes: Annotated[tuple[Annotated[tuple[Side, Side], Strict(False)], ...], Strict(False)] = Field(
        default=(), description="Your own sizes as [height, width]; with generator: list only."
    )
    step_px: int = Field(
        default=64, ge=8, multiple_of=8, description="Sides of a bucket are multiples of this many pixels."
    )
    min_side_px: int | None = Field(
        default=None, ge=8, description="Shortest side of a bucket in pixels; null: half of data.resolution."
    )
    max_side_px: int | None = Field(
        default=None, ge=8, description="Longest side of a bucket in pixels; null: twice data.resolution."
    )
    small_pictures: Literal["leave_out", "upscale"] = Field(
        default="leave_out", description="What happens to pictures smaller than their bucket."
    )
    resolutions: Literal["largest", "each"] = Field(
        default="largest", description="With lower_resolutions: a picture goes to the largest it fills, or to each."
    )
    max_crop: float = Field(
        default=1.0, gt=0, le=1, description="Pictures that would lose a larger share of their area are left out."
    )


class Crop(Section):
    """What is cut out of a picture to make it its bucket's size."""

    position: Literal["centre", "random", "focus"] = Field(
        default="centre", description="Where pictures are cut; focus: around the box in a JSON caption."
    )
    variants: int = Field(
        default=1,
        ge=1,
        description="Random crops kept of each picture; each is a latent, visits take turns. 1, where nothing is kept: "
        "each visit is cut anew.",
    )
    flip: bool = Field(
        default=False,
        description="Whether every picture is trained mirrored, too; doubles the cache, and belies left and right.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of random crops; another one encodes them anew.")


class Captions(Section):
    """Comma-separated tags or sentences in a text file beside each picture."""

    kind: Literal["tags", "prose"] = Field(
        default="tags", description="What captions are; prose is never split, shuffled or dropped in parts."
    )
    alternatives: Literal["none", "lines"] = Field(
        default="none", description="Whether a file is one caption, or each line is one, of which a visit draws one."
    )
    extension: str = Field(
        default=".txt",
        pattern=EXTENSION,
        json_schema_extra={"in_words": "a dot and letters, like .txt"},
        description="Ending of the caption file's name.",
    )
    separator: str = Field(default=",", min_length=1, description="Text between two tags.")
    templates: Annotated[tuple[Template, ...], Strict(False)] = Field(
        default=(), description="Sentences around {caption} or {tags}, of which a visit draws one."
    )
    shuffle: bool = Field(default=True, description="Whether the order of tags is drawn anew each time.")
    keep_first: int = Field(
        default=1, ge=0, description="Number of leading tags that keep their place and never drop out."
    )
    tag_dropout: Fraction = Field(default=0.0, description="Probability that one tag is left out.")
    caption_dropout: Fraction = Field(default=0.1, description="Probability of an empty caption; guidance needs some.")
    null_mode: Literal["zeros", "empty_string"] = Field(
        default="zeros",
        description="What the model is told in place of a dropped caption, and without a prompt in guidance: zeros, as "
        "SDXL was trained, or what the text encoders make of the empty string.",
    )
    weights: bool = Field(
        default=False, description="Whether (tag:1.2) is emphasis, in captions and prompts, or text like any other."
    )
    max_tokens: Literal[75, 150, 225] = Field(
        default=75, description="Most tokens of a caption or prompt, in chunks of 75; what lies beyond is never seen."
    )
    missing: Literal["refuse", "empty", "leave_out"] = Field(
        default="refuse", description="What happens to a picture without a caption file."
    )


class Cache(Section):
    """Encoded pictures on disk."""

    path: str | None = Field(default=None, min_length=1, description="Folder of the cache; null: <output_dir>/cache.")
    mode: Literal["first", "ahead", "none"] = Field(
        default="ahead",
        description="When pictures are encoded: first all, ahead as training comes to them; none keeps nothing.",
    )
    compression: Literal["none", "lossless"] = Field(
        default="none",
        description="How latents and text states are stored; lossless saves about an eighth and takes time.",
    )
    posterior: Literal["mean", "sample"] = Field(
        default="mean",
        description="What a latent is: the VAE's mean, or drawn from its distribution, which doubles the cache.",
    )
    text_variants: int = Field(
        default=0,
        ge=0,
        description="Captions of each picture that are kept encoded and shown in turn, so that the text encoders leave "
        "the GPU; 0: captions are encoded as they come.",
    )


class Preprocessing(Section):
    """How pictures are decoded and resized."""

    backend: Literal["auto", "cpu", "dali"] = Field(
        default="auto", description="Who does it when the cache is filled first; auto: DALI where it has a GPU."
    )
    background: Annotated[tuple[Level, Level, Level], Strict(False)] = Field(
        default=(255, 255, 255), description="Colour (red, green, blue) behind transparent pixels."
    )


class Data(Section):
    """Which pictures, at what sizes, with what captions."""

    sources: Annotated[tuple[Source, ...], Strict(False)] = Field(
        min_length=1, description="Places with pictures; at least one."
    )
    resolution: int = Field(
        default=1024, ge=8, description="Side of the square bucket in pixels; no bucket has a larger area."
    )
    lower_resolutions: Annotated[tuple[Side, ...], Strict(False)] = Field(
        default=(), description="Further resolutions, for pictures that do not fill the first."
    )
    buckets: Buckets = Field(default=Buckets(), description="Picture sizes; all pictures of a step share one.")
    crop: Crop = Field(default=Crop(), description="What is cut out of a picture.")
    captions: Captions = Field(default=Captions(), description="Text files beside the pictures.")
    preprocessing: Preprocessing = Field(default=Preprocessing(), description="How pictures are decoded and resized.")
    cache: Cache = Field(default=Cache(), description="Pictures encoded by the VAE, kept on disk.")
    duplicates: Literal["keep", "warn", "drop"] = Field(
        default="keep", description="What happens to pictures with the same bytes; warn and drop read candidates first."
    )
    near_duplicates: Literal["keep", "warn", "drop"] = Field(
        default="keep", description="What happens to pictures that look alike; warn and drop decode every picture once."
    )
    max_bad_fraction: Fraction = Field(
        default=0.1, description="The run stops when more than this share of all pictures cannot be used."
    )
    workers: int = Field(
        default=2, ge=0, description="Processes that read and decode pictures; 0 uses the main process."
    )


def side_limits_px(data: Data) -> tuple[int, int]:
    """Return the shortest and the longest side of a bucket, or what null stands for; on the grid of step_px."""
    buckets = data.buckets
    half = max(data.resolution // 2 // buckets.step_px, 1) * buckets.step_px
    shortest = half if buckets.min_side_px is None else buckets.min_side_px
    longest = 2 * data.resolution if buckets.max_side_px is None else buckets.max_side_px
    return shortest, longest
