"""Open files and directories of the mount, by the number that the kernel knows them by.

A number has 32 bits, since the kernel module needs the others; one that was given back is used again as late as can be.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from lockfs.fs.guard import Hold
from lockfs.fs.journal import records
from lockfs.fs.journal.file import Journal
from lockfs.fs.journal.state import State
from lockfs.fs.nodes import Node
from lockfs.protocol.messages import Owner
from lockfs.steps import step

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

    `flags` are those with which the daemon opened `fd`, as user `uid` and group `gid`; `fd` is -1 if that was another
    daemon and the file cannot be opened again.  `serial` is a number that is never used again, `unique` that of the
    request, and `answered` says that the kernel has taken the answer to it.  `inherited` says that `fd` is younger than
    the handle: it may miss errors of writing back.
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
    flags: int = 0
    uid: int = 0
    gid: int = 0
    unique: int = 0
    serial: int = 0
    answered: bool = False
    inherited: bool = False

    def record(self, number: int) -> records.Opened:
        """Return what a successor has to know; *number* is 0 once it is closed."""
        return records.Opened(
            self.serial, number, self.node.id, self.flags, self.writable, self.uid, self.gid, self.unique,
            self.counted, self.mappable, hold_record(self.hold), self.manager, self.answered, self.uncached,
        )  # fmt: skip


def hold_record(hold: Hold | None) -> records.Hold | None:
    """Return what a successor has to know of a hold."""
    return None if hold is None else records.Hold(hold.owner, hold.mode.value)


@dataclass(slots=True)
class DirectoryHandle:
    """One open directory.  `names` is the listing that offsets point into; taken at the first read and at each
    rewind.  `unique` is the number of the request that opened it.
    """

    node: Node
    fd: int
    names: list[bytes] = field(default_factory=list)
    unique: int = 0


class Handles:
    """All open handles of a mount.  What changes goes to the *journal*."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.last = 0
        self.last_serial = 0
        self._freed: deque[int] = deque()
        self._files: dict[int, FileHandle] = {}
        self._directories: dict[int, DirectoryHandle] = {}
        self._lingering: dict[int, FileHandle] = {}
        self._by_unique: dict[int, int] = {}
        self._unanswered: dict[int, FileHandle] = {}
        self._open: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._files) + len(self._directories)

    def add_file(self, handle: FileHandle) -> int:
        """Give an open file its number."""
        number = handle.number = self._number()
        self.last_serial += 1
        handle.serial = self.last_serial
        self._files[number] = handle
        self._open[handle.node.id] += 1
        self._unanswered[handle.unique] = handle
        step("open.before-journal")
        self._journal.note(handle.record(number))
        self._journal.flush()
        step("open.after-journal")
        return number

    def has(self, number: int, handle: FileHandle) -> bool:
        """Say whether an open file is still open, by this number."""
        return self._files.get(number) is handle

    def answered(self, unique: int) -> None:
        """Note that the kernel has taken the answer to a request that has opened a file."""
        opened = self._unanswered.pop(unique, None)
        if opened is not None:
            opened.answered = True
            self._journal.note(records.Answered(opened.serial))

    def unanswered(self) -> dict[int, FileHandle]:
        """Return the open files of which the kernel may not know, by their numbers."""
        return {number: handle for number, handle in self._files.items() if not handle.answered}

    def opened_by(self, unique: int) -> tuple[int, FileHandle] | None:
        """Return the number and the open file that a request has led to, if it was carried out by another daemon."""
        number = self._by_unique.get(unique, 0)
        handle = self._files.get(number)
        return (number, handle) if handle is not None and handle.unique == unique else None

    def directory_opened_by(self, unique: int) -> int | None:
        """Return the number of the open directory that a request has led to, as `opened_by`."""
        number = self._by_unique.get(unique, 0)
        handle = self._directories.get(number)
        return number if handle is not None and handle.unique == unique else None

    def took(self, handle: FileHandle) -> None:
        """Note that a manager's handle has got its hold."""
        hold = hold_record(handle.hold)
        if hold is not None:
            self._journal.note(records.Took(handle.serial, hold))
            self._journal.flush()

    def add_directory(self, handle: DirectoryHandle) -> int:
        """Give an open directory its number."""
        number = self._number()
        self._directories[number] = handle
        self._open[handle.node.id] += 1
        self._journal.note(records.OpenedDirectory(number, handle.node.id, handle.unique))
        return number

    def listed(self, number: int) -> None:
        """Note that an open directory was listed."""
        self._journal.note(records.Listed(number, self._directories[number].names))

    def _number(self) -> int:
        if self.last < MAX_NUMBER and len(self._freed) < KEPT_FREE:
            self.last += 1
            return self.last
        return self._freed.popleft()

    def file(self, number: int) -> FileHandle:
        """Return an open file.  Raises OSError: EBADF, or EIO if it is fenced."""
        handle = self._file(number)
        if handle.node.fenced or handle.fd < 0:
            # Not every request has the kernel look whether the inode is bad: fallocate and copy_file_range do not.
            raise OSError(errno.EIO, "the image is fenced, or its file is gone")
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

    def files(self) -> list[FileHandle]:
        """Return all open files."""
        return list(self._files.values())

    def are_open(self, node: Node) -> bool:
        """Tell whether there are open files of *node*, or open directories."""
        return node.id in self._open

    def _closed(self, node: Node) -> None:
        self._open[node.id] -= 1
        if not self._open[node.id]:
            del self._open[node.id]

    def is_written(self, node: Node) -> bool:
        """Tell whether the file of *node* is open for writing."""
        return any(handle.writable and handle.node is node for handle in self._files.values())

    def take_file(self, number: int) -> FileHandle:
        """Remove an open file and return it.  Raises OSError(EBADF)."""
        handle = self._file(number)
        del self._files[number]
        self._closed(handle.node)
        self._unanswered.pop(handle.unique, None)
        self._freed.append(number)
        return handle

    def note_closed(self, handle: FileHandle, *, lingers: bool) -> None:
        """Note that a file is closed, before anything of it is given back; its hold stays if it *lingers*."""
        if lingers:
            self._lingering[handle.serial] = handle
        step("close.before-journal")
        self._journal.note(records.Closed(handle.serial, lingers))
        self._journal.flush()
        step("close.after-journal")

    def note_freed(self, handle: FileHandle) -> None:
        """Note that the hold of a closed file lingers no more, before it is given back."""
        if self._lingering.pop(handle.serial, None) is not None:
            self._journal.note(records.Freed(handle.serial))
            self._journal.flush()

    def lingering(self) -> list[FileHandle]:
        """Return the closed files whose holds linger."""
        return list(self._lingering.values())

    def take_directory(self, number: int) -> DirectoryHandle:
        """Remove an open directory and return it.  Raises OSError(EBADF)."""
        handle = self.directory(number)
        del self._directories[number]
        self._closed(handle.node)
        self._freed.append(number)
        self._journal.note(records.ClosedDirectory(number))
        return handle

    # A successor -----------------------------------------------------------------------------------

    def records(self) -> Iterator[records.Record]:
        """Yield what there is."""
        for number, handle in self._files.items():
            yield handle.record(number)
        for handle in self._lingering.values():
            yield handle.record(0)
        for number, directory in self._directories.items():
            yield records.OpenedDirectory(number, directory.node.id, directory.unique)
            if directory.names:
                yield records.Listed(number, directory.names)

    def restore(self, state: State) -> None:
        """Go on with the numbers of the daemon before."""
        self.last, self.last_serial = state.last_number, state.last_serial

    def restore_file(self, number: int, handle: FileHandle) -> None:
        """Take over an open file; number 0 is that of a closed one whose hold lingers."""
        if not number:
            self._lingering[handle.serial] = handle
            return
        self._files[number] = handle
        self._open[handle.node.id] += 1
        handle.number = number
        self._by_unique[handle.unique] = number
        if not handle.answered:
            self._unanswered[handle.unique] = handle

    def restore_directory(self, number: int, handle: DirectoryHandle) -> None:
        """Take over an open directory."""
        self._directories[number] = handle
        self._open[handle.node.id] += 1
        self._by_unique[handle.unique] = number

    def take_all(self) -> list[FileHandle]:
        """Remove everything: close the directories and return the files."""
        for directory in self._directories.values():
            if directory.fd >= 0:
                os.close(directory.fd)
        self._directories.clear()
        files = list(self._files.values())
        self._files.clear()
        self._open.clear()
        return files
