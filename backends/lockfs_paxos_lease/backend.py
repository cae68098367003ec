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
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

import trio

from lockfs import text
from lockfs.backend import Busy, Context, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.errors import LockfsError, LockUnavailable
from lockfs.linux.deadline import Deadline
from lockfs_paxos_lease import driver, identity, registry, rule, viewing
from lockfs_paxos_lease.asking import Asked
from lockfs_paxos_lease.chosen import ChosenPlace
from lockfs_paxos_lease.disk.file import Disks, Storage
from lockfs_paxos_lease.disk.lane import Lane
from lockfs_paxos_lease.engine import lease as engine
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.errors import AGAIN, Clash, EngineError
from lockfs_paxos_lease.engine.errors import Held as HeldElsewhere
from lockfs_paxos_lease.errors import explained
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.in_use import Held, LeasesInUse
from lockfs_paxos_lease.late import LatePlace, Memory
from lockfs_paxos_lease.lockspace import Lockspace
from lockfs_paxos_lease.naming import Naming
from lockfs_paxos_lease.people import People
from lockfs_paxos_lease.settings import Settings
from lockfs_paxos_lease.taking import Moved, Taking

ATTEMPTS = 4
"""How often a lease is taken again because, meanwhile, the image has got another one, or the lease another place."""

log = logging.getLogger(__name__)


