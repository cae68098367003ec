"""Which mounts show one superblock, by mount id, in whatever mount namespace they are, or in none.

An open file keeps its mount, and the mount keeps its id.  So what was open before an instance of `MountIds` was made is
told rightly as long as it stays open; an id that got free may since have gone to another mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lockfs.linux.libc import failed, libc
from lockfs.linux.procfs import contents

_AT_STATX_DONT_SYNC = 0x4000
_STATX_SIZE = 256
_STATX_DEV = struct.Struct("II")
_STATX_DEV_OFFSET = 136
_OWN = "/proc/self/mountinfo"

libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]


class MountIds:
    """Tells mounts of the superblock *dev* (an ``st_dev``) from others.  Knows those of this process from the start."""

    def __init__(self, dev: int) -> None:
        self._dev = dev
        self._wanted = b"%d:%d" % (os.major(dev), os.minor(dev))
        self._known: dict[int, bool] = {}
        self._read_namespaces: set[tuple[str, str]] = set()
        self._mountpoints: list[dict[bytes, bool]] = []
        self._learn(contents(_OWN))

    def shows(self, proc: int, file: str, mount_id: int) -> bool:
        """Say whether an open file is on the superblock.

        *proc* is a descriptor of a directory of procfs of a process or thread, *file* the path of the file's link below
        it, *mount_id* what its fdinfo says.  Raises OSError.
        """
        if mount_id not in self._known:
            self.learn_namespace(proc)
        known = self._known.get(mount_id)
        return self._ask(proc, file, mount_id) if known is None else known

    def holds(self, path: bytes) -> bool:
        """Say whether a path may lead to the superblock by the mounts known; white space escaped as in mountinfo."""
        return any(_leads(path, mountpoints) for mountpoints in self._mountpoints)

    def learn_namespace(self, proc: int) -> None:
        """Read the mounts of a process, unless those of its namespace and root directory are known."""
        key = (os.readlink("ns/mnt", dir_fd=proc), os.readlink("root", dir_fd=proc))
        if key not in self._read_namespaces:
            self._learn(contents("mountinfo", proc))
            self._read_namespaces.add(key)

    def _learn(self, mountinfo: bytes) -> None:
        mountpoints: dict[bytes, bool] = {}
        for line in mountinfo.split(b"\n"):
            if line:
                number, _, dev, _, point, _ = line.split(b" ", 5)
                self._known[int(number)] = mountpoints[point] = dev == self._wanted
        self._mountpoints.append(mountpoints)

    def _ask(self, proc: int, file: str, mount_id: int) -> bool:
        """Ask the file itself, which is on a mount that nobody's list shows: detached, or outside a root directory.

        FUSE answers this form of statx(2) without its daemon.  Network filesystems honour it too; a cluster filesystem
        need not, which is why the lists come first.
        """
        result = ctypes.create_string_buffer(_STATX_SIZE)
        if libc.statx(proc, file.encode(), _AT_STATX_DONT_SYNC, 0, result) != 0:
            error = failed(file)
            if error.errno == errno.EIO:
                # The inode is fenced, on this superblock or another one, and does not tell which: in doubt it counts.
                return True
            if isinstance(error, (FileNotFoundError, ProcessLookupError, PermissionError)):
                raise error
            return False  # FUSE has no other answer
        major, minor = _STATX_DEV.unpack_from(result, _STATX_DEV_OFFSET)
        self._known[mount_id] = os.makedev(major, minor) == self._dev
        return self._known[mount_id]


def _leads(path: bytes, mountpoints: dict[bytes, bool]) -> bool:
    below = [point for point in mountpoints if path == point or path.startswith(point.rstrip(b"/") + b"/")]
    return bool(below) and mountpoints[max(below, key=len)]
