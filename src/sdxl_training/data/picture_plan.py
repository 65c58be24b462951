"""What becomes of a whole data set: which pictures, in which buckets, cut how. Columns, not objects.

Shape legend: P pictures, N records (a picture at one resolution), M pictures or records of some list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdxl_training.data.buckets import Fitting, Integers
from sdxl_training.data.crop_columns import Bits, CropColumns, Floats, make_crops, read_boxes, written_boxes
from sdxl_training.data.crops import Cut, covering_sizes, read_box, sample_id_at
from sdxl_training.data.lazy import Lazy
from sdxl_training.records import Bucket, CropPlan, ImageRecord, UserError

NOTABLE_CROP = 0.10
CROPPED_AT_ONCE = 2**15  # records, whose columns then stay in the processor's cache
CENTRE = Cut()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A readable picture that does not take part, and why."""

    record: ImageRecord
    reason: str


@dataclass(frozen=True)
class Columns:
    """What the plan must know of all pictures at once.

    make_sample_ids, make_boxes: see the properties; asked once, and only where crops depend on it.
    """

    heights_P: Integers
    widths_P: Integers
    repeats_P: Integers
    make_sample_ids: Callable[[], Bits]
    make_boxes: Callable[[], Floats]

    @cached_property
    def sample_ids(self) -> Bits:
        """Return the sample ids (P,)."""
        return self.make_sample_ids()

    @cached_property
    def boxes(self) -> Floats:
        """Return the focus boxes (P, 4) as `written_boxes` returns them."""
        return self.make_boxes()

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> Columns:
        """Return the columns of records that exist as objects."""
        rows = [(*record.size_hw, record.repeats) for record in records]
        heights_P, widths_P, repeats_P = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return cls(
            heights_P,
            widths_P,
            repeats_P,
            lambda: np.array([record.sample_id for record in records], dtype=np.uint64),
            lambda: written_boxes(pa.array([record.focus for record in records], pa.list_(pa.float64()))),
        )


