"""The journal as a file in the run directory, which lies in memory: it has to outlive the daemon, not the host.

Records are gathered and written with one write(2), by `flush`, before the reply that they belong to.  The file is
replaced by the records of what there is at the moment when a daemon takes over, and when it has grown to several times
that; a new file takes the place of the old one as a whole.

A journal that cannot be written is emptied: a mount daemon goes on without, and has no successor.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable

from lockfs.fs.journal import records
from lockfs.fs.journal.records import Record
from lockfs.steps import step

log = logging.getLogger("lockfs.fs")

MIN_SIZE = 4 << 20
"""Bytes below which a journal is not worth replacing."""
GROWTH = 4
"""It is replaced when it has grown to so many times what is in it."""


class Journal:
    """The journal of this daemon.  Until it is begun nothing is written: without a successor nobody needs it."""

    def __init__(self) -> None:
        self._path = ""
        self._fd = -1
        self._snapshot: Callable[[], Iterable[Record]] = tuple
        self._buffer = bytearray()
        self._looks: dict[int, int] = {}
        self._size = 0
        self._limit = MIN_SIZE

    @property
    def begun(self) -> bool:
        """Say whether there is one."""
        return self._fd >= 0

    def begin(self, path: str, snapshot: Callable[[], Iterable[Record]]) -> None:
        """Write what *snapshot* returns, a `Begin` first, to a file that takes the place of any at *path*.

        From now on add what is noted.  Raises OSError; then the one that was there is emptied: it is out of date soon.
        """
        self._path, self._snapshot = path, snapshot
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            self._replace()
        except OSError:
            self._empty()
            raise

    def note(self, record: Record) -> None:
        """Have a record written with the next `flush`."""
        if self._fd >= 0:
            self._buffer += records.encode(record)

    def looked(self, node: int, count: int) -> None:
        """Note a change of the kernel's lookup count of a node; such changes are added up until the next `flush`."""
        if self._fd >= 0:
            self._looks[node] = self._looks.get(node, 0) + count

    def forgotten(self, node: int) -> None:
        """Note that the kernel has forgotten a node."""
        if self._fd >= 0:
            self._looks.pop(node, None)
            self.note(records.Forgotten(node))

    def flush(self) -> None:
        """Write what was noted.  Never fails: see the module."""
        if self._looks:
            for node, count in self._looks.items():
                if count:
                    self._buffer += records.encode(records.Looked(node, count))
            self._looks.clear()
        if not self._buffer or self._fd < 0:
            return
        step("journal.before-write")
        try:
            written = os.write(self._fd, self._buffer)
            if written != len(self._buffer):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size += written
            self._buffer.clear()
            if self._size > self._limit:
                self._replace()
        except OSError as error:
            self._give_up(error)
        step("journal.after-write")

    def _replace(self) -> None:
        new = f"{self._path}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            data = b"".join(map(records.encode, self._snapshot()))
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            step("journal.before-replacement")
            os.rename(new, self._path)
            step("journal.after-replacement")
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, len(data)
        self._limit = max(MIN_SIZE, GROWTH * self._size)
        # What was noted and not written yet is in what there is.
        self._buffer.clear()
        self._looks.clear()

    def _give_up(self, error: OSError) -> None:
        log.error("the journal %s cannot be written (%s): this mount daemon will have no successor", self._path, error)
        self._empty()
        self.close()

    def _empty(self) -> None:
        for each in (self._path, f"{self._path}.new"):
            try:
                os.truncate(each, 0)
            except OSError:
                pass

    def remove(self) -> None:
        """Remove the file: the mount has ended."""
        if self._fd >= 0:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
            self.close()

    def close(self) -> None:
        """Write no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._buffer.clear()
        self._looks.clear()
