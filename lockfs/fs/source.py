"""The source directory: how names in it become inodes, without ever walking a path.

Everything is reached from one directory descriptor on a private clone of the source's mount (`lockfs.linux.tree`),
one name at a time and without following symbolic links, so nothing outside the source can be reached, whatever
others rename meanwhile. The functions here are plain system calls that may run in any thread; they touch no table.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from lockfs.linux import handle
from lockfs.linux.files import proc_path

HIDDEN = b".lockfs"
"""lockfs's own directory at the top of the source; not to be seen or reached through the mount."""

PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

Key = bytes | tuple[int, int]
"""What an inode is known by: its file handle, or device and inode number where the filesystem has no handles."""


@dataclass(slots=True)
class Found:
    """An inode that a name led to.  `fd` is an O_PATH descriptor that belongs to whoever got this."""

    fd: int
    stat: os.stat_result
    key: Key

    def close(self) -> None:
        """Close the descriptor, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def identify(fd: int) -> Found:
    """Return what the O_PATH descriptor *fd* refers to; *fd* belongs to the result, and is closed on failure."""
    try:
        stat = os.fstat(fd)
        return Found(fd, stat, handle.of_fd(fd) or (stat.st_dev, stat.st_ino))
    except BaseException:
        os.close(fd)
        raise


def find(directory: int, name: bytes) -> Found:
    """Return what *name* in *directory* is.  Raises OSError, as for a missing name."""
    return identify(os.open(name, PATH_FLAGS, dir_fd=directory))


def apply_umask(directory: int, mode: int, umask: int) -> int:
    """Return the mode of a new file in *directory*: the umask counts only where there is no default ACL (acl(5))."""
    if mode & umask:
        try:
            os.getxattr(proc_path(directory), "system.posix_acl_default")
        except OSError:
            return mode & ~umask
    return mode


def same(directory: int, name: bytes, found: Found) -> bool:
    """Tell whether *name* still leads to *found*."""
    try:
        stat = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (stat.st_dev, stat.st_ino) == (found.stat.st_dev, found.stat.st_ino)


def exists(directory: int, name: bytes) -> bool:
    """Tell whether there is such a name."""
    return leads_to(directory, name) != (0, 0)


def leads_to(directory: int, name: bytes) -> tuple[int, int]:
    """Return device and inode number of what *name* leads to, (0, 0) if there is no such name."""
    try:
        stat = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return 0, 0
    return stat.st_dev, stat.st_ino
