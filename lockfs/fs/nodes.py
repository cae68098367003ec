"""The inode table: what the kernel knows of, by node id.

Invariants:
- a node id names one inode for the life of the mount and is never used again;
- a node lives exactly as long as the kernel's lookup count of it is not zero;
- a fenced node is no way to its inode any more, which gets a new node when it is looked up again;
- a node's descriptor may be closed at any time that nobody borrows it, since a file handle finds the inode again;
  where there is no handle, or no name is left, the descriptor is pinned instead.

Only the event loop touches the table.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import trio

from lockfs.fs import source
from lockfs.fs.journal import records
from lockfs.fs.journal.file import Journal
from lockfs.fs.journal.state import State
from lockfs.fs.source import Found, Key
from lockfs.linux import handle
from lockfs.steps import step

ROOT = 1
"""FUSE_ROOT_ID."""


class Node:
    """One inode.  `parent` and `name` are where it was last seen; `dev` and `ino` are those of the storage."""

    __slots__ = ("borrowers", "dev", "fd", "fenced", "id", "ino", "key", "lookups", "name", "parent", "pinned")

    def __init__(
        self, number: int, key: Key, identity: tuple[int, int], fd: int, parent: Node | None, name: bytes
    ) -> None:
        self.id = number
        self.key = key
        self.dev, self.ino = identity
        self.fd = fd
        self.lookups = 0
        self.borrowers = 0
        self.fenced = False
        self.pinned = not isinstance(key, bytes)
        self.parent = parent
        self.name = name

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode number: what locks go by."""
        return self.dev, self.ino

    def path(self) -> bytes:
        """Return the path below the source by which the node was last reached."""
        names: list[bytes] = []
        node: Node | None = self
        # A rename elsewhere may have left stale parents behind; they cannot form a loop that is longer than this.
        while node is not None and node.parent is not None and len(names) < 4096:
            names.append(node.name)
            node = node.parent
        return b"/".join(reversed(names))


