"""Pictures that look nearly the same: saved again, in another format or size, or slightly brighter.

Two conditions, since either alone calls different pictures equal. The perceptual hash says where a picture is lighter
and darker, is robust, and finds candidates among millions; but it knows no colour, and simple pictures share it. A
thumbnail of 8x8 colours then tells the candidates apart. Mirrored, turned or cropped copies are other pictures.

Each picture is decoded once in its life: what is found is kept by content in a file.

Shape legend: N pictures or signatures, M pairs, T tables; H x W pixel rows and columns, K pixels of a
thumbnail, C = 3 colour channels.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from sdxl_training.data.atomic import write_atomically
from sdxl_training.data.buckets import Integers
from sdxl_training.data.colour import RGB, WHITE
from sdxl_training.data.duplicates import (
    ALONE,
    Digests,
    Groups,
    Mask,
    Processes,
    Progress,
    Readable,
    agree,
    first_equal,
    in_threads,
    known_columns,
)
from sdxl_training.data.fetching import Contents
from sdxl_training.data.images import UnreadablePicture, decode_pixels, digest_content

Pixels = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Records = NDArray[np.void]

SIDE_PX = 32  # of the picture that is transformed
THUMBNAIL_PX = 8
# Coefficients are bits 0 or 1 as they lie below or above their median. In pictures that are flat or symmetric many lie
# at zero like the median: without this distance, in grey levels, what compression adds would decide their bits.
ABOVE_MEDIAN = 2.0
WITHIN_BITS = 4
# Thumbnails, in levels of 255: a change of brightness is the same everywhere, the rest is small. It must be small
# beside the picture's own contrast, too, or all drawings of a few thin lines would look the same.
MAX_SHIFT = 13.0
MAX_DIFFERENCE = 10.0
NOISE, SHARE_OF_CONTRAST = 2.0, 0.2
MAX_LOG_ASPECT = 0.03

SIGNATURE = np.dtype([("hash", "<u8"), ("log_aspect", "<f4"), ("thumbnail_CK", "u1", (3, THUMBNAIL_PX**2))])
ENTRY = np.dtype([("content", "<u8", 2), ("signature", SIGNATURE)])
NO_LOOK = np.array((0, math.nan, 0), SIGNATURE)  # of what cannot be decoded
MAGIC = b"looks001"  # the last figures are the version of the signatures and of the file
PAIRS_AT_ONCE = 2**21
PICTURES_AT_ONCE = 2**17
THUMBNAILS_AT_ONCE = 2**14
SAVE_EVERY = 2**14  # pictures of all processes together

ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)

log = logging.getLogger(__name__)


# One picture


def perceptual_hash(pixels_HWC: Pixels) -> int:
    """Return 64 bits that nearly all stay when a uint8 RGB picture is saved again, resized or made slightly brighter.

    The DCT hash (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010): of the grey
    picture at 32x32 pixels the 8x8 lowest frequencies, compared with their median. The constant one (bit 0) is left
    out, and to count as above the median a coefficient must lie clearly above it (ABOVE_MEDIAN).
    """
    return _hash(_small(pixels_HWC))


def sign(pixels_HWC: Pixels) -> Records:
    """Return the signature () of a uint8 RGB picture: hash, shape and thumbnail."""
    small_HWC = _small(pixels_HWC)
    thumbnail_HWC = cv2.resize(small_HWC, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    height, width = pixels_HWC.shape[:2]
    thumbnail_CK = np.rint(thumbnail_HWC).reshape(-1, 3).T
    return np.array((_hash(small_HWC), math.log(height / width), thumbnail_CK), SIGNATURE)


def _small(pixels_HWC: Pixels) -> NDArray[np.float32]:
    small_HWC: NDArray[np.uint8] = cv2.resize(pixels_HWC, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    return small_HWC.astype(np.float32)


def _hash(small_HWC: NDArray[np.float32]) -> int:
    low = cv2.dct(cv2.cvtColor(small_HWC, cv2.COLOR_RGB2GRAY))[:8, :8].ravel()[1:]
    bits = np.concatenate([[False], low > np.median(low) + ABOVE_MEDIAN])
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


# Pairs and groups


def look_alike(left_M: Records, right_M: Records) -> Mask:
    """Return for each pair of signatures whether the pictures look nearly the same."""
    near_M = _bits_between(left_M["hash"], right_M["hash"]) <= WITHIN_BITS
    near_M &= np.abs(left_M["log_aspect"] - right_M["log_aspect"]) <= MAX_LOG_ASPECT
    pairs = np.flatnonzero(near_M)
    near_M[pairs] = _same_colours(left_M["thumbnail_CK"][pairs], right_M["thumbnail_CK"][pairs])
    return near_M


def _same_colours(left_MCK: Pixels, right_MCK: Pixels) -> Mask:
    left_MC1, right_MC1 = (side_MCK.mean(2, dtype=np.float32, keepdims=True) for side_MCK in (left_MCK, right_MCK))
    same_M = np.abs(left_MC1 - right_MC1).max((1, 2)) <= MAX_SHIFT
    pairs = np.flatnonzero(same_M)
    left_MCK, right_MCK = left_MCK[pairs] - left_MC1[pairs], right_MCK[pairs] - right_MC1[pairs]
    contrast_M = np.sqrt(np.minimum(np.square(left_MCK).mean((1, 2)), np.square(right_MCK).mean((1, 2))))
    limit_M = np.minimum(MAX_DIFFERENCE, NOISE + SHARE_OF_CONTRAST * contrast_M)
    same_M[pairs] = np.abs(left_MCK - right_MCK).max((1, 2)) <= limit_M
    return np.asarray(same_M)


def _bits_between(left_M: Hashes, right_M: Hashes) -> NDArray[np.uint8]:
    differing = np.ascontiguousarray(left_M ^ right_M).view(np.uint8).reshape(-1, 8)
    return np.asarray(ONES[differing].sum(1, dtype=np.uint8))


class Bands:
    """Tables in which all pairs of hashes within a few bits are found.

    Of within + 2 bands of bits two are always equal in such a pair, so each two bands make a table that is sorted by
    them. With four bits these are fifteen tables of 21 bits: four candidates for each of a million hashes of chance.
    """

    def __init__(self, hashes_N: Hashes, within: int = WITHIN_BITS) -> None:
        # Every sixth bit, not bits in a row: in smooth pictures the bits of high frequencies are all 0.
        masks = [sum(1 << bit for bit in range(band, 64, within + 2)) for band in range(within + 2)]
        keys = list(combinations(masks, 2))
        self._order_TN, self._place_TN, self._end_TN = np.empty((3, len(keys), len(hashes_N)), np.int32)
        for table, (one, other) in enumerate(keys):
            self._fill(table, hashes_N & np.uint64(one | other))

    def _fill(self, table: int, keys_N: Hashes) -> None:
        """Note numbers sorted by key, each number's place among them, and where the place's equal keys end."""
        order_N = np.argsort(keys_N, kind="stable")  # within a key the numbers stay in order
        sorted_N = keys_N[order_N]
        last_N = np.flatnonzero(np.append(sorted_N[1:] != sorted_N[:-1], True))
        self._order_TN[table] = order_N
        self._place_TN[table, order_N] = np.arange(len(order_N))
        self._end_TN[table] = np.repeat(last_N + 1, np.diff(last_N, prepend=-1))

    def count(self, numbers: Integers) -> Integers:
        """Return how many candidates `later` has for each number."""
        place_TN = self._place_TN[:, numbers]
        ends_TN = np.take_along_axis(self._end_TN, place_TN, 1)
        return np.asarray((ends_TN - place_TN - 1).sum(0, dtype=np.int64))

    def later(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Return pairs (number, greater number): all within the distance, some others, some more than once."""
        lefts, rights = [], []
        for order_N, place_N, end_N in zip(self._order_TN, self._place_TN, self._end_TN, strict=True):
            first = place_N[numbers] + 1
            many = end_N[first - 1] - first
            ends = np.cumsum(many, dtype=np.int64)
            lefts.append(np.repeat(numbers, many))
            rights.append(order_N[np.arange(many.sum()) + np.repeat(first - ends + many, many)])
        return np.concatenate(lefts), np.concatenate(rights)


