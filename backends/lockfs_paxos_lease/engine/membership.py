"""This host's membership of a lockspace: its delta lease, joined, renewed and left; and the watch over the others.

Invariants:

* The own lease counts from before the write that renewed it, and is valid for `Timing.fence` seconds (L) from there.
* Once L has passed, or the record was found to be somebody else's, the membership is lost for ever, whatever a
  renewal that was under way says.  A new one begins with a new generation.
* Nothing is written to the lockspace before every earlier write of this process has ended.

One `Membership` is one incarnation.  `renew` is to be run by one task, at `next_renewal`; leases look at `check` and
`valid_until`, and at who else there is (`hosts`, `census`, `look`), and nothing else in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lockfs_paxos_lease.engine.actions import Clock, DiskError, NotIssued, Operation, Sleep
from lockfs_paxos_lease.engine.census import Census
from lockfs_paxos_lease.engine.errors import NO_LOCKSPACE, Clash, Lost, StorageTrouble
from lockfs_paxos_lease.engine.hosts import Event, Hosts
from lockfs_paxos_lease.engine.records import Records
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import delta, names
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import DELTA_MAGIC, Leader, validate_delta
from lockfs_paxos_lease.format.size import Geometry

MAX_NAME = 47
"""sanlock writes at most so many bytes of a host name, and a zero."""
CLAIM = 1
"""In `Leader.unused1` of a delta record: the claim of a host that has not joined yet."""
_PAGE = 4096
_CALL = 6
"""A bit in the bitmap stays for so many times `io_timeout`."""
_FULL_LOOK = 5
"""Every so many renewals the whole lockspace is read, otherwise only as far as host ids were seen in use: so that each
comes while a bit stays, for it may be a host that was not known before that calls.  sanlock reads all each time."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a successful renewal has shown: which hosts ask us to look at requests; events for us; how long it took."""

    callers: Sequence[int] = ()
    events: list[Event] = field(default_factory=list)
    read_seconds: float = 0.0
    write_seconds: float = 0.0


