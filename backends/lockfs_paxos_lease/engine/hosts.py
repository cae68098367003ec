"""What this host has seen of the others in the lockspace, and what it makes of it: who lives, who is dead.

Judged is by change only: timestamps of different hosts are never compared with each other or with a clock.  A change
counts from *after* the read that showed it.  `Membership.renew` feeds `Hosts.observe`; everybody may ask.
Checksums are not looked at here, as in sanlock; whoever takes a lease over reads the owner's record again, and fully.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import delta, names, scan
from lockfs_paxos_lease.format.leader import DELTA_MAGIC, Leader
from lockfs_paxos_lease.format.size import Geometry

_NOTHING = bytes(16)
"""Owner and generation of a record that was never used; its timestamp is `_NO_TIME`."""
_NO_TIME = bytes(8)


class State(enum.IntEnum):
    """What a host is to us; values as in sanlock."""

    UNKNOWN = 1
    FREE = 2
    LIVE = 3
    FAIL = 4
    DEAD = 5


@dataclass(slots=True)
class Slot:
    """What was seen of one host id.  Times are local; `last_live` is when a change was last seen."""

    owner_id: int
    generation: int
    timestamp: int
    io_timeout: int
    name: bytes
    first_check: float
    last_live: float
    look: int
    """Number of the look that showed the last change."""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """What another host has put into its record for us (sanlock's events)."""

    host_id: int
    generation: int
    target_generation: int
    event: int
    data: int


class Hosts:
    """The watch over one lockspace."""

    def __init__(self, space: bytes, geometry: Geometry, timing: Timing) -> None:
        self._space = space
        self._geometry = geometry
        self._timing = timing
        self._memory: scan.Memory | None = None
        self._slots: dict[int, Slot] = {}
        self._confirmed: dict[int, tuple[int, int]] = {}
        self._first = 0.0
        self._looks = 0
        self.last_check = 0.0
        """When the last look began."""
        self.covered = 0
        """Host ids up to this one have been looked at."""

    def observe(self, area: bytes, began: float, now: float, own_id: int) -> tuple[list[int], list[Event]]:
        """Take in the first sectors of the lockspace, at least up to the last one known, read from *began* to *now*.

        Return which hosts ask us to look at requests, and what events there are for us.
        """
        size = self._geometry.sector
        if not self.covered:
            self._first = now
        self._looks += 1
        last = self._geometry.max_hosts
        if self._memory is None:
            number = min(len(area) // size, last) - 1
            blank = b"" if self._is_known(area, number) else area[number * size : (number + 1) * size]
            self._memory = scan.Memory(size, blank)
        changed = [number + 1 for number in self._memory.take(area) if number < last and self._is_known(area, number)]
        self.last_check = began
        callers: list[int] = []
        events: list[Event] = []
        for host_id in changed:
            sector = area[(host_id - 1) * size : host_id * size]
            if self._take(host_id, sector, now) and host_id != own_id:
                _, bitmap = delta.decode(sector)
                if delta.is_called(bitmap, own_id):
                    callers.append(host_id)
                    leader = Leader.decode(sector)
                    if leader.write_generation:
                        events.append(Event(
                            host_id, leader.owner_generation, leader.write_id, leader.write_generation,
                            leader.write_timestamp,
                        ))  # fmt: skip
        self.covered = max(self.covered, min(len(area) // size, self._geometry.max_hosts))
        return callers, events

    def _is_known(self, area: bytes, number: int) -> bool:
        """Say whether a host id was ever used; most were not, so nothing is decoded."""
        start = number * self._geometry.sector
        used = area[start + 32 : start + 48] != _NOTHING or area[start + 152 : start + 160] != _NO_TIME
        return used or number + 1 in self._slots

    def _take(self, host_id: int, sector: bytes, now: float) -> bool:
        slot = self._slots.get(host_id)
        leader = Leader.decode(sector)
        bad = leader.magic != DELTA_MAGIC or not names.same(leader.space_name, self._space)
        if slot is None:
            self._slots[host_id] = Slot(
                leader.owner_id, leader.owner_generation, leader.timestamp, leader.io_timeout, leader.resource_name,
                self._first, now, self._looks, bad,
            )  # fmt: skip
            return True
        slot.bad = bad
        now_there = (leader.owner_id, leader.owner_generation, leader.timestamp)
        if now_there == (slot.owner_id, slot.generation, slot.timestamp):
            return False
        slot.last_live, slot.look = now, self._looks
        slot.timestamp = leader.timestamp
        if not bad:
            slot.owner_id, slot.generation = leader.owner_id, leader.owner_generation
            slot.io_timeout, slot.name = leader.io_timeout, leader.resource_name
        return True

    def slot(self, host_id: int) -> Slot | None:
        """Return what was seen of a host id; None if nothing, or nothing yet."""
        return self._slots.get(host_id)

    def known(self) -> list[int]:
        """Return the host ids that were ever used, as far as was seen."""
        return sorted(self._slots)

    def changed_at_last_look(self, slot: Slot) -> bool:
        """Say whether the most recent look showed a change."""
        return slot.look == self._looks

    def state(self, host_id: int, now: float, own_id: int = 0) -> State:
        """Return what to make of a host (sanlock's get_hosts)."""
        slot = self._slots.get(host_id)
        if slot is None:
            return State.FREE if host_id <= self.covered else State.UNKNOWN
        if slot.timestamp == 0:
            return State.FREE
        if host_id == own_id:
            return State.LIVE
        age = now - slot.last_live
        confirmed = self.is_confirmed(host_id, slot.generation, slot.timestamp)
        if confirmed or age > self._timing.dead_after(slot.io_timeout):
            return State.DEAD
        if age > self._timing.live_for(slot.io_timeout):
            return State.FAIL
        return State.UNKNOWN if slot.first_check == slot.last_live else State.LIVE

    def holds_on(self, host_id: int, generation: int) -> bool:
        """Say whether a shared hold of that generation may still be in use, as of the last look.  In doubt it is.

        What counts is how long the host had stood still when the last look began: a watch that has not looked since
        knows nothing of now.  Of a generation that it has not seen yet it knows nothing, either: the host may have been
        dead, and back since.
        """
        slot = self._slots.get(host_id)
        if slot is None or slot.generation < generation:
            return True
        if slot.generation > generation or slot.timestamp == 0:
            return False
        if self.is_confirmed(host_id, slot.generation, slot.timestamp):
            return False
        return self.last_check - slot.last_live <= self._timing.dead_after(slot.io_timeout)

    def confirm(self, host_id: int, generation: int, timestamp: int) -> None:
        """Note that an administrator answers for the death of this host, as long as its record stays what it is."""
        self._confirmed[host_id] = (generation, timestamp)

    def is_confirmed(self, host_id: int, generation: int, timestamp: int) -> bool:
        """Say whether an administrator has confirmed the death of a host whose record says this."""
        return self._confirmed.get(host_id) == (generation, timestamp)
