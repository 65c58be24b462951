"""The files of a picture index, beside each other in a folder: where they are, how they are read, who may write them.

One source has one index, named after a digest of the source's identity. All of it is a cache: losing it costs time,
never data.

    pictures-<digest>.parquet            the index
    pictures-<digest>.part-0000.parquet  what a first index that was interrupted has found so far
    pictures-<digest>.hashes             content hashes learned since, and
    pictures-<digest>.failures.jsonl     pictures that turned out to be damaged; both only ever grow
    pictures-<digest>.lock               held by the process that brings the index up to date
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdxl_training.data.atomic import write_atomically
from sdxl_training.data.listing import FILES, PICTURES
from sdxl_training.records import UserError

HASH_BYTES = 16
# A row that must be looked at again has stamps that no file has: bytes -1 or caption_mtime_ns -2.
INDEX = pa.schema(
    [*FILES, *(column for column in PICTURES if column.name != "file"), ("content_hash", pa.binary(HASH_BYTES))]
)
"""Pictures with the stamps of their files; content_hash is null until the picture was first decoded."""

VERSION = b"1"
VERSION_KEY, GENERATION_KEY, FOLDED_KEY = b"sdxl_training_pictures", b"generation", b"folded"
POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexPaths:
    """The files of the index of one source."""

    folder: Path
    digest: str

    @classmethod
    def of(cls, folder: str | Path, identity: str) -> IndexPaths:
        """Return where the index of the source of this identity is."""
        return cls(Path(folder), hashlib.blake2b(identity.encode(), digest_size=8).hexdigest())

    @property
    def table(self) -> Path:
        """The index itself."""
        return self._path("parquet")

    @property
    def hashes(self) -> Path:
        """Content hashes, see `contents`."""
        return self._path("hashes")

    @property
    def failures(self) -> Path:
        """Pictures that could not be decoded, see `contents`."""
        return self._path("failures.jsonl")

    @property
    def lock(self) -> Path:
        """Held by who changes the others."""
        return self._path("lock")

    def part(self, number: int) -> Path:
        """Return the path of a part."""
        return self._path(f"part-{number:04d}.parquet")

    def parts(self) -> list[Path]:
        """Return the parts there are."""
        return sorted(self.folder.glob(f"pictures-{self.digest}.part-*.parquet"))

    def _path(self, ending: str) -> Path:
        return self.folder / f"pictures-{self.digest}.{ending}"


def number_of(part: Path) -> int:
    """Return the number of a part."""
    return int(part.name.split(".part-")[1].removesuffix(".parquet"))


def read_rows(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    """Return the rows of an index or a part, each column in one piece; schema INDEX, or the columns asked for.

    None where there is none, or where it is damaged or of another version, which is logged.
    """
    if not path.exists():
        return None
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if (schema.metadata or {}).get(VERSION_KEY) != VERSION or not schema.equals(INDEX):
                log.warning("%s was written by another version: its pictures are looked at again", path)
                return None
            table = file.read(columns, use_threads=False)  # more would wait for each other at every new page of memory
    except (pa.ArrowException, OSError) as error:
        log.warning("%s is damaged (%s): its pictures are looked at again", path, error)
        return None
    table = table.combine_chunks()
    pa.default_memory_pool().release_unused()  # else Arrow keeps what reading took: as much again as the table
    return table


def write_rows(path: Path, batches: Iterator[pa.Table], generation: int = 0, folded: int = 0) -> None:
    """Replace an index or a part by these rows. Raises UserError where that cannot be done.

    generation: stands for these rows and their order. folded: up to which byte of `hashes` they include what it says.
    """
    metadata = {VERSION_KEY: VERSION, GENERATION_KEY: b"%d" % generation, FOLDED_KEY: b"%d" % folded}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        INDEX.with_metadata(metadata),
        compression="zstd",
        use_dictionary=["mode", "format"],
        write_statistics=False,
    ) as writer:
        for batch in batches:
            writer.write_table(batch.cast(INDEX))
    write_atomically(path, sink.getvalue())


def generation_of(table: pa.Table) -> int:
    """Return the number that stands for an index' rows and their order; equal in all processes that loaded the same."""
    return int(table.schema.metadata[GENERATION_KEY])


def folded_in(table: pa.Table) -> int:
    """Return up to which byte of `hashes` a table says what it says."""
    return int(table.schema.metadata[FOLDED_KEY])


@contextmanager
def one_at_a_time(paths: IndexPaths, session: str) -> Iterator[bool]:
    """Wait until no other process changes the index; yields whether this one has to.

    It has not where another one finished while this one waited, or finished earlier with the same session, unless that
    is empty. Raises UserError where the folder cannot be written or locked.
    """
    try:
        paths.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(paths.lock, error) from error
    try:
        before = _last_update(file)
        waited = _wait_for(file, paths)
        last = _last_update(file)
        if (waited and last != before) or (session and last.partition("\n")[2] == session):
            yield False
        else:
            yield True
            os.ftruncate(file, 0)
            os.pwrite(file, f"{time.time_ns()}\n{session}".encode(), 0)
    finally:
        os.close(file)


def _wait_for(file: int, paths: IndexPaths) -> bool:
    """Take the lock; return whether another process had it."""
    waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except BlockingIOError:
            if not waited:
                log.info("waiting for the process that brings %s up to date", paths.table)
            waited = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            raise _unusable(paths.lock, error) from error


def _last_update(file: int) -> str:
    return os.pread(file, 4096, 0).decode(errors="replace")


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written and locked ({error.strerror or error}). Make the folder writable, or set "
        "data.cache.path to another one, on a disk of this machine."
    )
