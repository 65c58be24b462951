"""Filling the cache before training: every process takes pieces of the work until none is left.

A piece is a few dozen pictures of one bucket. While one is encoded, the next one is decoded. Whatever a process that
died had not finished is free again and taken over; what it had written counts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.buckets import Integers
from sdxl_training.data.cache import LatentCache, Reasons
from sdxl_training.data.claims import Claims
from sdxl_training.data.encoding import NOT_FINITE, Encoder
from sdxl_training.data.fetching import Contents, Reader, Unencoded
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.preparing import Job, Prepared, Preparer
from sdxl_training.records import CropPlan, ImageRecord

PIECE = 64  # latents
WAIT_SECONDS = 0.5

log = logging.getLogger(__name__)

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

    content: the digest of its bytes, empty where they cannot be had. wanted: the variants that nobody has encoded.
    pixels: of these, but for those that an equal picture brings. reason: why the picture cannot be decoded.
    """

    record: ImageRecord
    content: bytes = b""
    wanted: tuple[CropPlan, ...] = ()
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
        everything = range(len(pieces))
        todo, missing = self._look(pieces, everything)
        if not todo:
            return FillReport(latents - missing)
        why, encoded = Reasons(self.cache), Counter[str]()
        begin = round(self.start * len(todo))
        order = [*todo][begin:] + [*todo][:begin]
        with (
            self.claims,
            ThreadPoolExecutor(1) as ahead,
            progress.track("encoding pictures", sum(todo.values())) as advance,
        ):
            while order:
                found_free = False
                for piece in self._encode_free([(piece, pieces[piece]) for piece in order], why, encoded, ahead):
                    found_free = True
                    advance(todo.pop(piece, 0))
                # What is left is in other hands, or was until a moment ago.
                left, _ = self._look(pieces, order)
                advance(sum(todo.pop(piece, 0) for piece in order if piece not in left))
                order = list(left)
                if order and not found_free:
                    log.info("%d pieces of the work are in the hands of other processes: waiting for them", len(order))
                    self.wait()
        made = missing - self._look(pieces, everything)[1]
        return FillReport(latents - missing, encoded, max(made - encoded.total(), 0))

    def _pieces(self, latents: int) -> list[Integers]:
        """Return the record numbers of each piece: a bucket's in order, so that equal settings give equal pieces."""
        size = max(1, PIECE * len(self.plan.picture_N) // latents)
        buckets = self.plan.by_bucket.values()
        return [members[first : first + size] for members in buckets for first in range(0, len(members), size)]

    def _look(self, pieces: Sequence[Integers], among: Sequence[int]) -> tuple[dict[int, int], int]:
        """Return how many pictures of each piece have to be encoded, where any, and how many latents are missing.

        Those of pictures that cannot be encoded are missing for good.
        """
        self._learn_news()
        numbers_K = np.concatenate([pieces[piece] for piece in among])
        missing_K, failed_K = self._missing(numbers_K)
        starts = np.cumsum([0, *(len(pieces[piece]) for piece in among[:-1])])
        counts = np.add.reduceat((missing_K > 0) & ~failed_K, starts, dtype=np.int64).tolist()
        return {piece: count for piece, count in zip(among, counts, strict=True) if count}, int(missing_K.sum())

    def _learn_news(self) -> None:
        self.contents.refresh()
        self.cache.refresh()

    def _missing(self, numbers_K: Integers) -> tuple[Integers, NDArray[np.bool_]]:
        """Return how many latents each of K records lacks, and whether its picture cannot be encoded."""
        plan = self.plan.subset(numbers_K)
        contents_P, known_P, failed_P = self.contents.columns()
        pictures_K = plan.picture_N
        return self.cache.missing(contents_P[pictures_K], known_P[pictures_K], plan), failed_P[pictures_K]

    def _encode_free(
        self, pieces: Sequence[tuple[int, Integers]], why: Reasons, encoded: Counter[str], ahead: ThreadPoolExecutor
    ) -> Iterator[int]:
        """Encode the pieces that nobody else has, and yield the number of each when it is done.

        The next one is opened in the thread `ahead` meanwhile, but not before the one before it is forgotten.
        """
        free = ((piece, numbers) for piece, numbers in pieces if self.claims.take(piece))
        opening = self._open_next(free, frozenset(), ahead)
        while opening is not None:
            piece, future = opening
            opened = future.result()
            in_hand = {(one.content, one.plan) for each in opened for one in each.pixels}
            opening = self._open_next(free, in_hand, ahead)
            self._encode(opened, why, encoded)
            self.claims.give_back(piece)
            yield piece

    def _open_next(
        self, free: Iterator[tuple[int, Integers]], in_hand: AbstractSet[Made], ahead: ThreadPoolExecutor
    ) -> tuple[int, Future[list[Opened]]] | None:
        """Begin to open the next free piece; None where there is none. in_hand: what is about to be encoded."""
        for piece, numbers_K in free:
            # Another process may have worked on the piece before it died, or before it was free again.
            self._learn_news()
            missing_K, failed_K = self._missing(numbers_K)
            wanted = numbers_K[(missing_K > 0) & ~failed_K]
            return piece, ahead.submit(self._open, wanted.tolist(), in_hand)
        return None

    def _open(self, numbers: Sequence[int], in_hand: AbstractSet[Made]) -> list[Opened]:
        """Read and decode what of these records nobody has encoded or has in hand; equal pictures once."""
        records = [self.plan.records[number] for number in numbers]
        with ThreadPoolExecutor(self.threads) as threads:
            files = threads.map(self._read, records)
        opened: list[Opened] = []
        jobs: dict[int, Job] = {}  # by place in `opened`
        seen = set(in_hand)
        for number, record, file in zip(numbers, records, files, strict=True):
            if isinstance(file, UnreadablePicture):
                opened.append(Opened(record, reason=file.reason))
                continue
            data, content = file
            wanted = tuple(one for one in self.plan.variants[number] if not self.cache.has(content, one))
            first = tuple(one for one in wanted if (content, one) not in seen)
            seen.update((content, one) for one in first)
            if first:
                jobs[len(opened)] = Job(data, record.path, first)
            opened.append(Opened(record, content, wanted))
        for (place, job), prepared in zip(jobs.items(), self.preparer(list(jobs.values())), strict=True):
            opened[place] = _with_pixels(opened[place], job, prepared)
        return opened

    def _read(self, record: ImageRecord) -> tuple[bytes, bytes] | UnreadablePicture:
        """Return a file's bytes and their digest, or why it cannot be read."""
        try:
            data = self.pictures.read(record.picture)
        except UnreadablePicture as error:
            return error
        return data, digest_content(data)

    def _encode(self, opened: Sequence[Opened], why: Reasons, encoded: Counter[str]) -> None:
        """Encode what was opened and let the other processes know what became of it."""
        for each in opened:
            if each.content and each.content != self.contents.known(each.record.picture):
                self.contents.learn(each.record.picture, each.content)
        failed = {(each.content, plan): each.reason for each in opened for plan in each.wanted if each.reason}
        pixels = [one for each in opened for one in each.pixels]
        for one, latent in zip(pixels, self.encoder(pixels), strict=True):
            if latent is None:
                failed[one.content, one.plan] = NOT_FINITE
            else:
                encoded[why.of(one.sample_id, one.content, one.plan)] += 1
        for each in opened:
            # What is wrong with a picture is wrong with those that are equal to it.
            reasons = [each.reason, *(failed.get((each.content, plan)) for plan in each.wanted)]
            if reason := next(filter(None, reasons), None):
                self.contents.fail(each.record.picture, reason)


def _with_pixels(opened: Opened, job: Job, prepared: Prepared) -> Opened:
    if isinstance(prepared, UnreadablePicture):
        return replace(opened, reason=prepared.reason)
    record = opened.record
    pixels = tuple(
        Unencoded(pixels_HWC, record.path, record.picture, record.sample_id, opened.content, plan)
        for pixels_HWC, plan in zip(prepared, job.plans, strict=True)
    )
    return replace(opened, pixels=pixels)
