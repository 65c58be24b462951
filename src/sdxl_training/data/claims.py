"""Who works on what, without anybody being asked: a piece of work is claimed by locking one byte of a file.

The system frees the locks of a process that dies, however it dies, so others can take its work over. No process ever
waits for another one's word.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType


class Claims:
    """Claims on pieces of work 0, 1, 2, ... of what `path` stands for; every process that shares the work opens it.

    Locks belong to the process (POSIX): opening the same file twice in one process would lose them.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._file)

    def take(self, piece: int) -> bool:
        """Claim a piece; return False where another living process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, piece)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def give_back(self, piece: int) -> None:
        """End a claim."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, piece)
