"""All usable pictures of a run as one sequence of records, over the columns of their sources' indexes.

Shape legend: P usable pictures of all sources, in order of source and name; M rows of one source's index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.buckets import Integers
from sdxl_training.data.caption_weights import parse_weights
from sdxl_training.data.captions import join_tags, split_alternatives, split_tags
from sdxl_training.data.crop_columns import Bits, Floats, written_boxes
from sdxl_training.data.decoding import UnreadablePicture
from sdxl_training.data.filters import EVERYTHING, Filter
from sdxl_training.data.lazy import Lazy
from sdxl_training.data.listing import PictureSource
from sdxl_training.data.picture_plan import Columns, PicturePlan
from sdxl_training.records import ImageRecord, Quarantined, UserError

EXAMPLES = 5
IN_PYTHON = 2**14  # values of a column that are Python objects at a time
PROBES = 8  # other pictures that are tried before one that cannot be read is blamed for it
Missing = Literal["refuse", "empty", "leave_out"]


@dataclass(frozen=True, slots=True)
class SourceRules:
    """What a run makes of one source.

    repeats: times each picture is drawn in an epoch. weight: of its losses. separator, kind, weights: see
    captions.CaptionRules. lines: each line of a caption is an alternative. missing: what a picture without caption
    means; captions_are: where captions are looked for, as part of a sentence. only: which pictures take part.
    """

    repeats: int = 1
    weight: float = 1.0
    separator: str = ","
    kind: Literal["tags", "prose"] = "tags"
    weights: bool = False
    lines: bool = False
    missing: Missing = "refuse"
    captions_are: str = "captions are beside the pictures"
    only: Filter = EVERYTHING


@dataclass(frozen=True, eq=False)
class IndexedSource:
    """A source and its index: schema PICTURES and more, each column in one piece so that a row is found at once."""

    source: PictureSource
    rules: SourceRules
    table: pa.Table

    def usable(self) -> NDArray[np.bool_]:
        """Return for each row whether the picture takes part, as far as its header, caption and filters say."""
        usable_M = self._mask(pc.is_null(self.table["reason"]))
        if self.rules.missing != "empty":
            usable_M &= self._captioned()
        weights = self.rules.weights
        return usable_M & self.rules.only.passes(
            self.table, usable_M, self._all_tags if weights else self.tags, emphasis=weights
        )

    def without_caption(self) -> Integers:
        """Return the rows of readable pictures that have no caption."""
        return np.flatnonzero(self._mask(pc.is_null(self.table["reason"])) & ~self._captioned())

    def _captioned(self) -> NDArray[np.bool_]:
        return self._mask(pc.or_(pc.is_valid(self.table["captions"]), pc.is_valid(self.table["tags"])))

    def with_unused_tags(self) -> NDArray[np.bool_]:
        """Return which rows have other tags beside a caption that consists of tags itself."""
        if self.rules.kind == "prose":
            return np.zeros(self.table.num_rows, bool)
        beside, captions = (self.table[name].chunk(0) for name in ("tags", "captions"))
        others = pc.not_equal(joined_texts(beside, self.rules.separator), first_texts(captions))
        some = pc.greater(pc.list_value_length(beside), 0)
        return self._mask(pa.chunked_array([pc.fill_null(pc.and_(some, others), fill_value=False)]))

    def quarantined(self) -> Sequence[Quarantined]:
        """Return the pictures that cannot be used."""
        rows = np.flatnonzero(self._mask(pc.is_valid(self.table["reason"])))
        return Lazy(len(rows), lambda i: Quarantined(self.path(int(rows[i])), self._value("reason", int(rows[i]))))

    def path(self, row: int) -> str:
        """Return what people are shown for the picture of this row."""
        return self.source.path(os.fsdecode(self._value("name", row)))

    def captions(self, row: int) -> tuple[str, ...]:
        """Return the picture's captions, at least one; where there are only tags they are the caption."""
        captions = self._value("captions", row) or [join_tags(self._value("tags", row) or (), self.rules.separator)]
        return split_alternatives("\n".join(captions)) if self.rules.lines else tuple(captions)

    def tags(self, row: int) -> tuple[str, ...]:
        """Return the tags of the first caption, which are what is trained; of prose, the tags given beside it."""
        if self.rules.kind == "prose":
            return tuple(self._value("tags", row) or ())
        return split_tags(self.captions(row)[0], self.rules.separator, self.rules.weights)

    def plain_tags(self, row: int) -> tuple[str, ...]:
        """Return the tags without emphasis: what brackets hold together are several tags.

        Raises UserError, naming the picture, for a weight that no training survives.
        """
        try:
            texts = ["".join(text for text, _ in parse_weights(tag)) for tag in self.tags(row)]
        except UserError as error:
            raise UserError(f"{self.path(row)}: {error}") from error
        return tuple(tag for text in texts for tag in split_tags(text, self.rules.separator))

    def _all_tags(self, row: int) -> tuple[str, ...]:
        return (*self.tags(row), *self.plain_tags(row))

    def record(self, number: int, row: int, picture: int) -> ImageRecord:
        """Return the record of a row; number: that of the source."""
        focus = self._value("focus", row)
        return ImageRecord(
            sample_id=sample_id(number, self._value("name", row)),
            path=self.path(row),
            size_hw=(self._value("height", row), self._value("width", row)),
            captions=self.captions(row),
            tags=self.tags(row),
            repeats=self.rules.repeats,
            source=number,
            picture=picture,
            focus=None if focus is None else tuple(focus),
        )

    def read(self, row: int) -> bytes:
        """Return the picture's bytes; raises UnreadablePicture."""
        file = os.fsdecode(self._value("file", row))
        return self.source.read(file, self._value("start", row), self._value("length", row))

    def _value(self, column: str, row: int) -> Any:
        return self.table[column].chunk(0)[row].as_py()

    @staticmethod
    def _mask(booleans: pa.ChunkedArray) -> NDArray[np.bool_]:
        mask_M: NDArray[np.bool_] = booleans.to_numpy()
        return mask_M


