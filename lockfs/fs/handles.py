"""Open files and directories of the mount, by the number that the kernel knows them by.

A number has 32 bits, since the kernel module needs the others; one that was given back is used again as late as can be.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import trio

from lockfs.fs.guard import Hold
from lockfs.fs.nodes import Node
from lockfs.protocol.messages import Owner

MAX_NUMBER = (1 << 32) - 1
KEPT_FREE = 65536
"""Numbers that have to be free before one is used again: a late request gets EBADF, and not another's file."""


@dataclass(slots=True)
class FileHandle:
    """One open file description on the mount.

    `hold` is the right to write, or to read a pinned image; None where none is needed, and for a manager's handle
    until its first write.  `counted` says that it counts as an open in `lockfs.kernel.backing`, `mappable` that memory
    mapped from it changes the storage without a word to this daemon.  One that was opened with O_DIRECT is `uncached`:
    nothing that is written by it may stay in memory; `direct` is its descriptor that bypasses the cache, -1 for none.
    """

    node: Node
    fd: int
    writable: bool
    uncached: bool = False
    direct: int = -1
    number: int = 0
    hold: Hold | None = None
    manager: Owner | None = None
    turn: trio.Lock | None = None
    counted: bool = False
    mappable: bool = False


@dataclass(slots=True)
class DirectoryHandle:
    """One open directory.  `names` is the listing that offsets point into; taken at the first read and at each
    rewind.
    """

    node: Node
    fd: int
    names: list[bytes] = field(default_factory=list)


class Handles:
    """All open handles of a mount."""

    def __init__(self) -> None:
        self._last = 0
        self._freed: deque[int] = deque()
        self._files: dict[int, FileHandle] = {}
        self._directories: dict[int, DirectoryHandle] = {}

    def __len__(self) -> int:
        return len(self._files) + len(self._directories)

    def add_file(self, handle: FileHandle) -> int:
        """Give an open file its number."""
        number = handle.number = self._number()
        self._files[number] = handle
        return number

    def add_directory(self, handle: DirectoryHandle) -> int:
        """Give an open directory its number."""
        number = self._number()
        self._directories[number] = handle
        return number

    def _number(self) -> int:
        if self._last < MAX_NUMBER and len(self._freed) < KEPT_FREE:
            self._last += 1
            return self._last
        return self._freed.popleft()

    def file(self, number: int) -> FileHandle:
        """Return an open file.  Raises OSError: EBADF, or EIO if it is fenced."""
        handle = self._file(number)
        if handle.node.fenced:
            # Not every request has the kernel look whether the inode is bad: fallocate and copy_file_range do not.
            raise OSError(errno.EIO, "the image is fenced")
        return handle

    def _file(self, number: int) -> FileHandle:
        try:
            return self._files[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def directory(self, number: int) -> DirectoryHandle:
        """Return an open directory.  Raises OSError(EBADF)."""
        try:
            return self._directories[number]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def numbers(self, nodes: Collection[int]) -> list[int]:
        """Return the numbers of the open files of these nodes."""
        return [number for number, handle in self._files.items() if handle.node.id in nodes]

    def is_written(self, node: Node) -> bool:
        """Tell whether the file of *node* is open for writing."""
        return any(handle.writable and handle.node is node for handle in self._files.values())

    def take_file(self, number: int) -> FileHandle:
        """Remove an open file and return it.  Raises OSError(EBADF)."""
        handle = self._file(number)
        del self._files[number]
        self._freed.append(number)
        return handle

    def take_directory(self, number: int) -> DirectoryHandle:
        """Remove an open directory and return it.  Raises OSError(EBADF)."""
        handle = self.directory(number)
        del self._directories[number]
        self._freed.append(number)
        return handle

    def take_all(self) -> list[FileHandle]:
        """Remove everything: close the directories and return the files."""
        for directory in self._directories.values():
            os.close(directory.fd)
        self._directories.clear()
        files = list(self._files.values())
        self._files.clear()
        return files
