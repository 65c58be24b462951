"""Filling the cache before training: every process takes pieces of the work until none is left.

A piece is a few dozen pictures of one bucket. While one is encoded, the next one is decoded. Whatever a process that
died had not finished is free again and taken over; what it had written counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sdxl_training.data.buckets import Integers
from sdxl_training.data.cache import LatentCache, Reasons
from sdxl_training.data.claims import Claims
from sdxl_training.data.encoding import NOT_FINITE, Encoder
from sdxl_training.data.fetching import Contents, Reader, Unencoded
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.preparing import Job, Preparer
from sdxl_training.records import CropPlan, ImageRecord

PIECE = 64  # latents
WAIT_SECONDS = 0.5

Made = tuple[bytes, CropPlan]
"""What a latent is made from, as far as it differs between pictures: content digest and plan."""


class Progress(Protocol):
    """Shows how far something is."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar of `total` items; the value yielded is called with the number of items just done."""


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling the cache came to, in latents.

    reused: those that were there before. encoded: those that this process made, by reason why they had to be made.
    shared: those that it found made meanwhile, by another process or for a picture of equal content.
    """

    reused: int
    encoded: Mapping[str, int] = field(default_factory=dict)
    shared: int = 0

    def describe(self) -> str:
        """Return one sentence, such as "598 latents reused, 2 encoded: 1 new, 1 picture changed"."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.encoded.items()))
        sentence = f"{self.reused} latents reused, {sum(self.encoded.values())} encoded"
        sentence += f": {reasons}" if reasons else ""
        return sentence + (f"; {self.shared} more by other processes or for equal pictures" if self.shared else "")


@dataclass(frozen=True, slots=True)
class Opened:
    """What a picture's file turned out to be.

    content: the digest of its bytes, None where they cannot be had. pixels: of the variants that nobody has encoded.
    reason: why the picture cannot be used.
    """

    record: ImageRecord
    content: bytes | None = None
    pixels: tuple[Unencoded, ...] = ()
    reason: str | None = None


@dataclass
class Fill:
    """One process's share of filling the cache with what a plan needs.

    start: where among the pieces this process begins, from 0 to 1; processes that begin apart rarely meet. wait: called
    while all that is left is in other hands. threads: how many files are read at once. At most two pieces are in
    memory. Only the calling thread touches contents, claims, encoder and what the cache learns.
    """

    plan: PicturePlan
    pictures: Reader
    contents: Contents
    cache: LatentCache
    encoder: Encoder
    preparer: Preparer
    claims: Claims
    start: float = 0.0
    wait: Callable[[], None] = lambda: time.sleep(WAIT_SECONDS)
    threads: int | None = None

    def run(self, progress: Progress) -> FillReport:
        """Encode until the cache holds everything that can be encoded, by this process or others.

        A picture that cannot be decoded, or has no finite latent, is quarantined by name and not tried again. Raises
        UserError where the cache cannot be written.
        """
        latents = self.plan.latents()
        pieces = self._pieces(latents)
        todo = self._unfinished(pieces)
        missing = self._count_missing()
        if not todo:
            return FillReport(latents - missing)
        why, encoded = Reasons(self.cache), Counter[str]()
        begin = round(self.start * len(todo))
        order = [*list(todo)[begin:], *list(todo)[:begin]]
        with (
            self.claims,
            ThreadPoolExecutor(1) as ahead,
            progress.track("encoding pictures", sum(todo.values())) as advance,
        ):
            while order:
                for piece in self._encode_free(pieces, order, why, encoded, ahead):
                    advance(todo.pop(piece, 0))
                # What is left is in other hands, or was until a moment ago.
                left = self._unfinished(pieces, order)
                advance(sum(todo.pop(piece, 0) for piece in order if piece not in left))
                order = list(left)
                if order:
                    self.wait()
        shared = missing - self._count_missing() - encoded.total()
        return FillReport(latents - missing, encoded, max(shared, 0))

    def _pieces(self, latents: int) -> list[Integers]:
        """Return the record numbers of each piece: a bucket's in order, so that equal settings give equal pieces."""
        size = max(1, PIECE * len(self.plan.picture_N) // latents)
        buckets = self.plan.by_bucket.values()
        return [members[first : first + size] for members in buckets for first in range(0, len(members), size)]

    def _unfinished(self, pieces: Sequence[Integers], among: Sequence[int] | None = None) -> dict[int, int]:
        """Return which pieces are not finished, as far as anybody knows, and how many pictures of each are not."""
        self.contents.refresh()
        self.cache.refresh()
        among = range(len(pieces)) if among is None else among
        lacking = self._lacking(np.concatenate([pieces[piece] for piece in among]))
        ends = np.cumsum([len(pieces[piece]) for piece in among])
        counts = np.add.reduceat(lacking, np.append(0, ends[:-1]), dtype=np.int64)
        return {piece: int(count) for piece, count in zip(among, counts, strict=True) if count}

    def _lacking(self, numbers: Integers) -> np.ndarray:
        """Return which of these records have to be encoded."""
        plan = self.plan.subset(numbers)
        contents_P, known_P, failed_P = self.contents.columns()
        pictures_N = plan.picture_N
        missing_N = self.cache.missing(contents_P[pictures_N], known_P[pictures_N], plan)
        return (missing_N > 0) & ~failed_P[pictures_N]
