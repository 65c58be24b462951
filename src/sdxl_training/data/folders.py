"""Folders of pictures with caption files beside them, as a source."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sdxl_training.data.decoding import PictureHeader
from sdxl_training.data.images import UnreadablePicture, read_file
from sdxl_training.data.listing import PICTURES
from sdxl_training.data.quick_headers import look_quickly
from sdxl_training.data.sidecars import Sidecar, read_caption_file
from sdxl_training.data.walk import EXTENSIONS, hint_of, walk
from sdxl_training.records import UserError

EXAMPLES = 5
ABSENT = -1  # size and time of a file that is not there
NO_SIDECAR = Sidecar()

Look = tuple[PictureHeader | None, Sidecar, str | None]
"""What a look at a picture told: its header, or None and the reason why it cannot be used; what stands beside it."""


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Pictures anywhere under a folder; the caption of a.png is the file a.txt beside it.

    caption_extension: what captions end in; .json ones are objects (see `sidecars`), others are text. The extension
    alone decides: other files beside a picture are not looked for. processes: that list the folder; by default as many
    as there are cores.
    """

    root: str
    caption_extension: str = ".txt"
    processes: int | None = None

    @property
    def identity(self) -> str:
        """Return the folder's absolute path and the caption extension as JSON."""
        return json.dumps({"kind": "folder", "path": absolute(self.root), "captions": self._ending})

    def list_files(self) -> pa.Table:
        """Return the pictures there are now, schema FILES.

        Raises UserError where the folder is missing, cannot be listed, or holds no picture: what it holds instead.
        """
        files, others = list_folder(self.root, self._ending, self.processes)
        if not files.num_rows:
            raise UserError(f"{_found_instead(others)} Pictures end in {', '.join(sorted(EXTENSIONS))}.")
        return files

    def list_all(self) -> pa.Table:
        """Return the pictures there are now, schema FILES, without captions. Raises UserError where it is none."""
        return list_folder(self.root, None, self.processes)[0]

    def stamps(self, names: Sequence[bytes]) -> list[tuple[int, int]]:
        """Return size and time of files that need not be pictures; ABSENT where there is none."""
        return [_stamps_of(self.base + os.fsdecode(name)) for name in names]

    def look(self, files: pa.Table) -> pa.Table:
        """Return what headers and caption files say, schema PICTURES; a row a file."""
        return pictures_of_looks(files, self.looks(files))

    def looks(self, files: pa.Table) -> Iterator[Look]:
        """Yield what a look at each of these files told."""
        base, ending = self.base, self._ending
        names, caption_sizes = (files[column].to_pylist() for column in ("file", "caption_bytes"))
        for name, caption_size in zip(names, caption_sizes, strict=True):
            yield look_with(base + os.fsdecode(name), ending, caption_size)

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where the file is gone or no longer has its length."""
        return read_whole(self.path(file), length)

    def path(self, name: str) -> str:
        """Return the path of a picture."""
        return self.base + name

    @property
    def base(self) -> str:
        """What names are relative to; it ends in "/"."""
        return f"{absolute(self.root).rstrip('/')}/"

    @property
    def _ending(self) -> str:
        return "." + self.caption_extension.removeprefix(".")


def absolute(root: str) -> str:
    """Return a folder as an absolute path, a home folder's sign replaced."""
    return str(Path(root).expanduser().absolute())


def list_folder(root: str, ending: str | None, processes: int | None) -> tuple[pa.Table, Counter[bytes]]:
    """Return the pictures under a folder as `walk` does. Raises UserError where it is missing or is none."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        kind = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{kind}. Give the folder that holds the pictures.")
    return walk(absolute(root), ending, processes)


def look_with(path: str, ending: str, caption_size: int) -> Look:
    """Look at a picture and at the caption file beside it; caption_size: -1 where there was none."""
    try:
        header = look_quickly(path)
        if caption_size < 0:
            return header, NO_SIDECAR, None
        caption = path[: path.rindex(".")] + ending
        return header, read_caption_file(_read_caption(caption, caption_size), caption.rpartition("/")[2]), None
    except UnreadablePicture as error:
        return None, NO_SIDECAR, error.reason
    except ValueError as error:
        return None, NO_SIDECAR, str(error)


def pictures_of_looks(files: pa.Table, looks: Iterable[Look]) -> pa.Table:
    """Return what was seen of these files, each a picture, as rows of PICTURES."""
    headers: list[PictureHeader | None] = []
    sidecars: list[Sidecar] = []
    reasons: list[str | None] = []
    for header, sidecar, reason in looks:
        headers.append(header)
        sidecars.append(sidecar)
        reasons.append(reason)
    columns = {
        "file": files["file"],
        "name": files["file"],
        "start": pa.array([0] * len(headers), pa.int64()),
        "length": files["bytes"],
        "height": [header.size_hw[0] if header else 0 for header in headers],
        "width": [header.size_hw[1] if header else 0 for header in headers],
        "orientation": [header.orientation if header else None for header in headers],
        "mode": [header.mode if header else None for header in headers],
        "format": [header.format if header else None for header in headers],
        "captions": [sidecar.captions or None for sidecar in sidecars],
        "tags": [sidecar.tags or None for sidecar in sidecars],
        "focus": [sidecar.focus for sidecar in sidecars],
        "reason": reasons,
    }
    return pa.table(columns, schema=PICTURES)


def read_whole(path: str, length: int) -> bytes:
    """Return a file's bytes. Raises UnreadablePicture where it is gone or has not this length."""
    data = read_file(path)
    if len(data) != length:
        raise UnreadablePicture(
            path,
            f"it has {len(data)} bytes now and had {length} when it was listed; start anew to train what it is now",
        )
    return data


def _stamps_of(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return ABSENT, ABSENT
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (ABSENT, ABSENT)


def _read_caption(path: str, size: int) -> bytes:
    """Return a caption file's bytes. Raises ValueError with the reason where it cannot be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(file, size + 1)
        finally:
            os.close(file)
        if len(data) == size:
            return data
    except OSError:
        pass  # worth another try
    try:
        return read_file(path)
    except UnreadablePicture as error:
        why = error.reason.removeprefix("the file ")
        raise ValueError(f"its caption {path.rpartition('/')[2]} {why}") from error


def _found_instead(others: Counter[bytes]) -> str:
    if not others:
        return "the folder is empty."
    kinds = [f"{count} x {os.fsdecode(ending) or 'no extension'}" for ending, count in others.most_common(EXAMPLES)]
    return f"no picture in it, only {', '.join(kinds)}.{hint_of(map(os.fsdecode, others))}"
