"""What is known of pictures without decoding them: the columns of the index, and what every kind of source offers.

A source consists of files: pictures with their captions, or containers that hold many of both. Which files there are is
listed on every start; only files that are new or changed (by size and modification time) are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

COLUMNS_SETTING = "data.sources[].columns"  # where people name columns

# Names are bytes: a file name need not be valid UTF-8. They are relative to the source, with "/" between folders.
FILES = pa.schema(
    [
        ("file", pa.binary()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        # The caption file's size and time; both -1 where there is none or where captions are inside.
        ("caption_bytes", pa.int64()),
        ("caption_mtime_ns", pa.int64()),
    ]
)
"""Files of a source as they are listed, sorted by `file`, each once."""

PICTURES = pa.schema(
    [
        ("file", pa.binary()),
        ("name", pa.binary()),  # of the picture: that of its file, or <container>/<member>; unique in the source
        ("start", pa.int64()),  # where its bytes are: an offset in the file, or a row number of a table
        ("length", pa.int64()),  # how many bytes it has
        ("height", pa.int32()),  # as shown, EXIF orientation applied
        ("width", pa.int32()),
        ("orientation", pa.int8()),
        ("mode", pa.string()),
        ("format", pa.string()),
        ("captions", pa.list_(pa.large_string())),  # null: no caption; several: alternatives
        ("tags", pa.list_(pa.large_string())),  # beside the captions; null: none given
        ("focus", pa.list_(pa.float64())),  # [top, left, height, width] as written, pixels or fractions; null: none
        ("reason", pa.large_string()),  # why it cannot be used; null: it can
    ]
)
"""Pictures as a look at their files told; a picture that cannot be used has size 0 x 0 and a reason."""


class PictureSource(Protocol):
    """A place with pictures. Objects are small and frozen and travel to other processes.

    identity: names the place and everything that decides what a look finds (kind, address, caption settings): the index
    of one identity is never used for another.
    """

    @property
    def identity(self) -> str:
        """Return the source's place and settings as text."""

    def list_files(self) -> pa.Table:
        """Return the files there are now, schema FILES. Raises UserError where the place is missing or empty."""

    def look(self, files: pa.Table) -> pa.Table:
        """Return the pictures in these files (rows of FILES), schema PICTURES, in the files' order.

        A file that cannot be used is a row with a reason; never an exception.
        """

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return a picture's bytes. Raises UnreadablePicture where they cannot be had."""

    def path(self, name: str) -> str:
        """Return what people are shown for a picture or file of this name: a path or an address."""


def pictures_of(rows: Sequence[dict[str, object]]) -> pa.Table:
    """Return pictures from one mapping a row; columns that are left out are null."""
    return pa.Table.from_pylist(list(rows), schema=PICTURES)
