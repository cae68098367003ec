"""Which sectors of an area are used, or differ from what an earlier look has shown, without decoding all of them.

Slices of bytes are compared at the speed of memory; those of a memoryview byte by byte, so none is taken here.
"""

from __future__ import annotations

from collections.abc import Iterator

_CHUNK = 1 << 16


def used(area: bytes, sector_size: int) -> Iterator[int]:
    """Yield the numbers of the sectors that are not all zeros, in order."""
    return differing(area, bytes(len(area)), sector_size)


def differing(area: bytes, earlier: bytes, sector_size: int) -> Iterator[int]:
    """Yield the numbers of the sectors that two areas of equal size do not have in common, in order.

    Raises ValueError for areas of different sizes.
    """
    if len(area) != len(earlier):
        raise ValueError(f"the areas have {len(area)} and {len(earlier)} bytes")
    for start in range(0, len(area), _CHUNK):
        end = min(start + _CHUNK, len(area))
        if area[start:end] != earlier[start:end]:
            for offset in range(start, end, sector_size):
                if area[offset : offset + sector_size] != earlier[offset : offset + sector_size]:
                    yield offset // sector_size
