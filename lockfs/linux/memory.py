"""Staying in memory while a host is short of it: a daemon that others wait for must not wait for the disk."""

from __future__ import annotations

import ctypes
import os

from lockfs.linux import procfs
from lockfs.linux.libc import failed, libc

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14
NEVER_KILLED = -1000

libc.mlockall.argtypes = [ctypes.c_int]


def lock() -> bool:
    """Keep every page of this process in memory once it was used; return False without the right to.

    Only with CAP_IPC_LOCK: under a limit, memory that is reserved for threads would count, and soon none could be had.
    Raises OSError.
    """
    status = procfs.contents("/proc/self/status")
    start = status.index(b"\nCapEff:") + 8
    if not int(status[start : status.index(b"\n", start)], 16) >> _CAP_IPC_LOCK & 1:
        return False
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        raise failed()
    return True


def spare_from_oom_killer(adjustment: int = NEVER_KILLED) -> bool:
    """Have the kernel kill others first when memory runs out (proc(5)); return False if that is not allowed."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % adjustment)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True
