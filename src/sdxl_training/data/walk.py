"""Which pictures a folder holds, and when they and their captions were changed: listed by several processes at once.

Nothing is opened. Hidden files and what macOS leaves behind are ignored, linked folders are followed, and each folder
counts once, under the first of its names.

Shape legend: N pictures.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdxl_training.data.listing import FILES
from sdxl_training.data.processes import available_cores, open_pool
from sdxl_training.records import UserError

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl"}
)
IGNORED_FOLDER = b"__MACOSX"
HIDDEN = ord(".")  # how names of hidden files start
BATCH = 16  # folders that a process lists at a time, at most
PATIENCE = 0.05  # seconds; what takes longer is worth processes
NONE = (-1, -1)  # size and time of a caption that is not there

PICTURE_ENDINGS = frozenset(os.fsencode(extension.removeprefix(".")) for extension in EXTENSIONS)

Stamp = tuple[int, int]  # size and modification time
FolderId = tuple[int, int]  # device and inode
Place = tuple[bytes, FolderId]  # where a folder is, and which


class Subfolder(NamedTuple):
    """A folder in a folder: its name, which one it is, and how many pictures beside it come before those in it."""

    name: bytes
    identity: FolderId
    before: int


@dataclass(slots=True)
class Listed:
    """Some folders as they were listed; their pictures follow each other.

    counts: pictures of each folder. names: all together, without folders, of these lengths. stamps_N4: size and time of
    picture and caption. others: what else there is, by ending.
    """

    places: Sequence[Place]
    subfolders: list[list[Subfolder]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    names: bytes = b""
    lengths_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    stamps_N4: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4), np.int64))
    others: Counter[bytes] = field(default_factory=Counter)


def walk(root: str, caption_extension: str | None, processes: int | None = None) -> tuple[pa.Table, Counter[bytes]]:
    """Return the pictures under a folder, schema FILES, and how many other files there are of each ending.

    caption_extension: that of the caption beside a picture; None: there are none. Raises UserError where the folder or
    one inside cannot be listed.
    """
    ending = None if caption_extension is None else os.fsencode("." + caption_extension.removeprefix("."))
    try:
        top = _place(os.fsencode(root))
        parts = _list_all(top, ending, processes or available_cores())
    except OSError as error:
        place = root if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{place} cannot be listed ({error.strerror}). Make it readable.") from error
    return _in_order(parts, top[1]), sum((part.others for part in parts), Counter())


def list_folders(places: Sequence[Place], ending: bytes | None) -> Listed:
    """Return what is in these folders, and not in folders inside. Raises OSError."""
    listed = Listed(places)
    names: list[bytes] = []
    columns: tuple[list[int], ...] = ([], [], [], [])
    for path, _ in places:
        pictures, captions, subfolders = _list_folder(path, ending, listed.others)
        pictures.sort()
        inside: tuple[bytes, ...] = ()
        if pictures:
            inside, stems, *stamps = zip(*pictures, strict=True)
            stamps += zip(*map(captions.get, stems, repeat(NONE)), strict=True)
            for column, values in zip(columns, stamps, strict=True):
                column += values
        names += inside
        listed.counts.append(len(inside))
        # A folder's files stand where its name with a slash would.
        listed.subfolders.append(
            [Subfolder(name, which, bisect_left(inside, name + b"/")) for name, which in sorted(subfolders)]
        )
    listed.names = b"".join(names)
    listed.lengths_N = np.fromiter(map(len, names), np.int64, len(names))
    listed.stamps_N4 = np.array(columns, np.int64).T
    return listed


def _list_folder(
    path: bytes, ending: bytes | None, others: Counter[bytes]
) -> tuple[list[tuple[bytes, bytes, int, int]], dict[bytes, Stamp], list[Place]]:
    """Return pictures as (name, name without ending, size, time), stamps of captions by the latter, folders inside.

    It runs once for every file of the set, so it does little and nothing twice.
    """
    pictures: list[tuple[bytes, bytes, int, int]] = []
    captions: dict[bytes, Stamp] = {}
    subfolders: list[Place] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == HIDDEN or name == IGNORED_FOLDER:
                continue
            stem, dot, last = name.rpartition(b".")
            try:
                if not entry.is_file():
                    if entry.is_dir():
                        subfolders.append((name, _place(entry.path)[1]))
                elif dot and (last in PICTURE_ENDINGS or last.lower() in PICTURE_ENDINGS):
                    status = entry.stat()
                    pictures.append((name, stem, status.st_size, status.st_mtime_ns))
                elif ending is not None and name.endswith(ending):
                    status = entry.stat()
                    captions[name[: -len(ending)]] = status.st_size, status.st_mtime_ns
                else:
                    others[dot + last.lower() if dot and last else b""] += 1
            except FileNotFoundError:  # deleted in the meantime
                continue
    if captions and ending is not None:
        others[ending] += len(captions)
    return pictures, captions, subfolders


def _place(path: bytes) -> Place:
    status = os.stat(path)  # noqa: PTH116 - paths are bytes
    return path, (status.st_dev, status.st_ino)


def _list_all(top: Place, ending: bytes | None, processes: int) -> list[Listed]:
    """Return what is in a folder and all folders inside, each once."""
    waiting, seen, parts = deque([top]), {top[1]}, list[Listed]()

    def take_in(listed: Listed) -> None:
        parts.append(listed)
        for (path, _), subfolders in zip(listed.places, listed.subfolders, strict=True):
            new = [(path + b"/" + name, which) for name, which, _ in subfolders if which not in seen]
            waiting.extend(new)
            seen.update(which for _, which in new)

    deadline = time.monotonic() + PATIENCE
    while waiting and (processes == 1 or len(waiting) == 1 or time.monotonic() < deadline):
        take_in(list_folders([waiting.popleft()], ending))
    if not waiting:
        return parts
    with open_pool(processes) as pool:
        running: set[Future[Listed]] = set()
        while waiting or running:
            while waiting and len(running) < 2 * processes:
                number = min(BATCH, -(-len(waiting) // (4 * processes)))
                running.add(pool.submit(list_folders, [waiting.popleft() for _ in range(number)], ending))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                take_in(future.result())
    return parts


def _in_order(parts: Sequence[Listed], top: FolderId) -> pa.Table:
    """Return all pictures, sorted by their names with folders."""
    segments = list(_segments(parts, top))
    counts = [stop - start for start, stop, _ in segments]
    order_N = np.concatenate([np.arange(start, stop) for start, stop, _ in segments] or [np.empty(0, np.int64)])
    prefixes = pa.array([prefix for _, _, prefix in segments], pa.binary()).take(
        pa.array(np.repeat(np.arange(len(segments)), counts))
    )
    lengths_N = np.concatenate([part.lengths_N for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    if lengths_N.sum() > np.iinfo(np.int32).max:
        raise ValueError(f"the names of {len(lengths_N)} files do not fit into one column")
    data = pa.py_buffer(b"".join(part.names for part in parts))
    names = pa.Array.from_buffers(pa.binary(), len(lengths_N), [None, pa.py_buffer(offsets), data])
    files = pc.binary_join_element_wise(prefixes, names.take(pa.array(order_N)), b"")
    stamps_N4 = np.concatenate([part.stamps_N4 for part in parts])[order_N]
    return pa.Table.from_arrays([files, *(pa.array(stamps_N4[:, k]) for k in range(4))], schema=FILES)


def _segments(parts: Sequence[Listed], top: FolderId) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first row, row behind the last, folder) of pictures that follow each other, in the order of their names.

    A folder that has several names, by links, counts under the first that is met.
    """
    start = 0
    folders: dict[FolderId, tuple[int, int, list[Subfolder]]] = {}
    for part in parts:
        for (_, which), count, subfolders in zip(part.places, part.counts, part.subfolders, strict=True):
            folders[which] = (start, start + count, subfolders)
            start += count
    # Of folders, what is in them is still to be found; of rows, they are what is to be yielded.
    stack: list[tuple[FolderId | None, int, int, bytes]] = [(top, 0, 0, b"")]
    while stack:
        identity, first, stop, prefix = stack.pop()
        if identity is None:
            yield first, stop, prefix
        elif identity in folders:
            stack.extend(reversed(list(_pieces(prefix, *folders.pop(identity)))))


def _pieces(
    prefix: bytes, first: int, stop: int, subfolders: Sequence[Subfolder]
) -> Iterator[tuple[FolderId | None, int, int, bytes]]:
    """Yield a folder's rows and the folders among them, as `_segments` keeps them."""
    done = first
    for name, identity, before in sorted(subfolders, key=lambda subfolder: subfolder.name + b"/"):
        if done < first + before:
            yield None, done, first + before, prefix
        yield identity, 0, 0, prefix + name + b"/"
        done = first + before
    if done < stop:
        yield None, done, stop, prefix
