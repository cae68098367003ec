"""The backend ``paxos-lease``: leases on shared storage, in sanlock's format and by its rules."""

from __future__ import annotations

from lockfs.backend import Command, Spec
from lockfs_paxos_lease.options import OPTIONS

SPEC = Spec(
    name="paxos-lease",
    summary="leases on shared storage that has no locks (disk paxos, in sanlock's format): a dead host's run out",
    factory="lockfs_paxos_lease.engines:make",
    options=OPTIONS,
    commands=(
        Command("lease", "look at leases on the storage, check, mend, make them", "lockfs_paxos_lease.cli.lease:fill"),
    ),
)
