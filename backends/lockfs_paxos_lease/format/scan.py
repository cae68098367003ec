"""Which sectors of an area are used, or differ from what an earlier look has shown, without decoding all of them.

Whole pieces are compared at the speed of memory, and without a copy: `bytes.startswith` does that, slices would copy,
and those of a memoryview are compared byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

PIECE, PART = 1 << 16, 1 << 12
"""Bytes that are compared at once, and again where a piece differs: multiples of all sizes of sectors."""
_ZEROS = bytes(PIECE)


class Memory:
    """What the sectors of an area said when they were last seen; what never was counts as *blank* sectors, or zeros."""

    def __init__(self, sector_size: int, blank: bytes = b"") -> None:
        self._size = sector_size
        self._blank = blank * (PIECE // sector_size) if blank else _ZEROS
        self._pieces: list[bytes] = []

    def take(self, area: bytes) -> list[int]:
        """Take in what the area says from its start, as far as it was read; return the sectors that say another thing.

        They are numbered from 0, and in order.
        """
        pieces, size, changed = self._pieces, self._size, []
        for index, start in enumerate(range(0, len(area), PIECE)):
            if index == len(pieces):
                pieces.append(self._blank)
            before = pieces[index]
            length = min(len(area) - start, PIECE)
            if area.startswith(before if length == PIECE else before[:length], start):
                continue
            for part in range(0, length, PART):
                if not area.startswith(before[part : min(part + PART, length)], start + part):
                    changed += [
                        (start + offset) // size
                        for offset in range(part, min(part + PART, length), size)
                        if not area.startswith(before[offset : offset + size], start + offset)
                    ]
            pieces[index] = area[start : start + length] + before[length:]
        return changed


def used(area: bytes, sector_size: int) -> Iterator[int]:
    """Yield the numbers of the sectors that are not all zeros, in order."""
    yield from Memory(sector_size).take(area)


def last(area: bytes, sector: bytes, first: int, end: int, is_other: Callable[[int], bool]) -> int:
    """Return the number of the last sector from *first* up to before *end* of which `is_other` is true; -1 if none is.

    Not asked is of sectors that are the same as *sector*.
    """
    size = len(sector)
    each = PIECE // size
    piece = sector * each
    while end > first:
        begin = max(end - each, first)
        if not area.startswith(piece if end - begin == each else piece[: (end - begin) * size], begin * size):
            for number in range(end - 1, begin - 1, -1):
                if not area.startswith(sector, number * size) and is_other(number):
                    return number
        end = begin
    return -1