def first_alike(signatures_N: Records) -> Integers:
    """Return for each picture the first one that it looks like, itself where there is none.

    Every picture looks like the one that is returned for it, which stands for itself; of a chain in which each picture
    looks like the next, the ends may differ, so a chain is not a group. Memory is bounded: where thousands of pictures
    look the same, few of them are compared with all others at a time.
    """
    first_N = np.arange(len(signatures_N))
    bands = Bands(signatures_N["hash"])
    start = 0
    while start < len(first_N):
        end = min(start + PICTURES_AT_ONCE, len(first_N))
        numbers = np.arange(start, end)[first_N[start:end] == np.arange(start, end)]
        numbers = numbers[: max(1, int(np.searchsorted(np.cumsum(bands.count(numbers)), PAIRS_AT_ONCE, "right")))]
        for number, others in _alike(numbers, first_N, bands, signatures_N):
            if first_N[number] == number:
                first_N[others[first_N[others] == others]] = number
        start = int(numbers[-1]) + 1 if len(numbers) else end
    return first_N


def _alike(numbers: Integers, first_N: Integers, bands: Bands, signatures_N: Records) -> Iterator[tuple[int, Integers]]:
    """Yield, in order, each of the numbers with all that look like it, are greater and stand for themselves."""
    left_M, right_M = bands.later(numbers)
    wanted_M = first_N[right_M] == right_M
    left_M, right_M = left_M[wanted_M], right_M[wanted_M]
    hashes_N = signatures_N["hash"]
    wanted_M = _bits_between(hashes_N[left_M], hashes_N[right_M]) <= WITHIN_BITS
    pairs_M = np.unique(left_M[wanted_M] * len(first_N) + right_M[wanted_M])  # each once, in order
    left_M, right_M = pairs_M // len(first_N), pairs_M % len(first_N)
    alike = [
        look_alike(signatures_N[left_M[start:end]], signatures_N[right_M[start:end]])
        for start in range(0, len(left_M), THUMBNAILS_AT_ONCE)
        for end in [start + THUMBNAILS_AT_ONCE]
    ]
    alike_M = np.concatenate([*alike, np.empty(0, bool)])
    each, starts = np.unique(left_M[alike_M], return_index=True)
    yield from zip(each.tolist(), np.split(right_M[alike_M], starts[1:]), strict=False)


