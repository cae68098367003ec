"""sanlock's checksum: CRC-32C (Castagnoli) with the initial register 0xFFFFFFFE and without the final inversion."""

from __future__ import annotations

import google_crc32c

_ALL = 0xFFFFFFFF


def checksum(data: bytes) -> int:
    """Return the checksum of *data*."""
    # The library inverts its start value and its result; undone, a start of 1 is the register 0xFFFFFFFE.
    crc: int = google_crc32c.extend(1, data)
    return _ALL ^ crc
