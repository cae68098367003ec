"""Names in records: 48 bytes, padded with zeros."""

from __future__ import annotations

SIZE = 48


def checked(name: bytes) -> bytes:
    """Return *name* if it can stand in a record.  Raises ValueError."""
    if len(name) > SIZE:
        raise ValueError(f"the name {name!r} has {len(name)} bytes; there is room for {SIZE}")
    return name


def same(one: bytes, other: bytes) -> bool:
    """Compare as sanlock does (strncmp with 48): what follows a zero byte does not count."""
    return one[:SIZE].partition(b"\0")[0] == other[:SIZE].partition(b"\0")[0]


def shown(name: bytes) -> str:
    """Return a name for a message."""
    return ascii(name.partition(b"\0")[0].decode(errors="backslashreplace"))
