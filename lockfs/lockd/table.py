"""The lock table: what this host holds, who here holds it, and how that changes.

Invariants, beside those of `lockfs.lockd.lock`:
* The backend is asked by whoever has the lock's `transition`, in a task of `Storage`; so calls for one
  image never overlap, also when one of them hangs, and calls for different images do.
* A hold is taken away at once, the grant is given back after it; whoever comes in between finds a grant
  that is stronger than wanted, and settles that first.
* Nobody has a transition while waiting for another owner, so a release is never behind such a wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import trio

from lockfs import text
from lockfs.backend import Busy, Grant, Holder, Image, Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd.claims import Claims
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.events import Events
from lockfs.lockd.granting import Ask, Granting, path_of
from lockfs.lockd.heirlooms import Heirlooms
from lockfs.lockd.lock import Key, Lock, Waiter
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted, Share
from lockfs.lockd.state import Identity
from lockfs.lockd.storage import Job
from lockfs.protocol.errors import HeldError, NotHeld
from lockfs.protocol.messages import Claimed, Event, FenceTarget, HolderInfo
from lockfs.vault.wire import lock_key

LOCAL_GRACE = 0.1
"""Seconds that a conflict on this host may last at least: a RELEASE comes after the close(2) that caused
it.
"""
POLL_FIRST, POLL_LAST = 0.010, 0.050
"""Seconds between two looks at a lock that another host has: a hand-over takes a few milliseconds, a longer
wait must not become a load."""

log = logging.getLogger(__name__)


class Table:
    """All locks of this host."""

    def __init__(
        self,
        events: Events,
        recorder: Recorder | None = None,
        claims: Claims | None = None,
        heirlooms: Heirlooms | None = None,
    ) -> None:
        self.locks: dict[Key, Lock] = {}
        self._events = events
        self._recorder = recorder or Recorder()
        self._granting = Granting(self._recorder, events)
        self._claims = claims
        self._heirlooms = heirlooms

    # Acquire ---------------------------------------------------------------------------------

    async def acquire(self, ask: Ask) -> Lock:
        """Take or share the lock, and return it; the descriptor is the table's from here on.

        Raises `HeldError` if another owner has it for longer than the caller waits, and `LockUnavailable`.
        Whoever is cancelled in it holds nothing.
        """
        lock = self.find_or_make(ask.mounted.share, ask.image)
        lock.users += 1
        taken = False
        try:
            if self._claims is not None and lock.share.backend.excludes:
                await self._claims.clear(lock.key[1:], ask.mode, ask.wait)
                await self.clear_heirloom(lock.key[1:])
            waiter = lock.enter(ask.owner)
            try:
                await self._wait_and_take(lock, waiter, ask)
            finally:
                lock.leave(waiter)
            taken = True
            return lock
        except HeldError as error:
            self._refused(ask, error)
            raise
        except LockUnavailable as error:
            log.info("refused: %s for %s (%s); %s", ask.holder.path, ask.holder, ask.mode.value, error.message)
            raise
        finally:
            if ask.recorded and not taken:
                self._recorder.now(lock, ask.mounted, ask.image, ask.owner, ask.mode)
            lock.users -= 1
            if lock.fd is not ask.fd:
                ask.fd.close()
            self.forget_if_idle(lock)

    async def clear_heirloom(self, identity: Identity) -> None:
        """Return when no lock of the last lockd is in the way.  Raises `LockUnavailable`."""
        if self._heirlooms is not None:
            await self._heirlooms.clear(identity)

    async def _wait_and_take(self, lock: Lock, waiter: Waiter, ask: Ask) -> None:
        begin = trio.current_time()
        here_until, elsewhere_until = begin + max(ask.wait, LOCAL_GRACE), begin + ask.wait
        pause = POLL_FIRST
        while True:
            last = trio.current_time() >= here_until
            look_again = here_until
            # Who has waited in vain behind others gets one try out of turn: a refusal needs a holder.
            if lock.queue[0] is waiter or last:
                blocker = lock.blocker(ask.owner, ask.mode)
                if blocker is None:
                    try:
                        if await self._take(lock, ask):
                            return
                    except Busy as busy:
                        if trio.current_time() >= elsewhere_until:
                            raise HeldError(busy.holder, here=False) from None
                        look_again = min(elsewhere_until, trio.current_time() + pause)
                        pause = min(pause * 1.5, POLL_LAST)
                elif last:
                    raise HeldError(blocker, here=True)
            with trio.move_on_at(look_again):
                await waiter.turn.wait()
            waiter.turn = trio.Event()

    async def _take(self, lock: Lock, ask: Ask) -> bool:
        """Take or strengthen the grant, and add the hold.  Return False if an owner here was faster."""
        if lock.lost:
            raise LockUnavailable(
                "the lock on this image was lost; it can be had again when all who have it open for writing are gone"
            )
        if lock.share is not ask.mounted.share:
            raise LockUnavailable(
                f"the image is locked by way of {lock.share.source}, which {ask.mounted.share.source} overlaps with"
            )
        if lock.covers(ask.mode):
            self._granting.want(lock, ask)
            ask.first = lock.add(ask.mounted, ask.owner, ask.mode, ask.holder, ask.node)
            return True

        async def work(job: Job[bool]) -> bool:
            with ask.fd.in_use():
                async with lock.transition:
                    return await self._granting.take(lock, ask, job)

        return await lock.share.storage.run(lock, work)

    def _refused(self, ask: Ask, error: HeldError) -> None:
        path = ask.holder.path
        log.info("refused: %s for %s (%s); it is held by %s", path, ask.holder, ask.mode.value, error.holder)
        self._events.publish(
            Event(
                kind="refused",
                time=time.time(),
                mountpoint=ask.mounted.mount.mountpoint,
                image=path,
                mode=ask.mode.value,
                holder=HolderInfo.of(error.holder, here=error.here),
                owner=HolderInfo.of(ask.holder, here=True),
            )
        )

    # Release ---------------------------------------------------------------------------------

    async def release(self, mounted: Mounted, dev: int, ino: int, owner: str, mode: Mode) -> None:
        """Take one hold away, and give the lock back if it was the last.

        Returns when that is done, or when the storage does not answer in time: it is done then as soon as
        it does. Raises `NotHeld`.
        """
        lock = self.locks.get(_key(mounted.share, dev, ino))
        if lock is None or not lock.remove(mounted.mount_id, owner, mode):
            raise NotHeld(dev, ino)
        if lock.grant is not None:
            self._recorder.now(lock, mounted, lock.grant.image, owner, mode)
        lock.kick()
        if lock.unsettled:
            await lock.share.storage.insist(lock, partial(self._settle_alone, lock))
        self.forget_if_idle(lock)

    def abandon(self, mounted: Mounted) -> list[Lock]:
        """Take all holds of a mount away.  Return the locks that are to be settled now."""
        touched = [lock for lock in self.locks.values() if lock.remove_mount(mounted.mount_id)]
        for lock in touched:
            lock.kick()
        return touched

    def abandon_one(self, mounted: Mounted, lock: Lock) -> None:
        """Take the holds of a mount on one lock away; it is to be settled now."""
        _, dev, ino = lock.key
        holds = [(hold.owner, hold.mode) for hold in lock.holds.values() if hold.mounted is mounted]
        self._recorder.free(mounted.mount_id, dev, ino, holds)
        if lock.remove_mount(mounted.mount_id):
            lock.kick()

    def is_safe(self, mounted: Mounted, claimed: Claimed) -> bool:
        """Say whether a mount has a hold that it claims, and may write under it."""
        lock = self.locks.get(_key(mounted.share, claimed.dev, claimed.ino))
        hold = (mounted.mount_id, claimed.owner, Mode(claimed.mode))
        return lock is not None and hold in lock.holds and not lock.lost

    def keep_only(self, mounted: Mounted, claims: set[Claimed]) -> list[Lock]:
        """Take all holds of a mount away but those that are claimed; return the locks that are to be settled."""
        touched: list[Lock] = []
        for lock in self.held_by(mounted):
            for key, hold in list(lock.holds.items()):
                claimed = Claimed(lock.key[1], lock.key[2], hold.mode.value, hold.owner)
                if hold.mounted is not mounted:
                    continue
                if claimed in claims:
                    hold.count = 1  # a mount has each hold once, whoever shares it there
                else:
                    del lock.holds[key]
                    self._recorder.free(mounted.mount_id, lock.key[1], lock.key[2], [(hold.owner, hold.mode)])
                    touched.append(lock)
            lock.kick()
        return touched

    def kept_for(self, mounted: Mounted, dev: int, ino: int) -> tuple[int | None, list[int]]:
        """Return the token of the lock of an image that a mount holds, and the descriptors that it has to keep."""
        lock = self.locks.get(_key(mounted.share, dev, ino))
        if lock is None or lock.grant is None or lock.fd is None or not lock.is_held_by(mounted):
            return None, []
        return lock.grant.token, lock.kept

    def held_by(self, mounted: Mounted) -> list[Lock]:
        """Return the locks that are held through a mount."""
        return [lock for lock in self.locks.values() if lock.is_held_by(mounted)]

    async def settle(self, lock: Lock) -> None:
        """Give back what is not wanted any more, however long it takes."""
        if lock.unsettled:
            await lock.share.storage.finish(lock, partial(self._settle_alone, lock))
        self.forget_if_idle(lock)

    async def _settle_alone(self, lock: Lock, _: Job[None]) -> None:
        async with lock.transition:
            await self._granting.settle(lock)
        lock.kick()
        self.forget_if_idle(lock)

    # What else there is ----------------------------------------------------------------------

    async def inspect(self, mounted: Mounted, image: Image, fd: Descriptor) -> list[HolderInfo]:
        """Return who holds an image, here or on another host; the descriptor is the table's from here on."""
        share = mounted.share
        lock = self.find_or_make(share, image)
        lock.users += 1

        async def work(_: Job[list[HolderInfo]]) -> list[HolderInfo]:
            with fd.in_use():
                async with lock.transition:
                    await self._granting.settle(lock)
                    if lock.holds:
                        return [HolderInfo.of(each, here=True) for each in lock.holders()]
                    claimed = self._claims.holders(lock.key[1:]) if self._claims is not None else []
                    if claimed:
                        return [HolderInfo.of(each, here=True) for each in claimed]
                    if share.backend.excludes:
                        await self.clear_heirloom(lock.key[1:])
                    found = await share.backend.inspect(image)
                    return [] if found is None else [HolderInfo.of(found)]

        try:
            if lock.holds:
                return [HolderInfo.of(each, here=True) for each in lock.holders()]
            return await share.storage.run(lock, work)
        finally:
            fd.close()
            lock.users -= 1
            self.forget_if_idle(lock)

    def lose(self, share: Share, grant: Grant) -> Lock | None:
        """Take note that a grant is no longer safe: nothing more is granted for it until its holders are
        gone.

        Return its lock, None if it was given back meanwhile.
        """
        lock = self.locks.get(_key(share, grant.image.dev, grant.image.ino))
        if lock is None or lock.grant is not grant:
            return None
        self.mark_lost(lock, f"backend {share.backend_name} can no longer keep it")
        return lock

    def mark_lost(self, lock: Lock, reason: str) -> None:
        """Grant nothing more of a lock until its holders are gone."""
        if lock.lost:
            return
        lock.lost = True
        self._recorder.lost(lock)
        log.error("lost the lock on %s: %s; held here by %s", path_of(lock), reason, _people(lock.holders()))
        for hold in lock.holds.values():
            self._events.publish(
                Event(
                    kind="lost",
                    time=time.time(),
                    mountpoint=hold.mounted.mount.mountpoint,
                    image=hold.holder.path,
                    mode=hold.mode.value,
                    owner=HolderInfo.of(hold.holder, here=True),
                    reason=reason,
                )
            )
        lock.kick()

    def find(self, targets: Sequence[FenceTarget]) -> list[list[Lock]]:
        """Return for each target the locks that are held here: more than one if several files had that path."""
        by_path: dict[str, dict[Key, Lock]] = {}
        by_inode: dict[tuple[int, int], list[Lock]] = {}
        for lock in self.locks.values():
            if lock.grant is not None and lock.holds:
                by_inode.setdefault(lock.key[1:], []).append(lock)
                by_path.setdefault(_storage_path(lock), {})[lock.key] = lock
                for hold in lock.holds.values():
                    by_path.setdefault(hold.holder.path, {})[lock.key] = lock
        return [
            list(by_path.get(each.path, {}).values()) if each.path else by_inode.get((each.dev, each.ino), [])
            for each in targets
        ]

    def kept(self) -> Iterator[tuple[str, list[int]]]:
        """Yield what the vault is to keep of all locks, by key."""
        for lock in self.locks.values():
            if lock.kept and lock.backed and lock.share.backend.excludes:
                yield lock_key(*lock.key[1:]), lock.kept

    def has(self, identity: Identity) -> bool:
        """Say whether there is a lock on an image, of whatever mount."""
        lock = self.locks.get((0, *identity))
        return lock is not None and lock.grant is not None

    def uses(self, share: Share) -> bool:
        """Say whether there is any lock of this share."""
        return any(lock.share is share for lock in self.locks.values())

    def find_or_make(self, share: Share, image: Image) -> Lock:
        """Return the lock of an image; the caller counts itself among its `users` before it waits for anything."""
        key = _key(share, image.dev, image.ino)
        lock = self.locks.get(key)
        if lock is None:
            lock = self.locks[key] = Lock(key, share, self.forget_if_idle)
        return lock

    def forget_if_idle(self, lock: Lock) -> None:
        """Drop a lock that nothing would be forgotten with."""
        if lock.idle and self.locks.get(lock.key) is lock:
            del self.locks[lock.key]

def _key(share: Share, dev: int, ino: int) -> Key:
    return (0 if share.backend.excludes else share.number, dev, ino)


def _storage_path(lock: Lock) -> str:
    if lock.grant is None or lock.mount is None:
        return "?"
    return f"{lock.mount.mount.source.rstrip('/')}/{text.from_bytes(lock.grant.image.relative)}"


def _people(holders: Iterable[Holder]) -> str:
    return "; ".join(str(each) for each in holders) or "nobody"


__all__ = ["LOCAL_GRACE", "Ask", "Table"]
