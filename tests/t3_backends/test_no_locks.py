"""fcntl-lockd on a filesystem whose locks do not work: it says so, and grants nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from harness.lockless import Lockless
from t3_backends.stations import station

from lockfs.backend import Mode
from lockfs.errors import LockUnavailable, MountError


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
async def test_a_share_without_locks_does_not_come_up(lockless_fs: Callable[[int, str], Lockless], error: int) -> None:
    share = lockless_fs(error, "all").path
    with pytest.raises(MountError, match="byte locks do not work in") as caught:
        async with station("host-a", share, "fcntl-lockd", {}, fstype="fuse.lockless"):
            pytest.fail("it came up")
    assert os.strerror(error) in str(caught.value)
    assert "rpc.statd" in caught.value.hint


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("mode", Mode)
async def test_locks_that_fail_later_are_never_granted(lockless_fs: Callable[[int, str], Lockless], error: int, mode: Mode) -> None:
    share = lockless_fs(error, "img").path
    async with station("host-a", share, "fcntl-lockd", {}, fstype="fuse.lockless") as a:
        with pytest.raises(LockUnavailable, match="cannot lock /mnt/images/img: ") as caught:
            await a.acquire(mode)
        assert os.strerror(error) in str(caught.value)
        assert caught.value.errno == errno.ENOLCK
        with pytest.raises(LockUnavailable, match="cannot look at the lock on"):
            await a.holder_seen()
