"""Acting as the caller of a system call: filesystem uid, gid and groups of one thread.

setfsuid(2) and its relatives change the calling thread only, as does setgroups(2) when it is called past the C library.
With `keep_capabilities` in force the thread keeps its capabilities: the kernel has already checked the caller's
rights on the mount, so that here the identity matters for who owns a new file, whose quota pays, and whom a file
server sees.
"""

from __future__ import annotations

import ctypes
import os
import struct

from lockfs.linux.libc import failed, libc

_SYS_SETGROUPS = 116 if os.uname().machine == "x86_64" else 159
_SYS_CAPGET = 125 if os.uname().machine == "x86_64" else 90
_SYS_CAPSET = 126 if os.uname().machine == "x86_64" else 91
_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAP_VERSION_3 = 0x20080522
CAP_FSETID = 4
CAP_SYS_RESOURCE = 24

libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
libc.setfsuid.argtypes = [ctypes.c_uint]
libc.setfsgid.argtypes = [ctypes.c_uint]


def keep_capabilities() -> None:
    """Make a change of the filesystem uid leave capabilities alone, in this thread and those it starts."""
    if libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0) != 0:
        raise failed()


def drop_capability(number: int) -> None:
    """Give up one capability for good, in this thread and those it starts."""
    words = _capabilities()
    for each in range(3):
        words[each + (0 if number < 32 else 3)] &= ~(1 << (number % 32))
    _set_capabilities(words)


def use_capability(number: int, use: bool) -> None:
    """Let one capability that this thread has count, or not."""
    words = _capabilities()
    bit = 1 << (number % 32)
    which = 0 if number < 32 else 3
    words[which] = words[which] | bit & words[which + 1] if use else words[which] & ~bit
    _set_capabilities(words)


def _capabilities() -> list[int]:
    """Effective, permitted and inheritable ones; first the lower 32 of each."""
    data = ctypes.create_string_buffer(24)
    if libc.syscall(_SYS_CAPGET, struct.pack("Ii", _CAP_VERSION_3, 0), data) != 0:
        raise failed()
    return list(struct.unpack("6I", data.raw[:24]))


def _set_capabilities(words: list[int]) -> None:
    if libc.syscall(_SYS_CAPSET, struct.pack("Ii", _CAP_VERSION_3, 0), struct.pack("6I", *words)) != 0:
        raise failed()


def become(uid: int, gid: int, groups: tuple[int, ...] | None = None) -> None:
    """Do filesystem work of this thread as *uid* and *gid* until told otherwise; with *groups* if not None."""
    libc.setfsgid(gid)
    if groups is not None:
        set_groups(groups)
    libc.setfsuid(uid)


def set_groups(groups: tuple[int, ...]) -> None:
    """Set the supplementary groups of this thread alone."""
    if libc.syscall(_SYS_SETGROUPS, len(groups), struct.pack(f"{len(groups)}I", *groups)) != 0:
        raise failed()
