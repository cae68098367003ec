"""What an administrator is shown of a lockspace."""

from __future__ import annotations

import time

from lockfs.backend import Denied, Host
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
        seen, here = wall - (now - slot.last_live), host_id == membership.host_id
        found.append(Host(identity.shown(slot.name), state, seen, detail, host_id, here))
    return found


def number_of(membership: Membership, host: str) -> int:
    """Return the host id of a host that is named by its name or that number.  Raises `Denied`."""
    shown = {}
    for host_id in membership.hosts.known():
        slot = membership.hosts.slot(host_id)
        if slot is not None:
            shown[host_id] = identity.shown(slot.name)
    found = [host_id for host_id, name in shown.items() if host in (name, str(host_id))]
    if len(found) == 1:
        return found[0]
    hint = "`lockfs hosts` lists them."
    if found:
        raise Denied(f"more than one host is called '{host}': {', '.join(map(str, found))}", hint=f"Say which. {hint}")
    raise Denied(f"there is no host '{host}'", hint=hint)
