"""Who handles the leases: the mount option ``engine``."""

from __future__ import annotations

from lockfs.backend import Backend, Context
from lockfs_paxos_lease.options import SANLOCK


def make(context: Context) -> Backend:
    """Return the backend for a share.  Each engine loads only where it is wanted."""
    if context.options["engine"] == SANLOCK:
        from lockfs_paxos_lease.by_sanlock import SanlockBackend

        return SanlockBackend(context)
    from lockfs_paxos_lease.backend import PaxosBackend

    return PaxosBackend(context)
