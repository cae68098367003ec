"""A deadline in memory that processes share: until when writing is safe.

One sets it and others heed it, also when the one who sets it hangs or is dead: nobody has to be told that time has
passed.  Times are those of CLOCK_BOOTTIME, which goes on while the machine sleeps.

The memory begins with two numbers of 64 bits, in nanoseconds: `late`, from when on no write may begin until it was
moved, and `lost`, from when on it will not be moved any more.  The kernel module reads them, too
(`lockfs/kernel/gate.c`).
"""

from __future__ import annotations

import mmap
import os
import time

_NEVER = (1 << 63) - 1
_NANO = 1_000_000_000


def now() -> float:
    """Return the time of CLOCK_BOOTTIME in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Deadline:
    """See the module.  `fd` is the memory; who gets it may heed the deadline."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        self.fd = fd
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._memory = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, protection)
        self._view = memoryview(self._memory).cast("q")

    @classmethod
    def create(cls) -> Deadline:
        """Make one that is passed: nothing is safe before it is `set`.  Raises OSError."""
        fd = os.memfd_create("lockfs-deadline", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            return cls(fd, writable=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Deadline:
        """Heed the one of another process; the descriptor is taken over.  Raises OSError, ValueError."""
        try:
            return cls(fd, writable=False)
        except BaseException:
            os.close(fd)
            raise

    def set(self, late: float, lost: float) -> None:
        """Move it: to seconds of CLOCK_BOOTTIME, or infinity."""
        # Each store is one: a reader sees the old number or the new one.  In this order, since `lost` is what is final.
        self._view[1] = _nanoseconds(lost)
        self._view[0] = _nanoseconds(late)

    @property
    def is_late(self) -> bool:
        """Whether nothing may be written now."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= self._view[0]

    @property
    def is_lost(self) -> bool:
        """Whether it will not be moved any more."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) >= self._view[1]

    def close(self) -> None:
        """Let go of the memory."""
        self._view.release()
        self._memory.close()
        os.close(self.fd)


def _nanoseconds(seconds: float) -> int:
    return min(int(seconds * _NANO), _NEVER) if seconds < _NEVER / _NANO else _NEVER
