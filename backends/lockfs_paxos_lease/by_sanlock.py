"""The same leases by way of a sanlock daemon that runs on this host (``engine=sanlock``).

Each lease has a connection of its own to the daemon: it can have any number then, and calls for one do not wait for
those for another.  The lease stays as long as anybody has a descriptor of the connection, so the mount daemon keeps one
(`Grant.keep`): when lockd dies, it stays.

When the daemon can no longer keep a lease, it has a mark made (`sanlock.marks`); the grant is told lost, lockd fences,
and only then (`fenced`) the lease is let go, within the 40 s after which the daemon would kill lockd.  If the fence
fails it is not let go, and sanlock's watchdog resets the host, which is what it is for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from lockfs import text
from lockfs.backend import UNKNOWN_HOST, Busy, Context, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.cards import Cards, with_holds
from lockfs.errors import LockUnavailable, MountError
from lockfs_paxos_lease import driver, identity
from lockfs_paxos_lease.directory import LeaseDirectory
from lockfs_paxos_lease.disk.file import Disks
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.timing import DEFAULT_IO_TIMEOUT, Timing
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.naming import lease_name
from lockfs_paxos_lease.options import LIBVIRT
from lockfs_paxos_lease.place import FILE_TIMEOUT, Space
from lockfs_paxos_lease.san.volume import Joined, LeaseVolume
from lockfs_paxos_lease.sanlock import link
from lockfs_paxos_lease.sanlock.client import Client
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.errors import DaemonGone, SanlockError
from lockfs_paxos_lease.sanlock.marks import Marks
from lockfs_paxos_lease.sanlock.places import DaemonPlace, InDirectory, OnVolume, check_reachable
from lockfs_paxos_lease.sanlock.seat import Seat
from lockfs_paxos_lease.sanlock.wire import AcquireFlag, HostState, Lockspace, Resource, ResourceFlag

LOOK = 0.25
"""Seconds between two looks for marks."""
BUSY = frozenset((
    Code.ACQUIRE_ID_LIVE, Code.ACQUIRE_OWNED, Code.ACQUIRE_OTHER, Code.ACQUIRE_SHARED_RETRY,
    Code.ACQUIRE_OWNED_NOWAIT, -11, -16, -17, -117,
))  # fmt: skip
"""Answers that mean that somebody has the lease, or is about to; -17 and -117: somebody else on this host."""
_STATES = {
    HostState.UNKNOWN: "unknown", HostState.FREE: "free", HostState.LIVE: "live", HostState.FAIL: "failing",
    HostState.DEAD: "dead",
}  # fmt: skip
_NOT_YET = -11

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """One lease in use.  `gone` is true when it has been let go, after a loss."""

    resource: Resource
    client: Client
    grant: Grant | None = None
    lost: bool = False
    gone: bool = False


class SanlockBackend:
    """See the module; what each method is for stands in `lockfs.backend.Backend`."""

    excludes = True
    deadline = None  # the daemon does not say until when its leases are safe

    def __init__(self, context: Context) -> None:
        options = context.options
        self._context = context
        self._source = text.from_bytes(context.source)
        io_timeout = options["io_timeout"]
        self._io_timeout = io_timeout if isinstance(io_timeout, int) else DEFAULT_IO_TIMEOUT
        self._daemon = Daemon(link.run_dir())
        self._lane = Lane(4)
        self._place = self._find_place(str(options["leases"]))
        self._cards = Cards(context.source_fd, self._source, f"{context.host}\0{context.run_dir}")
        self._held: dict[str, _Held] = {}
        self._space: Space | None = None
        self._marks: Marks | None = None
        self._seat: Seat | None = None
        self._scope = trio.CancelScope()
        self._tell_lost, self._lost = trio.open_memory_channel[Grant](float("inf"))

    def _find_place(self, leases: str) -> DaemonPlace:
        context, timing = self._context, Timing.sanlock(self._io_timeout)
        disks, clock = Disks(context.fstype), driver.boottime
        if context.options["names"] == LIBVIRT and not leases:
            raise MountError("names=libvirt needs leases=, which must be libvirt's disk_lease_dir")
        if leases and not os.path.isdir(leases):
            return OnVolume(LeaseVolume(disks, clock, timing, leases, _nobody), self._daemon)
        libvirt = context.options["names"] == LIBVIRT
        directory = LeaseDirectory(disks, clock, timing, context.source_fd, self._source, leases, libvirt=libvirt)
        return InDirectory(directory, self._daemon, self._lane)

    # Its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the daemon, and the lockspace or make it, and have the daemon join."""
        check_reachable(self._place, self._context.mountpoint)
        try:
            space = self._space = await self._place.open()
        except DaemonGone as error:
            raise MountError(error.message, hint=error.hint) from error
        try:
            marks = self._marks = Marks(self._context.run_dir, space.name)
            marks.open()
            await self._aside(self._cards.open)
            wanted = self._context.options["host_id"]
            disk = await self._place.lockspace()
            lockspace = Lockspace(space.name, wanted if isinstance(wanted, int) else 0, disk)
            seat = Seat(self._daemon, lockspace, self._io_timeout, self._place.survey, self._lose)
            await seat.start()
            self._seat = seat
            trio.lowlevel.spawn_system_task(self._look_for_marks, marks, name="marks of sanlock")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._close()
            raise

    async def stop(self) -> None:
        """Leave the lockspace if nobody else uses it."""
        if self._seat is not None:
            await self._seat.stop()
            self._seat = None
        await self._close()

    async def _close(self) -> None:
        self._scope.cancel()
        self._tell_lost.close()
        for held in self._held.values():
            held.client.close()
        self._held.clear()
        await self._aside(self._cards.close)
        await self._place.close()

    # Locks -----------------------------------------------------------------------------------

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Take the lease of the image; then leave the card, so that it is there before anybody else is refused."""
        seat, marks, space = self._parts()
        seat.check()
        name = self._name(image)
        if name in self._held:
            raise Busy(Holder(self._context.host, self._mode_of(self._held[name])))
        disk = await self._place.find_or_create(name)
        resource = Resource(space.name, name.encode(), disk, flags=_FLAGS[mode])
        marks.clear(name)
        client = await Client.register(self._daemon.directory)
        held = self._held[name] = _Held(resource, client)
        try:
            await client.set_killpath(marks.program, [marks.argument(name)])
            await client.acquire([resource], AcquireFlag.OWNER_NOWAIT)
            found = await client.inquire()
        except BaseException as error:
            del self._held[name]
            client.close()
            if isinstance(error, SanlockError) and error.code in BUSY:
                raise Busy(await self._who(image, resource)) from None
            raise
        held.grant = Grant(image, mode, token=found[0].lver if found else None, keep=[client.fileno()])
        await self._aside(lambda: self._cards.write(image.ino, holder))
        return held.grant

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """Go on with the connection, if the daemon has the lease for it."""
        _, marks, space = self._parts()
        name, path = self._name(image), text.from_bytes(image.path)
        if not keep:
            raise GrantLost(f"nobody has the connection to sanlock by which {path} was locked")
        client = Client.of(keep[0])
        try:
            wanted = (space.name, name.encode())
            there = [each for each in await client.inquire() if (each.lockspace, each.name) == wanted]
            if not there or (mode is Mode.EXCLUSIVE and there[0].lver is None):
                raise GrantLost(f"sanlock does not keep the lock on {path} any more")
            await client.set_killpath(marks.program, [marks.argument(name)])
        except DaemonGone as error:
            client.close()
            raise GrantLost(f"the sanlock daemon that kept the lock on {path} has ended") from error
        except BaseException:
            client.close()
            raise
        for fd in keep:
            os.close(fd)
        mode = Mode.SHARED if there[0].lver is None else Mode.EXCLUSIVE
        resource = Resource(space.name, name.encode(), there[0].disk, flags=_FLAGS[mode])
        grant = Grant(image, mode, token=there[0].lver, keep=[client.fileno()])
        # A mark that was made while no lockd was there is seen from now on.
        self._held[name] = _Held(resource, client, grant)
        return grant

    async def inherit(self) -> None:
        """Locks in connections are gone with these."""

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Change the mode of the lease; weaker in a way that nobody gets in between."""
        held = self._of(grant)
        resource = replace(held.resource, flags=_FLAGS[mode])
        try:
            await held.client.convert(resource, AcquireFlag.OWNER_NOWAIT)
            found = await held.client.inquire()
        except SanlockError as error:
            if error.code in BUSY:
                raise Busy(await self._who(grant.image, held.resource)) from None
            raise
        except BaseException:
            # The connection was closed on the way, and what became of the lease nobody knows.
            self._lose_one(held)
            raise
        held.resource, grant.mode = resource, mode
        grant.token = found[0].lver if found else None
        await self._aside(lambda: self._cards.write(grant.image.ino, replace(holder, mode=mode)))

    async def release(self, grant: Grant) -> None:
        """Give the lease back: by name, since who keeps the connection would keep it."""
        held = self._of(grant)
        with trio.CancelScope(shield=True):
            await self._aside(lambda: self._cards.remove(grant.image.ino))
            try:
                if not held.gone:
                    await held.client.release([held.resource])
            finally:
                held.client.close()
                name = self._name(grant.image)
                self._held.pop(name, None)
                self._parts()[1].clear(name)

    async def fenced(self, grant: Grant) -> None:
        """Let the lease go: the daemon waits for that, and would soon begin to kill."""
        held = self._of(grant)
        held.gone = True
        try:
            await held.client.release()
        finally:
            held.client.close()

    # What there is to know -------------------------------------------------------------------

    async def inspect(self, image: Image) -> Holder | None:
        """Have the daemon read the lease, and say who has it."""
        seat, _, space = self._parts()
        name = self._name(image)
        disk = await self._place.find(name)
        if disk is None:
            return None
        found, owners = await self._daemon.owners(Resource(space.name, name.encode(), disk))
        own = seat.host_id
        others = [each for each in owners if each.host_id != own]
        if not others:
            return None
        mode = Mode.SHARED if found.flags & ResourceFlag.SHARED else Mode.EXCLUSIVE
        return await self._holder(image, others[0].host_id, mode)

    async def hosts(self) -> Sequence[Host]:
        """List the hosts that the daemon has seen in the lockspace."""
        seat, _, space = self._parts()
        own = seat.check()
        try:
            found = await self._daemon.hosts(space.name)
        except SanlockError as error:
            if error.code != _NOT_YET:
                raise
            return []
        words = {state.data32: state.words for state in await self._daemon.host_status(space.name)}
        now, wall = time.clock_gettime(time.CLOCK_MONOTONIC), time.time()
        hosts = []
        for each in found:
            about = words.get(each.host_id, {})
            live = int(about.get("last_live", "0"))
            name = identity.shown(about.get("owner_name", "").encode())
            detail = f"host id {each.host_id}, generation {each.generation}"
            seen = wall - (now - live) if live else None
            hosts.append(Host(name, _STATES[each.state], seen, detail, each.host_id, each.host_id == own))
        return with_holds(hosts, await self._aside(self._cards.all) or [])

    async def confirm_dead(self, host: str) -> str:
        """sanlock takes nobody's word."""
        raise Denied(
            "with engine=sanlock the daemon alone judges whether hosts live",
            hint="Its leases run out by themselves: see takeover= and io_timeout=.",
        )

    async def lost(self) -> AsyncIterator[Grant]:
        """Yield each grant that is no longer safe."""
        async for grant in self._lost:
            yield grant

    # Losses ----------------------------------------------------------------------------------

    async def _look_for_marks(self, marks: Marks) -> None:
        """As a system task it must not raise."""
        with self._scope:
            while True:
                try:
                    for name in marks.seen(list(self._held)):
                        self._lose_one(self._held[name])
                except Exception:
                    log.exception("cannot look for the marks of sanlock")
                    self._lose("nobody can tell whether sanlock still keeps the leases")
                await trio.sleep(LOOK)

    def _lose(self, reason: str) -> None:
        """Tell all grants lost, each once."""
        for held in self._held.values():
            self._lose_one(held)

    def _lose_one(self, held: _Held) -> None:
        if held.grant is not None and not held.lost:
            held.lost = True
            try:
                self._tell_lost.send_nowait(held.grant)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # nobody listens while it is being stopped

    # Parts -----------------------------------------------------------------------------------

    def _parts(self) -> tuple[Seat, Marks, Space]:
        if self._seat is None or self._marks is None or self._space is None:
            raise LockUnavailable(f"the backend of {self._source} is not running")
        return self._seat, self._marks, self._space

    def _name(self, image: Image) -> str:
        return lease_name(image, str(self._context.options["key"]), str(self._context.options["names"]))

    def _of(self, grant: Grant) -> _Held:
        held = self._held.get(self._name(grant.image))
        if held is None or held.grant is not grant:
            raise LockUnavailable(f"the lock on {text.from_bytes(grant.image.path)} is not held any more")
        return held

    def _mode_of(self, held: _Held) -> Mode:
        return Mode.SHARED if held.resource.flags & ResourceFlag.SHARED else Mode.EXCLUSIVE

    async def _who(self, image: Image, resource: Resource) -> Holder:
        """Name the holder after a lease was refused; it may be gone already."""
        try:
            found, owners = await self._daemon.owners(resource)
        except LockUnavailable:
            return Holder(UNKNOWN_HOST, Mode.EXCLUSIVE)
        own = self._seat.host_id if self._seat is not None else 0
        others = [each.host_id for each in owners if each.host_id != own] or [each.host_id for each in owners]
        mode = Mode.SHARED if found.flags & ResourceFlag.SHARED else Mode.EXCLUSIVE
        return await self._holder(image, others[0] if others else 0, mode)

    async def _holder(self, image: Image, host_id: int, mode: Mode) -> Holder:
        """Name a holder: the record of its host says the host, a card the rest."""
        card = await self._aside(lambda: self._cards.read(image.ino))
        if card is not None:
            return replace(card, mode=mode)
        if not host_id:
            return Holder(UNKNOWN_HOST, mode)
        states = await self._daemon.host_status(self._parts()[2].name)
        names = {state.data32: identity.shown(state.words.get("owner_name", "").encode()) for state in states}
        return Holder(names.get(host_id) or f"with id {host_id}", mode)

    async def _aside(self, work: Callable[[], T]) -> T | None:
        """Do something on which no lock depends."""
        try:
            return await self._lane.call(work, FILE_TIMEOUT)
        except (Overdue, OSError):
            return None


def _nobody() -> Joined:
    """The daemon is the member of the lockspace."""
    raise LockUnavailable("leases are made by the sanlock daemon")


_FLAGS = {Mode.SHARED: ResourceFlag.SHARED, Mode.EXCLUSIVE: ResourceFlag(0)}