@dataclass(frozen=True, eq=False)
class PicturePlan:
    """What becomes of every picture; record numbers are positions in `records`.

    A picture that is trained at several resolutions is a record at each. picture_N, bucket_N: the picture and the
    number of the bucket of each record. first_N: whether it is the picture's first. left_out_M: pictures that do not
    take part.
    """

    pictures: Sequence[ImageRecord]
    columns: Columns
    resolutions: Sequence[Sequence[Bucket]]
    buckets: tuple[Bucket, ...]
    fitting: Fitting
    cut: Cut
    picture_N: Integers
    bucket_N: Integers
    first_N: NDArray[np.bool_]
    left_out_M: Integers

    @property
    def records(self) -> Sequence[ImageRecord]:
        """Return the records; each is made when it is asked for."""
        return Lazy(len(self.picture_N), self._record)

    @property
    def variants(self) -> Sequence[tuple[CropPlan, ...]]:
        """Return the ways in which each record is prepared, all for one bucket; a visit shows one of them."""
        return Lazy(len(self.picture_N), self._variants)

    @property
    def crops_without_end(self) -> Sequence[Sequence[CropPlan]]:
        """Return, in place of `variants`, random crops of which each visit of a record sees another."""

        def crops(number: int) -> Sequence[CropPlan]:
            record = self._record(number)
            return self.cut.without_end(record.size_hw, self.buckets[self.bucket_N[number]], record.sample_id)

        return Lazy(len(self.picture_N), crops)

    @property
    def plans(self) -> Sequence[CropPlan]:
        """Return the first variant of each record; bucket and scale are the same in all of them."""
        return Lazy(len(self.picture_N), lambda number: self._variants(number)[0])

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Return the pictures that fit no bucket, and why."""
        return Lazy(len(self.left_out_M), self._left_out)

    @property
    def repeats(self) -> Integers:
        """Return how often each record counts in an epoch."""
        return self.columns.repeats_P[self.picture_N]

    def prepared(self) -> Iterator[tuple[ImageRecord, CropPlan]]:
        """Yield every record with each of its variants: all that has to be encoded."""
        for number in range(len(self.picture_N)):
            record = self._record(number)
            for plan in self._variants_of(record, number):
                yield record, plan

    @cached_property
    def by_bucket(self) -> dict[Bucket, Integers]:
        """Return the record numbers of each bucket that has any, buckets in order."""
        order_N = np.argsort(self.bucket_N, kind="stable")
        numbers, starts = np.unique(self.bucket_N[order_N], return_index=True)
        members = {
            self.buckets[number]: part for number, part in zip(numbers, np.split(order_N, starts[1:]), strict=True)
        }
        return {bucket: members[bucket] for bucket in sorted(members)}

    @property
    def counts(self) -> dict[Bucket, int]:
        """Return the number of records in each bucket."""
        return {bucket: len(numbers) for bucket, numbers in self.by_bucket.items()}

    @property
    def images_per_epoch(self) -> int:
        """Return pictures times repeats."""
        return int(self.repeats.sum())

    def subset(self, numbers: Sequence[int] | Integers) -> PicturePlan:
        """Return the plan of these record numbers only, renumbered in the order given."""
        chosen = np.asarray(numbers, dtype=np.int64)
        return replace(
            self, picture_N=self.picture_N[chosen], bucket_N=self.bucket_N[chosen], first_N=self.first_N[chosen]
        )

    @cached_property
    def cropped(self) -> NDArray[np.float64]:
        """Return the share of each resized picture's area that is cut away."""
        target_N2, resized_N2 = self._sizes
        return np.asarray(1.0 - target_N2.prod(axis=1) / resized_N2.prod(axis=1))

    @cached_property
    def scales(self) -> NDArray[np.float64]:
        """Return resized over original length of each record; above 1 is an upscale."""
        return np.asarray((self._sizes[1] / self._originals).max(axis=1))

    @property
    def upscaled(self) -> int:
        """Return how many pictures are enlarged."""
        return int((self.scales > 1.0).sum())

    @property
    def untouched(self) -> int:
        """Return how many pictures have exactly their bucket's size."""
        return int((self._originals == self._sizes[0]).all(axis=1).sum())

    def worst_crops(self, count: int) -> list[tuple[ImageRecord, CropPlan]]:
        """Return the pictures that lose the largest share of their area, worst first; uncut pictures are not listed."""
        worst = np.argsort(-self.cropped, kind="stable")[:count]
        return [(self._record(number), self._variants(number)[0]) for number in worst if self.cropped[number] > 0]

    def latents(self) -> int:
        """Return how many latents there are, variants counted."""
        if self.cut.position != "random":
            return len(self.picture_N) * (2 if self.cut.flip else 1)
        return sum(len(self.crops(part).picture_M) for part in self.parts())

    def parts(self) -> Iterator[slice]:
        """Yield the numbers of all records in parts of which the crops may be made at once."""
        yield from (slice(first, first + CROPPED_AT_ONCE) for first in range(0, len(self.picture_N), CROPPED_AT_ONCE))

    def crops(self, part: slice) -> CropColumns:
        """Return the variants of these records, whose numbers count from the part's first.

        Raises UserError for a box that is none.
        """
        picture_N = self.picture_N[part]
        original_N2 = np.stack([self.columns.heights_P[picture_N], self.columns.widths_P[picture_N]], axis=1)
        bucket_N2 = self._bucket_sizes[self.bucket_N[part]]
        sample_id_N, box_N4 = None, None
        if self.cut.position == "random":
            sample_id_N = self.columns.sample_ids[picture_N]
            bucket_h_N, bucket_w_N = bucket_N2.astype(np.uint64).T
            others_N = sample_id_at(sample_id_N, bucket_h_N, bucket_w_N)
            sample_id_N = np.where(self.first_N[part], sample_id_N, others_N)
        elif self.cut.position == "focus":
            written_N4 = self.columns.boxes[picture_N]
            box_N4 = read_boxes(written_N4, original_N2)
            for number in np.flatnonzero(~np.isnan(written_N4[:, 0]) & (box_N4[:, 2] == 0)):
                self._variants(part.start + int(number))  # which says what is wrong with the box
        return make_crops(self.cut, original_N2, bucket_N2, sample_id_N, box_N4)

    @cached_property
    def _bucket_sizes(self) -> Integers:
        return np.array([bucket.size_hw for bucket in self.buckets], dtype=np.int64)

    @property
    def _originals(self) -> Integers:
        return np.stack([self.columns.heights_P[self.picture_N], self.columns.widths_P[self.picture_N]], axis=1)

    @cached_property
    def _sizes(self) -> tuple[Integers, Integers]:
        """Return bucket and resized (height, width) of each record."""
        target_N2 = self._bucket_sizes[self.bucket_N]
        return target_N2, np.stack(covering_sizes(*self._originals.T, *target_N2.T), axis=1)

    def _record(self, number: int) -> ImageRecord:
        record = self.pictures[int(self.picture_N[number])]
        if self.first_N[number]:
            return record
        return replace(record, sample_id=sample_id_at(record.sample_id, *self.buckets[self.bucket_N[number]].size_hw))

    def _variants(self, number: int) -> tuple[CropPlan, ...]:
        return self._variants_of(self._record(number), number)

    def _variants_of(self, record: ImageRecord, number: int) -> tuple[CropPlan, ...]:
        box = None
        if self.cut.position == "focus" and record.focus is not None:
            box = read_box(record.focus, record.size_hw, f"{record.path}: focus")
        return self.cut.plans(record.size_hw, self.buckets[self.bucket_N[number]], record.sample_id, box)

    def _left_out(self, number: int) -> LeftOut:
        record = self.pictures[int(self.left_out_M[number])]
        return LeftOut(record, self.fitting.why_nowhere(record.size_hw, self.resolutions))


def plan_resolutions(
    pictures: Sequence[ImageRecord],
    resolutions: Sequence[Sequence[Bucket]],
    fitting: Fitting,
    cut: Cut = CENTRE,
    columns: Columns | None = None,
) -> PicturePlan:
    """Plan every picture. resolutions: the buckets of each, the largest first.

    columns: those of `pictures`, where they are already there. Further appearances of a picture at other resolutions
    have sample ids of their own, so their randomness differs. Raises UserError when no picture is left.
    """
    columns = columns or Columns.of(pictures)
    places = fitting.place(columns.heights_P, columns.widths_P, resolutions)
    plan = PicturePlan(
        pictures=pictures,
        columns=columns,
        resolutions=resolutions,
        buckets=places.buckets,
        fitting=fitting,
        cut=cut,
        picture_N=places.picture_M,
        bucket_N=places.bucket_M,
        first_N=places.first_M,
        left_out_M=np.flatnonzero(places.none_N),
    )
    if not len(plan.picture_N):
        raise UserError(_nothing_left(plan.left_out))
    return plan


def _nothing_left(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "data.sources: there is no picture to plan. Add pictures to a source."
    example = left_out[0]
    return (
        f"data.sources: none of the {len(left_out)} pictures fits its bucket, for example {example.record.path}: "
        f"{example.reason}. Lower data.resolution, set data.buckets.small_pictures: upscale, or allow larger crops."
    )
