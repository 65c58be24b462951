"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sdxl_training.records import UserError


def write_atomically(path: Path, payload: bytes) -> None:
    """Write a file so that it is either there whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "make the folder writable"
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). {remedy.capitalize()}, or set data.cache.path to "
            "another folder; what was cached before is kept."
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
