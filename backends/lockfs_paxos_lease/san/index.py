"""The index of a volume as it was read: where leases are, and where one more can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockfs_paxos_lease.format import rindex, version
from lockfs_paxos_lease.format.dblock import decode_host_sector
from lockfs_paxos_lease.format.leader import PAXOS_MAGIC, Leader
from lockfs_paxos_lease.format.size import Geometry

SANLOCK_LIMIT = 1 << 31
"""Bytes.  When it goes by a name, sanlock (3.8.5) takes where a lease lies, counted from the first one, for a signed
number of 32 bits: beyond that it looks, and writes, at the wrong place.
"""


@dataclass(frozen=True, slots=True)
class Index:
    """An index and all its bytes.  Raises `BadRecord` on use if its header is not right."""

    header: rindex.Header
    data: bytes

    @classmethod
    def decode(cls, data: bytes, space: bytes, offset: int) -> Index:
        """Return the index that lies at *offset* of the volume of lockspace *space*.  Raises `BadRecord`."""
        header = rindex.Header.decode(data)
        header.validate(space, offset)
        return cls(header, data)

    def find(self, name: bytes) -> int | None:
        """Return where the lease *name* begins; None if there is none.

        Of two with one name the first counts, on all hosts alike.
        """
        return next((entry.offset for _, entry in rindex.entries(self.data, self.header) if entry.name == name), None)

    def number_of(self, name: bytes) -> int | None:
        """Return the number of the entry of the lease *name*; None if there is none."""
        return next((number for number, entry in rindex.entries(self.data, self.header) if entry.name == name), None)

    def free(self, word: int) -> Iterator[tuple[int, int]]:
        """Yield number and place of each lease that there may be yet; *word* is the version word of the lockspace."""
        taken = {number for number, _ in rindex.entries(self.data, self.header)}
        with_sanlock = version.takeover_of(word) is None
        for number in range(self.header.resources):
            if with_sanlock and number * self.header.geometry.align >= SANLOCK_LIMIT:
                return
            if number not in taken:
                yield number, self.header.resource_offset(number)

    def sector_with(self, number: int, entry: rindex.Entry) -> tuple[int, bytes]:
        """Return offset and content of the sector in which entry *number* is, with that entry changed."""
        size, start = self.header.sector_size, self.header.entry_offset(number)
        offset = start - start % size
        sector = bytearray(self.data[offset : offset + size])
        sector[start - offset : start - offset + rindex.ENTRY_SIZE] = entry.encode()
        return offset, bytes(sector)


def is_used(area: bytes, geometry: Geometry) -> bool:
    """Say whether the bytes of an area are a lease that somebody has, though no entry names it."""
    leader = Leader.decode(area)
    if leader.magic != PAXOS_MAGIC:
        return False
    if leader.timestamp:
        return True
    size = geometry.sector
    hosts = range(1, geometry.max_hosts + 1)
    return any(
        decode_host_sector(area[geometry.host_offset(each) : geometry.host_offset(each) + size])[1].is_shared
        for each in hosts
    )
