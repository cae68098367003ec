"""Lock files in a shared directory, by the rules of virtlockd (libvirt: src/util/virlockspace.c).

The file of an image is named by the SHA-256 of its path.  It is made by whoever needs it and removed by
whoever was the last to lock it: *while* that one has it locked.  So who gets a lock looks whether the file
still has its name; if not, it has locked a file that nobody else will find, and begins again.
"""

from __future__ import annotations

import hashlib
import os
import stat

from lockfs.errors import LockUnavailable
from lockfs.linux import ofd

START, LENGTH = 0, 1
"""The byte that virtlockd locks."""
ATTEMPTS = 1000
"""Each one that fails means that somebody else has just let go of the lock; so many in a row mean something
else.
"""


def name_of(path: bytes) -> str:
    """Return the name of the lock file for a path, byte for byte as the programs use it."""
    return hashlib.sha256(path).hexdigest()


def name_of_inode(ino: int) -> str:
    """Return the name for an inode number, where images are known by that; no virtlockd does this."""
    return hashlib.sha256(b"inode:%d" % ino).hexdigest()


def take(directory: int, name: str, *, exclusive: bool) -> int | None:
    """Return a descriptor of the lock file with the lock on it; None if somebody else has it.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(ATTEMPTS):
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise LockUnavailable(f"{name} in the lockspace is not a file")
            if not ofd.lock(fd, exclusive=exclusive, start=START, length=LENGTH):
                os.close(fd)
                return None
            if _has_name(directory, name, info):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise LockUnavailable(f"the lock file {name} is replaced all the time")


def _has_name(directory: int, name: str, info: os.stat_result) -> bool:
    try:
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (info.st_dev, info.st_ino)


def give_back(directory: int, name: str, fd: int, *, exclusive: bool) -> None:
    """Let go of the lock, remove the file if nobody else shares it, and close it.  Raises OSError."""
    try:
        if exclusive or ofd.lock(fd, exclusive=True, start=START, length=LENGTH):
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                pass
        # By closing alone it would stay as long as others have the descriptor.
        ofd.unlock(fd, start=START, length=LENGTH)
    finally:
        os.close(fd)


def look(directory: int, name: str) -> ofd.Conflict | None:
    """Return who has the lock, None if nobody.  Raises OSError."""
    try:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        return ofd.test(fd, exclusive=True, start=START, length=LENGTH)
    finally:
        os.close(fd)
