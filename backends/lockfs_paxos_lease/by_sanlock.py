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
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import trio

from lockfs import text
from lockfs.backend import UNKNOWN_HOST, Busy, Context, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.errors import LockUnavailable, MountError
from lockfs_paxos_lease import identity, rule
from lockfs_paxos_lease.chosen import is_directory
from lockfs_paxos_lease.disk.file import Disks
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.naming import Naming
from lockfs_paxos_lease.people import People
from lockfs_paxos_lease.place import FILE_TIMEOUT, Space
from lockfs_paxos_lease.san.volume import Joined
from lockfs_paxos_lease.sanlock import link
from lockfs_paxos_lease.sanlock.client import Client
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.errors import DaemonGone, SanlockError
from lockfs_paxos_lease.sanlock.marks import Marks
from lockfs_paxos_lease.sanlock.places import DaemonPlace, InDirectory, OnVolume, check_reachable
from lockfs_paxos_lease.sanlock.seat import Seat
from lockfs_paxos_lease.sanlock.wire import AcquireFlag, HostState, Lockspace, Resource, ResourceFlag
from lockfs_paxos_lease.settings import Settings

ATTEMPTS = 4
"""How often a lease is taken again because the image has got another one meanwhile."""
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

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """One lease in use.  `gone` is true when it has been let go, after a loss."""

    name: str
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
        self._context = context
        self._settings = Settings.of(context)
        self._daemon = Daemon(link.run_dir())
        self._lane = Lane(4)
        self._naming = Naming(context)
        self._people = People(context)
        self._found: DaemonPlace | None = None
        self._held: dict[str, _Held] = {}
        self._by_image: dict[tuple[int, int], _Held] = {}
        self._space: Space | None = None
        self._marks: Marks | None = None
        self._seat: Seat | None = None
        self._scope = trio.CancelScope()
        self._tell_lost, self._lost = trio.open_memory_channel[Grant](float("inf"))

    async def _find_place(self) -> DaemonPlace:
        disks, mountpoint = Disks(self._context.fstype), self._context.mountpoint
        place: DaemonPlace
        if await is_directory(self._lane, self._settings.leases):
            place = InDirectory(self._settings.directory(disks), self._daemon, self._lane)
        else:
            place = OnVolume(self._settings.volume(disks, _nobody), self._daemon)
        try:
            await self._lane.call(lambda: check_reachable(place, mountpoint), FILE_TIMEOUT)
        except Overdue as error:
            raise LockUnavailable(f"cannot look at {place.where}: {error}") from error
        return place

    # Its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the daemon, and the lockspace or make it, and have the daemon join."""
        context, place = self._context, await self._find_place()
        self._found = place
        try:
            space = self._space = await place.open()
        except DaemonGone as error:
            raise MountError(error.message, hint=error.hint) from error
        try:
            await self._naming.open()
            await rule.check(self._lane, context.source_fd, self._settings.source, self._naming.rule)
            marks = self._marks = Marks(context.run_dir, space.name)
            marks.open()
            await self._people.open()
            disk = await place.lockspace()
            lockspace = Lockspace(space.name, self._settings.host_id, disk)
            seat = Seat(self._daemon, lockspace, int(self._settings.timing.io_timeout), place.survey, self._lose)
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
        self._by_image.clear()
        await self._people.close()
        if self._found is not None:
            await self._found.close()

    # Locks -----------------------------------------------------------------------------------

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Take the lease of the image; then leave the card, so that it is there before anybody else is refused.

        Then look again: the image may have been given another name meanwhile.
        """
        for _ in range(ATTEMPTS):
            name = await self._naming.of(image)
            grant = await self._acquire(image, name, mode)
            try:
                if await self._naming.of(image) == name:
                    await self._people.noted(image, holder)
                    return grant
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self.release(grant)
                raise
            await self.release(grant)
        raise LockUnavailable(f"the lease on {text.from_bytes(image.path)} changes its name")

    async def _acquire(self, image: Image, name: str, mode: Mode) -> Grant:
        seat, marks, space = self._parts()
        seat.check()
        if name in self._held:
            raise Busy(Holder(self._context.host, self._mode_of(self._held[name])))
        disk = await self._place.find_or_create(name)
        resource = Resource(space.name, name.encode(), disk, flags=_FLAGS[mode])
        marks.clear(name)
        client = await Client.register(self._daemon.directory)
        held = self._held[name] = _Held(name, resource, client)
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
        grant = Grant(image, mode, token=found[0].lver if found else None, keep=[client.fileno()])
        return self._granted(held, grant)

    def _granted(self, held: _Held, grant: Grant) -> Grant:
        held.grant = grant
        self._held[held.name] = self._by_image[grant.image.dev, grant.image.ino] = held
        return grant

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """Go on with the connection, if the daemon has the lease for it."""
        _, marks, space = self._parts()
        path = text.from_bytes(image.path)
        if not keep:
            raise GrantLost(f"nobody has the connection to sanlock by which {path} was locked")
        client = Client.of(keep[0])
        try:
            there = [each for each in await client.inquire() if each.lockspace == space.name]
            if not there or (mode is Mode.EXCLUSIVE and there[0].lver is None):
                raise GrantLost(f"sanlock does not keep the lock on {path} any more")
            name = there[0].name.decode()
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
        return self._granted(_Held(name, resource, client), grant)

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
        await self._people.noted(grant.image, replace(holder, mode=mode))

    async def release(self, grant: Grant) -> None:
        """Give the lease back: by name, since who keeps the connection would keep it."""
        held = self._of(grant)
        with trio.CancelScope(shield=True):
            await self._people.forgotten(grant.image)
            try:
                if not held.gone:
                    await held.client.release([held.resource])
            finally:
                held.client.close()
                self._held.pop(held.name, None)
                self._by_image.pop((grant.image.dev, grant.image.ino), None)
                self._parts()[1].clear(held.name)

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
        name = await self._naming.of(image)
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
        return await self._people.holds(hosts)

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
            raise LockUnavailable(f"the backend of {self._settings.source} is not running")
        return self._seat, self._marks, self._space

    @property
    def _place(self) -> DaemonPlace:
        if self._found is None:
            raise LockUnavailable(f"the backend of {self._settings.source} is not running")
        return self._found

    def _of(self, grant: Grant) -> _Held:
        held = self._by_image.get((grant.image.dev, grant.image.ino))
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
        host = ""
        if host_id:
            states = await self._daemon.host_status(self._parts()[2].name)
            names = {state.data32: identity.shown(state.words.get("owner_name", "").encode()) for state in states}
            host = names.get(host_id, "")
        return await self._people.holder(image, mode, host, host_id)


def _nobody() -> Joined:
    """The daemon is the member of the lockspace."""
    raise LockUnavailable("leases are made by the sanlock daemon")


_FLAGS = {Mode.SHARED: ResourceFlag.SHARED, Mode.EXCLUSIVE: ResourceFlag(0)}