# All pictures of a run


def near_pictures(
    pictures: Readable,
    contents: Contents,
    folder: Path,
    progress: Progress,
    processes: Processes = ALONE,
    among_P: Mask | None = None,
    background: RGB = WHITE,
    threads: int | None = None,
) -> Groups:
    """Find the pictures that look nearly the same; those of the same bytes are among them.

    A picture is decoded where `folder` holds nothing about its content; what is found is saved there now and then. One
    that cannot be decoded is remembered as such in both, and is like none. The groups follow from the pictures' bytes
    alone, so that the next start, which knows more failures, finds the same. among_P: which pictures are compared, all
    where None. background: laid under transparent pixels. Raises UserError where `folder` cannot be written.
    """
    path = folder / f"{MAGIC.decode()}-{bytes(background).hex()}"
    digests_P2, known_P = known_columns(contents)
    wanted_P = np.ones(len(pictures), bool) if among_P is None else among_P
    # Only the first process keeps signatures: they are a fifth of a gigabyte for a million pictures.
    entries = [read_signatures(path) if processes.rank == 0 else np.empty(0, ENTRY)]
    todo = agree(_unsigned(digests_P2, wanted_P, known_P, entries[0]), processes)
    for numbers, found in _signed(todo, pictures, contents, background, progress, processes, threads):
        digests_P2[numbers] = found["content"]
        known_P[numbers] = True
        if processes.rank == 0:
            entries.append(found)
            write_signatures(path, entries)
    leader_P = np.arange(len(pictures))
    if processes.rank == 0:
        compared = np.flatnonzero(wanted_P & known_P)
        everything = entries[0] if len(entries) == 1 else np.concatenate(entries)
        leader_P[compared] = compared[_first_alike(digests_P2[compared], everything)]
    return Groups(agree(leader_P, processes))