def sample_id(source: int, name: bytes) -> int:
    """Return 63 bits that stay the same when the source moves to another place or machine."""
    return int(_sample_ids(source, [name])[0])


def _sample_ids(source: int, names: Iterable[bytes]) -> Bits:
    before = source.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(before + name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, np.dtype("<u8")) >> np.uint64(1)


def _in_python(values: pa.Array) -> Iterator[bytes]:
    for first in range(0, len(values), IN_PYTHON):
        yield from values[first : first + IN_PYTHON].to_pylist()


class Pictures(Sequence[ImageRecord]):
    """The usable pictures of all sources; a record is made when it is asked for.

    Raises UserError where captions are missing and that is refused, or where no picture is left.
    """

    def __init__(self, sources: Sequence[IndexedSource]) -> None:
        self.sources = tuple(sources)
        self._refuse_missing_captions()
        self.rows: list[Integers] = [np.flatnonzero(source.usable()) for source in self.sources]
        self.source_P = np.repeat(np.arange(len(self.rows), dtype=np.int16), [len(rows) for rows in self.rows])
        self.row_P: Integers = np.concatenate(self.rows)
        if not len(self.row_P):
            raise UserError(self._nothing_left())

    def __len__(self) -> int:
        return len(self.row_P)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | Sequence[ImageRecord]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        source = int(self.source_P[number])
        return self.sources[source].record(source, int(self.row_P[number]), number)

    def boxed(self) -> int:
        """Return how many pictures have a focus box."""
        columns = [self.taken(number, "focus") for number in range(len(self.sources))]
        return sum(len(boxes) - boxes.null_count for boxes in columns)

    def subset(self, kept_P: NDArray[np.bool_]) -> Pictures:
        """Return only the pictures that are marked."""
        chosen = copy(self)
        ends = np.cumsum([len(rows) for rows in self.rows])[:-1]
        chosen.rows = [rows[kept] for rows, kept in zip(self.rows, np.split(kept_P, ends), strict=True)]
        chosen.source_P, chosen.row_P = self.source_P[kept_P], self.row_P[kept_P]
        return chosen

    def read(self, number: int) -> bytes:
        """Return the bytes of picture `number`.

        Raises UnreadablePicture where this one cannot be had and others of its source can; UserError where they cannot
        be had either: then it is no picture's fault, and none must be blamed for good.
        """
        try:
            return self._read(number)
        except UnreadablePicture as error:
            if error.__cause__ is None:  # it could be read, and is not what it was
                raise
            self._refuse_lost_place(number, error)
        try:
            return self._read(number)  # the fault may have passed meanwhile
        except UnreadablePicture as error:
            raise UnreadablePicture(error.path, f"{error.reason} (touch it once it can be)") from error

    def _read(self, number: int) -> bytes:
        source: IndexedSource = self.sources[self.source_P[number]]
        return source.read(int(self.row_P[number]))

    def _refuse_lost_place(self, number: int, error: UnreadablePicture) -> None:
        """Raise UserError unless another picture of the source, of some spread over it, can be read."""
        own = np.flatnonzero(self.source_P == self.source_P[number])
        others = np.roll(own, -int(np.searchsorted(own, number)))[1:]
        probes = others[np.linspace(0, len(others), min(PROBES, len(others)), endpoint=False, dtype=np.int64)]
        if len(probes) and not any(self._can_be_read(probe) for probe in probes.tolist()):
            raise UserError(
                f"data.sources.{self.source_P[number]}: {error.path}: {error.reason}; nor can {len(probes)} others of "
                "its pictures be read. Mend the disk, the network or the permissions, then start the same command "
                "again: it goes on where it was, and no picture is quarantined for this."
            ) from error

    def _can_be_read(self, number: int) -> bool:
        try:
            self._read(number)
        except UnreadablePicture:
            return False
        return True

    def columns(self) -> Columns:
        """Return what a plan must know of all pictures at once."""
        heights_P, widths_P = self.column("height"), self.column("width")
        repeats = np.array([source.rules.repeats for source in self.sources], dtype=np.int64)
        sizes = (heights_P.astype(np.int64), widths_P.astype(np.int64))
        return Columns(*sizes, repeats[self.source_P], self.sample_ids, self.written_boxes)

    def sample_ids(self) -> Bits:
        """Return the sample ids of all pictures; a second a million."""
        names = (_in_python(self.taken(number, "name")) for number in range(len(self.sources)))
        return np.concatenate([_sample_ids(number, some) for number, some in enumerate(names)])

    def written_boxes(self) -> Floats:
        """Return the focus boxes (P, 4) of all pictures as they are written, see crop_columns.written_boxes."""
        return np.concatenate([written_boxes(self.taken(number, "focus")) for number in range(len(self.sources))])

    def column(self, name: str) -> NDArray[np.generic]:
        """Return a column of numbers of all pictures."""
        return np.concatenate(
            [self.taken(number, name).to_numpy(zero_copy_only=False) for number in range(len(self.sources))]
        )

    def taken(self, source: int, name: str) -> pa.Array:
        """Return one source's part of a column."""
        return self.sources[source].table[name].chunk(0).take(self.rows[source])

    def names(self) -> list[NDArray[np.generic]]:
        """Return the names of all pictures as columns to be digested: of each source lengths and bytes."""
        return [part for number in range(len(self.sources)) for part in _columns_of(self.taken(number, "name"))]

    def captions(self) -> list[NDArray[np.generic]]:
        """Return captions and tags of all pictures as columns to be digested."""
        columns = (self.taken(number, name) for number in range(len(self.sources)) for name in ("captions", "tags"))
        return [part for lists in columns for part in _columns_of_lists(lists)]

    def boxes(self) -> list[NDArray[np.generic]]:
        """Return the focus boxes of all pictures as columns to be digested."""
        columns = [self.taken(number, "focus") for number in range(len(self.sources))]
        counts = [pc.list_value_length(boxes).fill_null(-1).to_numpy(zero_copy_only=False) for boxes in columns]
        return [*counts, *(pc.list_flatten(boxes).to_numpy(zero_copy_only=False) for boxes in columns)]

    def readings(self) -> list[str]:
        """Return how the captions of each source are read, which decides what its captions and tags are."""
        rules = [source.rules for source in self.sources]
        return [f"{each.kind} {each.separator} {each.weights} {each.lines}" for each in rules]

    def weights(self, plan: PicturePlan) -> NDArray[np.float32]:
        """Return the loss weight of each record of a plan of these pictures, with mean 1 over an epoch's images."""
        weight_N = np.array([source.rules.weight for source in self.sources])[self.source_P[plan.picture_N]]
        return np.asarray(weight_N * (plan.repeats.sum() / (weight_N * plan.repeats).sum()), dtype=np.float32)

    def quarantined(self) -> list[Quarantined]:
        """Return all pictures that cannot be used, by source and name."""
        return [bad for source in self.sources for bad in source.quarantined()]

    @property
    def found(self) -> int:
        """Return how many pictures the sources hold, usable or not."""
        return sum(source.table.num_rows for source in self.sources)

    @property
    def left_out(self) -> list[str]:
        """Return the paths of pictures that are left out because they have no caption."""
        return [
            source.path(int(row))
            for source in self.sources
            if source.rules.missing == "leave_out"
            for row in source.without_caption()
        ]

    @property
    def with_unused_tags(self) -> Integers:
        """Return the numbers of pictures with other tags beside a caption that consists of tags itself."""
        unused = (source.with_unused_tags()[rows] for source, rows in zip(self.sources, self.rows, strict=True))
        return np.flatnonzero(np.concatenate(list(unused)))

    def _refuse_missing_captions(self) -> None:
        problems = []
        for number, source in enumerate(self.sources):
            rows = source.without_caption()
            if len(rows) and source.rules.missing == "refuse":
                problems.append(_no_captions(number, source, rows))
        if problems:
            raise UserError("\n".join(problems))

    def _nothing_left(self) -> str:
        bad = self.quarantined()
        if len(bad) == self.found:
            return (
                f"data.sources: none of the {len(bad)} pictures can be read:\n{_listed([str(each) for each in bad])}\n"
                "Check that the files were copied completely."
            )
        return (
            f"data.sources: of {self.found} pictures none is left: {len(bad)} cannot be read, {len(self.left_out)} "
            "have no caption, the others do not pass data.sources[].only. Correct the filters, or give other folders."
        )


