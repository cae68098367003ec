"""fcntl-lockd on a filesystem whose locks do not work: it says so, and grants nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import mounts
from t3_backends import lockless
from t3_backends.stations import station

from lockfs.backend import Mode
from lockfs.errors import LockUnavailable, MountError

Start = Callable[[int, str], Path]


@pytest.fixture
def lockless_fs(leaves_nothing: None, tmp_path: Path) -> Iterator[Start]:
    """Mount a filesystem whose locks fail with an errno, on every file or on ``img`` only."""
    servers: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(error: int, where: str) -> Path:
        mountpoint = tmp_path / "lockless"
        mountpoint.mkdir()
        command = [sys.executable, lockless.__file__, str(mountpoint), str(error), where]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        servers.append((server, mountpoint))
        assert server.stdout
        assert server.stdout.readline() == b"ready\n"
        return mountpoint

    yield start
    for server, mountpoint in servers:
        problem = mounts.umount(mountpoint)
        with server:
            assert server.wait(10) == 0
        assert not problem


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
async def test_a_share_without_locks_does_not_come_up(lockless_fs: Start, error: int) -> None:
    share = lockless_fs(error, "all")
    with pytest.raises(MountError, match="byte locks do not work in") as caught:
        async with station("host-a", share, "fcntl-lockd", {}, fstype="fuse.lockless"):
            pytest.fail("it came up")
    assert os.strerror(error) in str(caught.value)
    assert "rpc.statd" in caught.value.hint


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("mode", Mode)
async def test_locks_that_fail_later_are_never_granted(lockless_fs: Start, error: int, mode: Mode) -> None:
    share = lockless_fs(error, "img")
    async with station("host-a", share, "fcntl-lockd", {}, fstype="fuse.lockless") as a:
        with pytest.raises(LockUnavailable, match="cannot lock /mnt/images/img: ") as caught:
            await a.acquire(mode)
        assert os.strerror(error) in str(caught.value)
        assert caught.value.errno == errno.ENOLCK
        with pytest.raises(LockUnavailable, match="cannot look at the lock on"):
            await a.holder_seen()
