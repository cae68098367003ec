"""Inodes of a FUSE mount by their node id: without a name, and without the mount daemon for what the kernel knows.

The calls of another process's mount may wait for its daemon, which may hang: make them in a thread that may, too.
A thread of the mount daemon itself must never make them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lockfs.linux import handle
from lockfs.linux.files import proc_path
from lockfs.linux.libc import AT_EMPTY_PATH, failed, libc

_FILEID_INO64_GEN = 0x81
_HANDLE = struct.Struct("=IiIII")
"""struct file_handle with three words: the node id, its upper half first, and the generation."""
_AT_STATX_FORCE_SYNC = 0x2000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_STATX_SIZE = 256
_NOT_KNOWN = frozenset({errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED})
"""What the daemon, or the end of its connection, answers to a lookup; for an inode that is known nobody is asked."""

libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]


def open_node(root_fd: int, node: int) -> int | None:
    """Return an O_PATH descriptor of the inode with that node id; None if the kernel does not know it.

    *root_fd* is a directory of the mount, open for reading.  Needs CAP_DAC_READ_SEARCH.  Raises OSError.
    """
    wanted = _HANDLE.pack(12, _FILEID_INO64_GEN, node >> 32, node & 0xFFFFFFFF, 0)
    try:
        return handle.open_handle(root_fd, wanted, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_KNOWN:
            return None
        raise


def is_known(root_fd: int, node: int) -> bool:
    """Say whether the kernel knows the inode: while it is open or mapped it does.  Raises OSError."""
    fd = open_node(root_fd, node)
    if fd is None:
        return False
    os.close(fd)
    return True


def is_bad(fd: int) -> bool:
    """Say whether the kernel has declared the inode bad: then all I/O on it fails, for good.  Asks nobody."""
    try:
        _statx(fd, _AT_STATX_DONT_SYNC)
    except OSError as error:
        if error.errno == errno.EIO:
            return True
        raise
    return False


def refresh(fd: int) -> None:
    """Make the kernel ask for the attributes of the inode; if their type has changed it declares the inode bad."""
    try:
        _statx(fd, _AT_STATX_FORCE_SYNC)
    except OSError:
        pass  # what became of it is asked next


def fence(root_fd: int, node: int) -> bool:
    """Make the kernel declare an inode bad whose type whoever answers its requests says to have changed.

    Return True if nothing can be done any more with what is open of it; also if the kernel does not know it.  Raises
    OSError.
    """
    fd = open_node(root_fd, node)
    if fd is None:
        return True
    try:
        refresh(fd)
        return is_bad(fd)
    finally:
        os.close(fd)


def drain(root_fd: int, node: int) -> bool:
    """Wait until the writes on a bad inode have ended that were under way; asynchronous ones may go on.

    Return False, without having waited, if the inode is not bad.  Uninterruptible.  Raises OSError: EROFS, without
    having waited, where the mount has become read-only.
    """
    fd = open_node(root_fd, node)
    if fd is None:
        return True
    try:
        if not is_bad(fd):
            return False
        try:
            # Takes the lock of the inode, as each write has it, and then fails.
            os.chown(proc_path(fd), -1, -1)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        return True
    finally:
        os.close(fd)


def _statx(fd: int, flags: int) -> None:
    result = ctypes.create_string_buffer(_STATX_SIZE)
    if libc.statx(fd, b"", AT_EMPTY_PATH | flags, _STATX_BASIC_STATS, result) != 0:
        raise failed()
