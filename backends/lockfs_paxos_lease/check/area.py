"""What an area is, told by its first sector."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from lockfs_paxos_lease.format import leader, rindex
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import Geometry

PROBE = 4096
"""Bytes that tell what an area is: one sector of the larger size."""


class Kind(enum.Enum):
    """What is at a place."""

    LOCKSPACE = "lockspace"
    LEASE = "lease"
    DELETED = "deleted lease"
    INDEX = "index"
    EMPTY = "empty"
    UNKNOWN = "unknown"


_MAGIC = {
    leader.DELTA_MAGIC: Kind.LOCKSPACE,
    leader.PAXOS_MAGIC: Kind.LEASE,
    leader.CLEARED_MAGIC: Kind.DELETED,
    rindex.MAGIC: Kind.INDEX,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an area is, and its sizes; `problem` says why those are a guess."""

    kind: Kind
    geometry: Geometry
    problem: BadRecord | None = None


def probe(start: bytes, guess: Geometry) -> Sizes:
    """Tell what begins with the bytes *start*; *guess* is what is taken where it does not say its sizes."""
    (magic,) = struct.unpack_from("<I", start)
    kind = _MAGIC.get(magic, Kind.UNKNOWN if any(start) else Kind.EMPTY)
    if kind in (Kind.UNKNOWN, Kind.EMPTY):
        return Sizes(kind, guess)
    try:
        if kind is Kind.INDEX:
            return Sizes(kind, rindex.Header.decode(start).geometry)
        return Sizes(kind, Leader.decode(start).geometry)
    except BadRecord as problem:
        return Sizes(kind, guess, problem)
