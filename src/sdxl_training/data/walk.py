"""Which pictures a folder holds, and when they and their captions were changed: listed by several processes at once.

Nothing is opened. Hidden files and what macOS leaves behind are ignored, linked folders are followed, and each folder
counts once, under the first of its names.

Shape legend: N pictures, M some of them.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

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
KINDS = {".parquet": "parquet", ".arrow": "parquet", ".tar": "tar"}
"""Endings of containers, and the kind of source that reads them."""
IGNORED_FOLDER = b"__MACOSX"
HIDDEN = ord(".")  # how names of hidden files start
SLICE = 2**16  # pictures that are put in order at a time, so that what that takes stays in the processor's cache
CROWD = 2**13  # pictures of one folder that a process looks at, at most; of a fuller one others take some
BATCH = 16  # folders that a process lists at a time, at most
PATIENCE = 0.05  # seconds; what takes longer is worth processes
NONE = (-1, -1)  # size and time of what is not there

PICTURE_ENDINGS = frozenset(os.fsencode(extension.removeprefix(".")) for extension in EXTENSIONS)

log = logging.getLogger(__name__)

FolderId = tuple[int, int]  # device and inode
Place = tuple[bytes, FolderId]  # where a folder is, and which
# A function, its arguments, and who takes its result.
Task = tuple[Callable[..., Any], tuple[Any, ...], Callable[[Any], None]]


class Subfolder(NamedTuple):
    """A folder in a folder: its name, which one it is, and how many pictures beside it come before those in it."""

    name: bytes
    identity: FolderId
    before: int


class Crowd(NamedTuple):
    """Pictures whose stamps are still to be found: some of a folder that has so many that processes share it.

    names: a picture's and its caption's in turns. first: number of the first picture among those of `Listed`.
    """

    folder: bytes
    names: Sequence[bytes]
    first: int


@dataclass(slots=True)
class Listed:
    """Some folders as they were listed; their pictures follow each other.

    counts: pictures of each folder. names: all together, without folders, of these lengths. stamps_N4: size and time of
    picture and caption. crowds: pictures whose stamps are still to be found. others: what else there is, by ending.
    dangling: symbolic links that lead nowhere.
    """

    places: Sequence[Place]
    subfolders: list[list[Subfolder]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    names: bytes = b""
    lengths_N: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    stamps_N4: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4), np.int64))
    crowds: list[Crowd] = field(default_factory=list)
    others: Counter[bytes] = field(default_factory=Counter)
    dangling: list[bytes] = field(default_factory=list)


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
    dangling = sorted(path for part in parts for path in part.dangling)
    if dangling:
        first = dangling[0].decode(errors="backslashreplace")
        log.warning("%d symbolic links lead nowhere and are passed over; the first: %s", len(dangling), first)
    return _in_order(parts, top[1]), sum((part.others for part in parts), Counter())


def list_folders(places: Sequence[Place], ending: bytes | None) -> Listed:
    """Return what is in these folders, and not in folders inside. Raises OSError."""
    listed = Listed(places)
    names: list[bytes] = []
    stamps = array("q")
    for path, _ in places:
        pictures, captions, subfolders = _names_in(path, ending, listed)
        if len(pictures) > CROWD:
            for first in range(0, len(pictures), CROWD):
                files = list(_with_captions(pictures[first : first + CROWD], captions, ending))
                listed.crowds.append(Crowd(path, files, len(names) + first))
            stamps += array("q", NONE) * (2 * len(pictures))
        elif pictures:
            stamps += _stamps(path, _with_captions(pictures, captions, ending))
        names += pictures
        listed.counts.append(len(pictures))
        # A folder's files stand where its name with a slash would.
        listed.subfolders.append(
            [Subfolder(name, which, bisect_left(pictures, name + b"/")) for name, which in sorted(subfolders)]
        )
    listed.names = b"".join(names)
    listed.lengths_N = np.fromiter(map(len, names), np.int64, len(names))
    listed.stamps_N4 = np.array(stamps, np.int64).reshape(-1, 4)
    return listed


def _names_in(path: bytes, ending: bytes | None, listed: Listed) -> tuple[list[bytes], set[bytes], list[Place]]:
    """Return the names of pictures, sorted, those of captions, and the folders inside.

    This and what follows runs once for every file of the set, so it does little and keeps no more than names.
    """
    pictures: list[bytes] = []
    captions: set[bytes] = set()
    subfolders: list[Place] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == HIDDEN:
                continue
            try:
                is_file = entry.is_file()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                is_file = False
            if not is_file:
                subfolders += _if_folder(entry, listed.dangling)
                continue
            _, dot, last = name.rpartition(b".")
            if dot and (last in PICTURE_ENDINGS or last.lower() in PICTURE_ENDINGS):
                pictures.append(name)
            elif ending is not None and name.endswith(ending):
                captions.add(name)
            else:
                listed.others[dot + last.lower() if dot and last else b""] += 1
    if captions and ending is not None:
        listed.others[ending] += len(captions)
    pictures.sort()
    return pictures, captions, subfolders


def _if_folder(entry: os.DirEntry[bytes], dangling: list[bytes]) -> list[Place]:
    """Return the name of a folder and which it is; nothing for what is none, or was deleted in the meantime."""
    try:
        if entry.is_dir():
            return [] if entry.name == IGNORED_FOLDER else [(entry.name, _place(entry.path)[1])]
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
    if entry.is_symlink():
        dangling.append(entry.path)
    return []


def _with_captions(pictures: Sequence[bytes], captions: Set[bytes], ending: bytes | None) -> Iterator[bytes]:
    """Yield each picture's name and that of its caption, empty where there is none."""
    for picture in pictures:
        yield picture
        caption = picture[: picture.rindex(b".")] + (ending or b"")
        yield caption if caption in captions else b""


