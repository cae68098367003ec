"""After the death of a mount daemon whose data bypasses it: what is open is written to as before.

So each image stays locked until nobody is left who could: no descriptor that is open for writing, no shared mapping of
one, and nothing that no list of processes shows, which is the case when the kernel forgets the inode.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from lockfs.backend import Mode
from lockfs.kernel import device
from lockfs.linux import fuseinode, holders
from lockfs.linux.holders import UNKNOWN_INO, Use
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.keeper import Keeper
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Mounted
from lockfs.lockd.table import Table

FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
"""Seconds between two looks at all processes, unless a file is closed."""
LOOK_TIMEOUT = 10.0
"""Seconds for an answer to a question that needs nobody but the kernel and this process."""
PRUNED_AT_ONCE = 256

log = logging.getLogger(__name__)


class Aftermath:
    """Frees the locks of one mount one after the other; *settle* gives locks back that were abandoned."""

    def __init__(
        self,
        mounted: Mounted,
        attachment: Attachment,
        keeper: Keeper,
        table: Table,
        settle: Callable[[Sequence[Lock]], Awaitable[None]],
    ) -> None:
        self._mounted = mounted
        self._attachment = attachment
        self._keeper = keeper
        self._table = table
        self._settle = settle
        self._can_prune = True

    async def run(self) -> None:
        """Return when no lock is left."""
        pause = FIRST_PAUSE
        with self._attachment.in_use():
            async with trio.open_nursery() as nursery:
                while locks := self._table.held_by(self._mounted):
                    self._keeper.closed = trio.Event()
                    free = await self._unused(locks)
                    for lock in free:
                        self._table.abandon_one(self._mounted, lock)
                    if free:
                        log.info("%d images of %s are free", len(free), self._mounted.mount.mountpoint)
                        nursery.start_soon(self._settle, free)
                        pause = FIRST_PAUSE
                        continue
                    with trio.move_on_after(pause):
                        await self._keeper.closed.wait()
                        await trio.sleep(FIRST_PAUSE / 10)  # one that ends closes much at once
                    pause = min(2 * pause, LAST_PAUSE)

    async def _unused(self, locks: Sequence[Lock]) -> list[Lock]:
        """Return those of *locks* by which nobody can write any more."""
        nodes = {lock.key: lock.nodes(self._mounted) for lock in locks}
        wanted = {node for each in nodes.values() for node in each}
        # Without its numbers a lock is free when nothing is open at all.
        everything = not all(nodes.values())
        try:
            uses = await trio.to_thread.run_sync(
                lambda: holders.uses(self._attachment.dev, None if everything else wanted)
            )
        except (holders.Incomplete, OSError) as error:
            log.info("images of %s stay locked: %s", self._mounted.mount.mountpoint, error)
            return []
        uses = [use for use in uses if use.pid != os.getpid()]
        ring = any(use.how == "ring" for use in uses)
        candidates = [lock for lock in locks if not _in_use(lock, nodes[lock.key], uses)]
        seen = {use.ino for use in uses}
        hidden = await self._known({node for lock in candidates for node in nodes[lock.key]} - seen)
        return [
            lock
            for lock in candidates
            if not nodes[lock.key] & hidden and not (ring and (nodes[lock.key] & seen or not self._can_prune))
        ]

    async def _known(self, nodes: set[int]) -> set[int]:
        """Return those *nodes*, which no process seems to have, that the kernel cannot be made to forget."""
        numbers = sorted(nodes)
        for at in range(0, len(numbers), PRUNED_AT_ONCE):
            part = numbers[at : at + PRUNED_AT_ONCE]
            try:
                if self._can_prune:
                    await trio.to_thread.run_sync(device.notify_prune, self._attachment.fuse.number, part)
            except OSError as error:
                # Before Linux 6.18 there is no such request, and on a connection that has ended there is none at all:
                # then what the processes show has to do.
                self._can_prune = False
                log.info("the kernel cannot be asked to forget files: %s", error.strerror)
        if not self._can_prune:
            return set()
        known: dict[int, bool] = {}
        await self._attachment.requests.for_each(
            LOOK_TIMEOUT, partial(fuseinode.is_known, self._attachment.root.number), numbers, known
        )
        return {node for node in numbers if known.get(node, True)}


def _in_use(lock: Lock, nodes: set[int], uses: Sequence[Use]) -> bool:
    """Say whether somebody can be seen who needs the lock.  Where it was taken to read, too, readers do."""
    shared = lock.wanted is Mode.SHARED
    return any(
        (use.writable or shared) and (use.ino in nodes or not nodes) and use.ino != UNKNOWN_INO for use in uses
    )
