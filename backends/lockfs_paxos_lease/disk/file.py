"""One open file or block device: reads and writes that go past the page cache and are on the disk when they return.

`Storage` is how files are reached at all: tests put one in its place that stalls, fails or tears.  Everything here
blocks and may hang for ever, so it is called in threads only (`disk.lane`).
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from lockfs_paxos_lease.disk.buffers import Buffers

ONE_HOST = ("tmpfs", "ramfs")
"""Filesystems that no other host can have mounted: all who use one share its page cache, so going past it is not needed
to see each other's writes.  (tmpfs refuses O_DIRECT before Linux 6.6.)
"""
_FLAGS = os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_buffers = Buffers()


class RawFile(Protocol):
    """What is asked of an open file.  Every method raises OSError, and is called by any number of threads at once."""

    @property
    def identity(self) -> tuple[int, int]:
        """Its device and inode number."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes."""

    def write(self, offset: int, data: bytes) -> None:
        """Have *data* on the disk.  Offset and length are multiples of the sector size."""

    def close(self) -> None:
        """Close it."""


class Storage(Protocol):
    """How files are opened."""

    def open(self, path: str, dir_fd: int | None = None) -> RawFile:
        """Open an existing file or block device, below *dir_fd* if *path* is relative.  Raises OSError."""


class DiskFile:
    """A file descriptor of a file or device that was opened with O_DIRECT where there is such a thing."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = os.fstat(fd)
        self.identity = (info.st_dev, info.st_ino)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly *length* bytes, in one I/O.  Raises OSError: EIO if there are fewer."""
        with _buffers.take(length) as buffer:
            got = os.preadv(self.fd, [buffer], offset)
            if got != length:
                raise OSError(errno.EIO, f"short read: {got} of {length} bytes at {offset}")
            return bytes(buffer)

    def write(self, offset: int, data: bytes) -> None:
        """Write *data*, in one I/O, and return when it is on the disk.  Raises OSError: EIO if only a part is."""
        with _buffers.take(len(data)) as buffer:
            buffer[:] = data
            done = os.pwritev(self.fd, [buffer], offset)
        if done != len(data):
            raise OSError(errno.EIO, f"short write: {done} of {len(data)} bytes at {offset}")

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class Disks:
    """Real files.  *fstype* is that of the filesystem they are on, or empty for devices."""

    def __init__(self, fstype: str = "") -> None:
        self._fstype = fstype

    def open(self, path: str, dir_fd: int | None = None) -> DiskFile:
        """Open an existing file or block device.  Raises OSError.

        A filesystem that refuses O_DIRECT is refused (EINVAL), since its cache could show what another host has
        overwritten; but for those that no other host can have mounted.
        """
        try:
            return _opened(os.open(path, _FLAGS | os.O_DIRECT, dir_fd=dir_fd))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            if self._fstype not in ONE_HOST:
                raise OSError(errno.EINVAL, "the filesystem has no direct I/O (O_DIRECT), which leases need") from error
        return _opened(os.open(path, _FLAGS, dir_fd=dir_fd))


def _opened(fd: int) -> DiskFile:
    try:
        return DiskFile(fd)
    except OSError:
        os.close(fd)
        raise
