"""Open-file-description locks on a real file."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockfs.linux import ofd

BYTE = {"start": 0, "length": 1}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Open the one file of the test, each time as another open file description."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    fds: list[int] = []

    def opened(flags: int = os.O_RDWR) -> int:
        fds.append(os.open(path, flags | os.O_CLOEXEC))
        return fds[-1]

    yield opened
    for fd in fds:
        os.close(fd)


def test_exclusive_excludes_all(opened: Callable[..., int]) -> None:
    first, second = opened(), opened()
    assert ofd.lock(first, exclusive=True, **BYTE)
    assert not ofd.lock(second, exclusive=True, **BYTE)
    assert not ofd.lock(second, exclusive=False, **BYTE)
    ofd.unlock(first, **BYTE)
    assert ofd.lock(second, exclusive=True, **BYTE)


def test_shared_admits_shared(opened: Callable[..., int]) -> None:
    first, second = opened(), opened(os.O_RDONLY)
    assert ofd.lock(first, exclusive=False, **BYTE)
    assert ofd.lock(second, exclusive=False, **BYTE)
    assert not ofd.lock(first, exclusive=True, **BYTE)
    assert ofd.test(opened(), exclusive=True, **BYTE) == ofd.Conflict(exclusive=False, pid=ofd.OFD)


def test_it_changes_in_place(opened: Callable[..., int]) -> None:
    first, second = opened(), opened()
    assert ofd.lock(first, exclusive=False, **BYTE)
    assert ofd.lock(first, exclusive=True, **BYTE)
    assert not ofd.lock(second, exclusive=False, **BYTE)
    assert ofd.lock(first, exclusive=False, **BYTE)
    assert ofd.lock(second, exclusive=False, **BYTE)


def test_only_the_asked_bytes_are_locked(opened: Callable[..., int]) -> None:
    first, second = opened(), opened()
    assert ofd.lock(first, exclusive=True, **BYTE)
    assert ofd.lock(second, exclusive=True, start=1, length=1)


def test_no_other_close_of_the_file_drops_it(opened: Callable[..., int], tmp_path: Path) -> None:
    first, second = opened(), opened()
    assert ofd.lock(first, exclusive=True, **BYTE)
    os.close(os.open(tmp_path / "file", os.O_RDWR))
    assert not ofd.lock(second, exclusive=True, **BYTE)


def test_it_lives_as_long_as_a_dup(opened: Callable[..., int], tmp_path: Path) -> None:
    second = opened()
    first = os.open(tmp_path / "file", os.O_RDWR)
    assert ofd.lock(first, exclusive=True, **BYTE)
    dup = os.dup(first)
    os.close(first)
    assert not ofd.lock(second, exclusive=True, **BYTE)
    os.close(dup)
    assert ofd.lock(second, exclusive=True, **BYTE)


def test_the_own_lock_is_no_conflict(opened: Callable[..., int]) -> None:
    first, second = opened(), opened(os.O_RDONLY)
    assert ofd.test(first, exclusive=True, **BYTE) is None
    assert ofd.lock(first, exclusive=True, **BYTE)
    assert ofd.test(first, exclusive=True, **BYTE) is None
    assert ofd.test(second, exclusive=True, **BYTE) == ofd.Conflict(exclusive=True, pid=ofd.OFD)


def test_a_posix_lock_of_a_process_is_seen_with_its_pid(opened: Callable[..., int], tmp_path: Path) -> None:
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 0);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"locked\n"
        first = opened()
        assert ofd.test(first, exclusive=True, **BYTE) == ofd.Conflict(exclusive=True, pid=process.pid)
        assert not ofd.lock(first, exclusive=True, **BYTE)
        process.communicate()
    assert ofd.lock(first, exclusive=True, **BYTE)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(opened(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)


def test_what_it_needs_is_said_by_the_kernel(opened: Callable[..., int]) -> None:
    with pytest.raises(OSError) as caught:
        ofd.lock(opened(os.O_RDONLY), exclusive=True, **BYTE)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_a_description_has_is_seen(opened: Callable[..., int], exclusive: bool) -> None:
    one, two = opened(), opened()
    assert ofd.held(one, start=0) is None
    assert ofd.lock(one, exclusive=exclusive, start=0, length=1)
    assert ofd.held(one, start=0) is exclusive
    assert ofd.held(one, start=1) is None
    assert ofd.held(two, start=0) is None
    assert ofd.is_held(one, exclusive=False, start=0, length=1)
    assert ofd.is_held(one, exclusive=True, start=0, length=1) is exclusive
    assert not ofd.is_held(two, exclusive=False, start=0, length=1)


def test_it_is_seen_also_where_procfs_does_not_show_it(opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By how two descriptions of the file meet the lock."""
    monkeypatch.setattr(ofd, "held", lambda fd, start: None)
    one, two = opened(), opened()
    assert not ofd.is_held(one, exclusive=True, start=0, length=1)
    assert ofd.lock(one, exclusive=True, start=0, length=1)
    assert ofd.is_held(one, exclusive=True, start=0, length=1)
    assert not ofd.is_held(two, exclusive=True, start=0, length=1)
    ofd.unlock(one, start=0, length=1)
    assert ofd.lock(one, exclusive=False, start=0, length=1)
    assert ofd.is_held(one, exclusive=False, start=0, length=1)
    assert not ofd.is_held(one, exclusive=True, start=0, length=1)
    # Beside others who share it, nobody can tell: then it counts as lost.
    assert ofd.lock(two, exclusive=False, start=0, length=1)
    assert not ofd.is_held(one, exclusive=False, start=0, length=1)
