"""How far the area of a lease has to be read: up to the highest host id that can have written to it by now.

A lease may be made for 2000 hosts, and a lockspace have three.  Nobody writes to a lease without having had a host id,
and whoever claims one has to wait before using it.  Let a look at the *whole* lockspace have begun at t on our clock,
and `highest` be the highest host id whose record was not as fresh as on the day the lockspace was made.  Then:

1. The claim of a host id above `highest` has landed after t, or will.  (A record that was ever claimed has a
   generation, which nothing takes away: not leaving, not dying, not the repair of a damaged record.  One that is
   damaged counts as used.)
2. From then on the claimant waits for the short delay at least, and looks at its claim again, before it writes to any
   lease.  By own timing that is `Timing.settle` for every host.  By sanlock's rules it is 2 io_timeout of the record
   found, or the host's own where that says 0; never less than 2 seconds.  More must not be relied on: a sanlock host
   may be killed in its first wait, and be back under its name to wait for 2 of its *own* io_timeout, which may be 1.
   Hosts that are quicker, since they have their own host id back, have an id that was used.  (`sanlock direct acquire`
   asks for no host id at all; but what it takes protects nobody, since its owner's record says that nobody is there.)
3. So no host id above `highest` writes to a lease before t + `Timing.quickest`, and until then its sector there is what
   it was when the lockspace was made.  A read that has *ended* by then would have shown nothing else.
4. What was there when the lockspace was made need not be zeros: a lockspace can be made anew over old leases, or leases
   be brought along from elsewhere.  Ballots of such blocks count for others, so they must for us: a lease is read as a
   whole once in each membership (`Extent`), and from then on at least up to the last sector that was not empty in that.
   What the repair of a damaged block writes behind that proposes nothing, and so decides nothing.

A shortened read is thus no change of the protocol: it shows what the whole one would have shown.  Reads that have not
ended in time, by the clock after them, are made again as a whole: if the host was stopped in between, the clock says
so.  Of the time a third is left for clocks of different speed, as everywhere (`engine.timing`).

`highest` never falls, and t never goes back: looks may overtake each other.  A look that fails says nothing, and one at
a part of the lockspace says nothing of t.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import scan
from lockfs_paxos_lease.format.dblock import is_empty
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.leader import Leader, validate_delta
from lockfs_paxos_lease.format.size import Geometry

LEASES = 1 << 16
"""Leases of which is kept how far they are in use."""
READS = 2
"""Reads of a lease in an attempt that are sure to become shorter by a look at the lockspace."""
_PAGE = 4096
_LONG_AGO = float("-inf")


@dataclass(slots=True)
class Extent:
    """A whole read of a lease: for how many hosts it was then, its last version, and its last host id not empty."""

    num_hosts: int
    lver: int
    highest: int


class Census:
    """See the module.  `look_cost`: how many bytes of reads a look at the lockspace must save to be made for that."""

    def __init__(self, space: bytes, geometry: Geometry, timing: Timing) -> None:
        self.highest = 0
        self.look_cost = geometry.align
        self._space = space
        self._geometry = geometry
        self._timing = timing
        self._began = _LONG_AGO
        self._fresh = bytes(geometry.sector)
        self._extents: dict[bytes, Extent] = {}

    # The lockspace.

    def take(self, area: bytes, began: float) -> None:
        """Take in a look at the lockspace, from its start, that began at *began*."""
        size, limit = self._geometry.sector, self._geometry.max_hosts
        seen = min(len(area) // size, limit)
        if seen > self.highest and self._is_used(area, seen - 1):  # else `_fresh` is what most of them are
            self.highest = seen
        used = scan.last(area, self._fresh, self.highest, seen, lambda number: self._is_used(area, number))
        self.highest = max(self.highest, used + 1)
        if seen == limit:
            self._began = max(self._began, began)

    def _is_used(self, area: bytes, number: int) -> bool:
        sector = area[number * self._geometry.sector : (number + 1) * self._geometry.sector]
        record = Leader.decode(sector)
        try:
            validate_delta(record, self._space, wanted=self._timing.delta_version)
        except BadRecord:
            return True
        if record.owner_id or record.owner_generation or record.timestamp or record.resource_name:
            return True
        self._fresh = sector
        return False

    def is_current(self, now: float) -> bool:
        """Say whether nobody above `highest` can have written to a lease until *now*."""
        return now - self._began < self._timing.quickest * 2 / 3

    def is_look_worthwhile(self, name: bytes, num_hosts: int, own_id: int) -> bool:
        """Say whether it costs less to look at the lockspace now than to read the lease as a whole."""
        reads = READS + self.is_known(name)
        saved = self._geometry.ballot_bytes(num_hosts) - self.length(self.bound(name, num_hosts, own_id), num_hosts)
        return saved * reads > self.look_cost

    # The leases.

    def note(self, name: bytes, leader: Leader, area: bytes) -> None:
        """Take note of a whole read of the lease *name*."""
        size, num_hosts = self._geometry.sector, leader.num_hosts
        last = scan.last(area, bytes(size), 2, num_hosts + 2, lambda number: not is_empty(area, number * size))
        if len(self._extents) >= LEASES:
            self._extents.clear()
        self._extents[name] = Extent(num_hosts, leader.lver, max(last - 1, 0))

    def is_known(self, name: bytes) -> bool:
        """Say whether the lease was read as a whole before."""
        return name in self._extents

    def is_another(self, name: bytes, leader: Leader) -> bool:
        """Say whether the lease is not the one that was read as a whole, or is for more hosts by now."""
        extent = self._extents.get(name)
        return extent is not None and (leader.num_hosts > extent.num_hosts or leader.lver < extent.lver)

    def follow(self, name: bytes, leader: Leader) -> None:
        """Take note of the leader that was read or written last."""
        if extent := self._extents.get(name):
            extent.lver = leader.lver

    def bound(self, name: bytes, num_hosts: int, own_id: int) -> int:
        """Return the highest host id that counts, where `is_current` and `is_known`."""
        extent = self._extents.get(name)
        return min(max(self.highest, own_id, extent.highest if extent else 0), num_hosts)

    def length(self, bound: int, num_hosts: int) -> int:
        """Return how many bytes of the area of a lease for *num_hosts* to read for host ids up to *bound*."""
        end = self._geometry.host_offset(bound + 1)
        return min(-(-end // _PAGE) * _PAGE, self._geometry.ballot_bytes(num_hosts))