class NodeTable:
    """All nodes of a mount.

    *root* is an O_RDONLY descriptor of the source, which the table does not close.  *close* closes, soon, a
    descriptor that may be the last of a removed file.  What changes goes to the *journal*.
    """

    def __init__(
        self, root: int, root_found: Found, *, open_limit: int, close: Callable[[int], None], journal: Journal
    ) -> None:
        self._mount_fd = root
        self._close_soon = close
        self._open_limit = open_limit
        self._journal = journal
        self.last = ROOT
        self.root = _node(ROOT, root_found, None, b"")
        self.root.lookups = 1
        self.root.pinned = True
        self._by_id: dict[int, Node] = {ROOT: self.root}
        self._by_key: dict[Key, Node] = {root_found.key: self.root}
        self._open: OrderedDict[int, Node] = OrderedDict()
        self._awaited: dict[int, trio.Event] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, number: int) -> Node:
        """Return the node with that id.  Raises OSError(ESTALE) if the kernel was told to forget it, or if it is
        fenced: the kernel then looks the name up again.
        """
        node = self._by_id.get(number)
        if node is None or node.fenced:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def find(self, number: int) -> Node | None:
        """Return the node with that id, also if it is fenced; None if there is none."""
        return self._by_id.get(number)

    def fence(self, number: int) -> None:
        """Cut a node off from its inode; the root cannot be."""
        node = self._by_id.get(number)
        if node is None or node is self.root or node.fenced:
            return
        node.fenced = True
        del self._by_key[node.key]
        self._journal.note(records.Fenced(number))

    def is_fenced(self, number: int) -> bool:
        """Say whether the node with that id is fenced."""
        node = self._by_id.get(number)
        return node is not None and node.fenced

    def known(self, key: Key) -> Node | None:
        """Return the node of an inode, if the kernel knows it."""
        return self._by_key.get(key)

    def adopt(self, found: Found, parent: Node, name: bytes) -> Node:
        """Return the node for what was found, and count one lookup for it; takes *found*'s descriptor."""
        node = self._by_key.get(found.key)
        if node is None:
            self.last += 1
            node = _node(self.last, found, parent, name)
            found.fd = -1
            self._by_id[node.id] = self._by_key[node.key] = node
            self._journal.note(_record(node))
            if not node.pinned:
                self._note_open(node)
        else:
            if node.fd < 0:
                node.fd, found.fd = found.fd, -1
                self._note_open(node)
            found.close()
            self.moved(found.key, parent, name)
        self.count(node)
        return node

    def count(self, node: Node) -> None:
        """Count one more lookup."""
        node.lookups += 1
        self._journal.looked(node.id, 1)

    def moved(self, key: Key, parent: Node, name: bytes) -> None:
        """Note that an inode was renamed."""
        node = self._by_key.get(key)
        if node is None or node is self.root or (node.parent is parent and node.name == name):
            return
        node.parent, node.name = parent, name
        self._journal.note(records.Moved(node.id, parent.id, name))

    def pin(self, found: Found) -> None:
        """Keep an inode that may have lost its last name reachable for as long as the kernel knows it; takes the
        descriptor.
        """
        node = self._by_key.get(found.key)
        if node is None or node.pinned:
            found.close()
            return
        node.pinned = True
        self._journal.note(records.Pinned(node.id))
        self._open.pop(node.id, None)
        if node.fd < 0:
            node.fd, found.fd = found.fd, -1
        found.close()

    def forget(self, number: int, lookups: int) -> None:
        """Take back *lookups* lookups; drop the node when none is left."""
        node = self._by_id.get(number)
        if node is None or node is self.root:
            return
        if node.pinned:
            step("nameless.before-forgotten")
        node.lookups -= lookups
        if node.lookups > 0:
            self._journal.looked(number, -lookups)
            return
        self._journal.forgotten(number)
        del self._by_id[node.id]
        if not node.fenced:
            del self._by_key[node.key]
        if (event := self._awaited.pop(node.id, None)) is not None:
            event.set()
        self._open.pop(node.id, None)
        if node.borrowers == 0:
            self._close(node)

    def when_forgotten(self, node: Node) -> trio.Event:
        """Return an event that is set when the kernel has forgotten the node."""
        if node.id not in self._by_id:
            event = trio.Event()
            event.set()
            return event
        return self._awaited.setdefault(node.id, trio.Event())

    def fd(self, node: Node) -> int:
        """Return an O_PATH descriptor of the node, good until the table is used again.  Raises OSError (ESTALE)."""
        if node.fd < 0:
            node.fd = self._reopen(node)
            if not node.pinned:
                self._note_open(node)
        elif not node.pinned:
            self._open.move_to_end(node.id)
        return node.fd

    def _reopen(self, node: Node) -> int:
        if isinstance(node.key, bytes):
            return handle.open_handle(self._mount_fd, node.key)
        # Only after the death of the daemon that had it open: without a handle its name is all that is left.
        parent = node.parent
        if parent is not None:
            found = source.find(self.fd(parent), node.name)
            if (found.stat.st_dev, found.stat.st_ino) == node.identity:
                return found.fd
            found.close()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    @contextmanager
    def borrow(self, node: Node) -> Iterator[int]:
        """Lend the node's descriptor for the length of a ``with`` block, over awaits and to threads."""
        fd = self.fd(node)
        node.borrowers += 1
        try:
            yield fd
        finally:
            node.borrowers -= 1
            if node.borrowers == 0 and node.id not in self._by_id:
                self._close(node)

    def _note_open(self, node: Node) -> None:
        if node.id not in self._by_id:
            return
        self._open[node.id] = node
        if len(self._open) <= self._open_limit:
            return
        for other in self._open.values():
            if other.borrowers == 0 and other is not node:
                del self._open[other.id]
                self._close(other)
                return

    # A successor -----------------------------------------------------------------------------------

    def records(self) -> Iterator[records.Record]:
        """Yield what there is."""
        for node in self._by_id.values():
            if node is not self.root:
                yield _record(node)
                if node.fenced:
                    yield records.Fenced(node.id)

    def restore(self, state: State, kept: Mapping[int, int]) -> None:
        """Take over the nodes of the daemon before, with the descriptors that were kept of some, by node id."""
        self.last = max(ROOT, state.last_node)
        for number, known in state.nodes.items():
            found = known.found
            key = found.handle if found.handle is not None else (found.dev, found.ino)
            node = Node(number, key, (found.dev, found.ino), -1, None, known.name)
            node.lookups, node.fenced = max(1, known.lookups), known.fenced
            node.pinned = node.pinned or known.pinned or number in kept
            node.fd = kept.get(number, -1)
            self._by_id[number] = node
            if not node.fenced:
                self._by_key[key] = node
        for number, known in state.nodes.items():
            # A parent that the kernel has forgotten: only the path for people suffers.
            self._by_id[number].parent = self._by_id.get(known.parent, self.root)
        for number in kept.keys() - state.nodes.keys():
            self._close_soon(kept[number])
        for number, known in state.nodes.items():
            if known.pinned:
                self._try_to_open(self._by_id[number])

    def _try_to_open(self, node: Node) -> None:
        """Keep what may have no name any more from vanishing, if it has not vanished yet."""
        try:
            self.fd(node)
        except OSError:
            pass

    def close(self) -> None:
        """Close every descriptor."""
        for node in self._by_id.values():
            self._close(node)
        self._by_id.clear()
        self._by_key.clear()
        self._open.clear()

    def _close(self, node: Node) -> None:
        if node.fd < 0:
            return
        if node.pinned:
            self._close_soon(node.fd)
        else:
            os.close(node.fd)
        node.fd = -1


def _node(number: int, found: Found, parent: Node | None, name: bytes) -> Node:
    return Node(number, found.key, (found.stat.st_dev, found.stat.st_ino), found.fd, parent, name)


def _record(node: Node) -> records.Found:
    key = node.key if isinstance(node.key, bytes) else None
    parent = ROOT if node.parent is None else node.parent.id
    return records.Found(node.id, node.dev, node.ino, parent, node.name, key, node.lookups, node.pinned)