def first_texts(lists: pa.ListArray) -> pa.Array:
    """Return the first text of each list; null where it has none."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    return lists.values.take(pa.array(lists.offsets.to_numpy()[:-1], mask=lengths == 0))


def joined_texts(lists: pa.ListArray, separator: str) -> pa.Array:
    """Return each list of tags as `join_tags` writes it; null where there is none."""
    return pc.binary_join(lists, pa.scalar(join_tags(["", ""], separator), pa.large_string()))


def _columns_of(texts: pa.Array) -> list[NDArray[np.generic]]:
    """Return lengths and joined bytes of texts without nulls."""
    wide = texts.cast(pa.large_binary())
    offsets = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset : wide.offset + len(wide) + 1]
    data = wide.buffers()[2]
    joined = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, np.uint8)
    return [np.diff(offsets), joined]


def _columns_of_lists(lists: pa.Array) -> list[NDArray[np.generic]]:
    """Return how many texts each list has, -1 where there is none, and the texts of all."""
    counts = pc.list_value_length(lists).fill_null(-1).to_numpy(zero_copy_only=False)
    return [counts, *_columns_of(pc.list_flatten(lists))]


def _no_captions(number: int, source: IndexedSource, rows: Integers) -> str:
    readable = source.table["reason"].null_count
    who = f"{len(rows)} of {readable} pictures have no caption"
    if len(rows) == readable:
        who = f"none of the {readable} pictures has a caption"
    return (
        f"data.captions: in data.sources.{number} {who}; {source.rules.captions_are}. Without:\n"
        f"{_listed([source.path(int(row)) for row in rows])}\n"
        "Add them, correct data.captions.extension, or set data.captions.missing to empty (train them with an empty "
        "caption) or leave_out (train without them; some must remain)."
    )


def _listed(lines: Sequence[str]) -> str:
    """Return the first few lines, indented, and how many more there are."""
    shown = [f"  {line}" for line in lines[:EXAMPLES]]
    return "\n".join(shown + ([f"  and {len(lines) - EXAMPLES} more"] if len(lines) > EXAMPLES else []))
