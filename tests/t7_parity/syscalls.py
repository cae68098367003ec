"""System calls that Python lacks or softens, called straight through the C library.  All raise OSError."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_COLLAPSE_RANGE = 8
FALLOC_FL_ZERO_RANGE = 16
FALLOC_FL_INSERT_RANGE = 32

Name = bytes | str


class Timespec(ctypes.Structure):
    """struct timespec of a 64-bit system."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def _call(name: str, *args: object) -> int:
    function = getattr(libc, name)
    function.restype = ctypes.c_ssize_t if name in ("getxattr", "listxattr", "getdents64") else ctypes.c_int
    result = function(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def rename(old: Name, new: Name, flags: int) -> None:
    """renameat2(2) below the current directory."""
    _call("renameat2", AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags))


def link(old: Name, new: Name, flags: int, old_fd: int = AT_FDCWD) -> None:
    """linkat(2)."""
    _call("linkat", old_fd, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def utimens(name: Name, times: tuple[tuple[int, int], tuple[int, int]] | None, flags: int = 0) -> None:
    """utimensat(2): atime and mtime as pairs of seconds and nanoseconds."""
    array = (Timespec * 2)(*(Timespec(*each) for each in times)) if times else None
    _call("utimensat", AT_FDCWD, os.fsencode(name), array, flags)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call("fallocate", fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """sync_file_range(2)."""
    _call("sync_file_range", fd, ctypes.c_int64(offset), ctypes.c_int64(length), ctypes.c_uint(flags))


def truncate(name: Name, length: int) -> None:
    """truncate(2), which unlike Python's takes any number."""
    _call("truncate", os.fsencode(name), ctypes.c_int64(length))


def getxattr_size(name: Name, attribute: str, size: int) -> int:
    """getxattr(2) into a buffer of *size* bytes; returns the length."""
    buffer = ctypes.create_string_buffer(size) if size else None
    return _call("getxattr", os.fsencode(name), attribute.encode(), buffer, ctypes.c_size_t(size))


def listxattr_size(name: Name, size: int) -> int:
    """listxattr(2) into a buffer of *size* bytes; returns the length."""
    buffer = ctypes.create_string_buffer(size) if size else None
    return _call("listxattr", os.fsencode(name), buffer, ctypes.c_size_t(size))


def chmod_nofollow(name: Name, mode: int) -> None:
    """fchmodat(2) with AT_SYMLINK_NOFOLLOW."""
    _call("fchmodat", AT_FDCWD, os.fsencode(name), ctypes.c_uint(mode), AT_SYMLINK_NOFOLLOW)


@dataclass(frozen=True)
class Entry:
    """One record of getdents64(2)."""

    name: bytes
    type: int
    offset: int


def getdents(fd: int, size: int = 32768) -> list[Entry]:
    """getdents64(2): the next entries of a directory; none at its end."""
    buffer = ctypes.create_string_buffer(size)
    length = _call("getdents64", fd, buffer, ctypes.c_size_t(size))
    found = []
    at = 0
    while at < length:
        _, offset, record, kind = struct.unpack_from("=QqHB", buffer.raw, at)
        name = buffer.raw[at + 19 : at + record].partition(b"\0")[0]
        found.append(Entry(name, kind, offset))
        at += record
    return found


def list_all(fd: int, size: int = 32768) -> list[Entry]:
    """Read a directory from its current position to its end."""
    found: list[Entry] = []
    while more := getdents(fd, size):
        found += more
    return found
