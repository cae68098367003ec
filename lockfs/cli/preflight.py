"""What is checked before a mount has any side effect: a mount that cannot work must not come up.

Directories are compared as paths, as inodes and as places in their filesystem, so that neither symbolic links
nor bind mounts hide that one lies inside the other.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from lockfs.errors import LockfsError, MountError, SystemError_
from lockfs.linux import mountinfo
from lockfs.text import from_bytes

FSTYPE = "fuse.lockfs"
"""The type of every lockfs mount as the kernel lists it."""
DEVICE = "/dev/fuse"
DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What a mount whose daemon has died gives; the second to a request that the daemon had just got."""


@dataclass(frozen=True, slots=True)
class Place:
    """A directory: its path without symbolic links, its inode and those above it, the mount it is on, and its
    path in the filesystem of that mount.
    """

    path: bytes
    inode: tuple[int, int]
    above: frozenset[tuple[int, int]]
    mount: mountinfo.MountInfo
    within: bytes

    @property
    def shown(self) -> str:
        """The path for messages."""
        return from_bytes(self.path)

    @property
    def is_lockfs_mountpoint(self) -> bool:
        """True if a lockfs mount shows here."""
        return self.mount.fstype == FSTYPE and self.mount.mountpoint == self.path

    def is_inside(self, other: Place) -> bool:
        """True if this directory is below *other*, by whatever way it is looked at."""
        return (
            _is_below(self.path, other.path)
            or (other.inode in self.above and other.inode != self.inode)
            or (self.mount.dev == other.mount.dev and _is_below(self.within, other.within))
        )


def _is_below(path: bytes, top: bytes) -> bool:
    return path != top and path.startswith(top.rstrip(b"/") + b"/")


def look(path: bytes, what: str) -> Place:
    """Return the directory that *path* leads to.  Raises `MountError`, in which *what* is its role."""
    shown = from_bytes(path)
    try:
        real = os.path.realpath(path, strict=True)
        fd = os.open(real, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreachable(error, what, shown) from error
    try:
        mount = mountinfo.find(fd)
        below = os.path.relpath(real, mount.mountpoint)
        within = os.path.normpath(os.path.join(mount.root, below))
        return Place(real, _inode(fd), _above(fd), mount, within)
    except OSError as error:
        raise MountError(f"the {what} '{shown}' cannot be examined: {error.strerror}") from error
    finally:
        os.close(fd)


def _unreachable(error: OSError, what: str, shown: str) -> LockfsError:
    if error.errno == errno.ENOENT:
        hint = "Is the shared storage mounted?" if what == "source" else f"Make it: mkdir -p {shown}"
        return MountError(f"the {what} '{shown}' does not exist", hint=hint)
    if error.errno == errno.ENOTDIR:
        hint = "lockfs mounts a directory on a directory."
        return MountError(f"the {what} '{shown}' is not a directory", hint=hint)
    if error.errno in DEAD:
        hint = f"Unmount what is left of it: umount {shown}"
        return MountError(f"the {what} '{shown}' is a mount whose daemon has died", hint=hint)
    return MountError(f"the {what} '{shown}' cannot be reached: {error.strerror}")


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _above(fd: int) -> frozenset[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    here = os.dup(fd)
    try:
        while True:
            parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = parent
            inode = _inode(here)
            if inode in found:
                return frozenset(found)
            found.add(inode)
    finally:
        os.close(here)


def check(source: Place, mountpoint: Place, fsname: bytes) -> None:
    """Check that *source* can be mounted on *mountpoint*.  Raises `LockfsError` with what to do instead."""
    if mountpoint.is_lockfs_mountpoint:
        raise _taken(source, mountpoint, fsname)
    if source.mount.fstype == FSTYPE:
        guarded = from_bytes(source.mount.mountpoint)
        raise MountError(
            f"the source '{source.shown}' is itself on a lockfs mount, '{guarded}'",
            hint="One mount guards already; mount the directory behind it instead.",
        )
    if mountpoint.is_inside(source):
        raise MountError(
            f"the mountpoint '{mountpoint.shown}' lies inside the source '{source.shown}'",
            hint="Choose a mountpoint outside of it, or mount the source over itself.",
        )
    if source.is_inside(mountpoint):
        raise MountError(
            f"the source '{source.shown}' lies inside the mountpoint '{mountpoint.shown}', which hides it",
            hint="Choose another mountpoint, or mount the source over itself.",
        )
    check_device()


def _taken(source: Place, mountpoint: Place, fsname: bytes) -> MountError:
    there = mountpoint.mount.source
    if there == fsname or source.inode == mountpoint.inode or _leads_to(there, source):
        return MountError(f"'{from_bytes(fsname)}' is already mounted on '{mountpoint.shown}'")
    return MountError(
        f"'{mountpoint.shown}' has a lockfs mount already, of '{from_bytes(there)}'",
        hint=f"Unmount it first: umount {mountpoint.shown}",
    )


def _leads_to(path: bytes, place: Place) -> bool:
    return os.path.isabs(path) and os.path.realpath(path) == place.path


def check_device() -> None:
    """Check that the kernel does FUSE.  Raises `SystemError_`."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise SystemError_(
            f"{DEVICE} cannot be opened: {error.strerror}",
            hint="Load the kernel module: modprobe fuse.  In a container, give it the device.",
        ) from error
