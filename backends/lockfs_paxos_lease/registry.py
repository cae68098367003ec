"""Which lockspaces this process has joined: one membership for all mounts of a host that share leases."""

from __future__ import annotations

import trio

from lockfs.errors import MountError
from lockfs_paxos_lease.engine.actions import Clock
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.lockspace import Lockspace, Member
from lockfs_paxos_lease.place import Place, Space

_open: dict[tuple[str, tuple[int, int, int]], Lockspace] = {}
_gates: dict[tuple[str, tuple[int, int, int]], trio.Lock] = {}


async def enter(
    member: Member, place: Place, space: Space, timing: Timing, clock: Clock, host: str, run_dir: str, wanted: int,
    watchdog_path: str,
) -> Lockspace:  # fmt: skip
    """Return the lockspace, joined by this host for this member and for all others that use the same.

    Raises `MountError`, `LockUnavailable`.
    """
    key = (run_dir, space.key)
    async with _gates.setdefault(key, trio.Lock()):
        lockspace = _open.get(key)
        if lockspace is None:
            lockspace = Lockspace(place, space, timing, clock, host, run_dir, wanted, watchdog_path)
            await lockspace.start()
            _open[key] = lockspace
        elif (lockspace.timing, lockspace.wanted, lockspace.watchdog_path) != (timing, wanted, watchdog_path):
            raise MountError(
                f"the leases in {place.where} are used on this host with another takeover=, io_timeout=, host_id= or "
                "watchdog=",
                hint="All mounts of one host that share leases must agree on these.",
            )
        lockspace.members.append(member)
        return lockspace


async def leave(member: Member, lockspace: Lockspace, run_dir: str) -> None:
    """Let a member go; the last one leaves the lockspace."""
    key = (run_dir, lockspace.space.key)
    async with _gates[key]:
        lockspace.members.remove(member)
        if not lockspace.members:
            del _open[key]
            await lockspace.stop()
