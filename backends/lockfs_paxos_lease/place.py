"""Where the leases of a share lie: what a backend asks of a directory or a volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from lockfs.errors import MountError
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import version
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import DELTA_MAGIC, Leader
from lockfs_paxos_lease.format.size import Geometry

FILE_TIMEOUT = 8.0
"""Seconds for what is done to files but reading and writing areas: somewhat less than lockd waits for a backend."""
LEASE_THREADS = 32
"""Calls for leases at once."""
LOCKSPACE_THREADS = 4
"""Calls for a lockspace at once: one is under way, the others are there for when that hangs."""
LEASE_HOSTS = 250
"""Host ids that a lease is made for where the timing is lockfs's own: so many host blocks each ballot reads, twice."""


@dataclass(frozen=True, slots=True)
class Space:
    """A lockspace: its name, its sizes, and what identifies it on this host (device and inode, offset)."""

    name: bytes
    geometry: Geometry
    key: tuple[int, int, int]

    @classmethod
    def of(cls, sector: bytes, key: tuple[int, int, int], timing: Timing, where: str) -> Space:
        """Return what the first record of a lockspace says.  Raises `MountError` if it cannot be used so."""
        leader = Leader.decode(sector)
        try:
            if leader.magic != DELTA_MAGIC:
                raise BadRecord(Code.LEADER_MAGIC, f"its magic number is {leader.magic:#010x}")
            version.check(leader.version, timing.delta_version, Code.LEADER_VERSION)
            return cls(leader.space_name, leader.geometry, key)
        except BadRecord as error:
            hint = "All hosts must mount with the same takeover=." if error.code is Code.LEADER_VERSION else ""
            raise MountError(f"{where} is no lockspace that can be used: {error.what}", hint=hint) from error


def hosts_of(timing: Timing, geometry: Geometry) -> int:
    """Return for how many host ids leases are made."""
    return geometry.max_hosts if timing.is_sanlock else min(geometry.max_hosts, LEASE_HOSTS)


class Place(Protocol):
    """The areas of one lockspace and its leases.

    Methods raise `LockUnavailable` where the storage fails or does not answer, `open` also `MountError`.
    """

    where: str

    async def open(self) -> Space:
        """Find the lockspace, or make it."""

    async def lockspace(self) -> AreaIO:
        """Open the area of the lockspace; the caller closes it."""

    async def find(self, name: str) -> AreaIO | None:
        """Open the area of a lease; None if there is none.  The caller closes it."""

    async def lease(self, name: str) -> AreaIO:
        """Return the area of a lease, not open yet; to open it makes it if there is none.  The caller closes it.

        To open it raises OSError, and `LockUnavailable`.
        """

    def is_current(self, name: str, area: AreaIO) -> bool:
        """Say whether an area that was opened is still that of the lease, and not that of one removed since.

        In a thread of the area's lane.
        """

    async def close(self) -> None:
        """Close what is open but for areas."""
