"""The backing ids of one mount: which open files bypass the daemon.

The kernel takes no mix on one inode: while it is open with a backing id, every further open must have that very id,
and while it is open without, none may have one; anything else is EIO.  So the first open of a node decides for all
until the last is released.  Here a node counts as open a little longer than in the kernel, which is on the safe side.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass

from lockfs.kernel import device

log = logging.getLogger("lockfs.kernel")


@dataclass(slots=True)
class _Open:
    backing_id: int
    count: int


class Backing:
    """Counts the opens of each node.  `enabled` is `Negotiated.passthrough`: without it no node gets a backing id."""

    def __init__(self, fuse_fd: int, *, enabled: bool) -> None:
        self._fuse_fd = fuse_fd
        self._enabled = enabled
        self._open: dict[int, _Open] = {}

    def open(self, node: int, fd: int, *, wanted: bool = True) -> int:
        """Count one more open of a regular file; return its backing id, 0 if its data has to go through the daemon.

        *fd* is any descriptor of the file, needed during the call.  With *wanted* false a node that is not open gets no
        id; one that is open with an id must get it all the same.  I/O will be done as the thread that makes the first
        call.  Raises OSError; then nothing was counted.
        """
        entry = self._open.get(node)
        if entry is None:
            backing_id = self._backing_id(fd) if self._enabled and wanted else 0
            entry = self._open[node] = _Open(backing_id, 0)
        entry.count += 1
        return entry.backing_id

    def mode(self, node: int) -> bool | None:
        """Say whether an open node has a backing id; None if it is not open."""
        entry = self._open.get(node)
        return None if entry is None else entry.backing_id != 0

    def close(self, node: int) -> None:
        """Count one open less, after its RELEASE, or if it failed after `open`; the last gives the id back."""
        entry = self._open[node]
        entry.count -= 1
        if entry.count == 0:
            del self._open[node]
            if entry.backing_id:
                device.backing_close(self._fuse_fd, entry.backing_id)

    def _backing_id(self, fd: int) -> int:
        try:
            return device.backing_open(self._fuse_fd, fd)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            log.debug("no passthrough: the storage is a stacked filesystem")
            return 0
