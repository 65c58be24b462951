"""assemble/folder.py: who may train in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path

import pytest

from sdxl_training.assemble.folder import RunFolder


def failing_with(number: int) -> object:
    def lockf(*_: object) -> None:
        raise OSError(number, "no")

    return lockf


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing_with(number))
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path).held():
        assert "do not train in this folder twice" in caplog.text


def test_another_failure_of_the_lock_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing_with(errno.EIO))
    with pytest.raises(OSError, match="no"), RunFolder(tmp_path).held():
        pass
