"""Who works on what, without anybody being asked: a piece of work is claimed by locking one byte of a file.

The system frees the locks of a process that dies, however it dies, so others can take its work over. No process ever
waits for another one's word.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType

from sdxl_training.records import UserError

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)
_opened: set[tuple[int, Path]] = set()  # by process


class Claims:
    """Claims on pieces of work 0, 1, 2, ... of what `path` stands for; every process that shares the work opens it.

    The file is opened by the first claim, and stays when all is done: empty, and of use to nobody. Where the file
    system has no locks every piece is free to everybody, so work may be done twice. One thread of one process.

    Locks belong to the process (POSIX), not to the open file: a child that inherits the file neither holds them nor
    keeps them from being freed. But whoever closes the file anywhere in the process loses all of them, so a process
    must have it open only once: a second Claims on it is a ValueError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._owner = 0
        self._file: int | None = None
        self._held: set[int] = set()
        self._has_locks = True

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def take(self, piece: int) -> bool:
        """Claim a piece; return False where a living process has it. Raises UserError where the file cannot be made."""
        if self._file is None:
            self._file = self._open()
        elif self._owner != os.getpid():
            raise ValueError("these claims are another process's")
        if piece in self._held:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, piece)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            if self._has_locks:
                log.warning("%s: the file system has no locks; processes may do the same work twice", self._path)
            self._has_locks = False
        self._held.add(piece)
        return True

    def give_back(self, piece: int) -> None:
        """End a claim."""
        self._held.remove(piece)
        if self._file is not None and self._has_locks:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)

    def close(self) -> None:
        """End all claims; others can be made after it."""
        if self._file is not None:
            os.close(self._file)
            _opened.discard((self._owner, self._path))
        self._file = None
        self._held.clear()

    def _open(self) -> int:
        self._owner = os.getpid()
        if (self._owner, self._path) in _opened:
            raise ValueError(f"{self._path}: this process has it open already, and would lose its claims")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"data.cache.path: {self._path} cannot be written ({error.strerror}). Make the folder writable, free "
                "some space, or set another folder; what was cached before is kept."
            ) from error
        _opened.add((self._owner, self._path))
        return file