def _unsigned(digests_P2: Digests, wanted_P: Mask, known_P: Mask, entries: Records) -> Integers:
    """Return the pictures that have to be decoded: of those that are known to have the same bytes one."""
    known = np.flatnonzero(wanted_P & known_P)
    first = first_equal(np.concatenate([entries["content"], digests_P2[known]]))[len(entries) :] - len(entries)
    return np.sort(np.append(known[first == np.arange(len(known))], np.flatnonzero(wanted_P & ~known_P)))


def _first_alike(digests_N2: Digests, entries: Records) -> Integers:
    """Return for each content the number of the first one that looks like it; its own where it has no look."""
    both = first_equal(np.concatenate([entries["content"], digests_N2]))
    row_N = both[len(entries) :]
    decoded = np.append(np.isfinite(entries["signature"]["log_aspect"]), np.zeros(len(digests_N2), bool))
    numbers = np.flatnonzero(decoded[row_N])
    rows, first, which = np.unique(row_N[numbers], return_index=True, return_inverse=True)
    order = np.argsort(first)  # one of each content, as the pictures come
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    alike = first_alike(entries["signature"][rows[order]])
    first_N = np.arange(len(digests_N2))
    first_N[numbers] = numbers[first[order][alike[rank[which]]]]
    return first_N


class Look(NamedTuple):
    """What decoding a picture came to: its entry (), none where it could not be read; and why it cannot be used."""

    entry: Records | None
    reason: str = ""


def _look(number: int, pictures: Readable, background: RGB) -> Look:
    entry, reason = None, ""
    try:
        data = pictures.read(number)
        entry = np.array((np.frombuffer(digest_content(data), "<u8"), NO_LOOK), ENTRY)
        pixels_HWC = decode_pixels(data, pictures[number].path, background).numpy()
        entry["signature"] = sign(pixels_HWC)
    except UnreadablePicture as error:
        reason = error.reason
    return Look(entry, reason)


def _signed(
    todo: Integers,
    pictures: Readable,
    contents: Contents,
    background: RGB,
    progress: Progress,
    processes: Processes,
    threads: int | None,
) -> Iterator[tuple[Integers, Records]]:
    """Yield numbers and entries of the pictures that could be read, by all processes, a few thousand at a time."""

    def look(number: int) -> Look:
        return _look(number, pictures, background)

    if not len(todo):
        return
    progress.message(
        f"{len(todo)} pictures are decoded to compare their looks (data.near_duplicates); this is done once"
    )
    with progress.track("comparing pictures", len(todo)) as advance:
        for start in range(0, len(todo), SAVE_EVERY):
            part = todo[start : start + SAVE_EVERY]
            own = part[processes.rank :: processes.world_size]
            numbers: list[int] = []
            found: list[Records] = []
            for done, (entry, reason) in enumerate(in_threads(look, own, threads)):
                number = int(own[done])
                if entry is not None:
                    contents.learn(number, entry["content"].tobytes())
                    numbers.append(number)
                    found.append(entry)
                if reason:
                    contents.fail(number, reason)
                advance(len(part) * (done + 1) // len(own) - len(part) * done // len(own))  # the others are as far
            everything = processes.gather([(np.array(numbers, np.int64), np.array(found, ENTRY).reshape(-1))])
            yield np.concatenate([each[0] for each in everything]), np.concatenate([each[1] for each in everything])


# The file


def read_signatures(path: Path) -> Records:
    """Return the entries that a file holds; none where it is missing or damaged (logged)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return np.empty(0, ENTRY)
    except OSError as error:
        log.warning("%s cannot be read (%s): every picture is decoded again", path, error.strerror)
        return np.empty(0, ENTRY)
    head, body = data[: len(MAGIC) + 4], memoryview(data)[len(MAGIC) + 4 :]
    if head != MAGIC + zlib.crc32(body).to_bytes(4, "little") or len(body) % ENTRY.itemsize:
        log.warning("%s is damaged: every picture is decoded again", path)
        return np.empty(0, ENTRY)
    return np.frombuffer(body, ENTRY)


def write_signatures(path: Path, entries: Sequence[Records]) -> None:
    """Replace the file. Raises UserError where it cannot be written."""
    parts = [part.tobytes() for part in entries]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    write_atomically(path, b"".join([MAGIC, checksum.to_bytes(4, "little"), *parts]))
