"""Closing in a thread of its own."""

from __future__ import annotations

import os
import threading
import time

import pytest
from harness.waiting import wait_until

from lockfs.linux import closer
from lockfs.linux.closer import Closer


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def threads(name: str) -> int:
    return sum(name in thread.name for thread in threading.enumerate())


def test_it_closes_all_and_ends_when_there_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer, "LINGER", 0.05)
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
    it = Closer("test-a")
    for fd in fds:
        it.close([fd])
    wait_until(lambda: not any(map(is_open, fds)), 5, "all are closed")
    wait_until(lambda: not threads("test-a"), 5, "the thread has ended")
    again = os.open("/dev/null", os.O_RDONLY)
    it.close([again])
    wait_until(lambda: not is_open(again), 5, "one that comes after the end is closed")
    wait_until(lambda: not threads("test-a"), 5, "the thread has ended")


def test_who_hands_one_over_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer, "LINGER", 0.05)
    go_on = threading.Event()
    real = os.close

    def slow(fd: int) -> None:
        go_on.wait(5)
        real(fd)

    fd = os.open("/dev/null", os.O_RDONLY)
    it = Closer("test-b")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", slow)
        begin = time.monotonic()
        it.close([fd])
        assert time.monotonic() - begin < 1
        assert is_open(fd)
        go_on.set()
        wait_until(lambda: not threads("test-b"), 5, "the thread has ended")
    assert not is_open(fd)


def test_a_descriptor_that_is_none_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer, "LINGER", 0.05)
    fd = os.open("/dev/null", os.O_RDONLY)
    it = Closer("test-c")
    it.close([99_999, fd])
    wait_until(lambda: not is_open(fd), 5, "the one behind it is closed")
    wait_until(lambda: not threads("test-c"), 5, "the thread has ended")
