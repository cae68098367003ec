"""The backing ids of one mount: which open files bypass the daemon.

The kernel takes no mix on one inode: while it is open with a backing id, every further open must have that very id,
and while it is open without, none may have one; anything else is EIO.  So the first open of a node decides for all
until the last is released.  Here a node counts as open a little longer than in the kernel, which is on the safe side.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lockfs.kernel import device

log = logging.getLogger("lockfs.kernel")


@dataclass(slots=True)
class _Open:
    backing_id: int
    count: int


class Backing:
    """Counts the opens of each node.  `enabled` is `Negotiated.passthrough`: without it no node gets a backing id.

    *opened* is called with a node and its new backing id, *closed* with one that was given back.  `last` is the highest
    that there was: the kernel gives them in a row.
    """

    def __init__(
        self,
        fuse_fd: int,
        *,
        enabled: bool,
        opened: Callable[[int, int], None] = lambda _node, _backing_id: None,
        closed: Callable[[int], None] = lambda _backing_id: None,
    ) -> None:
        self._fuse_fd = fuse_fd
        self._enabled = enabled
        self._open: dict[int, _Open] = {}
        self._opened = opened
        self._closed = closed
        self.last = 0

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
            if backing_id:
                self.last = backing_id
                self._opened(node, backing_id)
        entry.count += 1
        return entry.backing_id

    def id_of(self, node: int) -> int:
        """Return the backing id with which a node is open, 0 if there is none."""
        entry = self._open.get(node)
        return 0 if entry is None else entry.backing_id

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
                self._closed(entry.backing_id)

    def ids(self) -> Iterator[tuple[int, int]]:
        """Yield the nodes that are open with a backing id, and these."""
        for node, entry in self._open.items():
            if entry.backing_id:
                yield node, entry.backing_id

    def restore(self, counts: Mapping[int, int], ids: Mapping[int, int], last: int) -> None:
        """Take over what another process has opened on this connection: how often each node, and by which id."""
        self._open = {node: _Open(ids.get(node, 0), count) for node, count in counts.items()}
        self.last = last

    def close_unused(self, backing_ids: Iterable[int]) -> None:
        """Give back what another process may have left, and of which nothing is known but that it is not used."""
        for each in backing_ids:
            try:
                device.backing_close(self._fuse_fd, each)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _backing_id(self, fd: int) -> int:
        try:
            return device.backing_open(self._fuse_fd, fd)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            log.debug("no passthrough: the storage is a stacked filesystem")
            return 0
