"""Calls on inodes that the standard library does not offer in the form that works on O_PATH descriptors."""

from __future__ import annotations

import ctypes
import struct

from lockfs.linux.libc import AT_EMPTY_PATH, failed, libc

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UTIME_OMIT = (1 << 30) - 2

_NS = 1_000_000_000
_TIMES = struct.Struct("qqqq")

libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
libc.fchownat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_int]
libc.linkat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def rename(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Rename with flags, as renameat2(2)."""
    if libc.renameat2(old_dir, old, new_dir, new, flags) != 0:
        raise failed()


def utimens(fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set the times of what *fd* refers to, nanoseconds since 1970; None leaves one as it is."""
    times = _TIMES.pack(*_timespec(atime_ns), *_timespec(mtime_ns))
    if libc.utimensat(fd, b"", times, AT_EMPTY_PATH) != 0:
        raise failed()


def _timespec(ns: int | None) -> tuple[int, int]:
    return (0, UTIME_OMIT) if ns is None else divmod(ns, _NS)


def chown(fd: int, uid: int, gid: int) -> None:
    """Change the owner or group of what *fd* refers to; -1 leaves one as it is."""
    if libc.fchownat(fd, b"", uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, AT_EMPTY_PATH) != 0:
        raise failed()


def link(fd: int, directory: int, name: bytes) -> None:
    """Give what *fd* refers to one more name.  Needs CAP_DAC_READ_SEARCH."""
    if libc.linkat(fd, b"", directory, name, AT_EMPTY_PATH) != 0:
        raise failed()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate or free space, as fallocate(2) with its modes."""
    if libc.fallocate(fd, mode, offset, length) != 0:
        raise failed()


def proc_path(fd: int) -> str:
    """Return a path that leads to what *fd* refers to, for calls that take only paths; no name is looked up on the
    way.
    """
    return f"/proc/self/fd/{fd}"
