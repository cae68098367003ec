"""Waiting until nothing of a file is left in this host's memory that is yet to be written to the storage.

Dirty pages are what a fence cannot stop: the kernel writes them back whenever the storage lets it, also when another
host has the image long since.  Only a reset of the host does away with them, which is what a watchdog is for.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable

import trio

from lockfs.linux.closer import Closer

THREADS = 8
"""Files that are waited for at once; each call lasts as long as the storage hangs."""
AGAIN = 0.5
"""Seconds after a call that has failed: what could not be written is still there, or is given up by the kernel."""
_WAIT_WRITE_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER of sync_file_range(2).  That asks nothing of the storage where
there is nothing to write, as fsync does."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_limiter = trio.CapacityLimiter(THREADS)
log = logging.getLogger(__name__)


def write_back(fd: int) -> None:
    """Write the dirty pages of a file, and wait for them and those that are being written.  Raises OSError."""
    if _libc.sync_file_range(fd, 0, 0, _WAIT_WRITE_WAIT) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def wait_for_write_back(fd: int, what: str, written: Callable[[], None]) -> None:
    """Wait in the background, however long it takes; then call *written*.  The descriptor may be closed meanwhile.

    Where it cannot be waited for *written* is never called: nobody knows then.
    """
    try:
        copy = os.dup(fd)
    except OSError as error:
        log.error("%s: nobody can tell whether it is all written: %s", what, error.strerror)
        return
    trio.lowlevel.spawn_system_task(_wait, copy, what, written, name=f"write-back of {what}")


async def _wait(fd: int, what: str, written: Callable[[], None]) -> None:
    failed = False
    while True:
        try:
            await trio.to_thread.run_sync(write_back, fd, abandon_on_cancel=True, limiter=_limiter)
            break
        except OSError as error:
            if not failed:
                log.error("%s: what is in this host's memory could not be written: %s", what, error.strerror)
            failed = True
        await trio.sleep(AGAIN)
    written()
    Closer(what).close([fd])