class Membership:
    """See the module.  *name* must be unique among hosts, and stable if a host is to get its host id back at once."""

    def __init__(self, space: bytes, geometry: Geometry, timing: Timing, name: bytes, clock: Clock) -> None:
        if not 0 < len(name) <= MAX_NAME:
            raise ValueError(f"a host name has 1 to {MAX_NAME} bytes, not {len(name)}")
        self.space = space
        self.geometry = geometry
        self.timing = timing
        self.name = name
        self.clock = clock
        self.hosts = Hosts(space, geometry, timing)
        self.census = Census(space, geometry, timing)
        self._records = Records(space, geometry, timing)
        self.host_id = 0
        self.generation = 0
        self.last_success = 0.0
        """When the last good renewal began."""
        self.why_lost: Lost | None = None
        self._record = Leader(DELTA_MAGIC, timing.delta_version)
        self._unsure = False
        self._succeeds = False
        self._trusted: Leader | None = None
        """Before a claim: the record that is known to have been the last one there, by us or before us."""
        self._looks = 0
        self._extent = 0
        self._calls: dict[int, float] = {}
        self._event = (0, 0, 0)

    @property
    def joined(self) -> bool:
        """True from the end of `join` or `resume` to that of `leave`."""
        return self.generation > 0

    @property
    def valid_until(self) -> float:
        """L: from this moment on nothing may be done under this membership."""
        return self.last_success + self.timing.fence

    @property
    def next_renewal(self) -> float:
        """When the next renewal is due."""
        return self.last_success + self.timing.renewal

    def check(self) -> None:
        """Raise `Lost` unless the own lease is valid now."""
        if self.why_lost is None and not self.joined:
            raise Lost(NO_LOCKSPACE, "this host has not joined the lockspace")
        if self.why_lost is None and self.clock() >= self.valid_until:
            self.why_lost = Lost(
                NO_LOCKSPACE, f"this host's lease was not renewed for {self.timing.fence:g} seconds, and has run out"
            )
        if self.why_lost is not None:
            raise self.why_lost

    def call(self, host_id: int) -> None:
        """Ask another host to look at requests: its bit goes to the disk with the next renewals."""
        self._calls[host_id] = self.clock() + _CALL * self.timing.io_timeout

    def set_event(self, host_id: int, generation: int, event: int, data: int = 0) -> None:
        """Have an event for another host in our record, from the next renewal on.  Stays until it is replaced."""
        self._event = (generation, event, data)
        self.call(host_id)

    # Joining.

    def join(
        self, host_id: int, *, predecessor_gone: bool = True, same_boot: bool = False,
        noted: tuple[int, float] | None = None,
    ) -> Operation[None]:  # fmt: skip
        """Claim *host_id* as a new incarnation.

        A host id that is held must stand still for the long delay first, unless it is held under our own name, the
        caller knows that nobody acts any more under what that incarnation held (*predecessor_gone*), and nobody else
        can have claimed it since (`_is_ours`).  *same_boot*: the predecessor ran, or may have run, in this boot;
        *noted*: then its generation, and when it began the last renewal that it knew to be good.
        After a membership that was lost, or a claim that failed, go on with its `successor`.
        Raises `Clash`, `BadArea`, `StorageTrouble`.
        """
        if not 1 <= host_id <= self.geometry.max_hosts:
            raise ValueError(f"host ids are from 1 to {self.geometry.max_hosts}, not {host_id}")
        yield from self._records.quiet()
        began = self.clock()
        found = yield from self._records.read(host_id)
        if found.timestamp and not (predecessor_gone and self._is_ours(found, same_boot, noted)):
            began, found = yield from self._stands_still(host_id, found)
        self._trusted = found
        short = self.timing.short_delay(found.io_timeout)
        now = self.clock()
        claim = replace(
            found, timestamp=self.timing.stamp(now), unused1=CLAIM, io_timeout=self.timing.stored, owner_id=host_id,
            owner_generation=found.owner_generation + 1, resource_name=self.name,
        ).sealed()  # fmt: skip
        yield from self._write_claim(host_id, claim, began + short)
        # Whoever read the sector before our write was there has written by now, or finds ours when it looks; that holds
        # only if we were no slower ourselves.  If we were, who was there before us finds out, or fences, first.
        slow = self.clock() - began > short / 2
        delay = self.timing.long_delay(found.io_timeout) if slow else short
        self._record, self.last_success = yield from self._stand(host_id, claim, now, delay)
        self._unsure = False
        self.host_id, self.generation = host_id, claim.owner_generation

    def _is_ours(self, found: Leader, same_boot: bool, noted: tuple[int, float] | None) -> bool:
        """Say whether a record under our name is that of a predecessor, and nobody has claimed the host id since.

        A claim or a renewal of ours that came late may stand where another host had claimed the host id, and that host
        need not have noticed yet.  So the record must not be a claim; where we know what was there last, it must be
        that; and in the same boot it must be so young that no other host could have taken the predecessor for dead.

        What we know to have been there is there for the first time: its write had ended, so nothing has put it back.
        A renewal whose outcome was unknown when the lease was lost is no such thing, even if nothing was held under it:
        it may have landed when others had the right to the host id.  Then the long delay is the only way to know.
        """
        if not names.same(found.resource_name, self.name) or found.unused1 == CLAIM:
            return False
        if noted is not None and (found.owner_generation, found.timestamp) == (noted[0], self.timing.stamp(noted[1])):
            return True
        if self._trusted is not None or self._succeeds:
            return found == self._trusted
        age = self.clock() - self.timing.seconds(found.timestamp)
        return not same_boot or 0 <= age < self.timing.margin

    def successor(self) -> Membership:
        """Return the next incarnation of this host, in this process, after this one was lost or has failed to join."""
        after = Membership(self.space, self.geometry, self.timing, self.name, self.clock)
        after._succeeds = True
        after._trusted = self._record if self._record.owner_id else self._trusted
        return after

    def _stand(self, host_id: int, claim: Leader, since: float, delay: float) -> Operation[tuple[Leader, float]]:
        """See a claim stand for *delay*, renewing it; return it as it is then, and when it was written last.

        A claim that is not renewed is one that other hosts may take over.
        """
        until = self.clock() + delay
        while True:
            yield Sleep(min(until - self.clock(), self.timing.renewal))
            stood = self.clock() >= until
            there = yield from self._records.read(host_id)
            if there != claim:
                raise self._clash(host_id, there)
            now = self.clock()
            if stood and now < since + self.timing.fence:
                return claim, since
            claim, limit = replace(claim, timestamp=self.timing.stamp(now)).sealed(), since + self.timing.fence
            yield from self._write_claim(host_id, claim, limit)
            since = now

    def _write_claim(self, host_id: int, claim: Leader, not_after: float) -> Operation[None]:
        try:
            yield self._records.write(host_id, delta.encode(claim, b"", self.geometry.sector), not_after)
        except DiskError as error:
            raise StorageTrouble(Code.LEADER_WRITE, f"the claim of host id {host_id} failed: {error}") from error

    def _stands_still(self, host_id: int, found: Leader) -> Operation[tuple[float, Leader]]:
        """Watch a held host id for the long delay.  Return when the last look began, and what it showed."""
        since = self.clock()
        delay = self.timing.long_delay(found.io_timeout)
        while True:
            left = since + delay - self.clock()
            yield Sleep(min(self.timing.renewal, left) if left > 0 else self.timing.poll / 2)
            began = self.clock()
            there = yield from self._records.read(host_id)
            if there.timestamp == 0:
                return began, there
            if there != found:
                raise self._clash(host_id, there)
            if began - since > delay:
                return began, there

    def resume(self, host_id: int, generation: int) -> Operation[bool]:
        """Take up the incarnation of a predecessor on this host that died, without a new generation.

        The caller knows host id and generation from it, that it ran in this boot (the clock is the same), under the
        same name, and that it is wholly gone.  False if its lease has run out or its record is not there any more:
        then everything that it held must be fenced, and `join` begins a new incarnation.
        Raises `BadArea`, `StorageTrouble`.
        """
        yield from self._records.quiet()
        there = yield from self._records.read(host_id)
        who = (there.owner_id, there.owner_generation)
        if who != (host_id, generation) or not names.same(there.resource_name, self.name) or not there.timestamp:
            return False
        if there.unused1 == CLAIM:
            return False
        success = self.timing.seconds(there.timestamp)
        if not success <= self.clock() < success + self.timing.fence:
            return False
        self._record, self._unsure, self.last_success = there, True, success
        self.host_id, self.generation = host_id, generation
        try:
            yield from self.renew()
        except Lost:
            return False
        return True

    # Renewing.

    def renew(self) -> Operation[Renewal]:
        """Look at all hosts, check that our record is still ours, and renew it.

        Raises `Lost`: fence.  Raises `StorageTrouble`: try again after `Timing.retry`, until `valid_until`.
        """
        self.check()
        yield from self._records.quiet()
        started = self.clock()
        length = self._look_length()
        area = yield from self._records.look(length)
        seen = self.clock()
        offset = self.geometry.delta_offset(self.host_id)
        self._verify(area[offset : offset + self.geometry.sector])
        callers, events = self.hosts.observe(area, started, seen, self.host_id)
        self.census.take(area, started)
        self._looks += 1
        yield from self._write_renewal()
        return Renewal(callers, events, seen - started, self.clock() - seen)

    def _write_renewal(self) -> Operation[None]:
        self.check()
        now, until = self.clock(), self.valid_until
        generation, event, data = self._event
        record = replace(
            self._record, timestamp=self.timing.stamp(now), unused1=0, io_timeout=self.timing.stored,
            write_id=generation, write_generation=event, write_timestamp=data,
        ).sealed()  # fmt: skip
        self._calls = {host_id: end for host_id, end in self._calls.items() if now < end}
        sector = delta.encode(record, delta.bitmap_of(self._calls), self.geometry.sector)
        unsure, self._unsure = self._unsure, True
        try:
            yield self._records.write(self.host_id, sector, until, max(until - now, 0.0))
        except NotIssued:
            self._unsure = unsure
            self.check()
            raise StorageTrouble(Code.LEADER_WRITE, "the renewal came too late to be written") from None
        except DiskError as error:
            self.check()
            raise StorageTrouble(Code.LEADER_WRITE, f"the renewal could not be written: {error}") from error
        self.check()  # by the renewal before: one that ends after L revives nothing
        self._record, self._unsure, self.last_success = record, False, now

    def _verify(self, sector: bytes) -> None:
        there = Leader.decode(sector)
        try:
            validate_delta(there, self.space, wanted=self.timing.delta_version)
        except BadRecord as error:
            raise self._lose(error.code, f"this host's record was overwritten: {error.what}") from error
        ours = self._record
        if (there.owner_id, there.owner_generation) != (ours.owner_id, ours.owner_generation) or not names.same(
            there.resource_name, self.name
        ):
            whom = f"{names.shown(there.resource_name)} in generation {there.owner_generation}"
            raise self._lose(Code.RENEW_OWNER, f"host id {self.host_id} was taken by {whom}")
        if not self._unsure and there != ours:
            raise self._lose(Code.RENEW_DIFF, "this host's record is not as this host has written it")

    def _lose(self, code: int, message: str) -> Lost:
        self.why_lost = Lost(code, message)
        return self.why_lost

    def _look_length(self) -> int:
        """Return how much of the lockspace to read: all of it now and then, otherwise as far as it is in use."""
        size = self.geometry.sector
        everything = self.geometry.max_hosts * size
        if not self.timing.is_sanlock and self._looks % _FULL_LOOK:
            highest = max([self.host_id, *self.hosts.known()[-1:]])
            everything = min(everything, highest * size)
        return min(-(-everything // _PAGE) * _PAGE, self.geometry.align)

    # Leaving.

    def leave(self) -> Operation[None]:
        """Free the host id.  Everything held under it was released before.  Raises `Lost`, `StorageTrouble`.

        Not done while the outcome of a renewal is unknown, as in sanlock: the record may not be ours any more.
        """
        self.check()
        if self._unsure:
            raise StorageTrouble(Code.LEADER_WRITE, "the last renewal failed, so the host id is left to run out")
        yield from self._records.quiet()
        sector = delta.encode(replace(self._record, timestamp=0).sealed(), b"", self.geometry.sector)
        host_id, until = self.host_id, self.valid_until
        self.generation = 0
        self.why_lost = Lost(NO_LOCKSPACE, "this host has left the lockspace")
        try:
            yield self._records.write(host_id, sector, until)
        except DiskError as error:
            raise StorageTrouble(Code.LEADER_WRITE, f"the host id could not be freed: {error}") from error

    # The others.

    def confirm_dead(self, host_id: int) -> Operation[None]:
        """Take an administrator's word that a host is dead: its leases may be had at once.

        Watches the host for somewhat more than the time in which it would renew, and raises `Clash` if it does.
        Raises `BadArea`, `StorageTrouble`.
        """
        first = yield from self._records.read(host_id)
        slot = self.hosts.slot(host_id)
        since = self.clock()
        if slot is not None and (slot.generation, slot.timestamp) == (first.owner_generation, first.timestamp):
            since = slot.last_live
        period = self.timing.renewal * (first.io_timeout or self.timing.stored) / self.timing.stored
        while (left := since + 1.5 * period - self.clock()) > 0:
            yield Sleep(min(self.timing.poll, left))
            there = yield from self._records.read(host_id)
            if (there.owner_generation, there.timestamp) != (first.owner_generation, first.timestamp):
                name = names.shown(there.resource_name)
                raise Clash(Code.ACQUIRE_ID_LIVE, f"host {name} (id {host_id}) has just renewed its lease: it lives",
                            there.resource_name)  # fmt: skip
        self.hosts.confirm(host_id, first.owner_generation, first.timestamp)

    def look(self) -> Operation[None]:
        """See how far host ids are in use, between two renewals.  Raises `StorageTrouble`."""
        began = self.clock()
        area = yield from self._records.look(self.geometry.align)
        self.census.take(area, began)

    def read_host(self, host_id: int) -> Operation[Leader]:
        """Return the record of a host, checked in full.  Raises `BadArea`, `StorageTrouble`."""
        return (yield from self._records.read(host_id))

    def _clash(self, host_id: int, there: Leader) -> Clash:
        name = names.shown(there.resource_name)
        return Clash(Code.HOST_ID_BUSY, f"host id {host_id} is in use by the host {name}", there.resource_name)
