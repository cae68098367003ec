"""Who handles the leases: the mount option ``engine``."""

from __future__ import annotations

from lockfs.backend import Backend, Context
from lockfs.errors import MountError
from lockfs_paxos_lease.options import SANLOCK


def make(context: Context) -> Backend:
    """Return the backend for a share.  Each engine loads only where it is wanted.

    Raises `MountError` for options that the engine has no use for and that are not about speed only.
    """
    if context.options["engine"] == SANLOCK:
        if context.options["watchdog"]:
            raise MountError("watchdog= is for engine=own: the sanlock daemon has wdmd for that")
        from lockfs_paxos_lease.by_sanlock import SanlockBackend

        return SanlockBackend(context)
    from lockfs_paxos_lease.backend import PaxosBackend

    return PaxosBackend(context)
