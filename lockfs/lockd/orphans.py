"""Mounts of the last lockd whose daemon has died too: their connection has ended, and no error stops who has files of
them open.  Data that bypasses the daemon is written on, and nobody has a lock for it any more.

So before anything is granted, all processes are looked through (`lockfs.linux.holders`) for those that can still write.
Each image that one of them can write to stays refused, in its name, until the last of them has closed it; or they are
killed, if the mount has the option ``orphans=kill``.  As soon as a mount of the same directory is there the lock is
taken for them, so that other hosts are refused, too; where another host was faster they are killed.

What no list of processes shows is not found: a descriptor on its way through a socket, a loop device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container

import trio

from lockfs.backend import Mode
from lockfs.linux import holders, mountinfo, process
from lockfs.linux.holders import UNKNOWN_INO, Use
from lockfs.lockd.claims import Claim, Claims
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.state import Identity, ImageState, MountIs

FIRST_PAUSE, LAST_PAUSE = 0.1, 1.0
"""Seconds between two looks at all processes."""
FSTYPE = "fuse.lockfs"

log = logging.getLogger(__name__)


class Orphans:
    """Finds out what has become of mounts that do not come back.

    Its tasks live in *nursery*.  *is_back* says whether a mount has come back, and *is_served* whether a device number
    belongs to a mount that has.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        claims: Claims,
        recorder: Recorder,
        is_back: Callable[[str], bool],
        is_served: Callable[[int], bool],
    ) -> None:
        self._nursery = nursery
        self._claims = claims
        self._recorder = recorder
        self._is_back = is_back
        self._is_served = is_served
        self._looks: dict[str, trio.Event] = {}

    def begin(self) -> None:
        """Look after all mounts of the last lockd."""
        for claim in self._claims.all():
            self._looks[claim.mount_id] = trio.Event()
            self._nursery.start_soon(self._follow, claim)

    async def looked(self, claim: Claim) -> None:
        """Return when it is known which images of a dead mount can still be written to."""
        await self._looks[claim.mount_id].wait()

    async def _follow(self, claim: Claim) -> None:
        """Wait for the mount to come back, or its daemon to die; then see to it that nothing more is written."""
        try:
            await _end_of_daemon(claim.mount.mount)
            if self._is_settled(claim) or self._is_back(claim.mount_id):
                return  # what becomes of it now is known to whoever serves it
            await self.see_off(claim)
        finally:
            self._looks[claim.mount_id].set()

    def _is_settled(self, claim: Claim) -> bool:
        return self._claims.get(claim.mount_id) is not claim

    async def see_off(self, claim: Claim) -> None:
        """Free the images of a dead mount as soon as nobody can write to them by it; return when that is done."""
        mount = claim.mount.mount.mount
        self._claims.orphan(claim)
        self._looks.setdefault(claim.mount_id, trio.Event())
        log.info("the daemon of %s died while no lockd ran", mount.mountpoint)
        told: set[Identity] = set()
        pause = FIRST_PAUSE
        while claim.images:
            used = await self._used(claim)
            for identity in [each for each in claim.images if each not in used]:
                self._free(claim, identity)
            self._looks[claim.mount_id].set()
            for identity in claim.images.keys() - told:
                told.add(identity)
                image, uses = claim.images[identity], used[identity]
                log.error("%s can be written to without a lock, since both daemons had died, by %s",
                          image.image.path, _who(uses))  # fmt: skip
            if mount.options.get("orphans") == "kill":
                kill_all([use for uses in used.values() for use in uses], "it was left behind by both daemons")
            if claim.images:
                await trio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)
        self._claims.settle(claim)
        self._recorder.left(claim.mount_id)
        log.info("nobody can write by way of %s any more", mount.mountpoint)

    def _free(self, claim: Claim, identity: Identity) -> None:
        holds = [(by.owner.key, Mode(by.mode)) for by in claim.images[identity].holds.values()]
        self._recorder.free(claim.mount_id, *identity, holds)
        self._claims.settle_image(claim, identity)

    async def _used(self, claim: Claim) -> dict[Identity, list[Use]]:
        """Return by whom which images of a dead mount can still be written to."""
        dev = self._device(claim)
        if dev is None:
            return {}
        while True:
            try:
                uses = await trio.to_thread.run_sync(holders.uses, dev, _nodes(claim))
            except (holders.Incomplete, OSError) as error:
                log.info("images of %s stay locked: %s", claim.mount.mount.mount.mountpoint, error)
                await trio.sleep(LAST_PAUSE)
            else:
                return {
                    identity: found
                    for identity, image in claim.images.items()
                    if (found := [use for use in uses if _keeps(use, image)])
                }

    def _device(self, claim: Claim) -> int | None:
        """Return the device number by which files of a dead mount are known; None if nobody can write to them."""
        attached = claim.mount.attached
        if attached is None:
            # It had only begun to serve.
            there = mountinfo.at(os.fsencode(claim.mount.mount.mount.mountpoint))
            return there.dev if there is not None and there.fstype == FSTYPE else None
        if attached.data != "passthrough" or self._is_served(attached.dev):
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


def _nodes(claim: Claim) -> set[int]:
    return {node for image in claim.images.values() for node in image.nodes}


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
    finally:
        os.close(pidfd)
