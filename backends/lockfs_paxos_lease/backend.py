"""Leases on shared storage as the way in which hosts agree: disk paxos in sanlock's format.

Invariants:
* A lease is used by one image of this host at a time, also where two files have the same name for it.
* A grant counts as held, and its lease stays open, from before its acquire begins until its release has ended; what
  could not be given back on the disk is tidied up before the lease is used again.
* A grant that was told lost is never made good again: it is over when lockd gives it back.
* A lease that could not be adopted stays as it is on the disk until lockd has fenced those who went by it.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from lockfs import text
from lockfs.backend import UNKNOWN_HOST, Busy, Context, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.cards import Cards, with_holds
from lockfs.errors import LockfsError, LockUnavailable, MountError
from lockfs.linux.deadline import Deadline
from lockfs_paxos_lease import driver, identity, registry, viewing
from lockfs_paxos_lease.directory import LeaseDirectory
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.file import Disks, Storage
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine import lease as engine
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.errors import AGAIN, Clash, EngineError, Held
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import DEFAULT_IO_TIMEOUT, Timing
from lockfs_paxos_lease.errors import explained
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.late import LatePlace, Memory
from lockfs_paxos_lease.lockspace import Lockspace
from lockfs_paxos_lease.naming import lease_name
from lockfs_paxos_lease.options import LIBVIRT
from lockfs_paxos_lease.place import Place, hosts_of
from lockfs_paxos_lease.san.volume import LeaseVolume
from lockfs_paxos_lease.writeback import wait_for_write_back

CARD_TIMEOUT = 2.0
"""Seconds for a card, on which nothing depends."""
CARD_THREADS = 4
TIDY_TIMEOUT = 8.0

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """One lease that this host has in use: for a grant, or while one is being taken."""

    name: str
    lease: engine.Lease
    area: AreaIO
    mode: Mode
    grant: Grant | None = None
    lost: bool = False
    stopped: bool = False
    """It is lost, and nobody can write by it any more."""
    fenced: bool = False
    """And nothing that was written by it can still get to the storage, as far as a watchdog is to see to that."""


class PaxosBackend:
    """See the module; what each method is for stands in `lockfs.backend.Backend`."""

    excludes = True

    def __init__(self, context: Context, storage: Storage | None = None) -> None:
        options = context.options
        self._context = context
        self._source = text.from_bytes(context.source)
        self._timing = _timing(options["takeover"], options["io_timeout"])
        leases = str(options["leases"])
        self._place = LatePlace(
            self._find_place(storage or Disks(context.fstype), leases),
            Memory(context.run_dir, context.source, leases, self._timing),
            lambda: self._card(self._cards.open),
        )
        self._cards = Cards(context.source_fd, self._source, f"{context.host}\0{context.run_dir}")
        self._card_lane = Lane(CARD_THREADS)
        self._random = random.SystemRandom()
        self._held: dict[str, _Held] = {}
        self._adopting: set[trio.CancelScope] = set()
        self._lockspace: Lockspace | None = None
        self._inherited = self._mending = False
        self._tell_lost, self._lost = trio.open_memory_channel[Grant](float("inf"))

    def _find_place(self, storage: Storage, leases: str) -> Place:
        libvirt = self._context.options["names"] == LIBVIRT
        if libvirt and not (leases and self._timing.is_sanlock):
            raise MountError("names=libvirt needs takeover=sanlock, and leases= must be libvirt's disk_lease_dir")
        if leases and not os.path.isdir(leases):
            return LeaseVolume(storage, driver.boottime, self._timing, leases, lambda: self._joined)
        return LeaseDirectory(
            storage, driver.boottime, self._timing, self._context.source_fd, self._source, leases, libvirt=libvirt
        )

    @property
    def deadline(self) -> Deadline | None:
        """Until when this host's lease is safe, and with it all that was granted."""
        return None if self._lockspace is None else self._lockspace.deadline

    # Its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find or make the lockspace, and join it.

        Where the last lockd held leases it does not wait long for the storage: see `late` and `Lockspace.start`.
        """
        space = await self._place.open()
        try:
            host_id = self._context.options["host_id"]
            self._lockspace = await registry.enter(
                self, self._place, space, self._timing, driver.boottime, self._context.host, self._context.run_dir,
                host_id if isinstance(host_id, int) else 0, str(self._context.options["watchdog"]),
            )  # fmt: skip
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._close()
            raise

    async def stop(self) -> None:
        """Leave the lockspace if nobody else uses it."""
        self._tell_lost.close()
        if self._lockspace is not None:
            joined, self._lockspace = self._lockspace, None
            await registry.leave(self, joined, self._context.run_dir)
        await self._close()

    async def _close(self) -> None:
        for held in list(self._held.values()):
            await self._forget(held, given_back=False)
        await self._card(self._cards.close)
        await self._place.close()

    # Locks -----------------------------------------------------------------------------------

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Take the lease of the image; then leave the card, so that it is there before anybody else is refused."""
        joined, membership, name = self._joined, self._joined.membership(), self._name(image)
        if name in joined.unfenced:
            raise LockUnavailable(f"the lease on {text.from_bytes(image.path)} was lost, and is still being fenced")
        if name in joined.in_use:
            # Not the same image, which lockd would know, but one that has the same name: on another filesystem below
            # the source, say.
            mode = self._held[name].mode if name in self._held else Mode.EXCLUSIVE
            raise Busy(await self._holder(image, membership.host_id, mode))
        held = await self._use(name, membership, mode, self._place.find_or_create(name))
        try:
            with explained(f"lock {text.from_bytes(image.path)}", held.area.where):
                await joined.note(name)
                token = await joined.run(held.lease.acquire(_MODES[mode]), held.area)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._tidy(held)
                await self._forget(held, given_back=not held.lease.untidy)
            if isinstance(error, Held):
                raise Busy(await self._who(image, error)) from None
            raise
        held.grant = Grant(image, mode, token=token)
        await self._card(lambda: self._cards.write(image.ino, holder))
        return held.grant

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """See whether the lease is there, in the incarnation that the last lockd had; nothing is taken.

        Nothing is given back either where it is lost: somebody still goes by it, until `fenced` says otherwise.  As
        long as it cannot be known the answer is awaited here, so that a loss is told when it happens, and not later.
        """
        joined, name, scope = self._joined, self._name(image), trio.CancelScope()
        self._adopting.add(scope)
        try:
            await joined.decided()
            with scope:
                return await self._adopt(joined, name, image, mode, holder, token)
            raise GrantLost(f"the lease on {text.from_bytes(image.path)} has run out before it could be looked at")
        except GrantLost:
            joined.unfenced.add(name)
            raise
        finally:
            self._adopting.discard(scope)

    async def _adopt(
        self, joined: Lockspace, name: str, image: Image, mode: Mode, holder: Holder, token: int | None
    ) -> Grant:
        path = text.from_bytes(image.path)
        if joined.broken:
            raise GrantLost(f"the lease on {path} has run out: the last lockd's lease was not taken up in time")
        membership = joined.membership()
        if name in joined.in_use:
            raise LockUnavailable(f"the lease on {path} is in use already")
        held = await self._use(name, membership, mode, self._find(name))
        try:
            with explained(f"look at the lock on {path}", held.area.where):
                await joined.note(name)
                found = await joined.run(held.lease.adopt(_MODES[mode]), held.area)
            has = Mode.SHARED if found is engine.Mode.SHARED else Mode.EXCLUSIVE
            if found is None or (has is Mode.SHARED and mode is Mode.EXCLUSIVE):
                raise GrantLost(f"the lease on {path} is not this host's any more")
            if has is Mode.EXCLUSIVE and token is not None and held.lease.version != token:
                raise GrantLost(f"the lease on {path} has changed hands: version {held.lease.version}, not {token}")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._forget(held, given_back=False)
            raise
        held.mode = has
        held.grant = Grant(image, has, token=held.lease.version if has is Mode.EXCLUSIVE else token)
        await self._card(lambda: self._cards.write(image.ino, replace(holder, mode=has)))
        return held.grant

    async def inherit(self) -> None:
        """Give back what the last lockd had, and nobody has taken up."""
        joined = self._joined
        self._inherited = joined.inherited = True
        for name in sorted(joined.left - joined.in_use - joined.unfenced):
            await self._give_back(name)

    async def mend(self) -> None:
        """Try again to give back what the storage did not let us give back."""
        if not self._inherited or self._mending:
            return
        self._mending = True
        try:
            await self.inherit()
        except LockfsError as error:
            log.info("%s", error.message)
        finally:
            self._mending = False

    async def _give_back(self, name: str) -> None:
        joined = self._joined
        try:
            held = await self._use(name, joined.membership(), Mode.EXCLUSIVE, self._find(name))
        except GrantLost:
            joined.left.discard(name)
            await joined.drop(name)
            return
        try:
            with explained("give back a lease that nobody uses", held.area.where):
                if await joined.run(held.lease.adopt(), held.area) is not None:
                    await joined.run(held.lease.release(), held.area)
                await joined.run(held.lease.tidy(), held.area)
        finally:
            with trio.CancelScope(shield=True):
                await self._forget(held, given_back=held.lease.mode is None and not held.lease.untidy)

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Change the mode of the lease; weaker in a way that nobody gets in between."""
        held = self._of(grant)
        try:
            with explained(f"change the lock on {text.from_bytes(grant.image.path)}", held.area.where):
                grant.token = await self._joined.run(held.lease.convert(_MODES[mode]), held.area)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._tidy(held)
            if isinstance(error, Held):
                raise Busy(await self._who(grant.image, error)) from None
            # To weaken it may have come so far that others share it already: then it is no more than that.
            grant.mode = held.mode = Mode(held.lease.mode.value) if held.lease.mode is not None else grant.mode
            if isinstance(error.__cause__, EngineError) and error.__cause__.code in _TAKEN:
                self._lose(held)
            raise
        grant.mode = held.mode = mode
        await self._card(lambda: self._cards.write(grant.image.ino, replace(holder, mode=mode)))

    async def release(self, grant: Grant) -> None:
        """Give the lease back."""
        held = self._of(grant)
        if held.lost:
            self._be_rid_of(held)
        with trio.CancelScope(shield=True), explained(f"unlock {text.from_bytes(grant.image.path)}", held.area.where):
            await self._card(lambda: self._cards.remove(grant.image.ino))
            try:
                if code := await self._joined.run(held.lease.release(), held.area):
                    log.error("%s was taken by another host while it was held here (%d)", held.area.where, code)
            finally:
                await self._tidy(held)
                await self._forget(held, given_back=not held.lease.untidy)

    async def _tidy(self, held: _Held) -> None:
        """Take back what may be on the disk and is not held; what the storage does not let us, `mend` does later."""
        if not held.lease.untidy:
            return
        with trio.move_on_after(TIDY_TIMEOUT):
            try:
                await self._joined.run(held.lease.tidy(), held.area)
            except EngineError:
                pass

    async def _use(self, name: str, membership: Membership, mode: Mode, opening: Awaitable[AreaIO]) -> _Held:
        """Begin to use a lease: nobody else on this host does from before its area is opened."""
        joined = self._joined
        joined.in_use.add(name)
        try:
            area = await opening
        except BaseException:
            joined.in_use.discard(name)
            raise
        self._held[name] = _Held(name, self._lease(name, membership), area, mode)
        return self._held[name]

    async def _find(self, name: str) -> AreaIO:
        area = await self._place.find(name)
        if area is None:
            raise GrantLost(f"the lease {name} is not there any more")
        return area

    async def _forget(self, held: _Held, *, given_back: bool) -> None:
        """End the use of a lease; *given_back*: on the disk, too, or it is not for us to do that."""
        await held.area.close()
        if self._held.pop(held.name, None) is None or self._lockspace is None:
            return
        if given_back:
            self._lockspace.left.discard(held.name)
            await self._lockspace.drop(held.name)
        else:
            self._lockspace.left.add(held.name)
        self._lockspace.in_use.discard(held.name)

    # What there is to know -------------------------------------------------------------------

    async def inspect(self, image: Image) -> Holder | None:
        """Read the lease, and say who has it."""
        joined, name = self._joined, self._name(image)
        membership = joined.membership()
        area = await self._place.find(name)
        if area is None:
            return None
        try:
            with explained(f"look at the lock on {text.from_bytes(image.path)}", area.where):
                _, found = await joined.run(requests.inspect(self._lease(name, membership).area), area)
        finally:
            await area.close()
        # What this host holds by itself is known to lockd; what an earlier lockd left is free.
        others = [each for each in found if each.host_id != membership.host_id]
        if not others:
            return None
        return await self._holder(image, others[0].host_id, Mode.SHARED if others[0].shared else Mode.EXCLUSIVE)

    async def hosts(self) -> Sequence[Host]:
        """List the hosts that were ever seen in the lockspace."""
        hosts = viewing.hosts(self._joined.membership())
        return with_holds(hosts, await self._card(self._cards.all) or [])

    async def confirm_dead(self, host: str) -> str:
        """Watch the host for somewhat more than a renewal; then what it held may be taken."""
        joined = self._joined
        membership = joined.membership()
        host_id = viewing.number_of(membership, host)
        slot = membership.hosts.slot(host_id)
        name = identity.shown(slot.name) if slot is not None else host
        if host_id == membership.host_id:
            raise Denied(f"host '{host}' is this one, and it lives")
        with explained(f"look whether {name} lives", self._place.where):
            try:
                await joined.run(membership.confirm_dead(host_id))
            except Clash as error:
                hint = "Stop lockfs there, or cut its power or its path to the storage; its leases then run out."
                raise Denied(error.message, hint=hint) from None
        return name

    async def lost(self) -> AsyncIterator[Grant]:
        """Yield each grant that is no longer safe."""
        async for grant in self._lost:
            yield grant

    async def fenced(self, grant: Grant) -> None:
        """Take note: the lease runs out by itself, but a watchdog must not reset the host for it.

        What is left on the disk of one that could not be adopted is given back now; where the storage does not let us,
        `mend` does it.
        """
        name = self._name(grant.image)
        held = self._held.get(name)
        if held is not None and held.grant is grant and held.lost:
            self._be_rid_of(held)
        joined = self._joined
        if name in joined.unfenced:
            joined.unfenced.discard(name)
            if name in joined.left and name not in joined.in_use:
                await self._give_back(name)

    # The lockspace's side --------------------------------------------------------------------

    @property
    def at_stake(self) -> bool:
        """True while there is a lease in use that is not both lost and fenced."""
        return any(not held.fenced for held in self._held.values())

    def _be_rid_of(self, held: _Held) -> None:
        """Nobody can write by a lost grant any more: with a watchdog, wait until what was written is on the storage."""
        if held.stopped or held.grant is None:
            return
        held.stopped, joined = True, self._joined
        if not joined.watchdog_path:
            held.fenced = True
            return

        def written() -> None:
            held.fenced = True
            joined.unwritten -= 1

        image = held.grant.image
        joined.unwritten += 1
        wait_for_write_back(image.fd, text.from_bytes(image.path), written)

    def lose(self, reason: str) -> None:
        """Tell all grants lost, each once."""
        for scope in self._adopting:
            scope.cancel()
        for held in self._held.values():
            self._lose(held)

    def _lose(self, held: _Held) -> None:
        if held.grant is not None and not held.lost:
            held.lost = True
            try:
                self._tell_lost.send_nowait(held.grant)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # nobody listens while it is being stopped

    # Parts -----------------------------------------------------------------------------------

    @property
    def _joined(self) -> Lockspace:
        if self._lockspace is None:
            raise LockUnavailable(f"the backend of {self._source} is not running")
        return self._lockspace

    def _lease(self, name: str, membership: Membership) -> engine.Lease:
        return engine.Lease(name.encode(), membership, self._random, hosts_of(self._timing, membership.geometry))

    def _name(self, image: Image) -> str:
        return lease_name(image, str(self._context.options["key"]), str(self._context.options["names"]))

    def _of(self, grant: Grant) -> _Held:
        held = self._held.get(self._name(grant.image))
        if held is None or held.grant is not grant:
            raise LockUnavailable(f"the lock on {text.from_bytes(grant.image.path)} is not held any more")
        return held

    async def _who(self, image: Image, refusal: Held) -> Holder:
        mode = Mode.SHARED if refusal.code == AGAIN else Mode.EXCLUSIVE
        return await self._holder(image, refusal.host_id, mode)

    async def _holder(self, image: Image, host_id: int, mode: Mode) -> Holder:
        """Name a holder: the record of its host says the host, a card of that host the rest."""
        host = await self._host_name(host_id)
        card = await self._card(lambda: self._cards.read(image.ino))
        if card is not None and (not host or card.host.startswith(host)):
            return replace(card, mode=mode)
        return Holder(host or (f"with id {host_id}" if host_id else UNKNOWN_HOST), mode)

    async def _host_name(self, host_id: int) -> str:
        """Return what a host calls itself; empty if that is not known."""
        membership = self._joined.membership()
        slot = membership.hosts.slot(host_id)
        if slot is not None:
            return identity.shown(slot.name)
        try:
            # It has joined since the last look at all of them.
            record = await self._joined.run(membership.read_host(host_id)) if host_id else None
        except EngineError:
            return ""
        return identity.shown(record.resource_name) if record is not None else ""

    async def _card(self, work: Callable[[], T]) -> T | None:
        """Do something with the cards; no lock depends on it.

        Whoever is cancelled in it would not know what has become of the lock; and it does not take long.
        """
        try:
            with trio.CancelScope(shield=True):
                return await self._card_lane.call(work, CARD_TIMEOUT)
        except (Overdue, OSError):
            pass
        return None


_TAKEN = (Code.RELEASE_LVER, Code.RELEASE_OWNER)
"""What is found on the disk where another host has taken a lease that was held."""
_MODES = {Mode.SHARED: engine.Mode.SHARED, Mode.EXCLUSIVE: engine.Mode.EXCLUSIVE}


def _timing(takeover: object, io_timeout: object) -> Timing:
    """Return the timing that the options ask for."""
    if isinstance(takeover, float) and takeover:
        return Timing.own(takeover)
    return Timing.sanlock(io_timeout if isinstance(io_timeout, int) else DEFAULT_IO_TIMEOUT)
