"""What the backend has granted for a lock, and how that is brought in line with what is wanted of it.

Invariants:
* The backend is asked by whoever has the lock's `transition`; so calls for one image never overlap.
* What is about to be granted is written down before the backend is asked.
* What was got for a caller that has given up is given back.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import trio

from lockfs import text
from lockfs.backend import Backend, Grant, Holder, Image, Mode
from lockfs.errors import LockfsError
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.events import Events
from lockfs.lockd.lock import Lock
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted
from lockfs.lockd.storage import Job
from lockfs.protocol.messages import Event, HolderInfo
from lockfs.steps import step

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Ask:
    """One acquire: for which mount, of what (`image.fd` is the number of `fd`), how, for whom, and how
    patiently.

    `node` is the number by which the kernel knows the file, 0 if it is not known.  `first` is set if it gives
    this mount its first hold of the lock, `recorded` if it was written down that it is wanted.
    """

    mounted: Mounted
    image: Image
    fd: Descriptor
    mode: Mode
    owner: str
    holder: Holder
    wait: float
    node: int = 0
    first: bool = False
    recorded: bool = False


class Granting:
    """Deals with the backends on behalf of the table."""

    def __init__(self, recorder: Recorder, events: Events) -> None:
        self._recorder = recorder
        self._events = events

    def want(self, lock: Lock, ask: Ask) -> None:
        """Write down what is about to be granted.  Raises `LockUnavailable`."""
        if not ask.recorded:
            self._recorder.wanted(lock, ask.mounted, ask.image, ask.owner, ask.holder, ask.node)
            ask.recorded = True

    async def take(self, lock: Lock, ask: Ask, job: Job[bool]) -> bool:
        """Take or strengthen the grant, and add the hold.  Return False if an owner here was faster, or nobody waits.

        The caller has the transition.  Raises `Busy`, `LockUnavailable`.
        """
        await self.settle(lock)
        if job.given_up() or lock.lost or lock.blocker(ask.owner, ask.mode) is not None:
            return False
        backend = lock.share.backend
        self.want(lock, ask)
        if lock.grant is None:
            step("lockd.before-backend-acquire")
            grant = await backend.acquire(ask.image, ask.mode, ask.holder)
            step("lockd.after-backend-acquire")
            if job.given_up():
                with trio.CancelScope(shield=True):
                    await _give_back(backend, grant)
                return False
            lock.grant, lock.fd, lock.mount, lock.since = grant, ask.fd, ask.mounted, ask.holder.since or time.time()
            lock.keep()
            self._tell("acquired", lock, ask.holder)
            await lock.share.vault.flushed()
        elif lock.grant.mode is Mode.SHARED and ask.mode is Mode.EXCLUSIVE:
            await backend.convert(lock.grant, Mode.EXCLUSIVE, ask.holder)
            if job.given_up():
                with trio.CancelScope(shield=True):
                    await self.settle(lock)
                return False
        ask.first = lock.add(ask.mounted, ask.owner, ask.mode, ask.holder, ask.node)
        return True

    async def settle(self, lock: Lock) -> None:
        """Make the grant as weak as what is wanted.  The caller has the transition."""
        if lock.grant is None or not lock.unsettled:
            return
        backend = lock.share.backend
        if lock.wanted is not None:
            if not lock.backed:
                return
            try:
                await backend.convert(lock.grant, lock.wanted, next(iter(lock.holders())))
            except LockfsError as error:
                # Too strong a lock is safe; whoever wants to share it on another host is told that it is
                # held.
                log.warning("%s stays locked exclusively: %s", path_of(lock), error)
            return
        if lock.backed:
            await _give_back(backend, lock.grant)
        else:
            await _tell_fenced(backend, lock.grant)
        self._tell("released", lock, None)
        lock.keep_no_more()
        if lock.fd is not None:
            lock.fd.close()
        lock.grant, lock.fd, lock.mount, lock.lost, lock.backed = None, None, None, False, True

    def _tell(self, kind: str, lock: Lock, owner: Holder | None) -> None:
        if lock.grant is None or lock.mount is None:
            return
        path = path_of(lock)
        log.debug("%s: %s (%s) %s", kind, path, lock.grant.mode.value, owner or "")
        self._events.publish(
            Event(
                kind=kind,
                time=time.time(),
                mountpoint=lock.mount.mount.mountpoint,
                image=path,
                mode=lock.grant.mode.value,
                owner=HolderInfo.of(owner, here=True) if owner else None,
            )
        )


async def _give_back(backend: Backend, grant: Grant) -> None:
    try:
        step("lockd.before-backend-release")
        await backend.release(grant)
        step("lockd.after-backend-release")
    except LockfsError as error:
        # The descriptors of the lock are closed next, which ends what the storage still has of it.
        log.warning("could not give back the lock on inode %d: %s", grant.image.ino, error)


async def _tell_fenced(backend: Backend, grant: Grant) -> None:
    """All have closed an image whose lock the backend could not take up: so nobody can write to it any more."""
    try:
        await backend.fenced(grant)
    except LockfsError as error:
        log.info("%s", error.message)


def path_of(lock: Lock) -> str:
    """Return the path of the image, for people."""
    return text.from_bytes(lock.grant.image.path) if lock.grant else "?"
