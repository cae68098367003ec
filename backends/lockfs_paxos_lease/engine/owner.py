"""Whether the owner of a lease, as its leader record names it, is still there.

Dead is who has not changed its record for longer than `Timing.dead_after`; that is counted from after a change was
seen to before the read was begun that shows none since.  In doubt the owner lives.
"""

from __future__ import annotations

from lockfs_paxos_lease.engine.actions import Operation, Sleep
from lockfs_paxos_lease.engine.area import LeaseArea
from lockfs_paxos_lease.engine.errors import Held
from lockfs_paxos_lease.format import names
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import Leader


def is_gone(record: Leader, cur: Leader) -> bool:
    """Say whether the delta record of a lease's owner shows that this incarnation is over.

    sanlock takes any record with timestamp 0 for that; a record of an *older* generation says nothing of this one:
    it is a write that came late.
    """
    if record.owner_id != cur.owner_id or record.owner_generation > cur.owner_generation:
        return True
    return record.timestamp == 0 and record.owner_generation == cur.owner_generation


def await_end(area: LeaseArea, cur: Leader, *, wait: bool) -> Operation[bool]:
    """Return True if the owner named by *cur* is gone, dead, or has given the lease back; False if the leader changed.

    Raises `Held` if the owner lives, or if one would have to wait to know and *wait* is false; `BadArea`,
    `StorageTrouble`.
    """
    membership, clock = area.membership, area.membership.clock
    hosts, host_id = membership.hosts, cur.owner_id
    since, stamp, stored, fresh = 0.0, -1, 0, False
    slot = hosts.slot(host_id)
    if slot is not None and (slot.owner_id, slot.generation) == (host_id, cur.owner_generation):
        since, stamp, stored = slot.last_live, slot.timestamp, slot.io_timeout
        fresh = hosts.changed_at_last_look(slot)
    while True:
        began = clock()
        record = yield from membership.read_host(host_id)
        if is_gone(record, cur):
            return True
        confirmed = hosts.is_confirmed(host_id, record.owner_generation, record.timestamp)
        if stamp == -1:
            since, stamp, stored = clock(), record.timestamp, record.io_timeout
        elif not confirmed and (record.timestamp != stamp or fresh):
            if (yield from _gave_back(area, cur)):
                return True
            raise _held(Code.ACQUIRE_ID_LIVE, "it is held by", record, cur)
        if confirmed or began - since > area.timing.dead_after(stored):
            return True
        if not wait:
            if (yield from _gave_back(area, cur)):
                return True
            raise _held(Code.ACQUIRE_OWNED_NOWAIT, "it is held by a host that may be dead,", record, cur)
        yield Sleep(area.timing.poll)
        if (yield from area.read_leader()) != cur:
            return False


def _gave_back(area: LeaseArea, cur: Leader) -> Operation[bool]:
    """Say whether the owner has given the lease back in its own block only.

    It does so where another host has written it into the leader: then it must not touch that.  The flag counts only in
    a block of this version or a later one; sanlock also leaves it in blocks that it has zeroed.
    """
    if cur.write_id == cur.owner_id:
        return False
    block, _ = yield from area.read_host(cur.owner_id)
    return block.is_released and (block.lver >= cur.lver or not block.mbal)


def _held(code: Code, how: str, record: Leader, cur: Leader) -> Held:
    who = f"host {names.shown(record.resource_name)} (id {cur.owner_id})"
    return Held(code, f"{how} {who}", cur.owner_id, cur.owner_generation)
