"""What an administrator is shown of a lockspace."""

from __future__ import annotations

import time

from lockfs.backend import Host
from lockfs_paxos_lease import identity
from lockfs_paxos_lease.engine.hosts import State
from lockfs_paxos_lease.engine.membership import Membership

_STATES = {
    State.UNKNOWN: "live",  # seen once: alive as far as anybody can tell
    State.LIVE: "live",
    State.FAIL: "failing",
    State.DEAD: "dead",
    State.FREE: "free",
}


def hosts(membership: Membership) -> list[Host]:
    """Return all hosts that were ever seen, by host id, as of the last renewal."""
    now, wall = membership.clock(), time.time()
    found = []
    for host_id in membership.hosts.known():
        slot = membership.hosts.slot(host_id)
        if slot is None:
            continue
        state = _STATES[membership.hosts.state(host_id, now, membership.host_id)]
        if slot.bad:
            state = "failing"
        detail = f"host id {host_id}, generation {slot.generation}" + (", its record is damaged" if slot.bad else "")
        found.append(Host(identity.shown(slot.name), state, wall - (now - slot.last_live), detail))
    return found
