"""When a filesystem is mounted nowhere any more, as the lists of mounts tell."""

from __future__ import annotations

import os
import select

from lockfs.linux import procfs

_OWN = "/proc/self/mountinfo"


class MountChanges:
    """Becomes readable when a mount of this mount namespace comes, goes or changes, and at the beginning.

    `fileno` is for whoever waits; `clear` comes before the look at the mounts.
    """

    def __init__(self) -> None:
        self._list = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        # A list of mounts counts as readable at all times, so only edges tell; a plain poll would take them away.
        self._epoll.register(self._list, select.EPOLLIN | select.EPOLLET)

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._epoll.fileno()

    def clear(self) -> None:
        """Take note of what has changed so far."""
        self._epoll.poll(0)

    def close(self) -> None:
        """Close it."""
        self._epoll.close()
        os.close(self._list)


def is_mounted_here(dev: int) -> bool:
    """Say whether this mount namespace shows the superblock whose ``st_dev`` is *dev*."""
    return _shows(procfs.contents(_OWN), dev)


def is_mounted(dev: int) -> bool:
    """Say whether the mount namespace of any process shows the superblock.  Takes milliseconds for many processes."""
    if is_mounted_here(dev):
        return True
    seen: set[tuple[str, str]] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            view = os.readlink(f"/proc/{name}/ns/mnt"), os.readlink(f"/proc/{name}/root")
            if view in seen:
                continue
            content = procfs.contents(f"/proc/{name}/mountinfo")
        except OSError:
            continue
        if content:  # one that dies meanwhile shows nothing, and another one of its namespace is to be asked
            seen.add(view)
        if _shows(content, dev):
            return True
    return False


def _shows(mountinfo: bytes, dev: int) -> bool:
    wanted = b"%d:%d" % (os.major(dev), os.minor(dev))
    return any(line.split(b" ", 3)[2] == wanted for line in mountinfo.split(b"\n") if line)
