"""The right to change a file's bytes: the one way by which opens, truncations and a manager's first write get it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import trio

from lockfs.backend import Mode
from lockfs.fs.base import HELD_SECONDS, READ_SECONDS, Base
from lockfs.fs.guard import Hold
from lockfs.fs.handles import FileHandle
from lockfs.fs.mappings import Mappings
from lockfs.fs.nodes import Node
from lockfs.fs.work import DAEMON, Caller
from lockfs.kernel.backing import Backing
from lockfs.kernel.gates import NO_TRUST, Gates, Trust
from lockfs.linux.files import proc_path
from lockfs.protocol.messages import Owner

log = logging.getLogger("lockfs.fs")


class WriteRights(Base):
    """Helpers of all operations that change bytes.

    `backing` has the backing ids of files whose data bypasses the daemon, `mappings` tells when nobody can write to
    such a file any more; both are None where all data goes through the daemon.  `gates` are the open files that the
    kernel module serves; None without it.
    """

    gates: Gates | None = None
    backing: Backing | None = None
    mappings: Mappings | None = None

    async def hold_to_write(self, node: Node, owner: Owner, caller: Caller) -> Hold | None:
        """Take the image of *node* as its writers take it; None if it is not guarded.  Raises as `Guard.hold`."""
        path = node.path()
        if not self.guard.policy.guarded(path):
            return None
        return await self.guard.hold(node, self.guard.policy.writer(path), owner, caller)

    async def hold_to_read(self, node: Node, caller: Caller) -> Hold | None:
        """Take a pinned image against writers; None if it is not pinned.  Raises as `Guard.hold`."""
        if not self.guard.policy.pinned(node.path()):
            return None
        owner, _manager = self.owners.of(caller)
        return await self.guard.hold(node, Mode.SHARED, owner, caller)

    async def claim(self, handle: FileHandle) -> None:
        """Make sure that *handle* may write at this moment.

        A manager's handle takes the lock here, at its first write; one whose lock is late waits.  Raises `Busy`,
        `LockUnavailable`; OSError(EIO) if the lock was lost.
        """
        if handle.manager is not None:
            await self._claim_for_manager(handle)
        if handle.hold is not None:
            await self.guard.until_safe(handle.hold)

    async def _claim_for_manager(self, handle: FileHandle) -> None:
        if handle.turn is None:
            handle.turn = trio.Lock()
        async with handle.turn:
            if handle.manager is not None:
                handle.hold = await self.hold_to_write(handle.node, handle.manager, DAEMON)
                handle.manager = None
                self.open_gate(handle)
                self.handles.took(handle)

    def open_direct(self, fd: int, flags: int) -> int:
        """Open a file once more, with O_DIRECT, if its data goes through this daemon; return -1 if that cannot be."""
        if self.gates is None or self.backing is not None:
            return -1
        try:
            return os.open(proc_path(fd), flags & ~os.O_TRUNC | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            log.debug("no O_DIRECT on the storage: %s", error)
            return -1

    def open_gate(self, handle: FileHandle) -> None:
        """Let the kernel module serve the data of an open file."""
        if self.gates is None or handle.fd < 0 or handle.manager is not None or handle.flags & os.O_APPEND:
            return  # where writes append, one that is sent again must not be carried out again
        guarded = handle.writable and handle.hold is not None
        self.gates.add(handle.number, handle.fd, handle.direct, guarded=guarded, trust=self._trust(handle))

    def _trust(self, handle: FileHandle) -> Trust:
        if handle.hold is not None and (handle.hold.mode is Mode.EXCLUSIVE or not handle.writable):
            # As long as the file is open the image is held, if only by a reader, and nobody else can change it.
            return Trust(HELD_SECONDS)
        if handle.writable or self.guard.policy.writer(handle.node.path()) is Mode.SHARED:
            return NO_TRUST  # whoever shares an image with other writers has ways of its own to know when it changes
        return Trust(READ_SECONDS, calm_only=True)

    def fence(self, nodes: Collection[int]) -> None:
        """Serve nothing more of nodes whose inodes the kernel is to declare bad."""
        self._shut_gates(lambda node: node.id in nodes)
        for number in nodes:
            self.nodes.fence(number)

    def lose(self, images: Collection[tuple[int, int]], why: str) -> None:
        """Let nobody write any more to images, known by device and inode number, whose locks are lost."""
        self._shut_gates(lambda node: node.identity in images)
        for image in images:
            self.guard.lose(image, why)

    def _shut_gates(self, concerned: Callable[[Node], bool]) -> None:
        if self.gates is None:
            return
        for handle in self.handles.files():
            if concerned(handle.node):
                self.gates.shut(handle.number)

    @asynccontextmanager
    async def held_to_write(self, node: Node, caller: Caller) -> AsyncIterator[None]:
        """Hold the image of *node* for the length of one call."""
        owner, _manager = self.owners.of(caller)
        hold = await self.hold_to_write(node, owner, caller)
        try:
            yield
        finally:
            if hold is not None:
                await self.guard.release(hold)

    async def truncate(self, node: Node, size: int, fh: int | None, caller: Caller) -> None:
        """Set the size of a file, by an open handle or by name.  Raises as `claim` and `held_to_write`; OSError."""
        if fh is not None:
            handle = self.handles.file(fh)
            await self.claim(handle)
            await self.work.long(caller, os.ftruncate, handle.fd, size)
            return
        async with self.held_to_write(node, caller):
            with self.nodes.borrow(node) as fd:
                await self.work.long(caller, os.truncate, proc_path(fd), size)
