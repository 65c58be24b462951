"""Claims on pieces of work: one at a time, by living processes only. Real processes and files."""

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import threading
import time
from contextlib import contextmanager

import pytest

from sdxl_training.data.claims import Claims
from sdxl_training.records import UserError

FORK = multiprocessing.get_context("fork")


def hold(path, pieces, pipe):
    """Claim pieces, say which could be had, and hold them until told otherwise."""
    claims = Claims(path)
    pipe.send([claims.take(piece) for piece in pieces])
    pipe.recv()


@contextmanager
def another_process(path, *pieces):
    """Yield the other process, its pipe, and which of the pieces it could claim."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(path, pieces, theirs))
    process.start()
    try:
        yield process, ours, ours.recv()
    finally:
        process.kill()
        process.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "claims"


def test_a_piece_is_claimed_by_one_process_at_a_time(path):
    with Claims(path) as claims:
        assert claims.take(3)
        with another_process(path, 2, 3, 4) as (_, _, got):
            assert got == [True, False, True]
            assert [claims.take(piece) for piece in (2, 4, 5)] == [False, False, True]
            claims.give_back(3)
            with another_process(path, 2, 3, 5) as (_, _, got):
                assert got == [False, True, False]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_claims_of_a_process_that_dies_are_free(path, how):
    with Claims(path) as claims, another_process(path, 0, 10**6) as (process, _, got):
        assert got == [True, True]
        assert not claims.take(0)
        os.kill(process.pid, how)
        process.join()
        assert claims.take(0)
        assert claims.take(10**6)


def test_a_process_that_ends_frees_its_claims(path):
    with Claims(path) as claims, another_process(path, 0) as (process, pipe, _):
        pipe.send("end")
        process.join()
        assert claims.take(0)


def test_a_stopped_process_keeps_its_claims_and_nobody_waits_for_it(path):
    with Claims(path) as claims, another_process(path, 0) as (process, _, _):
        os.kill(process.pid, signal.SIGSTOP)
        before = time.monotonic()
        assert not claims.take(0)
        assert time.monotonic() - before < 1
        os.kill(process.pid, signal.SIGCONT)


def test_within_a_process_a_piece_is_claimed_once_too(path):
    """The system would grant it: to it, all threads are one."""
    taken = []
    with Claims(path) as claims:
        assert claims.take(1)
        assert not claims.take(1)
        thread = threading.Thread(target=lambda: taken.append(claims.take(1)))
        thread.start()
        thread.join()
        assert taken == [False]
        claims.give_back(1)
        assert claims.take(1)


def test_a_process_may_not_open_it_twice(path):
    """Closing the second one would lose the claims of the first."""
    with Claims(path) as claims, Claims(path.parent / ".." / path.parent.name / path.name) as again:
        assert claims.take(0)
        with pytest.raises(ValueError, match="has it open already"):
            again.take(1)
        again.close()
        with another_process(path, 0) as (_, _, got):
            assert got == [False]
    with Claims(path) as later:
        assert later.take(0)


def test_after_closing_all_is_free_and_can_be_claimed_again(path):
    claims = Claims(path)
    assert claims.take(0)
    claims.close()
    with another_process(path, 0) as (_, _, got):
        assert got == [True]
        assert not claims.take(0)
    assert claims.take(0)
    claims.close()
    claims.close()


def test_a_child_neither_holds_nor_loses_its_parents_claims(path):
    with Claims(path) as claims:
        assert claims.take(0)

        def child():
            with pytest.raises(ValueError, match="another process's"):
                claims.take(0)
            claims.close()
            with Claims(path) as own:
                os._exit(7 if own.take(1) and not own.take(0) else 8)

        process = FORK.Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 7
        with another_process(path, 0, 1) as (_, _, got):
            assert got == [False, True]


def test_a_child_that_lives_on_does_not_keep_a_dead_process_claims(path):
    """A loader's worker, for instance, that has inherited the open file."""
    pipe, theirs = FORK.Pipe()

    def parent():
        claims = Claims(path)
        claims.take(0)
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        theirs.send(child.pid)
        time.sleep(60)

    process = FORK.Process(target=parent)
    process.start()
    grandchild = pipe.recv()
    try:
        with Claims(path) as claims:
            assert not claims.take(0)
            process.kill()
            process.join()
            os.kill(grandchild, 0)
            assert claims.take(0)
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_nothing_is_on_disk_before_the_first_claim_and_an_empty_file_after_it(path):
    with Claims(path) as claims:
        assert not path.parent.exists()
        claims.take(5)
    assert path.stat().st_size == 0


def test_many_processes_share_out_every_piece_once(path, tmp_path):
    pieces, log, barrier = 300, tmp_path / "log", FORK.Barrier(4)

    def work(start):
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with Claims(path) as claims:
            for i in range(pieces):
                piece = (start + i) % pieces
                if claims.take(piece):
                    os.write(file, f"{piece}\n".encode())  # and keeps it
            barrier.wait(60)

    processes = [FORK.Process(target=work, args=(start,)) for start in (0, 100, 200, 0)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    taken = [int(line) for line in log.read_text().split()]
    assert len(set(taken)) == pieces
    assert len(taken) == pieces


def test_a_file_system_without_locks_is_named_once_and_all_is_free(path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Claims(path) as claims:
        assert claims.take(0)
        assert claims.take(1)
        claims.give_back(0)
        assert claims.take(0)
        assert not claims.take(1), "it is in hand"
    assert caplog.text.count("the file system has no locks") == 1


def test_another_error_of_the_disk_is_not_swallowed(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with Claims(path) as claims, pytest.raises(OSError, match="Input/output"):
        claims.take(0)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache\.path: .*claims cannot be written .*set another folder"):
        Claims(tmp_path / "cache" / "claims").take(0)


def test_other_users_may_share_the_work(path):
    before = os.umask(0)
    try:
        with Claims(path) as claims:
            claims.take(0)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


def test_giving_back_what_is_not_held_is_a_fault_of_the_program(path):
    with Claims(path) as claims, pytest.raises(KeyError):
        claims.give_back(3)
