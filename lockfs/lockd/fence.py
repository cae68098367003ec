"""The fence: every further I/O on what is open of an image fails, at once and for good.

No storage is touched on the way, and no daemon is waited for that hangs.  The steps, for each mount of the image:

* the mount daemon is told (`orders`): from then on it says that the type of the file has changed, and hands out no more
  of it; then the kernel is made to ask, and declares the inode bad;
* a mount daemon that has not done so within `PATIENCE`, or gets no further for so long, is killed, and lockd answers in
  its place (`keeper`) what has to be answered before its successor does.  The other choice would be that somebody goes
  on to write without a lock; a daemon that hangs serves nobody anyway;
* who can still write by a way that no error stops is killed (`stragglers`); after a loss, on a mount with
  ``onloss=kill``, everybody who has it open for writing.

The lock itself stays lost, and held, until all who have the image open for writing have closed it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial

import trio

from lockfs.backend import Grant
from lockfs.errors import LockfsError
from lockfs.linux import fuseinode
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.events import Events
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Mounted, Share
from lockfs.lockd.stragglers import Stragglers
from lockfs.lockd.table import Table
from lockfs.lockd.target import Target
from lockfs.protocol.messages import Event, FencedImage, FenceResult, FenceTarget

PATIENCE = 0.25
"""Seconds in which a mount daemon must have taken note of one part of a fence, and each answer of it must come."""
PATIENCE_IN_ALL = 1.0
"""Seconds for a thousand images, or fewer, for a mount daemon that takes note of them one after another."""
DEATH_PATIENCE = 0.2
"""Seconds for a mount daemon that was killed to be gone; one that is stuck in the storage is not."""
DEATH_POLL = 0.002
"""Seconds between two looks."""
GATHER = 0.005
"""Seconds after a loss in which others are awaited, to look through all processes only once."""

log = logging.getLogger(__name__)


class Fencer:
    """Fences images of this host.  Its tasks live in *nursery*."""

    def __init__(self, nursery: trio.Nursery, table: Table, events: Events) -> None:
        self._nursery = nursery
        self._table = table
        self._events = events
        self._stragglers = Stragglers(nursery)
        self._lost: dict[str, list[Lock]] = {}

    def lose(self, share: Share, grant: Grant) -> None:
        """Take note that a backend can no longer keep a grant: nothing more is granted for it, and it is fenced."""
        lock = self._table.lose(share, grant)
        if lock is not None:
            self.lose_lock(lock, "the backend can no longer keep its lock")

    def lose_lock(self, lock: Lock, why: str) -> None:
        """Grant nothing more of a lock, and fence its image."""
        self._table.mark_lost(lock, why)
        if not self._lost:
            self._nursery.start_soon(self._fence_lost)
        self._lost.setdefault(why, []).append(lock)

    async def _fence_lost(self) -> None:
        await trio.sleep(GATHER)
        lost, self._lost = self._lost, {}
        async with trio.open_nursery() as nursery:
            for why, locks in lost.items():
                nursery.start_soon(self._fence_and_tell, locks, why)

    async def _fence_and_tell(self, locks: Sequence[Lock], why: str) -> None:
        """Fence, and tell the backend that others may get the images now: nobody here can write to them any more.

        Where what was being written hangs, it is told that when all have closed the image.
        """
        targets = await self.fence(locks, why, loss=True)
        for lock in locks:
            results = [target.result() for target in targets if target.lock is lock]
            certain = all(each.fenced and each.drained for each in results)
            if not certain or lock.grant is None:
                continue
            try:
                await lock.share.backend.fenced(lock.grant)
            except LockfsError as error:
                log.warning("%s: %s", lock.share.source, error.message)

    async def fence_these(self, images: Sequence[FenceTarget], reason: str) -> list[FenceResult]:
        """Fence the images that an admin names; return what became of each, in their order."""
        found = self._table.find(images)
        locks = {lock.key: lock for each in found if len(each) == 1 for lock in each}
        targets = await self.fence(locks.values(), reason or "it is fenced by an admin")
        results: list[FenceResult] = []
        for image, each in zip(images, found, strict=True):
            name = image.path or f"inode {image.ino} of device {image.dev}"
            if len(each) == 1:
                results += [target.result() for target in targets if target.lock is each[0]]
            else:
                results.append(FenceResult(name, problems=[_why_not(each)]))
        return results

    async def fence(self, locks: Iterable[Lock], reason: str, *, loss: bool = False) -> list[Target]:
        """Fence images in all mounts by which they are held; return how it went.

        *loss*: because their locks were lost, so that the option ``onloss`` counts.
        """
        locks = list(locks)
        targets = [Target.of(lock, mounted) for lock in locks for mounted in _mounts_of(lock)]
        for lock in locks:
            self._table.mark_lost(lock, reason)
        async with trio.open_nursery() as nursery:
            for mounted in {target.mounted.mount_id: target.mounted for target in targets}.values():
                group = [target for target in targets if target.mounted is mounted]
                nursery.start_soon(self._fence_mount, mounted, group, reason, loss)
        for target in targets:
            self._tell(target, reason)
        return targets

    def _tell(self, target: Target, reason: str) -> None:
        summary = target.summary()
        log.log(logging.ERROR if target.problems else logging.WARNING, "fenced %s: %s", target.path, summary)
        mountpoint = target.mounted.mount.mountpoint
        self._events.publish(
            Event("fenced", time.time(), mountpoint=mountpoint, image=target.path, reason=f"{reason}; {summary}")
        )

    async def _fence_mount(self, mounted: Mounted, targets: list[Target], reason: str, loss: bool) -> None:
        mounted.fenced.update(node for target in targets for node in target.nodes)
        attachment = mounted.attachment
        if attachment is None:
            await self._tell_daemon_alone(mounted, targets, reason)
            return
        with attachment.in_use():
            await self._declare_bad(mounted, attachment, targets, reason)
            await self._stragglers.stop(attachment, targets)
            if loss and (doomed := [target for target in targets if _ends_users(target)]):
                await self._stragglers.end(attachment, doomed, reason)

    async def _tell_daemon_alone(self, mounted: Mounted, targets: list[Target], reason: str) -> None:
        obeyed = await _order(mounted, targets, reason)
        for target in targets:
            target.stopped = obeyed
            if not obeyed:
                target.problems.append("the mount is not attached to lockd, and its daemon does not answer")

    async def _declare_bad(
        self, mounted: Mounted, attachment: Attachment, targets: list[Target], reason: str
    ) -> None:
        restarts = mounted.restarts
        if not mounted.absent and await _order(mounted, targets, reason):
            await self._trigger(attachment, targets)
        if all(target.stopped for target in targets):
            return
        if not mounted.absent:
            self._kill_daemon(mounted, attachment, targets)
        died = await _has_died(attachment)
        if attachment.data == "passthrough":
            self._keep(mounted, attachment, restarts)
            await self._trigger(attachment, targets)
            return
        # Data gets nowhere without a daemon, and one that was killed does nothing more, even if it cannot end yet since
        # it is stuck in the storage; but what it is stuck in may still be done, and its callers need an answer.
        if not died:
            self._keep(mounted, attachment, restarts)
        for target in targets:
            target.stopped, target.drained, target.undrainable = True, died, True

    def _keep(self, mounted: Mounted, attachment: Attachment, restarts: int) -> None:
        """Answer in place of the dead daemon, unless a successor does meanwhile, which knows what is fenced."""
        if mounted.restarts == restarts:
            mounted.keep(attachment, self._nursery)

    async def _trigger(self, attachment: Attachment, targets: list[Target]) -> None:
        """Make the kernel ask for the attributes of all nodes that are not known to be bad."""
        targets = [target for target in targets if not target.stopped]
        nodes = sorted({node for target in targets for node in target.nodes})
        root = attachment.root.number
        bad: dict[int, bool] = {}
        await attachment.requests.for_each(PATIENCE, partial(fuseinode.fence, root), nodes, bad, [attachment.root])
        for target in targets:
            target.stopped = bool(target.nodes) and all(bad.get(node, False) for node in target.nodes)

    def _kill_daemon(self, mounted: Mounted, attachment: Attachment, targets: list[Target]) -> None:
        log.error(
            "the daemon of %s (process %d) does not fence %s: it is killed, lest somebody write without a lock",
            mounted.mount.mountpoint, mounted.pid, ", ".join(target.path for target in targets if not target.stopped),
        )  # fmt: skip
        attachment.kill_daemon()
        for target in targets:
            target.daemon_killed = True


async def _order(mounted: Mounted, targets: Sequence[Target], reason: str) -> bool:
    """Have the mount daemon fence; return whether it has taken note."""
    in_all = PATIENCE_IN_ALL * max(1, len(targets) / 1000)
    return await mounted.orders.fence(_images(targets), reason, PATIENCE, in_all)


async def _has_died(attachment: Attachment) -> bool:
    until = trio.current_time() + DEATH_PATIENCE
    while True:
        died = attachment.daemon_has_died()
        if died or trio.current_time() > until:
            return died
        await trio.sleep(DEATH_POLL)


def _ends_users(target: Target) -> bool:
    """Say whether those who have an image open are not to outlive the loss of its lock."""
    forced = target.lock.grant is not None and target.lock.grant.forced
    return forced or target.mounted.mount.options.get("onloss") == "kill"


def _mounts_of(lock: Lock) -> Iterable[Mounted]:
    return {hold.mounted.mount_id: hold.mounted for hold in lock.holds.values()}.values()


def _images(targets: Sequence[Target]) -> list[FencedImage]:
    return [FencedImage(target.lock.key[1], target.lock.key[2], sorted(target.nodes)) for target in targets]


def _why_not(found: Sequence[Lock]) -> str:
    if not found:
        return "this host does not hold it"
    inodes = ", ".join(f"{dev}:{ino}" for _, dev, ino in (lock.key for lock in found))
    return f"several images that are held were opened by this path; name one by its inode: {inodes}"
