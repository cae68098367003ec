"""File handles: a name of an inode that outlives every descriptor (name_to_handle_at(2), open_by_handle_at(2)).

A handle contains a generation number, so it never names a later file that got the same inode number.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lockfs.linux.libc import AT_EMPTY_PATH, failed, libc

MAX_HANDLE = 128
"""MAX_HANDLE_SZ, include/linux/exportfs.h."""
_HEADER = struct.Struct("Ii")

libc.name_to_handle_at.argtypes = [
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int,
]  # fmt: skip
libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]

_FRESH = _HEADER.pack(MAX_HANDLE, 0) + bytes(MAX_HANDLE)


def of_fd(fd: int) -> bytes | None:
    """Return the handle of what *fd* (which may be O_PATH) refers to; None where the filesystem has no handles."""
    buffer = ctypes.create_string_buffer(_FRESH, len(_FRESH))
    mount_id = ctypes.c_int()
    if libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), AT_EMPTY_PATH) != 0:
        if ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            return None
        raise failed()
    size, _kind = _HEADER.unpack_from(buffer)
    return buffer.raw[: _HEADER.size + size]


def open_handle(mount_fd: int, handle: bytes, flags: int = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC) -> int:
    """Open what *handle* names on the filesystem of *mount_fd* (not an O_PATH descriptor).

    Needs CAP_DAC_READ_SEARCH.  Raises OSError: ESTALE if the file is gone.
    """
    fd: int = libc.open_by_handle_at(mount_fd, handle, flags)
    if fd < 0:
        raise failed()
    return fd
