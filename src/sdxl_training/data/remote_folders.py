"""A folder of pictures at an address (s3://bucket/pictures), with captions beside them; read, never written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from sdxl_training.data.decoding import read_header
from sdxl_training.data.folders import NO_SIDECAR, Look, pictures_of_looks
from sdxl_training.data.images import PictureHeader, UnreadablePicture
from sdxl_training.data.listing import FILES
from sdxl_training.data.quick_headers import AT_FIRST, parse_start
from sdxl_training.data.remote import base_of, list_files, open_seekable, read_range, shown
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
        captions = [listed.get(self._caption_of(file.name)) for file in pictures]
        columns = {
            "file": [file.name for file in pictures],
            "bytes": [file.size for file in pictures],
            "mtime_ns": [file.mtime_ns for file in pictures],
            "caption_bytes": [caption.size if caption else -1 for caption in captions],
            "caption_mtime_ns": [caption.mtime_ns if caption else -1 for caption in captions],
        }
        return pa.table(columns, schema=FILES).sort_by("file").combine_chunks()

    def look(self, files: pa.Table) -> pa.Table:
        """Return what headers and caption files say, schema PICTURES; a row a file."""
        with ThreadPoolExecutor(THREADS) as threads:
            return pictures_of_looks(files, list(threads.map(self._look, files.to_pylist())))

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
    def _root(self) -> str:
        return self.address.rstrip("/") + "/"

    @property
    def _ending(self) -> str:
        return "." + self.caption_extension.removeprefix(".")

    def _caption_of(self, name: bytes) -> bytes:
        return name[: name.rindex(b".")] + os.fsencode(self._ending)

    def _place(self, name: bytes) -> str:
        return base_of(self._root) + os.fsdecode(name)

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
        except OSError as error:
            return None, NO_SIDECAR, f"it cannot be read: {error.strerror or error}"
        except ValueError as error:
            return None, NO_SIDECAR, str(error)

    def _header(self, name: bytes, size: int) -> PictureHeader:
        start = read_range(self._place(name), 0, min(AT_FIRST, size))
        header = parse_start(start)
        if header is not None:
            return header
        with open_seekable(self._place(name)) as opened:
            return read_header(opened, self.path(os.fsdecode(name)))


def _ending_of(name: bytes) -> str:
    return PurePosixPath(os.fsdecode(name)).suffix.lower()
