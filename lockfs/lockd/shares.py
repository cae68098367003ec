"""Which mounts there are on this host: how one comes, gets a successor of its daemon, and goes."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Sequence
from functools import partial

import trio

from lockfs.errors import LockfsError, MountError
from lockfs.linux import fuseinode
from lockfs.lockd import nameless
from lockfs.lockd.aftermath import Aftermath
from lockfs.lockd.attachment import Attachment
from lockfs.lockd.claims import Claim
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.events import Events
from lockfs.lockd.fence import Fencer
from lockfs.lockd.lock import Lock
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.revival import RESTARTS, Revival, watch
from lockfs.lockd.share import Mounted, Share
from lockfs.lockd.sources import Sources
from lockfs.lockd.state import MountIs
from lockfs.lockd.storage import STORAGE_TIMEOUT
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Table
from lockfs.lockd.vault import Vault
from lockfs.protocol import messages, start
from lockfs.protocol.errors import UnknownMount
from lockfs.protocol.varlink import ProtocolError
from lockfs.steps import step
from lockfs.vault.wire import mount_key

SETTLERS = 16
"""Locks of a mount that is gone that are given back at once."""

RESTORE_PAUSE = 1.0
"""Seconds before it is tried again to go on with a mount whose backend does not start."""
REPLACE_POLL = 0.02
"""Seconds between two looks whether a daemon was replaced."""

log = logging.getLogger(__name__)


class Shares:
    """The shares of this host and their mounts.  *host* is the name of this host among the others.

    `leaving` counts the mounts that are gone and whose locks are still being given back.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        table: Table,
        fencer: Fencer,
        events: Events,
        recorder: Recorder,
        succession: Succession,
        host: str,
        run_dir: str,
        vault: Vault | None = None,
    ) -> None:
        self.mounts: dict[str, Mounted] = {}
        self.leaving = 0
        self.host = host
        self._nursery = nursery
        self._table = table
        self._fencer = fencer
        self._events = events
        self._recorder = recorder
        self._succession = succession
        self._run_dir = run_dir
        self._vault = vault or Vault()
        self._sources = Sources(nursery, table, fencer, succession, host, run_dir, self._vault)

    def get(self, mount_id: str, pid: int) -> Mounted:
        """Return the mount that process *pid* registered.  Raises `UnknownMount`."""
        mounted = self.mounts.get(mount_id)
        if mounted is None or mounted.pid != pid or mounted.gone:
            raise UnknownMount(mount_id)
        return mounted

    def all(self) -> list[Share]:
        """Return the shares that are open."""
        return self._sources.all()

    def is_back(self, mount_id: str) -> bool:
        """Say whether a mount of the last lockd has come back."""
        there = self.mounts.get(mount_id)
        return there is not None and not there.gone

    def ghost(self, claim: Claim) -> Mounted | None:
        """Return what stands for a dead mount of the last lockd, if its share is there, else None."""
        there = self.mounts.get(claim.mount_id)
        share = self._sources.get(claim.mount.mount.top)
        if there is not None or share is None or share.ended.cancel_called:
            return there
        mount = claim.mount.mount
        ghost = Mounted(mount.mount_id, mount.mount, mount.pid, share, mount.since, detached=True, gone=True)
        self.mounts[mount.mount_id] = share.mounts[mount.mount_id] = ghost
        return ghost

    async def free(self, ghost: Mounted, locks: Sequence[Lock]) -> None:
        """Free locks of a dead mount."""
        for lock in locks:
            self._table.abandon_one(ghost, lock)
        await self._settle(locks)

    async def bury(self, claim: Claim) -> None:
        """Forget a dead mount."""
        start.remove_journal(self._run_dir, claim.mount_id)
        ghost = self.mounts.pop(claim.mount_id, None)
        if ghost is None:
            self._vault.forget(claim.mount_id)
            return
        share = ghost.share
        ghost.detach()
        del share.mounts[ghost.mount_id]
        await self._sources.close_if_unused(share)

    def serves(self, dev: int) -> bool:
        """Say whether a mount that is attached has this device number."""
        return any(each.attachment is not None and each.attachment.dev == dev for each in self.mounts.values())

    async def join(self, mount: messages.Mount, source_fd: int, pid: int, mount_id: str = "") -> Mounted:
        """Register a mount; the descriptor stays the caller's.

        With *mount_id* it is one that the last lockd has known already.  Raises `MountError` if the share cannot be
        mounted so.
        """
        try:
            async with self._sources.shared(mount, source_fd) as share:
                mounted = self._admit(mount, share, source_fd, pid, mount_id)
        except MountError:
            raise
        except (LockfsError, OSError) as error:
            message = error.message if isinstance(error, LockfsError) else str(error)
            raise MountError(message, hint=getattr(error, "hint", "")) from error
        what = "back" if mount_id else "mounted"
        log.info("%s: %s on %s, backend %s, process %d", what, mount.source, mount.mountpoint, mount.backend, pid)
        self._tell(what, mounted)
        return mounted

    def _admit(self, mount: messages.Mount, share: Share, source_fd: int, pid: int, mount_id: str) -> Mounted:
        if mount_id in self.mounts:
            raise MountError(f"{mount.mountpoint} is registered already, by process {self.mounts[mount_id].pid}")
        top = Descriptor(os.dup(source_fd), share.storage.closer)
        mounted = Mounted(mount_id or secrets.token_hex(8), mount, pid, share, source=top, came_back=bool(mount_id))
        try:
            self._succession.register(mounted)
        except BaseException:
            top.close()
            raise
        self.mounts[mounted.mount_id] = share.mounts[mounted.mount_id] = mounted
        return mounted

    def attach(self, mounted: Mounted, call: messages.Attach, root_fd: int, fuse_fd: int) -> None:
        """Keep the root and the connection of a mount; the descriptors are lockd's from here on.

        Raises OSError; then they are still the caller's.
        """
        if mounted.attachment is not None or mounted.detached:
            raise ProtocolError("the mount is attached already")
        self._recorder.attached(mounted, call.dev, call.data)
        mounted.attachment = Attachment.of(call, root_fd, fuse_fd, mounted.pid, self._nursery)
        if call.resumable and RESTARTS:
            self._vault.put(mount_key(mounted.mount_id), mounted.kept)
            if not mounted.came_back:
                mounted.is_whole()
            self._nursery.start_soon(watch, mounted, mounted.attachment)

    async def secure(self, mounted: Mounted) -> None:
        """Have the vault keep what is kept of a mount that has just been attached, before it serves."""
        if mounted.kept and RESTARTS:
            await self._vault.begun()

    async def revive(self, claim: Claim) -> bool:
        """Go on with a mount of the last lockd whose daemon has died, too, if the vault has kept what that takes.

        Return when there is a successor, or none is to be; False if the mount cannot be gone on with.
        """
        kept = self._vault.inherited.get(mount_key(claim.mount_id))
        if kept is None or claim.mount.attached is None:
            return False
        source = os.dup(kept[2])
        mount = claim.mount.mount
        log.info("the daemon of %s died together with the last lockd", mount.mount.mountpoint)
        try:
            mounted = await self._restore(mount, source)
        finally:
            os.close(source)
        if mounted is not None:
            await self.leave(mounted, mounted.pid)
        return mounted is not None

    def is_kept(self, mount_id: str) -> bool:
        """Say whether the vault has kept what it takes to go on with a mount of the last lockd."""
        return mount_key(mount_id) in self._vault.inherited

    async def _restore(self, mount: MountIs, source: int) -> Mounted | None:
        """Have a mount as it was registered with the last lockd; None if that cannot be."""
        for _ in range(RESTARTS):
            try:
                async with self._sources.shared(mount.mount, source) as share:
                    top = Descriptor(os.dup(source), share.storage.closer)
                    mounted = Mounted(mount.mount_id, mount.mount, mount.pid, share, mount.since, top)
                    self.mounts[mounted.mount_id] = share.mounts[mounted.mount_id] = mounted
                    return mounted
            except (LockfsError, OSError) as error:
                log.error("%s cannot be gone on with: %s", mount.mount.mountpoint, error)
            await trio.sleep(RESTORE_PAUSE)
        return None

    def _inherit(self, mounted: Mounted) -> None:
        """Go on with what the vault has kept of a mount, and its dead daemon has not given to this lockd."""
        claim = self._succession.claims.get(mounted.mount_id)
        said = claim.mount.attached if claim is not None else None
        if said is not None and mounted.attachment is None and not mounted.detached:
            if (kept := self._vault.take(mount_key(mounted.mount_id))) is None:
                return
            fuse, root, source, namespace = kept
            os.close(source)
            # The life line of one that had come back has ended, but perhaps not all its threads.
            pid = mounted.pid if mounted.came_back else 0
            mounted.attachment = Attachment.inherited(said, fuse, root, namespace, pid, self._nursery)
            self._nursery.start_soon(watch, mounted, mounted.attachment)
        nameless.inherit(mounted)

    def detach(self, mounted: Mounted) -> bool:
        """Let a mount go that is mounted nowhere any more; return False if its images are still held."""
        if self._table.held_by(mounted):
            return False
        mounted.detach()
        return True

    async def fence_orphans(self) -> None:
        """Cut off who can still write by way of mounts whose daemon is dead: this lockd alone keeps their locks."""
        orphaned = [each for each in self.mounts.values() if each.absent and each.attachment is not None]
        locks = {lock.key: lock for mounted in orphaned for lock in self._table.held_by(mounted)}
        if locks:
            await self._fencer.fence(locks.values(), "lockd stops, and nobody else keeps its lock")
        await self._succession.kill_orphans()

    def resume(self, mount_id: str, token: str, pid: int) -> Mounted:
        """Take note of a successor of a mount daemon.  Raises `UnknownMount` for one that nobody waits for."""
        mounted = self.mounts.get(mount_id)
        if mounted is None or mounted.revival is None or not mounted.revival.admit(token, pid):
            raise UnknownMount(mount_id)
        mounted.pid = pid
        self._recorder.mount(mounted)
        return mounted

    def claim(self, mounted: Mounted, claims: messages.Claim) -> list[messages.Claimed]:
        """Compare what a successor claims with what there is; return what is not safe to write under."""
        if mounted.revival is None:
            raise ProtocolError("only a successor claims what is held")
        unsafe = [each for each in claims.holds if not self._table.is_safe(mounted, each)]
        mounted.revival.claimed.update(claims.holds)
        if claims.last:
            self._nursery.start_soon(self._settle, self._table.keep_only(mounted, mounted.revival.claimed))
        return unsafe

    async def take_over(self, mounted: Mounted) -> list[int]:
        """Let a successor answer the kernel; return what is fenced."""
        if mounted.revival is None:
            raise ProtocolError("only a successor takes a mount over")
        if mounted.keeper is not None:
            await mounted.keeper.stop()
            mounted.keeper = None
        mounted.revival.succeed()
        self._tell("daemon-restarted", mounted)
        if mounted.fenced and mounted.attachment is not None:
            self._nursery.start_soon(_declare_bad, mounted.attachment, sorted(mounted.fenced))
        return sorted(mounted.fenced)

    def check_expendable(self) -> None:
        """Raise `MountError` with the reason if something depends on this very process."""
        for mounted in self.mounts.values():
            if mounted.absent and self._table.held_by(mounted):
                raise MountError(
                    f"the daemon of {mounted.mount.mountpoint} is dead, and only lockd keeps its locks",
                    hint="Wait until it has been started again; or end who uses the mount.",
                )
        for share in self.all():
            if share.storage.overdue:
                raise MountError(f"the storage of {share.source} does not answer")

    async def replace_daemon(self, mount_id: str) -> bool:
        """Have a successor take a mount over, as `replace`.  Raises `UnknownMount`."""
        mounted = self.mounts.get(mount_id)
        if mounted is None:
            raise UnknownMount(mount_id)
        return await self.replace(mounted)

    async def known(self, mounted: Mounted, nodes: Sequence[int]) -> list[int]:
        """Return those nodes of a mount that the kernel knows, or of which it is not certain that it does not."""
        attachment, found = mounted.attachment, dict[int, bool]()
        if attachment is not None:
            call = partial(fuseinode.is_known, attachment.root.number)
            await attachment.requests.for_each(STORAGE_TIMEOUT, call, nodes, found, [attachment.root])
        return [node for node in nodes if found.get(node, True)]

    async def replace(self, mounted: Mounted) -> bool:
        """End the daemon of a mount and have a successor take over; return whether one serves now."""
        attachment, before = mounted.attachment, mounted.restarts
        if attachment is None or not attachment.resumable:
            return False
        attachment.kill_daemon()
        while mounted.restarts == before and not mounted.gone and not mounted.detached:  # noqa: ASYNC110
            await trio.sleep(REPLACE_POLL)
        return mounted.restarts > before

    async def leave(self, mounted: Mounted, pid: int) -> None:
        """The life line of a mount has ended, which was that of process *pid*.

        Have a successor take over, or free what the mount holds as soon as nobody can write by it; return when that is
        done.
        """
        if mounted.revival is not None:
            return  # a successor that failed: the revival sees to it
        if pid != mounted.pid:
            return
        step("revival.before-inheritance")
        self._inherit(mounted)
        attachment = mounted.attachment
        await self._succession.died(mounted)
        step("revival.after-inheritance")
        if attachment is not None and attachment.resumable and mounted.source is not None and RESTARTS:
            revival = mounted.revival = Revival(mounted, attachment, mounted.source, self._run_dir)
            if await revival.run():
                return
            mounted.revival = None
        await self._free(mounted)

    async def _free(self, mounted: Mounted) -> None:
        self.leaving += 1
        mounted.gone = True
        try:
            attachment = mounted.attachment
            if attachment is not None and attachment.data == "passthrough" and self._table.held_by(mounted):
                log.warning("the daemon of %s is dead; what is open there stays locked", mounted.mount.mountpoint)
                self._tell("daemon-gone", mounted)
                keeper = mounted.keep(attachment, self._nursery)
                await Aftermath(mounted, attachment, keeper, self._table, self._settle).run()
            await self._leave(mounted)
        finally:
            self.leaving -= 1

    async def _leave(self, mounted: Mounted) -> None:
        share = mounted.share
        mounted.detach()
        start.remove_journal(self._run_dir, mounted.mount_id)
        del self.mounts[mounted.mount_id]
        del share.mounts[mounted.mount_id]
        locks = self._table.abandon(mounted)
        log.info("unmounted: %s; it leaves %d locks to release", mounted.mount.mountpoint, len(locks))
        self._tell("unmounted", mounted)
        await self._settle(locks)
        await self._succession.gone(mounted)
        await self._sources.close_if_unused(share)

    async def _settle(self, locks: Sequence[Lock]) -> None:
        todo = iter(locks)

        async def settle() -> None:
            for lock in todo:
                await self._table.settle(lock)

        async with trio.open_nursery() as nursery:
            for _ in range(min(SETTLERS, len(locks))):
                nursery.start_soon(settle)

    def _tell(self, kind: str, mounted: Mounted) -> None:
        self._events.publish(messages.Event(kind, time.time(), mountpoint=mounted.mount.mountpoint))


async def _declare_bad(attachment: Attachment, nodes: Sequence[int]) -> None:
    """Have the kernel refuse all I/O on what was fenced while there was no mount daemon."""
    call = partial(fuseinode.fence, attachment.root.number)
    await attachment.requests.for_each(STORAGE_TIMEOUT, call, nodes, {}, [attachment.root])
