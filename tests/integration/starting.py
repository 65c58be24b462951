"""The program started as a process of its own, without the seconds that importing torch and diffusers takes.

It is forked from a process that has imported them and done nothing else: multiprocessing's fork server, one for each
process that runs tests. What `python src/main.py` does beside that, importing, is left to the tests that start it so.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.util import Finalize
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sdxl_training.assemble", "sdxl_training.cli", "tests.integration.starting"])


class Started:
    """A running program, with what of subprocess.Popen[str] tests need.

    together: what it says on its standard error comes with its standard output.
    """

    def __init__(
        self, program: Path, arguments: Sequence[str], environment: Mapping[str, str], together: bool = False
    ) -> None:
        self.args = [sys.executable, str(program), *arguments]
        self._said = tempfile.TemporaryDirectory(prefix="started-")
        self._files = [Path(self._said.name) / name for name in ("out", "out" if together else "err")]
        self._process = FORKS.Process(target=_run, args=(self.args[1:], dict(environment), *map(str, self._files)))
        self._process.start()
        Finalize(None, self._process.kill, exitpriority=100)  # before what is left is waited for

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return what was said on standard output and on standard error."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        return out, "" if self._files[0] == self._files[1] else err


def _run(arguments: Sequence[str], environment: Mapping[str, str], out: str, err: str) -> None:
    """Be a program: the first argument's, with this environment and these files to speak to."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