class PaxosBackend:
    """See the module; what each method is for stands in `lockfs.backend.Backend`."""

    excludes = True

    def __init__(self, context: Context, storage: Storage | None = None) -> None:
        settings = Settings.of(context)
        files = storage or Disks(context.fstype)
        directory = settings.directory(files)
        self._context = context
        self._settings = settings
        self._place = LatePlace(
            ChosenPlace(
                settings.leases, lambda: directory, lambda: settings.volume(files, lambda: self._joined),
                directory.where,
            ),
            Memory(context.run_dir, context.source, settings.leases, settings.timing),
            self._reached,
        )  # fmt: skip
        self._naming = Naming(context)
        self._people = People(context)
        self._in_use = LeasesInUse(self._place, settings.timing)
        self._taking = Taking(self._naming, self._place, self._people)
        self._asked = Asked(self._in_use, self._lose)
        self._lane = Lane(1)
        self._unfenced: dict[tuple[int, int], str] = {}
        """What could not be adopted, by image: until those who went by it are fenced."""
        self._adopting: set[trio.CancelScope] = set()
        self._lockspace: Lockspace | None = None
        self._inherited = self._mending = False
        self._tell_lost, self._lost = trio.open_memory_channel[Grant](float("inf"))

    async def _reached(self) -> None:
        """The storage has answered for the first time."""
        await self._naming.open()
        await rule.check(self._lane, self._context.source_fd, self._settings.source, self._naming.rule)
        await self._people.open()

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
            self._lockspace = await registry.enter(
                self, self._place, space, self._settings.timing, driver.boottime, self._context.host,
                self._context.run_dir, self._settings.host_id, str(self._context.options["watchdog"]),
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
        async with trio.open_nursery() as nursery:
            for held in self._in_use.all():
                nursery.start_soon(partial(self._in_use.end, self._lockspace, held, given_back=False))
        await self._people.close()
        await self._place.close()

    # Locks -----------------------------------------------------------------------------------

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Take the lease of the image.

        What it is called is known in nearly all cases without asking the storage, which `Taking` does in any case.
        """
        name = self._naming.expected(image)
        if name in self._joined.holdings.in_use or name in self._joined.holdings.unfenced:
            name = await self._naming.of(image)
        for _ in range(ATTEMPTS):
            try:
                return await self._acquire(image, name, mode, holder)
            except Moved as moved:
                name = moved.name or await self._naming.of(image)
        raise LockUnavailable(f"the lease on {text.from_bytes(image.path)} is being moved or removed")

    async def _acquire(self, image: Image, name: str, mode: Mode, holder: Holder) -> Grant:
        joined, membership = self._joined, self._joined.membership()
        if name in joined.holdings.unfenced:
            raise LockUnavailable(f"the lease on {text.from_bytes(image.path)} was lost, and is still being fenced")
        if name in joined.holdings.in_use:
            # Not the same image, which lockd would know, but one that has the same name: on another filesystem below
            # the source, say, or because somebody has named both so.
            held = self._in_use.get(name)
            mode = held.mode if held is not None else Mode.EXCLUSIVE
            raise Busy(await self._holder(image, membership.host_id, mode))
        held = await self._in_use.begin(joined, name, membership, mode, self._place.lease(name))
        try:
            with explained(f"lock {text.from_bytes(image.path)}", held.area.where):
                await joined.note(name, image)
                token = await joined.run(self._taking.take(held, _MODES[mode], image, holder), held.area)
            if joined.membership() is not membership:
                # What there was to be told lost was told without this one.
                raise LockUnavailable(f"the lease on {text.from_bytes(image.path)} was lost as soon as it was had")
        except BaseException as error:
            if held.lease.mode is not None:
                await self._people.forgotten(image)
            await self._in_use.give_up(joined, held)
            if isinstance(error, HeldElsewhere):
                raise Busy(await self._who(image, error)) from None
            raise
        return self._in_use.granted(held, Grant(image, mode, token=token))

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """See whether the lease is there, in the incarnation that the last lockd had; nothing is taken.

        Nothing is given back either where it is lost: somebody still goes by it, until `fenced` says otherwise.  As
        long as it cannot be known the answer is awaited here, so that a loss is told when it happens, and not later.
        """
        joined, scope = self._joined, trio.CancelScope()
        name = joined.holdings.name_noted(image) or await self._naming.of(image)
        self._adopting.add(scope)
        try:
            await joined.decided()
            with scope:
                return await self._adopt(joined, name, image, mode, holder, token)
            raise GrantLost(f"the lease on {text.from_bytes(image.path)} has run out before it could be looked at")
        except GrantLost:
            joined.holdings.unfenced.add(name)
            self._unfenced[image.dev, image.ino] = name
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
        if name in joined.holdings.in_use:
            raise LockUnavailable(f"the lease on {path} is in use already")
        held = await self._in_use.begin(joined, name, membership, mode, self._in_use.find(name))
        try:
            with explained(f"look at the lock on {path}", held.area.where):
                await joined.note(name, image)
                found = await joined.run(held.lease.adopt(_MODES[mode]), held.area)
            has = Mode.SHARED if found is engine.Mode.SHARED else Mode.EXCLUSIVE
            if found is None or (has is Mode.SHARED and mode is Mode.EXCLUSIVE):
                raise GrantLost(f"the lease on {path} is not this host's any more")
            if has is Mode.EXCLUSIVE and token is not None and held.lease.version != token:
                raise GrantLost(f"the lease on {path} has changed hands: version {held.lease.version}, not {token}")
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._in_use.end(joined, held, given_back=False)
            raise
        token = held.lease.version if has is Mode.EXCLUSIVE else token
        grant = self._in_use.granted(held, Grant(image, has, token=token))
        await self._people.noted(image, replace(holder, mode=has))
        return grant

    async def inherit(self) -> None:
        """Give back what the last lockd had, and nobody has taken up."""
        joined = self._joined
        self._inherited = joined.holdings.inherited = True
        for name in sorted(joined.holdings.left - joined.holdings.in_use - joined.holdings.unfenced):
            await self._in_use.give_back(joined, name)

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

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Change the mode of the lease; weaker in a way that nobody gets in between."""
        held = self._of(grant)
        try:
            with explained(f"change the lock on {text.from_bytes(grant.image.path)}", held.area.where):
                grant.token = await self._joined.run(held.lease.convert(_MODES[mode]), held.area)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._in_use.tidy(self._joined, held)
            if isinstance(error, HeldElsewhere):
                raise Busy(await self._who(grant.image, error)) from None
            # To weaken it may have come so far that others share it already: then it is no more than that.
            grant.mode = held.mode = Mode(held.lease.mode.value) if held.lease.mode is not None else grant.mode
            if isinstance(error.__cause__, EngineError) and error.__cause__.code in _TAKEN:
                self._lose(held)
            raise
        grant.mode = held.mode = mode
        await self._people.noted(grant.image, replace(holder, mode=mode))

    async def release(self, grant: Grant) -> None:
        """Give the lease back."""
        joined, held = self._joined, self._of(grant)
        if held.lost:
            self._in_use.stopped(joined, held)
        with trio.CancelScope(shield=True), explained(f"unlock {text.from_bytes(grant.image.path)}", held.area.where):
            try:
                if code := await joined.run(self._taking.give_back(held, grant.image), held.area):
                    log.error("%s was taken by another host while it was held here (%d)", held.area.where, code)
            finally:
                await self._in_use.tidy(joined, held)
                await self._in_use.end(joined, held, given_back=not held.lease.untidy)

    # What there is to know -------------------------------------------------------------------

    async def inspect(self, image: Image) -> Holder | None:
        """Read the lease, and say who has it."""
        joined, name = self._joined, await self._naming.of(image)
        membership = joined.membership()
        area = await self._place.find(name)
        if area is None:
            return None
        try:
            with explained(f"look at the lock on {text.from_bytes(image.path)}", area.where):
                _, found = await joined.run(requests.inspect(self._in_use.lease(name, membership).area), area)
        finally:
            await area.close()
        # What this host holds by itself is known to lockd; what an earlier lockd left is free.
        others = [each for each in found if each.host_id != membership.host_id]
        if not others:
            return None
        return await self._holder(image, others[0].host_id, Mode.SHARED if others[0].shared else Mode.EXCLUSIVE)

    async def hosts(self) -> Sequence[Host]:
        """List the hosts that were ever seen in the lockspace."""
        return await self._people.holds(viewing.hosts(self._joined.membership()))

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
        joined, held = self._joined, self._in_use.of(grant)
        if held is not None and held.lost:
            self._in_use.stopped(joined, held)
        name = self._unfenced.pop((grant.image.dev, grant.image.ino), None)
        if name is not None:
            joined.holdings.unfenced.discard(name)
            if name in joined.holdings.left and name not in joined.holdings.in_use:
                await self._in_use.give_back(joined, name)

    # The lockspace's side --------------------------------------------------------------------

    @property
    def at_stake(self) -> bool:
        """True while there is a lease in use that is not both lost and fenced."""
        return any(not held.fenced for held in self._in_use.all())

    def lose(self, reason: str) -> None:
        """Tell all grants lost, each once."""
        for scope in self._adopting:
            scope.cancel()
        for held in self._in_use.all():
            self._lose(held)

    async def asked(self, callers: Sequence[int]) -> None:
        """See what other hosts ask of the leases that are held here."""
        if (joined := self._lockspace) is not None:
            await self._asked.look(joined, [await self._host_name(each) or f"with id {each}" for each in callers])

    def _lose(self, held: Held) -> None:
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
            raise LockUnavailable(f"the backend of {self._settings.source} is not running")
        return self._lockspace

    def _of(self, grant: Grant) -> Held:
        held = self._in_use.of(grant)
        if held is None:
            raise LockUnavailable(f"the lock on {text.from_bytes(grant.image.path)} is not held any more")
        return held

    async def _who(self, image: Image, refusal: HeldElsewhere) -> Holder:
        mode = Mode.SHARED if refusal.code == AGAIN else Mode.EXCLUSIVE
        return await self._holder(image, refusal.host_id, mode)

    async def _holder(self, image: Image, host_id: int, mode: Mode) -> Holder:
        return await self._people.holder(image, mode, await self._host_name(host_id), host_id)

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

_TAKEN = (Code.RELEASE_LVER, Code.RELEASE_OWNER)
"""What is found on the disk where another host has taken a lease that was held."""
_MODES = {Mode.SHARED: engine.Mode.SHARED, Mode.EXCLUSIVE: engine.Mode.EXCLUSIVE}
