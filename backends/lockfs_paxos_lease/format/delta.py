"""A host's sector in the lockspace: its delta lease, and a bitmap of the hosts that it calls.

Bit H-1 of the bitmap (the lowest bit of a byte first) asks host H to look at requests and at the event in this
host's record.
"""

from __future__ import annotations

from collections.abc import Iterable

from lockfs_paxos_lease.format.leader import Leader

BITMAP_OFFSET = 256
BITMAP_SIZE = 256


def encode(leader: Leader, bitmap: bytes, sector_size: int) -> bytes:
    """Return a whole sector.  Raises ValueError for a bitmap of another size."""
    if len(bitmap) not in (0, BITMAP_SIZE):
        raise ValueError(f"a bitmap has {BITMAP_SIZE} bytes, not {len(bitmap)}")
    return (leader.encode().ljust(BITMAP_OFFSET, b"\0") + bitmap).ljust(sector_size, b"\0")


def decode(sector: bytes | memoryview) -> tuple[Leader, bytes]:
    """Return the record and the bitmap.  Raises ValueError if the sector is too short."""
    if len(sector) < BITMAP_OFFSET + BITMAP_SIZE:
        raise ValueError(f"a delta sector has 512 bytes at least, not {len(sector)}")
    return Leader.decode(sector), bytes(sector[BITMAP_OFFSET : BITMAP_OFFSET + BITMAP_SIZE])


def bitmap_of(host_ids: Iterable[int]) -> bytes:
    """Return the bitmap that calls these hosts."""
    bits = 0
    for host_id in host_ids:
        bits |= 1 << (host_id - 1)
    return bits.to_bytes(BITMAP_SIZE, "little")


def is_called(bitmap: bytes, host_id: int) -> bool:
    """Say whether a host is called."""
    return bool(bitmap[(host_id - 1) >> 3] >> ((host_id - 1) & 7) & 1)


def called(bitmap: bytes) -> list[int]:
    """Return the ids of all hosts that are called."""
    bits = int.from_bytes(bitmap, "little")
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length())
        bits ^= lowest
    return found
