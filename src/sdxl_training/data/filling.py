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
from typing import NamedTuple, Protocol

import numpy as np

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


class State(NamedTuple):
    """How a piece of the work stands: latents that are there, pictures that have to be encoded."""

    there: int
    pictures: int


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
    _without_latent: set[int] = field(default_factory=set)

    def run(self, progress: Progress) -> FillReport:
        """Encode until the cache holds everything that can be encoded, by this process or others.

        A picture that cannot be read or decoded is quarantined by name and not tried again. One that has no finite
        latent is not stored, which belongs to the VAE and not to the picture; each process finds that out by itself.
        Raises UserError where the cache cannot be written, or no picture can be read.
        """
        pieces = self._pieces()
        state = self._look(pieces, range(len(pieces)))
        reused = sum(each.there for each in state.values())
        todo = {piece: each.pictures for piece, each in state.items() if each.pictures}
        if not todo:
            return FillReport(reused)
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
                state |= self._look(pieces, order)
                advance(sum(todo.pop(piece, 0) for piece in order if not state[piece].pictures))
                order = [piece for piece in order if state[piece].pictures]
                if order and not found_free:
                    log.info("%d pieces of the work are in the hands of other processes: waiting for them", len(order))
                    self.wait()
        shared = sum(each.there for each in state.values()) - reused - encoded.total()
        return FillReport(reused, encoded, max(shared, 0))

    def _pieces(self) -> list[Integers]:
        """Return the record numbers of each piece: a bucket's in order, so that equal settings give equal pieces."""
        cut = self.plan.cut
        size = max(1, PIECE // (cut.variants * (2 if cut.flip else 1)))
        buckets = self.plan.by_bucket.values()
        return [members[first : first + size] for members in buckets for first in range(0, len(members), size)]

    def _look(self, pieces: Sequence[Integers], among: Sequence[int]) -> dict[int, State]:
        """Return how these pieces stand, as far as anybody knows."""
        self._learn_news()
        numbers_K = np.concatenate([pieces[piece] for piece in among])
        pictures_K = self.plan.picture_N[numbers_K]
        contents_P, known_P, failed_P = self.contents.columns()
        failed_K = failed_P[pictures_K] | np.isin(pictures_K, list(self._without_latent))
        there_K, missing_K = self.cache.count(contents_P[pictures_K], known_P[pictures_K], self.plan.subset(numbers_K))
        starts = np.cumsum([0, *(len(pieces[piece]) for piece in among[:-1])])
        there = np.add.reduceat(there_K, starts).tolist()
        pictures = np.add.reduceat((missing_K > 0) & ~failed_K, starts, dtype=np.int64).tolist()
        return {piece: State(*each) for piece, *each in zip(among, there, pictures, strict=True)}

    def _learn_news(self) -> None:
        self.contents.refresh()
        self.cache.refresh()

    def _to_encode(self, numbers_K: Integers) -> list[int]:
        """Return which of these few records have to be encoded."""
        # Asked one by one: the columns of all pictures take as long as a piece may.
        pictures = self.plan.picture_N[numbers_K].tolist()
        contents = [self.contents.known(picture) for picture in pictures]
        failed_K = np.array([self._is_hopeless(picture) for picture in pictures])
        known_K = np.array([content is not None for content in contents])
        contents_K = np.frombuffer(b"".join(content or bytes(16) for content in contents), np.uint64).reshape(-1, 2)
        missing_K = self.cache.missing(contents_K, known_K, self.plan.subset(numbers_K))
        wanted: list[int] = numbers_K[(missing_K > 0) & ~failed_K].tolist()
        return wanted

    def _is_hopeless(self, picture: int) -> bool:
        return picture in self._without_latent or self.contents.failure(picture) is not None

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
            return piece, ahead.submit(self._open, self._to_encode(numbers_K), in_hand)
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
        failed = {(each.content, plan): each.reason for each in opened for plan in each.wanted if each.reason}
        pixels = [one for each in opened for one in each.pixels]
        for one, latent in zip(pixels, self.encoder(pixels), strict=True):
            if latent is None:
                failed[one.content, one.plan] = NOT_FINITE
            else:
                encoded[why.of(one.sample_id, one.content, one.plan)] += 1
        # After the latents: who stores them waits while the disk is full.
        for each in opened:
            picture = each.record.picture
            if each.content and each.content != self.contents.known(picture):
                self.contents.learn(picture, each.content)
            # What is wrong with a picture is wrong with those that are equal to it.
            reasons = [each.reason, *(failed.get((each.content, plan)) for plan in each.wanted)]
            reason = next(filter(None, reasons), None)
            if reason == NOT_FINITE:
                self._without_latent.add(picture)
            elif reason:
                self.contents.fail(picture, reason)


def _with_pixels(opened: Opened, job: Job, prepared: Prepared) -> Opened:
    if isinstance(prepared, UnreadablePicture):
        return replace(opened, reason=prepared.reason)
    record = opened.record
    pixels = tuple(
        Unencoded(pixels_HWC, record.path, record.picture, record.sample_id, opened.content, plan)
        for pixels_HWC, plan in zip(prepared, job.plans, strict=True)
    )
    return replace(opened, pixels=pixels)
