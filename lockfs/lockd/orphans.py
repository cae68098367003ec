"""Mounts of the last lockd whose daemon has died too.

Where the vault has kept what that takes, another daemon goes on.  If it has died as well, the connection has ended, and
no error stops who has files of the mount open.  Data that bypasses the daemon is written on, and nobody has a lock for
it any more.

So before anything is granted, all processes are looked through (`lockfs.linux.holders`) for those that can still write.
Each image that one of them can write to stays refused, in its name, until the last of them has closed it; or they are
killed, if the mount has the option ``orphans=kill``.  As soon as a mount of the same directory is there the lock is
taken for them, so that other hosts are refused, too; where another host was faster they are killed.

What no list of processes shows is not found: a descriptor on its way through a socket, a loop device.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from lockfs.backend import Busy, Mode
from lockfs.errors import LockfsError
from lockfs.linux import holders, mountinfo, process
from lockfs.linux.holders import UNKNOWN_INO, Use
from lockfs.lockd.adoption import Adoption
from lockfs.lockd.claims import Claim, Claims
from lockfs.lockd.lock import Lock
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.share import Mounted
from lockfs.lockd.state import Identity, ImageState, MountIs
from lockfs.lockd.table import Table
from lockfs.protocol import hung

FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
"""Seconds between two looks at all processes."""
ABSENCE = hung.HANG + 2.0
"""Seconds for a daemon that lives to come back, which takes well under one: then it hangs, as one that was stopped."""
FSTYPE = "fuse.lockfs"

log = logging.getLogger(__name__)


class Places(Protocol):
    """What `Orphans` asks of `Shares`."""

    def is_back(self, mount_id: str) -> bool:
        """Say whether a mount has come back."""

    def serves(self, dev: int) -> bool:
        """Say whether a mount that is attached has this device number."""

    def ghost(self, claim: Claim) -> Mounted | None:
        """Return what stands for a dead mount if another mount of its directory is there, else None."""

    async def free(self, ghost: Mounted, locks: Sequence[Lock]) -> None:
        """Free locks of a dead mount."""

    def is_kept(self, mount_id: str) -> bool:
        """Say whether there is what `revive` takes."""

    async def revive(self, claim: Claim) -> bool:
        """Have a successor go on with a dead mount; return False if what that takes is not there."""

    async def bury(self, claim: Claim) -> None:
        """Forget a dead mount."""


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A dead mount that is being looked after; `done` is set when nothing of it is left, or it has come back."""

    claim: Claim
    done: trio.Event = field(default_factory=trio.Event)


