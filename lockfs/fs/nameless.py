"""Open files and directories that lose their last name: nothing leads to them again but a descriptor.

If this daemon dies, its descriptors are gone, and the storage removes the file.  So lockd is given one before the name
is removed, and its successor gets it back.  No one else has one: not the kernel, unless data bypasses the daemon; nor
lockd by way of a lock, unless the file is open for writing.

What is given to lockd stays there until the kernel has forgotten the inode: node ids are not used again, so a late call
cannot mean another file.  Removals past this mount are not seen.
"""

from __future__ import annotations

import logging
import os
import stat as st
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import trio

from lockfs import text
from lockfs.errors import LockfsError
from lockfs.fs.handles import Handles
from lockfs.fs.nodes import Node, NodeTable
from lockfs.fs.source import Found
from lockfs.fs.work import DAEMON, Work
from lockfs.kernel.backing import Backing
from lockfs.steps import step

if TYPE_CHECKING:
    from lockfs.fs.session import LockdSession

log = logging.getLogger("lockfs.fs")


class Nameless:
    """Those of one mount.  *nursery* has the tasks that wait for the kernel to forget one."""

    def __init__(
        self,
        nodes: NodeTable,
        handles: Handles,
        work: Work,
        backing: Backing | None,
        session: LockdSession,
        nursery: trio.Nursery,
    ) -> None:
        self._nodes = nodes
        self._handles = handles
        self._work = work
        self._backing = backing
        self._session = session
        self._nursery = nursery
        self._kept: dict[int, Node] = {}
        session.entrusted = self.descriptors

    async def losing(self, found: Found) -> None:
        """Take note that a name of something is about to be removed."""
        node = self._needy(found)
        # A file server may keep the file under a name of its own, and say that it has one.
        if node is not None and (st.S_ISDIR(found.stat.st_mode) or found.stat.st_nlink <= 1 or self._work.remote):
            await self._keep(node, found)

    async def lost(self, found: Found) -> None:
        """Take note that a name was removed: others may have removed the rest, or opened it, meanwhile."""
        node = self._needy(found)
        if node is not None and (await self._work.short(DAEMON, os.fstat, found.fd)).st_nlink == 0:
            await self._keep(node, found)

    async def opened(self, node: Node, fd: int) -> None:
        """Take note that something was opened that may have lost its last name before."""
        if node.id in self._kept or self._bypasses(node):
            return
        status = await self._work.short(DAEMON, os.fstat, fd)
        if status.st_nlink == 0 or (self._work.remote and isinstance(node.key, bytes)):
            await self._keep(node, Found(fd, status, node.key))

    def _needy(self, found: Found) -> Node | None:
        """Return the node of something if it is open, and nobody keeps it but this daemon."""
        node = self._nodes.known(found.key)
        if node is None or node.id in self._kept or not self._handles.are_open(node) or self._bypasses(node):
            return None
        return node

    def _bypasses(self, node: Node) -> bool:
        return self._backing is not None and self._backing.id_of(node.id) != 0

    async def _keep(self, node: Node, found: Found) -> None:
        """Have lockd keep it; the descriptor stays the caller's.  Never fails: without it, it is as it would be."""
        self._nodes.pin(Found(os.dup(found.fd), found.stat, found.key))
        self._kept[node.id] = node
        step("nameless.before")
        try:
            await self._session.entrust([node.id], [found.fd])
        except LockfsError as error:
            del self._kept[node.id]
            log.info("%s is lost if this mount daemon dies: %s", text.from_bytes(node.path()), error)
            return
        step("nameless.after")
        self._nursery.start_soon(self._until_forgotten, node)

    async def _until_forgotten(self, node: Node) -> None:
        await self._nodes.when_forgotten(node).wait()
        del self._kept[node.id]
        await self._dispose(node.id)

    async def _dispose(self, number: int) -> None:
        try:
            await self._session.dispose([number])
        except LockfsError as error:
            log.info("lockd could not be told that a file is closed: %s", error)

    async def sift(self, is_known: Callable[[int], bool]) -> None:
        """Let go of those that the kernel has forgotten without this being noted: FORGET has no answer, so it is lost
        with a daemon that has just read it.

        *is_known* asks the kernel about a node id, and may wait for it.  To be called when what the kernel has sent
        again has been dealt with.
        """
        for number, node in list(self._kept.items()):
            if not self._handles.are_open(node) and not await trio.to_thread.run_sync(is_known, number):
                self._nodes.forget(number, node.lookups)

    def descriptors(self) -> dict[int, int]:
        """Return a descriptor for each that lockd is to keep, by node id; they are the caller's to close."""
        return {number: os.dup(node.fd) for number, node in self._kept.items() if node.fd >= 0}

    def restore(self, kept: Mapping[int, int]) -> None:
        """Take over what lockd has kept for the daemon before; the nodes have the descriptors by now."""
        for number in kept:
            node = self._nodes.find(number)
            if node is None:
                self._nursery.start_soon(self._dispose, number)
            else:
                self._kept[number] = node
                self._nursery.start_soon(self._until_forgotten, node)
