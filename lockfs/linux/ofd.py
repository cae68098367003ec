"""Open-file-description locks (fcntl(2), ``F_OFD_*``; Linux 3.15).

Such a lock belongs to the open file description: dups and processes that share it share the lock, it ends
with the last of them, and no other open or close of the file touches it.  It conflicts with classic POSIX
locks of any process, also of this one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from dataclasses import dataclass

from lockfs.linux import procfs

# struct flock: l_type, l_whence, l_start, l_len, l_pid, as the compiler aligns them; 0q pads the end.
_FLOCK = struct.Struct("@hhqqi0q")
_SHOWN = re.compile(rb"^lock:\t\d+: OFDLCK +\S+ +(READ|WRITE) +\S+ +\S+ (\d+) (\d+|EOF)$", re.MULTILINE)
OFD = -1
"""`Conflict.pid` of an open-file-description lock, which has no process."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A lock that is in the way.

    `pid` is that of the process if it is a POSIX lock of this host, `OFD`, or 0 or below for a lock of
    another host.
    """

    exclusive: bool
    pid: int


def lock(fd: int, *, exclusive: bool, start: int, length: int) -> bool:
    """Take the lock or change the one that this open file description has, atomically and without waiting.

    Return False, and change nothing, if another lock is in the way.  Raises OSError: EBADF if *fd* is not
    open for writing (exclusive) or reading (shared), ENOLCK and others if the filesystem has no locks.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        _call(fd, fcntl.F_OFD_SETLK, kind, start, length)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, *, start: int, length: int) -> None:
    """Give the lock up, for all who share the open file description.  Raises OSError."""
    _call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, start, length)


def test(fd: int, *, exclusive: bool, start: int, length: int) -> Conflict | None:
    """Return a lock that would be in the way of one taken on *fd*, which may be open in any mode.  Raises
    OSError.

    A lock of the same open file description never is.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    found, _, _, _, pid = _call(fd, fcntl.F_OFD_GETLK, kind, start, length)
    return None if found == fcntl.F_UNLCK else Conflict(found == fcntl.F_WRLCK, pid)


def held(fd: int, *, start: int) -> bool | None:
    """Return whether the lock that this open file description has on the byte at *start* is exclusive; None if procfs
    shows none, as for filesystems that leave locks to their server alone (FUSE).

    Takes none, and asks no storage (proc_pid_fdinfo(5)).  Raises OSError.
    """
    for kind, first, last in _SHOWN.findall(procfs.contents(f"/proc/self/fdinfo/{fd}")):
        if int(first) <= start and (last == b"EOF" or start <= int(last)):
            return bool(kind == b"WRITE")
    return None


def is_held(fd: int, *, exclusive: bool, start: int, length: int) -> bool:
    """Say whether this open file description has the lock, in this mode or the stronger one.  Takes none.

    Where procfs does not show it, it is there if another description of the file meets a lock and this one does not.
    That takes no notice of a shared lock beside which others have one.  Raises OSError.
    """
    shown = held(fd, start=start)
    if shown is not None:
        return shown or not exclusive
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        met = test(other, exclusive=True, start=start, length=length)
    finally:
        os.close(other)
    if met is None or (exclusive and not met.exclusive):
        return False
    return test(fd, exclusive=True, start=start, length=length) is None


def _call(fd: int, command: int, kind: int, start: int, length: int) -> tuple[int, int, int, int, int]:
    request = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    kind, whence, start, length, pid = _FLOCK.unpack(fcntl.fcntl(fd, command, request))
    return kind, whence, start, length, pid
