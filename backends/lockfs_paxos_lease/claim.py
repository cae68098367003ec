"""Which host id this host takes in a lockspace, and whether it may take it at once.

* The one that the last lockd of this boot had, with its generation, if its lease has not run out: nothing has happened.
* Else the one that has this machine's name in its record.  If that was not given back, somebody may still act under
  it: a virtual machine of a lockd that was killed, or another machine that was cloned from this one.  So it must stand
  still for as long as any other host would wait; only if the record is of an earlier boot it is watched for a moment,
  which shows a clone, and taken.  A process that had it itself, and has nothing left of it, takes it at once where the
  record is what it wrote last: then nobody can have had it in between.  So does one whose predecessor has noted that it
  wrote that, and held nothing when it ended.
* Else, or if told so, a free one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import trio

from lockfs_paxos_lease import identity
from lockfs_paxos_lease.engine.actions import Area, Clock, DiskError, Operation, read
from lockfs_paxos_lease.engine.errors import Clash, StorageTrouble
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import Leader, validate_delta
from lockfs_paxos_lease.place import Space, hosts_of
from lockfs_paxos_lease.state import State

RENEWALS_WATCHED = 1.5
"""How many renewal intervals a record is watched to see whether somebody renews it."""
ATTEMPTS = 8
"""Free host ids that are tried: each failure means that another host was faster by a moment."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Run(Protocol):
    """Runs an operation of the engine on the lockspace."""

    def __call__(self, operation: Operation[T]) -> Awaitable[T]: ...


@dataclass(slots=True)
class Claim:
    """How to become a member of a lockspace, again and again.  *wanted* is the host id that was given, 0 for any."""

    space: Space
    timing: Timing
    clock: Clock
    digits: str
    name: bytes
    wanted: int
    run: Run
    _last: Membership | None = field(default=None, init=False)
    """The incarnation that was tried last: it knows what this process has written."""
    _noted: State | None = field(default=None, init=False)
    """What the last lockd of this boot has written down."""

    async def resume(self, state: State) -> Membership | None:
        """Return the membership that the last lockd of this boot had; None if it has run out or is not wanted.

        Raises `EngineError`.
        """
        self._noted = state
        if self.wanted not in (0, state.host_id):
            return None
        if self.clock() >= state.renewed + self.timing.dead_after(self.timing.stored):
            # Somebody else may have had the host id since, whatever a renewal that landed late makes of the record.
            return None
        membership = self._membership(state.name)
        return membership if await self.run(membership.resume(state.host_id, state.generation)) else None

    async def make(self, *, idle: Callable[[], bool]) -> Membership:
        """Return a new membership.  Raises `EngineError`.

        *idle* says whether it is certain that nobody can act any more by what this machine was granted before; asked as
        late as can be.
        """
        records = await self.run(self._survey())
        mine = next((each for each in records if identity.is_of(records[each].resource_name, self.digits)), 0)
        if self.wanted or mine:
            return await self._take(self.wanted or mine, records, idle=idle)
        return await self._take_free(records)

    async def _take(
        self, host_id: int, records: Mapping[int, Leader], *, idle: Callable[[], bool]
    ) -> Membership:
        there = records.get(host_id)
        if there is None or not identity.is_of(there.resource_name, self.digits):
            membership = self._membership(self.name)
            await self.run(membership.join(host_id))
            return membership
        # Under the name that is there, else it would be somebody else's record; it tells the host's name of that time.
        membership = self._membership(there.resource_name)
        # A time that this boot has not seen yet is one of an earlier boot, which nothing has survived.
        rebooted = there.timestamp > self.timing.stamp(self.clock())
        if rebooted and not idle():
            await self._look_for_a_clone(membership, host_id, there)
        state = self._noted
        noted = (state.generation, state.renewed) if state is not None and state.host_id == host_id else None
        try:
            await self.run(
                membership.join(host_id, predecessor_gone=idle() or rebooted, same_boot=not rebooted, noted=noted)
            )
        except Clash as error:
            raise self._clone(host_id, error.name) from error
        return membership

    async def _look_for_a_clone(self, membership: Membership, host_id: int, there: Leader) -> None:
        await trio.sleep(self.timing.renewal * RENEWALS_WATCHED)
        now = await self.run(membership.read_host(host_id))
        if now.timestamp not in (0, there.timestamp):
            raise self._clone(host_id, now.resource_name)

    def _clone(self, host_id: int, name: bytes) -> Clash:
        return Clash(
            Code.HOST_ID_BUSY,
            f"another machine with the same machine-id and hardware UUID is at work as host id {host_id} "
            f"({identity.shown(name)}): one is a copy of the other, or both use one run directory",
            name,
        )

    async def _take_free(self, records: Mapping[int, Leader]) -> Membership:
        limit = hosts_of(self.timing, self.space.geometry)
        free = [each for each in range(1, limit + 1) if each not in records or not records[each].timestamp]
        # Not one that another machine has given back for now, as long as there are others.
        free.sort(key=lambda each: each in records)
        clash: Clash | None = None
        for host_id in free[:ATTEMPTS]:
            membership = self._membership(self.name)
            try:
                await self.run(membership.join(host_id))
            except Clash as error:
                clash = error
                log.info("host id %d went to %s; trying the next", host_id, identity.shown(error.name))
                continue
            return membership
        if clash is not None:
            raise clash
        raise Clash(Code.HOST_ID, f"all {limit} host ids are in use; set host_id= to that of a host that is gone", b"")

    def _survey(self) -> Operation[dict[int, Leader]]:
        """Return the records of all host ids that were ever used.  A damaged one counts as in use."""
        geometry, fresh = self.space.geometry, (0, 0, 0)
        try:
            area = yield from read(Area.LOCKSPACE, 0, geometry.align, self.timing.io_timeout)
        except DiskError as error:
            raise StorageTrouble(Code.LEADER_READ, f"the lockspace could not be read: {error}") from error
        found = {}
        for host_id in range(1, geometry.max_hosts + 1):
            record = Leader.decode(memoryview(area)[geometry.delta_offset(host_id) :])
            try:
                validate_delta(record, self.space.name, wanted=self.timing.delta_version)
            except BadRecord as error:
                log.warning("the record of host id %d is damaged: %s", host_id, error.what)
                record = replace(record, timestamp=max(record.timestamp, 1))
            if (record.owner_id, record.owner_generation, record.timestamp) != fresh:
                found[host_id] = record
        return found

    def _membership(self, name: bytes) -> Membership:
        if self._last is not None and self._last.name == name:
            self._last = self._last.successor()
        else:
            self._last = Membership(self.space.name, self.space.geometry, self.timing, name, self.clock)
        return self._last
