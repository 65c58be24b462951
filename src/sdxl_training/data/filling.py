"""Filling the cache before training: every process takes pieces of the work until none is left.

A piece is a few dozen pictures of one bucket. While one is encoded, the next one is decoded. Whatever a process that
died had not finished is free again and taken over; what it had written counts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from sdxl_training.data.buckets import Integers
from sdxl_training.data.cache import LatentCache, Reasons
from sdxl_training.data.claims import Claims
from sdxl_training.data.encoding import NOT_FINITE, Encoder
from sdxl_training.data.fetching import Contents, Reader, Unencoded
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.picture_plan import PicturePlan
from sdxl_training.data.preparing import Job, Preparer
from sdxl_training.records import ImageRecord

PIECE = 64  # pictures
WAIT_SECONDS = 0.5


class Progress(Protocol):
    """Shows how far something is."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar of `total` items; the value yielded is called with the number of items just done."""


@dataclass(frozen=True, slots=True)
class FillReport:
    """What filling the cache came to. encoded: latents that this process made, by reason why they had to be made."""

    reused: int
    encoded: Mapping[str, int]

    def describe(self) -> str:
        """Return one sentence, such as "598 latents reused, 2 encoded: 1 new, 1 picture changed"."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.encoded.items()))
        sentence = f"{self.reused} latents reused, {sum(self.encoded.values())} encoded"
        return sentence + (f": {reasons}" if reasons else "")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece of the work whose pictures are decoded; pixels: of pictures of one bucket, variants one after another."""

    piece: int
    pixels: Sequence[Unencoded]


@dataclass
class Fill:
    """One process's share of filling the cache with what a plan needs.

    start: where among the pieces this process begins, from 0 to 1; processes that begin apart rarely meet.
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
        why = Reasons(self.cache)
        encoded: Counter[str] = Counter()
        pieces = self._pieces()
        todo = self._unfinished(pieces, range(len(pieces)))
        wanted = sum(len(pieces[piece]) for piece in todo)
        begin = round(self.start * len(todo))
        todo = todo[begin:] + todo[:begin]
        with ThreadPoolExecutor(self.threads) as threads, progress.track("encoding pictures", wanted) as advance:
            while todo:
                for prepared in self._prepared(pieces, todo, threads):
                    reasons = [why.of(one.sample_id, one.content, one.plan) for one in prepared.pixels]
                    latents = self.encoder(prepared.pixels)
                    encoded.update(reason for reason, latent in zip(reasons, latents, strict=True) if latent)
                    self._learn_failures(prepared.pixels, latents)
                    self.claims.give_back(prepared.piece)
                    advance(len(pieces[prepared.piece]))
                # What is left is in other hands, or was until a moment ago.
                todo = self._unfinished(pieces, todo)
                if todo:
                    self.wait()
        return FillReport(self._variants - encoded.total(), encoded)

    @cached_property
    def _variants(self) -> int:
        return self.plan.latents()

    def _pieces(self) -> list[Integers]:
        """Return the record numbers of each piece: a bucket's in order, so that equal settings give equal pieces."""
        size = max(1, PIECE * len(self.plan.picture_N) // self._variants)
        buckets = self.plan.by_bucket.values()
        return [members[first : first + size] for members in buckets for first in range(0, len(members), size)]

    def _unfinished(self, pieces: Sequence[Integers], among: Iterable[int]) -> list[int]:
        self.contents.refresh()
        self.cache.refresh()
        contents_P, known_P, failed_P = self.contents.columns()
        pictures_N = self.plan.picture_N
        missing_N = self.cache.missing(contents_P[pictures_N], known_P[pictures_N], self.plan)
        missing_N &= ~failed_P[pictures_N]
        return [piece for piece in among if missing_N[pieces[piece]].any()]

    def _prepared(
        self, pieces: Sequence[Integers], todo: Sequence[int], threads: ThreadPoolExecutor
    ) -> Iterator[Prepared]:
        """Claim pieces and yield them decoded, the next one being decoded meanwhile."""
        with ThreadPoolExecutor(1) as ahead:
            waiting: Future[Prepared] | None = None
            for piece in todo:
                if not self.claims.take(piece):
                    continue
                started = ahead.submit(self._prepare, piece, pieces[piece], threads)
                if waiting is not None:
                    yield waiting.result()
                waiting = started
            if waiting is not None:
                yield waiting.result()

    def _prepare(self, piece: int, numbers: Integers, threads: ThreadPoolExecutor) -> Prepared:
        # Another process may have worked on the piece before it died, or before it was free again.
        self.contents.refresh()
        self.cache.refresh()
        jobs = [job for job in threads.map(self._job, numbers.tolist()) if job is not None]
        pixels: list[Unencoded] = []
        for (record, content, job), prepared in zip(jobs, self.preparer([job for _, _, job in jobs]), strict=True):
            if isinstance(prepared, UnreadablePicture):
                self.contents.fail(record.picture, prepared.reason)
                continue
            pixels += [
                Unencoded(pixels_HWC, record.path, record.picture, record.sample_id, content, plan)
                for pixels_HWC, plan in zip(prepared, job.plans, strict=True)
            ]
        return Prepared(piece, pixels)

    def _job(self, number: int) -> tuple[ImageRecord, bytes, Job] | None:
        """Return what of a record has to be decoded; None where nothing has, or where its bytes cannot be had."""
        record = self.plan.records[number]
        content = self.contents.known(record.picture)
        variants = self.plan.variants[number]
        if self.contents.failure(record.picture) or (content and all(self.cache.has(content, one) for one in variants)):
            return None
        try:
            data = self.pictures.read(record.picture)
        except UnreadablePicture as error:
            self.contents.fail(record.picture, error.reason)
            return None
        content = digest_content(data)
        self.contents.learn(record.picture, content)
        plans = tuple(one for one in variants if not self.cache.has(content, one))
        return (record, content, Job(data, record.path, plans)) if plans else None

    def _learn_failures(self, pixels: Sequence[Unencoded], latents: Sequence[object | None]) -> None:
        for one, latent in zip(pixels, latents, strict=True):
            if latent is None:
                self.contents.fail(one.picture, NOT_FINITE)
