"""assemble/folder.py: who may train in a run's folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from sdxl_training.assemble.folder import RunFolder


def failing_with(number: int) -> object:
    def lockf(*_: object) -> None:
        raise OSError(number, "no")

    return lockf


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing_with(number))
    with RunFolder(tmp_path).held() as said:
        assert "do not train in this folder twice" in said


def test_with_locks_nothing_is_said(tmp_path: Path) -> None:
    with RunFolder(tmp_path).held() as said:
        assert said == ""


def test_another_failure_of_the_lock_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing_with(errno.EIO))
    with pytest.raises(OSError, match="no"), RunFolder(tmp_path).held():
        pass
