"""A folder of pictures at an address (s3://bucket/pictures), with captions beside them; read, never written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from sdxl_training.data.decoding import read_header
from sdxl_training.data.folders import ABSENT, NO_SIDECAR, Look, pictures_of_looks
from sdxl_training.data.images import PictureHeader, UnreadablePicture
from sdxl_training.data.listing import FILES
from sdxl_training.data.quick_headers import AT_FIRST, parse_start
from sdxl_training.data.remote import ListedFile, base_of, list_files, open_seekable, read_range, shown, stamps_of
from sdxl_training.data.sidecars import read_caption_file
from sdxl_training.data.walk import EXTENSIONS
from sdxl_training.records import UserError

THREADS = 16  # that wait for the network in each process


@dataclass(frozen=True, slots=True)
class AddressSource:
    """Pictures anywhere under an address; the caption of a.png is the file a.txt beside it.

    caption_extension: what captions end in, as in `folders.FolderSource`.
    """

    address: str
    caption_extension: str = ".txt"

    @property
    def identity(self) -> str:
        """Return the address, without credentials, and the caption extension as JSON."""
        return json.dumps({"kind": "address", "address": shown(self._root), "captions": self._ending})

    def list_files(self) -> pa.Table:
        """Return the pictures there are, schema FILES. Raises UserError where there is none."""
        listed = {file.name: file for file in list_files(self._root, (*EXTENSIONS, self._ending))}
        pictures = [file for file in listed.values() if _ending_of(file.name) in EXTENSIONS]
        if not pictures:
            raise UserError(f"there is no picture. Pictures end in {', '.join(sorted(EXTENSIONS))}.")
        return _as_table(pictures, [listed.get(self._caption_of(file.name)) for file in pictures])

    def list_all(self) -> pa.Table:
        """Return all files there are, schema FILES, as if without captions. Raises UserError where there is none."""
        files = list_files(self._root)
        return _as_table(files, [None] * len(files))

    def stamps(self, names: Sequence[bytes]) -> list[tuple[int, int]]:
        """Return size and time of files that a listing may lack, as hidden ones; ABSENT where there is none."""
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(self._stamps, names))

    def look(self, files: pa.Table) -> pa.Table:
        """Return what headers and caption files say, schema PICTURES; a row a file."""
        return pictures_of_looks(files, self.looks(files))

    def looks(self, files: pa.Table) -> Iterable[Look]:
        """Return what a look at each of these files told."""
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(self._look, files.to_pylist()))

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where they cannot be had."""
        try:
            return read_range(self._place(os.fsencode(file)), 0, length)
        except OSError as error:
            raise UnreadablePicture(self.path(file), f"the file cannot be read: {error.strerror or error}") from error

    def path(self, name: str) -> str:
        """Return the address of a picture, without credentials."""
        return shown(self._place(os.fsencode(name)))

    @property
    def base(self) -> str:
        """What names are relative to; it ends in "/"."""
        return base_of(self._root)

    @property
    def _root(self) -> str:
        return self.address.rstrip("/") + "/"

    @property
    def _ending(self) -> str:
        return "." + self.caption_extension.removeprefix(".")

    def _caption_of(self, name: bytes) -> bytes:
        return name[: name.rindex(b".")] + os.fsencode(self._ending)

    def _place(self, name: bytes) -> str:
        return self.base + os.fsdecode(name)

    def _stamps(self, name: bytes) -> tuple[int, int]:
        try:
            return stamps_of(self._place(name)) or (ABSENT, ABSENT)
        except (OSError, UserError):  # a look at it says why
            return ABSENT, ABSENT

    def _look(self, file: Mapping[str, bytes | int]) -> Look:
        name, size, caption_size = file["file"], file["bytes"], file["caption_bytes"]
        if not isinstance(name, bytes) or not isinstance(size, int) or not isinstance(caption_size, int):
            raise TypeError(f"{file} is no row of FILES")
        try:
            header = self._header(name, size)
            if caption_size < 0:
                return header, NO_SIDECAR, None
            caption = self._caption_of(name)
            data = read_range(self._place(caption), 0, caption_size)
            return header, read_caption_file(data, os.fsdecode(caption).rpartition("/")[2]), None
        except UnreadablePicture as error:
            return None, NO_SIDECAR, error.reason
        except FileNotFoundError:  # services have their own words for it
            return None, NO_SIDECAR, f"it cannot be read: {os.strerror(errno.ENOENT)}"
        except OSError as error:
            return None, NO_SIDECAR, f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            return None, NO_SIDECAR, str(error)

    def _header(self, name: bytes, size: int) -> PictureHeader:
        start = b"" if size < 0 else read_range(self._place(name), 0, min(AT_FIRST, size))
        header = parse_start(start)
        if header is not None:
            return header
        with open_seekable(self._place(name)) as opened:
            return read_header(opened, self.path(os.fsdecode(name)))


def _as_table(files: Sequence[ListedFile], captions: Sequence[ListedFile | None]) -> pa.Table:
    """Return files and the captions that belong to them, schema FILES."""
    columns = {
        "file": [file.name for file in files],
        "bytes": [file.size for file in files],
        "mtime_ns": [file.mtime_ns for file in files],
        "caption_bytes": [caption.size if caption else ABSENT for caption in captions],
        "caption_mtime_ns": [caption.mtime_ns if caption else ABSENT for caption in captions],
    }
    return pa.table(columns, schema=FILES).sort_by("file").combine_chunks()


def _ending_of(name: bytes) -> str:
    return PurePosixPath(os.fsdecode(name)).suffix.lower()
