"""Pictures that are there more than once: with the same bytes here, with the same look in `perceptual`.

Of each group of equal pictures the first is kept, by order of source and name. The processes of a run share the
reading; what follows from it is worked out by one of them, so that all come to the same result.

Shape legend: P pictures, N digests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.buckets import Integers
from sdxl_training.data.fetching import Contents
from sdxl_training.data.images import UnreadablePicture, digest_content
from sdxl_training.data.lazy import Lazy
from sdxl_training.records import ImageRecord

CHUNK = 1024  # pictures handed to the threads at a time
NAMED = 5  # members of a group that are named in a sentence

Digests = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Item = TypeVar("Item")


class Progress(Protocol):
    """Says what is done and how far it is."""

    def track(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar of `total` items; the value yielded is called with the number of items just done."""

    def message(self, text: str) -> None:
        """Say a sentence."""


class Readable(Protocol):
    """The pictures of a run, in order of source and name."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> ImageRecord: ...

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of numbers of all pictures."""

    def read(self, number: int) -> bytes:
        """Return the bytes of a picture; raises UnreadablePicture, or UserError where none can be read."""


class Processes(Protocol):
    """The processes of a run; each makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Return this process's number."""

    @property
    def world_size(self) -> int:
        """Return how many there are."""

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Return all processes' items, in order of rank."""


@dataclass(frozen=True, slots=True)
class OneProcess:
    """A run that has one process only."""

    rank: int = 0
    world_size: int = 1

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Return the items."""
        return list(items)


ALONE = OneProcess()


class Likeness(NamedTuple):
    """What the pictures of a group have in common: its name; for people the words, and the sign between two names."""

    name: str
    words: str
    sign: str


SAME_BYTES = Likeness("same bytes", "have the same bytes", " = ")
SAME_LOOK = Likeness("same look", "look nearly the same", " ~ ")


@dataclass(frozen=True, eq=False)
class Groups:
    """Which pictures are equal. leader_P: the number of the first picture of each one's group; its own when alone."""

    leader_P: Integers

    def kept_mask(self) -> Mask:
        """Return for each of the P pictures whether it stays when all but the first of every group go."""
        return np.equal(self.leader_P, np.arange(len(self.leader_P)))

    @property
    def dropped(self) -> int:
        """Return how many pictures go when all but the first of every group go."""
        return len(self.leader_P) - int(self.kept_mask().sum())

    @cached_property
    def members(self) -> Sequence[Integers]:
        """Return the groups of two and more, in order: numbers of pictures, the kept one first."""
        sizes_P = np.bincount(self.leader_P, minlength=len(self.leader_P))
        together = np.flatnonzero(sizes_P[self.leader_P] > 1)
        together = together[np.argsort(self.leader_P[together], kind="stable")]
        ends = np.cumsum(sizes_P[sizes_P > 1])
        return Lazy(len(ends), lambda i: together[ends[i - 1] if i else 0 : ends[i]])


def same_pictures(
    pictures: Readable,
    contents: Contents,
    progress: Progress,
    processes: Processes = ALONE,
    threads: int | None = None,
) -> Groups:
    """Find the pictures that have the same bytes.

    Only pictures of equal length can be equal: of those the ones that nobody has read yet are read, and their digests
    remembered in `contents`. A picture that cannot be read is remembered as such, and equal to none; whether one can be
    decoded does not matter, so that the next start, which knows more about that, finds the same groups. threads: how
    many read at once; as many as the machine suggests where None.
    """
    digests_P2, known_P = known_columns(contents)
    candidates_P = _occur_twice(pictures.column("length"))
    unread = agree(np.flatnonzero(candidates_P & ~known_P), processes)
    own = unread[processes.rank :: processes.world_size]
    numbers, digests = [], []
    for number, digest in zip(own.tolist(), _digests(own, pictures, progress, threads), strict=True):
        if isinstance(digest, UnreadablePicture):
            contents.fail(number, digest.reason)
        else:
            contents.learn(number, digest)
            numbers.append(number)
            digests.append(digest)
    for their_numbers, their_digests in processes.gather([(numbers, b"".join(digests))]):
        digests_P2[their_numbers] = np.frombuffer(their_digests, "<u8").reshape(-1, 2)
        known_P[their_numbers] = True
    readable = np.flatnonzero(candidates_P & known_P)
    leader_P = np.arange(len(pictures))
    leader_P[readable] = readable[first_equal(digests_P2[readable])]
    return Groups(agree(leader_P, processes))


