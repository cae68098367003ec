"""The host sectors of a lease: all of them decoded, or those that count, of which what has not changed is not decoded
again.

A lease has up to 2000 of them, and an attempt to get it reads them three times.  Most were never used, most others are
of versions that are settled long since, and hardly any changes between two reads.  Every checksum is checked all the
same, once for each content.
"""

from __future__ import annotations

from collections.abc import Iterator

from lockfs_paxos_lease.engine.errors import BadArea
from lockfs_paxos_lease.format import scan
from lockfs_paxos_lease.format.dblock import Dblock, ModeBlock, decode_host_sector, glance, is_empty
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.size import Geometry

_FIRST = 2
"""Sectors before that of host id 1."""


class Blocks:
    """What one attempt of host *host_id* sees of the hosts up to *num_hosts*; blocks for versions before *floor* are
    history.

    `counting` has, by host id, those for later versions, those of sharers, and our own.  `mbal`, `version` and `time`
    are the highest ballot number, version, and time of a proposal for us, of all that were ever seen.
    """

    def __init__(self, geometry: Geometry, num_hosts: int, host_id: int, floor: int) -> None:
        self.counting: dict[int, tuple[Dblock, ModeBlock]] = {}
        self.mbal = self.version = self.time = 0
        self._geometry = geometry
        self._num_hosts = num_hosts
        self._host_id = host_id
        self._floor = floor
        self._memory = scan.Memory(geometry.sector)

    def look(self, area: bytes) -> dict[int, tuple[Dblock, ModeBlock]]:
        """Take in what was read of the lease from its start, and return `counting`.  Raises `BadArea`."""
        size, last = self._geometry.sector, self._num_hosts + _FIRST
        for number in self._memory.take(area):
            if _FIRST <= number < last:
                self._take(number + 1 - _FIRST, area, number * size)
        return self.counting

    def _take(self, host_id: int, area: bytes, start: int) -> None:
        try:
            mbal, inp, time, lver, shared = glance(area, start)
        except BadRecord as error:
            raise BadArea(error, start) from error
        self.mbal, self.version = max(self.mbal, mbal), max(self.version, lver)
        if inp == self._host_id:
            self.time = max(self.time, time)
        if lver >= self._floor or shared or host_id == self._host_id:
            self.counting[host_id] = decode_host_sector(area[start : start + self._geometry.sector])
        else:
            self.counting.pop(host_id, None)


def host_blocks(area: bytes, geometry: Geometry, num_hosts: int) -> Iterator[tuple[int, Dblock, ModeBlock]]:
    """Yield host id, block and mode of all host sectors that are not empty, in order.  Raises `BadArea`."""
    size = geometry.sector
    for number in scan.used(area, size):
        if _FIRST <= number < num_hosts + _FIRST and not is_empty(area, number * size):
            block, mode = decode_host_sector(area[number * size : (number + 1) * size])
            host_id = number + 1 - _FIRST
            yield host_id, checked(block, host_id, geometry), mode


def checked(block: Dblock, host_id: int, geometry: Geometry) -> Dblock:
    """Return the block of a host if its checksum is right.  Raises `BadArea`."""
    try:
        block.validate()
    except BadRecord as error:
        raise BadArea(error, geometry.host_offset(host_id)) from error
    return block
