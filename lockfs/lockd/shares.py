"""Which shares and mounts there are: registration, the backend of each share, and the end of a mount.

One share has one backend with one set of options, whatever mount it is reached by: two ways to agree on
locks would exclude nobody.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import partial

import trio

from lockfs import options, text
from lockfs.backend import Backend, Context, Spec, find
from lockfs.errors import LockfsError, MountError
from lockfs.linux import fuseinode
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
from lockfs.lockd.storage import STORAGE_TIMEOUT, Job, Storage
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Table
from lockfs.protocol import messages, start
from lockfs.protocol.errors import UnknownMount
from lockfs.protocol.varlink import ProtocolError

SETTLERS = 16
"""Locks of a mount that is gone that are given back at once."""

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
        self._shares: dict[tuple[int, int], Share] = {}
        self._gates: dict[tuple[int, int], trio.Lock] = {}

    def get(self, mount_id: str, pid: int) -> Mounted:
        """Return the mount that process *pid* registered.  Raises `UnknownMount`."""
        mounted = self.mounts.get(mount_id)
        if mounted is None or mounted.pid != pid or mounted.gone:
            raise UnknownMount(mount_id)
        return mounted

    def all(self) -> list[Share]:
        """Return the shares that are open."""
        return list(self._shares.values())

    def is_back(self, mount_id: str) -> bool:
        """Say whether a mount of the last lockd has come back."""
        there = self.mounts.get(mount_id)
        return there is not None and not there.gone

    def ghost(self, claim: Claim) -> Mounted | None:
        """Return what stands for a dead mount of the last lockd, if its share is there, else None."""
        there = self.mounts.get(claim.mount_id)
        share = self._shares.get(claim.mount.mount.top)
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
            return
        share = ghost.share
        ghost.detach()
        del share.mounts[ghost.mount_id]
        async with self._gates[share.dev, share.ino]:
            if self._is_unused(share):
                await self._close(share)

    def serves(self, dev: int) -> bool:
        """Say whether a mount that is attached has this device number."""
        return any(each.attachment is not None and each.attachment.dev == dev for each in self.mounts.values())

    async def join(self, mount: messages.Mount, source_fd: int, pid: int, mount_id: str = "") -> Mounted:
        """Register a mount; the descriptor stays the caller's.

        With *mount_id* it is one that the last lockd has known already.  Raises `MountError` if the share cannot be
        mounted so.
        """
        try:
            with trio.fail_after(STORAGE_TIMEOUT):
                info = await trio.to_thread.run_sync(os.fstat, source_fd, abandon_on_cancel=True)
                spec = await trio.to_thread.run_sync(find, mount.backend)
            values = parse_options(spec, mount.options)
            identity = (info.st_dev, info.st_ino)
            async with self._gates.setdefault(identity, trio.Lock()):
                share = self._shares.get(identity)
                if share is not None and self._is_unused(share):
                    await self._close(share)
                    share = None
                if share is None:
                    share = await self._open(mount, source_fd, identity, spec, values)
                _check_same(share, mount, values)
                mounted = self._admit(mount, share, source_fd, pid, mount_id)
        except trio.TooSlowError:
            raise MountError(f"the storage of {mount.source} does not answer") from None
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
        mounted = Mounted(mount_id or secrets.token_hex(8), mount, pid, share, source=top)
        try:
            self._succession.register(mounted)
        except BaseException:
            top.close()
            raise
        self.mounts[mounted.mount_id] = share.mounts[mounted.mount_id] = mounted
        return mounted

    async def _open(
        self,
        mount: messages.Mount,
        source_fd: int,
        identity: tuple[int, int],
        spec: Spec,
        values: Mapping[str, object],
    ) -> Share:
        storage = Storage(self._nursery, mount.source)
        top = Descriptor(os.dup(source_fd), storage.closer)
        try:
            context = _context(mount, top.number, values, self.host, self._run_dir)
            backend = await trio.to_thread.run_sync(spec.load, context)
            share = Share(*identity, mount.source, mount.backend, values, top, backend, storage)
            await storage.run(share, partial(_start, backend, top))
        except BaseException:
            top.close()
            raise
        self._shares[identity] = share
        self._nursery.start_soon(self._attend, share)
        return share

    async def _attend(self, share: Share) -> None:
        with share.ended:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._inherit, share)
                async for grant in share.backend.lost():
                    self._fencer.lose(share, grant)

    async def _inherit(self, share: Share) -> None:
        await self._succession.claims.settled()
        try:
            await share.storage.finish(share, lambda _: share.backend.inherit())
        except LockfsError as error:
            log.warning("what the last lockd held on %s could not be given back: %s", share.source, error)

    def attach(self, mounted: Mounted, call: messages.Attach, root_fd: int, fuse_fd: int) -> None:
        """Keep the root and the connection of a mount; the descriptors are lockd's from here on.

        Raises OSError; then they are still the caller's.
        """
        if mounted.attachment is not None or mounted.detached:
            raise ProtocolError("the mount is attached already")
        self._recorder.attached(mounted, call.dev, call.data)
        mounted.attachment = Attachment.of(call, root_fd, fuse_fd, mounted.pid, self._nursery)
        if call.resumable and RESTARTS:
            self._nursery.start_soon(watch, mounted, mounted.attachment)

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
        for share in self._shares.values():
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
        attachment = mounted.attachment
        await self._succession.died(mounted)
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
        async with self._gates[share.dev, share.ino]:
            if self._is_unused(share):
                await self._close(share)

    async def _settle(self, locks: Sequence[Lock]) -> None:
        todo = iter(locks)

        async def settle() -> None:
            for lock in todo:
                await self._table.settle(lock)

        async with trio.open_nursery() as nursery:
            for _ in range(min(SETTLERS, len(locks))):
                nursery.start_soon(settle)

    def _is_unused(self, share: Share) -> bool:
        known = self._shares.get((share.dev, share.ino)) is share
        return known and not share.mounts and not self._table.uses(share)

    async def _close(self, share: Share) -> None:
        share.ended.cancel()
        await share.storage.finish(share, lambda _: share.backend.stop())
        share.top.close()
        del self._shares[share.dev, share.ino]

    def _tell(self, kind: str, mounted: Mounted) -> None:
        self._events.publish(messages.Event(kind, time.time(), mountpoint=mounted.mount.mountpoint))


async def _declare_bad(attachment: Attachment, nodes: Sequence[int]) -> None:
    """Have the kernel refuse all I/O on what was fenced while there was no mount daemon."""
    call = partial(fuseinode.fence, attachment.root.number)
    await attachment.requests.for_each(STORAGE_TIMEOUT, call, nodes, {}, [attachment.root])


def parse_options(spec: Spec, given: Mapping[str, str]) -> dict[str, object]:
    """Return the values of a backend's options, and of ``key``, which it may go by.

    Raises `MountError` for a value that cannot be.
    """
    table = [*spec.options, *(option for option in options.OPTIONS if option.name == "key")]
    values: dict[str, object] = {}
    for option in table:
        value = given.get(option.name, option.default)
        try:
            values[option.name] = option.parse(value)
        except ValueError as error:
            raise MountError(f"option {option.name}={value}: must be {error}") from None
    return values


def _check_same(share: Share, mount: messages.Mount, values: Mapping[str, object]) -> None:
    if (share.backend_name, share.options) == (mount.backend, values):
        return
    other = next(iter(share.mounts.values())).mount.mountpoint if share.mounts else "a mount that is going away"
    if share.backend_name != mount.backend:
        what = f"with backend {share.backend_name}, not {mount.backend}"
    else:
        wrong = [name for name, value in values.items() if share.options.get(name) != value]
        what = f"with other values of: {', '.join(wrong)}"
    raise MountError(
        f"{mount.source} is already mounted on {other} {what}",
        hint=f"All mounts of one directory must agree on this. Use the same, or unmount {other} first.",
    )


async def _start(backend: Backend, top: Descriptor, job: Job[None]) -> None:
    with top.in_use():
        await backend.start()
        if job.given_up():
            with trio.CancelScope(shield=True):
                await backend.stop()


def _context(
    mount: messages.Mount, source_fd: int, values: Mapping[str, object], host: str, run_dir: str
) -> Context:
    return Context(
        source_fd=source_fd,
        source=text.to_bytes(mount.source),
        mountpoint=text.to_bytes(mount.mountpoint),
        fstype=mount.fstype,
        fsoptions=mount.fsoptions,
        host=host,
        options=values,
        run_dir=run_dir,
    )