def known_columns(contents: Contents) -> tuple[Digests, Mask]:
    """Return what all processes know by now: digests (P, 2), and which are known; copies."""
    contents.refresh()
    digests_P2, known_P, _ = contents.columns()
    return digests_P2.copy(), known_P.copy()


def first_equal(digests_N2: Digests) -> Integers:
    """Return for each digest the number of the first one that is equal to it; its own where there is none before it."""
    order_N = np.lexsort((digests_N2[:, 0], digests_N2[:, 1]))  # stable: of equal digests the first comes first
    sorted_N2 = digests_N2[order_N]
    starts_N = np.ones(len(order_N), bool)
    starts_N[1:] = (sorted_N2[1:] != sorted_N2[:-1]).any(1)
    first_N = np.empty(len(order_N), np.int64)
    first_N[order_N] = order_N[starts_N][np.cumsum(starts_N) - 1]
    return first_N


def agree(value: Item, processes: Processes) -> Item:
    """Return the value of the first process, in every process."""
    return processes.gather([value] if processes.rank == 0 else [])[0]


def in_threads(work: Callable[[int], Item], numbers: Integers, threads: int | None = None) -> Iterator[Item]:
    """Yield what `work` makes of each number, in order; a thread a number, a limited number ahead."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(numbers), CHUNK):
            yield from pool.map(work, numbers[start : start + CHUNK].tolist())


def describe(groups: Groups, pictures: Readable, limit: int, likeness: Likeness = SAME_BYTES) -> str:
    """Say which pictures are equal, naming the first `limit` groups and some pictures of each; the kept one first."""
    if not groups.members:
        return f"no two of {len(groups.leader_P)} pictures {likeness.words}"
    named = [f"\n  {_named(members, pictures, likeness)}" for members in groups.members[:limit]]
    more = len(groups.members) - len(named)
    where = "a run lists all in duplicates.jsonl, plan with --duplicates"
    return (
        f"{groups.dropped + len(groups.members)} pictures in {_groups(len(groups.members))} {likeness.words}:"
        + "".join(named)
        + (f"\n  and {_groups(more, 'more ')}: {where}" if more else "")
    )


@dataclass(frozen=True, eq=False)
class Duplicates:
    """What a search found among `pictures`, and whether all but the first of each group are left out of the run."""

    groups: Groups
    pictures: Readable
    likeness: Likeness = SAME_BYTES
    drop: bool = False

    def lines(self) -> Iterator[str]:
        """Yield a line of JSON for each group: what its pictures have in common, which are kept and which left out."""
        for members in self.groups.members:
            paths = [self.pictures[number].path for number in members.tolist()]
            kept = 1 if self.drop else len(paths)
            yield json.dumps({"kind": self.likeness.name, "kept": paths[:kept], "left_out": paths[kept:]})


def _occur_twice(lengths_P: NDArray[Any]) -> Mask:
    _, which_P, counts = np.unique(lengths_P, return_inverse=True, return_counts=True)
    return np.asarray(counts[which_P] > 1)


def _digests(
    numbers: Integers, pictures: Readable, progress: Progress, threads: int | None
) -> Iterator[bytes | UnreadablePicture]:
    def digest(number: int) -> bytes | UnreadablePicture:
        try:
            return digest_content(pictures.read(number))
        except UnreadablePicture as error:
            return error

    if not len(numbers):
        return
    with progress.track("reading pictures of equal length", len(numbers)) as advance:
        for result in in_threads(digest, numbers, threads):
            yield result
            advance(1)


def _groups(count: int, more: str = "") -> str:
    return f"{count} {more}group{'' if count == 1 else 's'}"


def _named(members: Integers, pictures: Readable, likeness: Likeness) -> str:
    names = likeness.sign.join(pictures[number].path for number in members[:NAMED].tolist())
    return names + (f" and {len(members) - NAMED} more" if len(members) > NAMED else "")
