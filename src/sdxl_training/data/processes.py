"""Worker processes for listing and looking at files. They end by themselves when the process that made them is gone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

WATCH_SECONDS = 0.5


def available_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool of this many processes, to be used in a with statement.

    On Linux they are forks, which start at once and see what this process has loaded; elsewhere forks are not safe.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    return ProcessPoolExecutor(processes, multiprocessing.get_context(method), _leave_with, (os.getpid(),))


def _leave_with(parent: int) -> None:
    """Watch the parent: one that is killed cannot tell its workers, which would wait for work and hold its locks."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    gc.freeze()  # what was inherited is not looked through again, and so not copied
    threading.Thread(target=watch, daemon=True).start()
