"""A host that asks others for leases, as sanlock hosts do: a member of a lockspace that takes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.directory import LeaseDirectory
from lockfs_paxos_lease.disk.file import Disks
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.actions import Area
from lockfs_paxos_lease.engine.area import LeaseArea
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing

HOST_ID = 9


@asynccontextmanager
async def asking(leases: Path, name: str, mode: int, takeover: float) -> AsyncIterator[None]:
    """Ask for the lease *name* in this directory, in the force mode *mode*; within the context others are called."""
    timing = Timing.own(takeover)
    place = LeaseDirectory(Disks(), driver.boottime, timing, -1, "", str(leases))
    space = await place.open()
    member = Membership(space.name, space.geometry, timing, b"asker", driver.boottime)
    lockspace, lease = await place.lockspace(), await place.find(name)
    assert lease is not None
    areas = {Area.LOCKSPACE: lockspace, Area.LEASE: lease}
    await driver.run(member.join(HOST_ID), areas)
    assert await driver.run(requests.make(LeaseArea(name.encode(), member), mode), areas), "nobody has it"

    async def renew() -> None:
        while True:
            await driver.run(member.renew(), areas)
            await trio.sleep(timing.renewal)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew)
            yield
            nursery.cancel_scope.cancel()
        await driver.run(member.leave(), areas)
    finally:
        with trio.CancelScope(shield=True):
            await lease.close()
            await lockspace.close()
            await place.close()