class Orphans:
    """Finds out what has become of mounts that do not come back.  Its tasks live in *nursery*."""

    def __init__(
        self,
        nursery: trio.Nursery,
        table: Table,
        claims: Claims,
        adoption: Adoption,
        recorder: Recorder,
        places: Places,
    ) -> None:
        self._nursery = nursery
        self._table = table
        self._claims = claims
        self._adoption = adoption
        self._recorder = recorder
        self._places = places
        self._seen_off: dict[str, _Begun] = {}

    def begin(self) -> None:
        """Look after all mounts of the last lockd."""
        for claim in self._claims.all():
            self._nursery.start_soon(self._follow, claim)

    async def _follow(self, claim: Claim) -> None:
        """Wait for the mount to come back, or its daemon to die; then see to it that nothing more is written."""
        with trio.move_on_after(ABSENCE) as absence:
            await _end_of_daemon(claim.mount.mount)
        if self._claims.get(claim.mount_id) is not claim or self._places.is_back(claim.mount_id):
            return
        if absence.cancelled_caught:
            if self._places.is_kept(claim.mount_id):
                _kill_daemon(claim.mount.mount)
            await _end_of_daemon(claim.mount.mount)
            if self._claims.get(claim.mount_id) is not claim or self._places.is_back(claim.mount_id):
                return
        if not await self._places.revive(claim):
            await self.see_off(claim)

    async def see_off(self, claim: Claim) -> None:
        """Free the images of a dead mount as soon as nobody can write to them by it; return when that is done.

        The end of its daemon and that of its connection both lead here, in any order: it is done once.
        """
        if (begun := self._seen_off.get(claim.mount_id)) is not None:
            await begun.done.wait()
            return
        self._seen_off[claim.mount_id] = begun = _Begun(claim)
        await self._see_off(claim)
        del self._seen_off[claim.mount_id]
        begun.done.set()

    async def _see_off(self, claim: Claim) -> None:
        mount = claim.mount.mount.mount
        self._claims.orphan(claim)
        log.info("the daemon of %s died while no lockd ran", mount.mountpoint)
        images, told = dict(claim.images), set[Identity]()
        pause = FIRST_PAUSE
        while not self._places.is_back(claim.mount_id):
            used = await self._used(claim, images)
            ghost = self._places.ghost(claim) if used else None
            await self._free(claim, [identity for identity in images if identity not in used])
            images = {identity: images[identity] for identity in used}
            if not images:
                break
            for identity in images.keys() - told:
                log.error("%s can be written to without a lock, since both daemons had died, by %s",
                          images[identity].image.path, _who(used[identity]))  # fmt: skip
            told |= images.keys()
            if mount.options.get("orphans") == "kill":
                kill_all([use for uses in used.values() for use in uses], "it was left behind by the daemons")
            elif ghost is not None:
                await self._lock(ghost, claim, used)
            await trio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        if self._places.is_back(claim.mount_id):
            return  # a successor of its daemon was being started, and goes on
        self._claims.settle(claim)
        self._recorder.left(claim.mount_id)
        await self._places.bury(claim)
        log.info("nobody can write by way of %s any more", mount.mountpoint)

    async def _lock(self, ghost: Mounted, claim: Claim, used: dict[Identity, list[Use]]) -> None:
        """Take the locks of images for those who can write to them."""
        for identity, image in list(claim.images.items()):
            try:
                await self._adoption.lock_for_orphans(ghost, claim, identity)
                log.warning("%s is locked again", image.image.path)
            except Busy as error:
                kill_all(used.get(identity, []), f"it can write to {image.image.path}, which is {error}")
            except (LockfsError, OSError) as error:
                log.info("%s cannot be locked: %s", image.image.path, error)

    async def _free(self, claim: Claim, identities: Sequence[Identity]) -> None:
        for identity in identities:
            if (image := claim.images.get(identity)) is not None:
                holds = [(by.owner.key, Mode(by.mode)) for by in image.holds.values()]
                self._recorder.free(claim.mount_id, *identity, holds)
                self._claims.settle_image(claim, identity)
        if (ghost := self._places.ghost(claim)) is not None:
            locks = [lock for lock in self._table.held_by(ghost) if lock.key[1:] in identities]
            await self._places.free(ghost, locks)

    async def kill(self) -> None:
        """End all who can still write to images that only this lockd keeps locked."""
        for claim in [each.claim for each in self._seen_off.values()]:
            locked = {lock.key[1:] for lock in self._table.locks.values() if _is_held_by(lock, claim)}
            images = {each: claim.before[each] for each in locked if each in claim.before}
            for uses in (await self._used(claim, images)).values():
                kill_all(uses, "lockd stops, and nobody else keeps its lock")

    async def _used(self, claim: Claim, images: Mapping[Identity, ImageState]) -> dict[Identity, list[Use]]:
        """Return by whom which images of a dead mount can still be written to."""
        dev = self._device(claim)
        if dev is None:
            return {}
        nodes = {node for image in images.values() for node in image.nodes}
        while True:
            try:
                uses = await trio.to_thread.run_sync(holders.uses, dev, nodes)
            except (holders.Incomplete, OSError) as error:
                log.info("images of %s stay locked: %s", claim.mount.mount.mount.mountpoint, error)
                await trio.sleep(LAST_PAUSE)
            else:
                return {
                    identity: found
                    for identity, image in images.items()
                    if (found := [use for use in uses if _keeps(use, image)])
                }

    def _device(self, claim: Claim) -> int | None:
        """Return the device number by which files of a dead mount are known; None if nobody can write to them."""
        attached = claim.mount.attached
        if attached is None:
            # It had only begun to serve.
            there = mountinfo.at(os.fsencode(claim.mount.mount.mount.mountpoint))
            return there.dev if there is not None and there.fstype == FSTYPE else None
        if attached.data != "passthrough" or self._places.serves(attached.dev):
            return None
        others = any(each.dev == attached.dev and each.fstype != FSTYPE for each in mountinfo.read())
        return None if others else attached.dev  # the number of a filesystem that has ended may get another's


def kill_all(uses: list[Use], why: str) -> None:
    """End processes that no error stops."""
    for pid, use in {use.pid: use for use in uses}.items():
        command = process.command(pid)
        try:
            if holders.kill(use):
                log.warning("killed process %d (%s): %s", pid, command, why)
        except PermissionError:
            log.error("process %d (%s) cannot be killed: %s", pid, command, why)


def _keeps(use: Use, image: ImageState) -> bool:
    """Say whether a use needs the lock of an image.  Where it was taken to read, too, readers do."""
    if use.how == "ring" and use.ino == UNKNOWN_INO:
        return True
    nodes: Container[int] = image.nodes
    shared = all(by.mode == Mode.SHARED.value for by in image.holds.values())
    return (use.writable or shared) and use.ino in nodes


def _is_held_by(lock: Lock, claim: Claim) -> bool:
    return any(hold.mounted.mount_id == claim.mount_id for hold in lock.holds.values())


def _who(uses: list[Use]) -> str:
    return ", ".join(f"process {pid} ({process.command(pid)})" for pid in sorted({use.pid for use in uses}))


async def _end_of_daemon(mount: MountIs) -> None:
    """Return when the daemon of a mount has ended; it may have done so long ago."""
    try:
        pidfd = os.pidfd_open(mount.pid)
    except ProcessLookupError:
        return
    try:
        if process.of_pid(mount.pid) != process.Process(mount.pid, mount.start):
            return  # the number is another's now
        await trio.lowlevel.wait_readable(pidfd)
        _reap(mount.pid)
    finally:
        os.close(pidfd)


def _kill_daemon(mount: MountIs) -> None:
    """Kill a daemon that does not come back, if it has not ended: a successor can go on with the mount."""
    try:
        pidfd = os.pidfd_open(mount.pid)
    except ProcessLookupError:
        return
    try:
        if process.of_pid(mount.pid) == process.Process(mount.pid, mount.start):
            log.error(
                "the daemon of %s (process %d) has not come back for %g s: it is killed, and another one started",
                mount.mount.mountpoint, mount.pid, ABSENCE,
            )  # fmt: skip
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def _reap(pid: int) -> None:
    """A lockd that has replaced itself is the parent of daemons that it does not know to have started."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
