"""Who can still write to an image that is fenced, by a way that no error stops; they are killed.

* A shared mapping of the file belongs to the file of the storage where data bypasses the mount daemon; elsewhere what
  is written to it would be dropped without a word.  So who has one that may be written is killed at once.
* Who splices into the image is looked for (`splicers`).
* Where the kernel could not be made to refuse I/O, everybody who has the file open for writing is killed.

Who only calls write(2) gets EIO, and lives; unless the mount has `onloss=kill`, or the loss was forced (`end`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

import trio

from lockfs.linux import fuseinode, process
from lockfs.linux.holders import Incomplete, Use, kill
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.scans import Scans
from lockfs.lockd.splicers import Watch, note_drained
from lockfs.lockd.target import Target
from lockfs.lockd.threads import TooSlow
from lockfs.protocol.messages import KilledProcess

DRAIN_PATIENCE = 1.0
"""Seconds for what is being written to end; a storage that hangs is not waited for."""
DEATH_PATIENCE = 1.0
"""Seconds for those who were killed to be gone."""
DEATH_POLL = 0.01
"""Seconds between two looks whether they are."""

log = logging.getLogger(__name__)


class Stragglers:
    """Stops them.  Its threads live in *nursery*."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._scans = Scans(nursery)

    async def stop(self, attachment: Attachment, targets: Sequence[Target]) -> None:
        """Stop all who can still write to *targets*, which are on the mount of *attachment*."""
        drains: dict[int, bool] = {}
        bypassed = attachment.data == "passthrough"
        watch = Watch(self._scans, attachment.dev, targets, drains)
        nodes = {node for target in targets for node in target.nodes}
        mappings_only = not bypassed and all(target.stopped for target in targets)
        look = partial(self._look, attachment.dev, nodes, targets, mappings_only)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, attachment, targets, drains)
            # The first look is fast and the second exact: on a busy host that takes its time.
            watch.add(await look(exact=False))
            async with trio.open_nursery() as inner:
                if bypassed:
                    inner.start_soon(watch.run)
                more = watch.add(await look(exact=True))
            if bypassed and more:
                await watch.run()
        note_drained(targets, drains)
        await self._see_them_gone(attachment.dev, nodes, targets)

    async def end(self, attachment: Attachment, targets: Sequence[Target], why: str) -> None:
        """Kill all who have *targets* open for writing, though no I/O of theirs succeeds any more; *why* for people.

        Whoever cannot be found or killed is told of; the fence holds all the same.
        """
        nodes = {node for target in targets for node in target.nodes}
        try:
            uses = await self._scans.uses(attachment.dev, nodes)
        except (Incomplete, OSError, TooSlow) as error:
            log.error("not all who have %s open are known, to be ended: %s", _paths(targets), error or "too slow")
            uses = error.found if isinstance(error, Incomplete) else []
        for target in targets:
            for use in uses:
                if use.writable and use.ino in target.nodes:
                    _end(target, use, why)

    async def _look(
        self, dev: int, nodes: set[int], targets: Sequence[Target], mappings_only: bool, *, exact: bool
    ) -> list[Use]:
        """Kill those of whom it is clear that no error stops them; return all who were found."""
        look = self._scans.uses if exact else self._scans.glance
        try:
            uses = await look(dev, nodes, mappings_only=mappings_only)
        except (Incomplete, OSError, TooSlow) as error:
            for target in targets if exact else ():
                target.problems.append(f"not all who may have it open or mapped are known: {error or 'too slow'}")
            uses = error.found if isinstance(error, Incomplete) else []
        for target in targets:
            _kill(target, uses)
        return uses

    async def _drain(self, attachment: Attachment, targets: Sequence[Target], drains: dict[int, bool]) -> None:
        nodes = {node for target in targets if target.stopped and not target.undrainable for node in target.nodes}
        call = partial(fuseinode.drain, attachment.root.number)
        await attachment.drains.for_each(DRAIN_PATIENCE, call, sorted(nodes), drains, [attachment.root])

    async def _see_them_gone(self, dev: int, nodes: set[int], targets: Sequence[Target]) -> None:
        """Say of whom it is not certain that they can write no more."""
        alive = {pid for target in targets for pid in target.killed}
        with trio.move_on_after(DEATH_PATIENCE):
            while alive:
                alive = await self._still_writing(dev, nodes, alive)
                await trio.sleep(DEATH_POLL if alive else 0)
        for target in targets:
            for pid in alive & target.killed.keys():
                target.problems.append(f"process {pid} was killed and does not end: it may be stuck in the storage")
            if not target.nodes:
                target.problems.append("the number by which the kernel knows it is not known")

    async def _still_writing(self, dev: int, nodes: set[int], pids: set[int]) -> set[int]:
        try:
            uses = await self._scans.uses(dev, nodes, pids=sorted(pids))
        except (Incomplete, OSError, TooSlow):
            return pids
        return {use.pid for use in uses if use.writable and use.how != "ring"}


def _end(target: Target, use: Use, why: str) -> None:
    if use.pid in target.killed:
        return
    command = process.command(use.pid)
    try:
        if kill(use):
            target.killed[use.pid] = KilledProcess(use.pid, command, f"had it open: {why}")
    except PermissionError:
        log.error("process %d (%s), which has %s open, cannot be killed", use.pid, command, target.path)


def _paths(targets: Sequence[Target]) -> str:
    return ", ".join(target.path for target in targets)


def _kill(target: Target, uses: Iterable[Use]) -> None:
    for use in uses:
        if use.how == "ring":
            if not target.stopped:
                target.kill(use, "may have it open in an io_uring")
        elif use.writable and use.ino in target.nodes:
            if use.how == "mapping":
                target.kill(use, "has it mapped")
            elif not target.stopped:
                target.kill(use, "has it open")
