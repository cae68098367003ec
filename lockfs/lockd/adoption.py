"""How a mount that comes back hands over what it holds to a lockd that was started anew.

Invariants:
* No lock is taken here: each is there already, in the descriptors that the mount has kept or on the storage, or it is
  lost; what is lost is fenced.
* What the mount says is true: what the predecessor had granted beside that, the mount was never told of.
* An image stays claimed (`lockfs.lockd.claims`) until its lock is in the table.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec
import trio

from lockfs import text
from lockfs.backend import Grant, GrantLost, Holder, Image, Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd.claims import Claim, Claims
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.fence import Fencer
from lockfs.lockd.lock import Hold, Lock
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted
from lockfs.lockd.state import Identity
from lockfs.lockd.storage import Job
from lockfs.lockd.table import Table
from lockfs.protocol import messages
from lockfs.protocol.messages import HeldBy, HeldImage
from lockfs.protocol.varlink import ProtocolError
from lockfs.steps import step

AGAIN = 1.0
"""Seconds before a backend is asked again whose storage has not answered."""

Before = Mapping[tuple[str, messages.ModeName], HeldBy]
log = logging.getLogger(__name__)


class Adoption:
    """Takes up the locks of mounts that come back.  *host* is the name of this host."""

    def __init__(self, table: Table, claims: Claims, fencer: Fencer, recorder: Recorder, host: str) -> None:
        self._table = table
        self._claims = claims
        self._fencer = fencer
        self._recorder = recorder
        self._host = host

    async def take_up(self, mounted: Mounted, images: Sequence[tuple[HeldImage, int, list[int]]]) -> None:
        """Take up what a mount holds: each image with the descriptor that its lock is on (or -1) and those to keep.

        The descriptors are the table's from here on.  Returns when all is done, or as soon as the storage is too slow.
        """
        async with trio.open_nursery() as nursery:
            for held, fd, keep in images:
                nursery.start_soon(self._take_up, mounted, held, fd, keep)

    def finish(self, mounted: Mounted) -> None:
        """The mount has said all: what it has not mentioned it does not hold."""
        mounted.share.vault.settle_mount(mounted.mount_id)
        claim = self._claims.get(mounted.mount_id)
        if claim is None:
            mounted.is_whole()
            return
        dropped = 0
        for (dev, ino), image in list(claim.images.items()):
            if (dev, ino) in mounted.adopting:
                continue  # it is settled when the storage has answered
            self._recorder.free(
                mounted.mount_id, dev, ino, [(by.owner.key, Mode(by.mode)) for by in image.holds.values()]
            )
            self._claims.settle_image(claim, (dev, ino))
            dropped += 1
        mounted.handed_over = True
        if not mounted.adopting:
            mounted.is_whole()
            self._claims.settle(claim)
        log.info("%s has come back, and holds %d images%s", mounted.mount.mountpoint,
                 len(self._table.held_by(mounted)),
                 f"; {dropped} more it had not been told of" if dropped else "")  # fmt: skip

    async def lock_for_orphans(self, ghost: Mounted, claim: Claim, identity: Identity) -> None:
        """Take the lock of an image for those who can write to it by way of a dead mount, for which *ghost* stands.

        The one exception to the first invariant: they have none.  Raises `LockfsError` (`Busy` if another host has it),
        OSError.
        """
        held = claim.images[identity]
        share = ghost.share
        if not self._claims.shares(claim, identity):
            await self._table.clear_heirloom(identity)
        relative = text.to_bytes(held.image.relative)
        number = await trio.to_thread.run_sync(_open_image, share.top.number, relative, identity)
        fd = Descriptor(number, share.storage.closer)
        message = HeldImage(held.image, list(held.holds.values()))
        image = Image(number, *identity, relative, text.to_bytes(held.image.path))
        lock = self._table.find_or_make(share, image)
        mode, holder = _strongest(message, None), self._holder(message, message.holds[0])
        lock.users += 1

        async def work(_: Job[None]) -> None:
            async with lock.transition:
                if lock.grant is None:
                    lock.grant = await share.backend.acquire(image, mode, holder)
                    lock.fd, lock.mount, lock.since = fd, ghost, holder.since
                    lock.keep()
                self._put(lock, ghost, image, message, held.holds)
                self._claims.settle_image(claim, identity)

        try:
            with fd.in_use():
                await share.storage.run(lock, work)
        finally:
            lock.users -= 1
            if lock.fd is not fd:
                fd.close()
            self._table.forget_if_idle(lock)

    async def _take_up(self, mounted: Mounted, held: HeldImage, fd: int, keep: list[int]) -> None:
        identity = (held.image.dev, held.image.ino)
        if not held.holds:
            raise ProtocolError("an image was handed over that nobody holds")
        claim = self._claims.get(mounted.mount_id)
        known = claim.images.get(identity) if claim is not None else None
        before = dict(known.holds) if known is not None else {}
        descriptor = Descriptor(fd, mounted.share.storage.closer) if fd >= 0 else None
        image = Image(
            fd, *identity, text.to_bytes(held.image.relative), text.to_bytes(held.image.path)
        )  # fmt: skip
        lock = self._table.find_or_make(mounted.share, image)
        mode = _strongest(held, self._claims.strongest(identity))
        lost = held.lost or self._claims.is_lost(identity)
        mounted.adopting.add(identity)
        lock.users += 1

        async def work(_: Job[None]) -> None:
            try:
                async with lock.transition:
                    await self._adopt(lock, mounted, image, mode, descriptor, keep, held, before)
                    self._put(lock, mounted, image, held, before)
            finally:
                lock.users -= 1
                mounted.adopting.discard(identity)
                if claim is not None:
                    self._claims.settle_image(claim, identity)
                    if mounted.handed_over and not mounted.adopting:
                        mounted.is_whole()
                        self._claims.settle(claim)
            if any(lock.blocker(by.owner.key, Mode(by.mode)) for by in held.holds):
                self._fencer.lose_lock(lock, "two owners have it")
            elif lost:
                self._fencer.lose_lock(lock, "it was being fenced when lockd ended")

        if lock.share is not mounted.share:
            log.error("%s is held by way of two sources, %s and %s", held.image.path, lock.share.source,
                      mounted.share.source)  # fmt: skip
        await lock.share.storage.insist(lock, work)

    async def _adopt(
        self, lock: Lock, mounted: Mounted, image: Image, mode: Mode, fd: Descriptor | None, keep: list[int],
        held: HeldImage, before: Before,
    ) -> None:  # fmt: skip
        """Have the backend take up the lock, unless it has done so for another mount.  The caller has `transition`."""
        closer = lock.share.storage.closer
        if lock.grant is not None:
            if fd is not None:
                fd.close()
            closer.close(keep)
            return
        holder = self._holder(held, held.holds[0])
        step("lockd.before-adoption")
        try:
            grant = await _ask(partial(lock.share.backend.adopt, image, mode, holder, keep, held.token), held)
            lock.backed = True
        except GrantLost as error:
            log.error("%s: %s", held.image.path, error)
            closer.close(keep)
            grant, lock.backed = Grant(image, mode), False
        lock.grant, lock.fd, lock.mount = grant, fd, mounted
        lock.since = min((by.since for by in (*held.holds, *before.values()) if by.since), default=time.time())
        step("lockd.after-adoption")
        if lock.backed:
            lock.keep()
        else:
            self._fencer.lose_lock(lock, "its lock was gone when lockd came back")

    def _put(
        self, lock: Lock, mounted: Mounted, image: Image, held: HeldImage, before: Before
    ) -> None:
        """Have the mount hold the image as it says; *before* is what the last lockd had written down."""
        holds = []
        for by in held.holds:
            if (known := before.get((by.owner.key, by.mode))) is not None:
                by = msgspec.structs.replace(by, since=known.since, nodes=[*{*by.nodes, *known.nodes}])
            mode = Mode(by.mode)
            hold = Hold(mounted, by.owner.key, mode, self._holder(held, by), set(by.nodes), by.count)
            lock.put(mounted, by.owner.key, hold)
            holds.append(hold)
        listed = {(by.owner.key, by.mode) for by in held.holds}
        dropped = [by for key, by in before.items() if key not in listed]
        self._recorder.adopted(mounted, image, holds, dropped)

    def _holder(self, held: HeldImage, by: HeldBy) -> Holder:
        owner = by.owner
        path = held.image.path
        return Holder(self._host, Mode(by.mode), owner.pid, owner.command, owner.vm, by.since or time.time(), path)


def _open_image(top: int, relative: bytes, identity: Identity) -> int:
    fd = os.open(relative, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=top)
    info = os.fstat(fd)
    if (info.st_dev, info.st_ino) != identity:
        os.close(fd)
        raise OSError(errno.ESTALE, "another file has its name now")
    return fd


async def _ask(question: Callable[[], Awaitable[Grant]], held: HeldImage) -> Grant:
    while True:
        try:
            return await question()
        except LockUnavailable as error:
            log.warning("%s stays as it is: %s", held.image.path, error)
            await trio.sleep(AGAIN)


def _strongest(held: HeldImage, claimed: Mode | None) -> Mode:
    modes: set[messages.ModeName] = {by.mode for by in held.holds}
    return Mode.EXCLUSIVE if claimed is Mode.EXCLUSIVE or Mode.EXCLUSIVE.value in modes else Mode.SHARED

