"""When nobody can write to an image any more that bypasses the daemon: the end of its last writable mapping.

Memory mapped from such a file belongs to the file of the storage.  It outlives the RELEASE of the open file, and no
request tells when it ends.  So the image stays held until one of two things is seen:

- the kernel forgets the inode, which it is asked to do; it cannot while the inode is open or mapped;
- where readers keep the inode, no process has a shared mapping of it that may be written.
"""

from __future__ import annotations

import errno
import logging
import math
from collections import Counter
from dataclasses import dataclass

import trio

from lockfs.fs.guard import Guard, Hold
from lockfs.fs.handles import FileHandle, Handles
from lockfs.fs.nodes import Node, NodeTable
from lockfs.kernel import device
from lockfs.kernel.backing import Backing
from lockfs.linux import holders

log = logging.getLogger("lockfs.fs")

_PRUNE_WAITS = (0.001, 0.005)
"""Seconds to wait for the kernel to forget.  It does so at once, but for the file whose close(2) has yet to return."""
_PRUNED_AT_ONCE = 256
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 1.0
"""Seconds between two looks at all mappings: short for a hand-over, long for a mapping that stays."""


@dataclass(slots=True, eq=False)
class _Closed:
    handle: FileHandle
    hold: Hold

    @property
    def node(self) -> Node:
        return self.handle.node


class Mappings:
    """The images that were closed but may be mapped still.

    `run` looks after them.  *dev* is the device of the mount, *fuse_fd* its connection.
    """

    def __init__(
        self, nodes: NodeTable, handles: Handles, guard: Guard, backing: Backing, fuse_fd: int, dev: int
    ) -> None:
        self._nodes = nodes
        self._handles = handles
        self._guard = guard
        self._backing = backing
        self._fuse_fd = fuse_fd
        self._dev = dev
        self._can_prune = True
        self._open: Counter[tuple[int, str]] = Counter()
        self._fresh: list[_Closed] = []
        self._passed_on: list[_Closed] = []
        self._changed = trio.Event()

    def opened(self, node: Node, hold: Hold) -> None:
        """Note an open file that can be mapped for writing."""
        self._open[node.id, hold.owner.key] += 1

    def closed(self, handle: FileHandle, hold: Hold) -> None:
        """Give the *hold* of a closed file back as soon as nobody can write to it through memory."""
        key = (handle.node.id, hold.owner.key)
        self._open[key] -= 1
        closed = _Closed(handle, hold)
        if self._open[key]:
            # The owner keeps the image by another such file, at whose end all mappings are looked for.
            self._passed_on.append(closed)
        else:
            del self._open[key]
            self._fresh.append(closed)
        self._changed.set()

    def restore(self) -> None:
        """Take over what the daemon before had to look after."""
        for handle in self._handles.files():
            if handle.mappable and handle.hold is not None:
                self.opened(handle.node, handle.hold)
        for handle in self._handles.lingering():
            if handle.hold is not None:
                self._fresh.append(_Closed(handle, handle.hold))
        self._changed.set()

    async def _release(self, closed: _Closed) -> None:
        self._handles.note_freed(closed.handle)
        await self._guard.release(closed.hold)

    async def run(self) -> None:
        """Give holds back, until cancelled."""
        mapped: list[_Closed] = []
        pause = _FIRST_PAUSE
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_after(pause if mapped else math.inf):
                    await self._changed.wait()
                pause = min(pause * 2, _LAST_PAUSE)
                waiting = mapped
                self._changed = trio.Event()
                while self._passed_on:
                    nursery.start_soon(self._release, self._passed_on.pop())
                if self._fresh:
                    fresh, self._fresh = self._fresh, []
                    waiting = mapped + fresh
                    pause = _FIRST_PAUSE
                mapped = await self._still_mapped(await self._not_forgotten(waiting))
                for each in set(waiting).difference(mapped):
                    nursery.start_soon(self._release, each)

    async def _not_forgotten(self, closed: list[_Closed]) -> list[_Closed]:
        """Ask the kernel to forget the inodes; return those that it has not forgotten."""
        for seconds in _PRUNE_WAITS:
            # One that readers have open cannot be forgotten.
            idle = [each.node for each in closed if self._backing.mode(each.node.id) is None]
            if not idle or not self._can_prune:
                break
            forgotten = [self._nodes.when_forgotten(node) for node in idle]
            await self._prune([node.id for node in idle])
            with trio.move_on_after(seconds):
                for event in forgotten:
                    await event.wait()
            closed = [each for each in closed if not self._nodes.when_forgotten(each.node).is_set()]
        return closed

    async def _prune(self, numbers: list[int]) -> None:
        for at in range(0, len(numbers), _PRUNED_AT_ONCE):
            part = numbers[at : at + _PRUNED_AT_ONCE]
            try:
                # In a thread: it may have to wait for a request that the event loop is to answer.
                await trio.to_thread.run_sync(device.notify_prune, self._fuse_fd, part)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self._can_prune = False  # before Linux 6.18
                return

    async def _still_mapped(self, closed: list[_Closed]) -> list[_Closed]:
        if not closed:
            return []
        numbers = {each.node.id for each in closed}
        mapped = await self._mapped(numbers)
        return [each for each in closed if each.node.id in mapped]

    async def _mapped(self, numbers: set[int]) -> set[int]:
        try:
            found = await trio.to_thread.run_sync(lambda: holders.uses(self._dev, numbers, mappings_only=True))
        except (holders.Incomplete, OSError) as error:
            log.info("images stay locked that may be mapped still: %s", error)
            return numbers
        return {use.ino for use in found if use.writable}
