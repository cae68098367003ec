"""mount(2) and umount2(2), and the mount flags by the names that mount(8) gives them (linux/mount.h)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from types import MappingProxyType

from lockfs.linux.libc import failed, libc

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_DIRSYNC = 0x80
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000

MNT_FORCE = 0x1
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_ATIME = MS_NOATIME | MS_RELATIME | MS_STRICTATIME

MS_FLAGS = MappingProxyType(
    {
        "ro": (MS_RDONLY, 0),
        "rw": (0, MS_RDONLY),
        "nosuid": (MS_NOSUID, 0),
        "suid": (0, MS_NOSUID),
        "nodev": (MS_NODEV, 0),
        "dev": (0, MS_NODEV),
        "noexec": (MS_NOEXEC, 0),
        "exec": (0, MS_NOEXEC),
        "nosymfollow": (MS_NOSYMFOLLOW, 0),
        "symfollow": (0, MS_NOSYMFOLLOW),
        "sync": (MS_SYNCHRONOUS, 0),
        "async": (0, MS_SYNCHRONOUS),
        "dirsync": (MS_DIRSYNC, 0),
        # The three ways to keep access times exclude each other: the kernel would take them in its own order.
        "noatime": (MS_NOATIME, _ATIME),
        "atime": (0, MS_NOATIME),
        "relatime": (MS_RELATIME, _ATIME),
        "norelatime": (0, MS_RELATIME),
        "strictatime": (MS_STRICTATIME, _ATIME),
        "nostrictatime": (0, MS_STRICTATIME),
        "nodiratime": (MS_NODIRATIME, 0),
        "diratime": (0, MS_NODIRATIME),
    }
)
"""For each name the bits that it sets and those that it clears (clearing comes first)."""

libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def flags_of(names: Iterable[str], start: int = 0) -> int:
    """Return the flag word of *names*, the later ones winning, beginning with *start*.

    Raises KeyError for a name that is no mount flag.
    """
    flags = start
    for name in names:
        sets, clears = MS_FLAGS[name]
        flags = flags & ~clears | sets
    return flags


def mount(source: bytes, target: bytes, fstype: str, flags: int, data: str = "") -> None:
    """Call mount(2).  Raises OSError, with *target* as its file name."""
    if libc.mount(source, target, fstype.encode(), flags, os.fsencode(data)) < 0:
        raise failed(target)


def umount(target: bytes, flags: int = 0) -> None:
    """Call umount2(2).  Raises OSError, with *target* as its file name."""
    if libc.umount2(target, flags) < 0:
        raise failed(target)
