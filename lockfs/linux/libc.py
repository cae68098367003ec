"""The C library, for calls that the standard library has no wrapper for."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000


def failed(what: bytes | str | None = None) -> OSError:
    """Return the error that the last failed call of `libc` in this thread left in errno."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), os.fsdecode(what) if what is not None else None)
