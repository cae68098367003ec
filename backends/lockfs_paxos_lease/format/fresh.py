"""New areas, as sanlock makes them."""

from __future__ import annotations

from dataclasses import replace

from lockfs_paxos_lease.format import delta, rindex
from lockfs_paxos_lease.format import version as versions
from lockfs_paxos_lease.format.leader import CLEARED_MAGIC, DELTA_MAGIC, PAXOS_MAGIC, Leader
from lockfs_paxos_lease.format.request import Request
from lockfs_paxos_lease.format.size import Geometry


def fresh_lockspace(
    geometry: Geometry, space: bytes, io_timeout: int = 10, version: int = versions.DELTA
) -> tuple[bytes, bytes]:
    """Return a lockspace without hosts, as the two writes that make it: the whole area, then its first sector.

    In the first one the record of host 1 has no magic number, so a lockspace that was half made is not taken for one.
    """
    leader = Leader(
        DELTA_MAGIC, version, geometry.flag, geometry.sector, max_hosts=1, space_name=space, io_timeout=io_timeout
    )
    sector = delta.encode(leader, b"", geometry.sector)
    unfinished = delta.encode(replace(leader, magic=0), b"", geometry.sector)
    area = (unfinished + sector * (geometry.max_hosts - 1)).ljust(geometry.align, b"\0")
    return area, sector


def fresh_lease(
    geometry: Geometry, space: bytes, resource: bytes, num_hosts: int = 0, version: int = versions.PAXOS
) -> bytes:
    """Return the area of a lease that was never held, which is written at once.

    It may be used by host ids up to *num_hosts*; 0 stands for all that there is room for.
    """
    return _lease(_fresh_leader(geometry, space, resource, num_hosts, version), geometry)


def cleared_lease(
    geometry: Geometry,
    space: bytes,
    resource: bytes,
    now: int,
    num_hosts: int = 0,
    version: int = versions.PAXOS,
) -> bytes:
    """Return the area of a lease that was deleted at time *now*."""
    leader = _fresh_leader(geometry, space, resource, num_hosts, version)
    return _lease(replace(leader, magic=CLEARED_MAGIC, write_timestamp=now), geometry)


def fresh_rindex(header: rindex.Header) -> bytes:
    """Return the area of an index without leases, which is written at once; the lease that guards it goes behind it."""
    return header.encode().ljust(header.geometry.align, b"\0")


def _fresh_leader(geometry: Geometry, space: bytes, resource: bytes, num_hosts: int, version: int) -> Leader:
    limit = geometry.max_hosts
    return Leader(
        PAXOS_MAGIC, version, geometry.flag, geometry.sector, min(num_hosts or limit, limit), limit,
        space_name=space, resource_name=resource,
    )  # fmt: skip


def _lease(leader: Leader, geometry: Geometry) -> bytes:
    first = leader.encode().ljust(geometry.sector, b"\0")
    return (first + Request().encode(geometry.sector)).ljust(geometry.align, b"\0")