def _stamps(folder: bytes, names: Iterable[bytes]) -> array[int]:
    """Return size and time of each of these files; -1, -1 of one that is gone or has no name."""
    stamps = array("q")
    # From an open folder a name is found sooner than from the root.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names:
            try:
                status = os.stat(name, dir_fd=descriptor) if name else None
            except FileNotFoundError:  # deleted in the meantime
                status = None
            except OSError as error:
                raise OSError(error.errno, error.strerror, folder + b"/" + name) from error
            stamps.append(-1 if status is None else status.st_size)
            stamps.append(-1 if status is None else status.st_mtime_ns)
    finally:
        os.close(descriptor)
    return stamps


def _place(path: bytes) -> Place:
    status = os.stat(path)  # noqa: PTH116 - paths are bytes
    return path, (status.st_dev, status.st_ino)


class _Walk:
    """What was found so far under a folder, and what is still to be done."""

    def __init__(self, top: Place, ending: bytes | None) -> None:
        self.parts: list[Listed] = []
        self._ending = ending
        self._folders = deque([top])
        self._crowds: deque[tuple[Listed, Crowd]] = deque()
        self._seen = {top[1]}

    def __len__(self) -> int:
        """Return how many tasks wait that need no other one first."""
        return len(self._folders) + len(self._crowds)

    def next_task(self, folders: int) -> Task:
        """Take out a task: a part of a crowded folder, or so many folders."""
        if self._crowds:
            listed, crowd = self._crowds.popleft()
            return _stamps, (crowd.folder, crowd.names), partial(_fill_in, listed, crowd)
        places = [self._folders.popleft() for _ in range(folders)]
        return list_folders, (places, self._ending), self._take_in

    def _take_in(self, listed: Listed) -> None:
        self.parts.append(listed)
        self._crowds.extend((listed, crowd) for crowd in listed.crowds)
        listed.crowds = []
        for (path, _), subfolders in zip(listed.places, listed.subfolders, strict=True):
            new = [(path + b"/" + name, which) for name, which, _ in subfolders if which not in self._seen]
            self._folders.extend(new)
            self._seen.update(which for _, which in new)


def _fill_in(listed: Listed, crowd: Crowd, stamps: array[int]) -> None:
    stamps_M4 = np.array(stamps, np.int64).reshape(-1, 4)
    listed.stamps_N4[crowd.first : crowd.first + len(stamps_M4)] = stamps_M4


def _list_all(top: Place, ending: bytes | None, processes: int) -> list[Listed]:
    """Return what is in a folder and all folders inside, each once."""
    todo = _Walk(top, ending)
    deadline = time.monotonic() + PATIENCE
    while todo and (processes == 1 or len(todo) == 1 or time.monotonic() < deadline):
        function, arguments, use = todo.next_task(folders=1)
        use(function(*arguments))
    if not todo:
        return todo.parts
    with open_pool(processes) as pool:
        running: dict[Future[Any], Callable[[Any], None]] = {}
        while todo or running:
            while todo and len(running) < 2 * processes:
                function, arguments, use = todo.next_task(min(BATCH, -(-len(todo) // (4 * processes))))
                running[pool.submit(function, *arguments)] = use
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                running.pop(future)(future.result())
    return todo.parts


def _in_order(parts: Sequence[Listed], top: FolderId) -> pa.Table:
    """Return all pictures, sorted by their names with folders."""
    segments = list(_segments(parts, top))
    counts = [stop - start for start, stop, _ in segments]
    order_N = np.concatenate([np.arange(start, stop) for start, stop, _ in segments] or [np.empty(0, np.int64)])
    segment_N = np.repeat(np.arange(len(segments)), counts)
    prefixes = pa.array([prefix for _, _, prefix in segments], pa.binary())
    lengths_N = np.concatenate([part.lengths_N for part in parts])
    if lengths_N.sum() > np.iinfo(np.int32).max:
        raise ValueError(f"the names of {len(lengths_N)} files do not fit into one column")
    offsets = np.zeros(len(lengths_N) + 1, np.int32)
    np.cumsum(lengths_N, out=offsets[1:])
    data = pa.py_buffer(b"".join(part.names for part in parts))
    names = pa.Array.from_buffers(pa.binary(), len(lengths_N), [None, pa.py_buffer(offsets), data])
    stamps_N4 = np.concatenate([part.stamps_N4 for part in parts])
    batches = []
    for first in range(0, len(order_N), SLICE):
        row_M, segment_M = order_N[first : first + SLICE], segment_N[first : first + SLICE]
        there_M = stamps_N4[row_M, 0] >= 0  # others vanished after their folder was read
        row_M, segment_M = row_M[there_M], segment_M[there_M]
        files = pc.binary_join_element_wise(prefixes.take(pa.array(segment_M)), names.take(pa.array(row_M)), b"")
        columns = [files, *(pa.array(stamps_N4[row_M, k]) for k in range(4))]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=FILES))
    return pa.Table.from_batches(batches, FILES)


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


def hint_of(endings: Iterable[str]) -> str:
    """Return what to set where a source holds nothing but files with such endings; empty where there is no advice."""
    kinds = sorted({KINDS[ending] for ending in endings if ending in KINDS})
    return "".join(f" For the pictures inside them set data.sources[].type: {kind}." for kind in kinds)
