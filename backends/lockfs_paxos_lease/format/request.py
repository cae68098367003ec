"""The request record, sector 1 of a lease: somebody asks its owner to let go.  It has no checksum."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lockfs_paxos_lease.format import version as versions
from lockfs_paxos_lease.format.errors import BadRecord, Code

MAGIC = 0x08292011
FORCE = 1
"""Kill the holder."""
GRACEFUL = 2
"""Ask the holder to end."""

_LAYOUT = struct.Struct("<IIQI")


@dataclass(frozen=True, slots=True)
class Request:
    """A request for version `lver` of a lease, in `force_mode` (0: none)."""

    lver: int = 0
    force_mode: int = 0
    magic: int = MAGIC
    version: int = versions.REQUEST

    def encode(self, sector_size: int) -> bytes:
        """Return a whole sector."""
        return _LAYOUT.pack(self.magic, self.version, self.lver, self.force_mode).ljust(sector_size, b"\0")

    @classmethod
    def decode(cls, sector: bytes | memoryview) -> Request:
        """Return what the sector says, be it good or not.  Raises ValueError if it is too short."""
        if len(sector) < _LAYOUT.size:
            raise ValueError(f"a request record has {_LAYOUT.size} bytes, not {len(sector)}")
        magic, version, lver, force_mode = _LAYOUT.unpack_from(sector)
        return cls(lver, force_mode, magic, version)

    def validate(self) -> None:
        """Raise `BadRecord` unless it is a request record."""
        if self.magic != MAGIC:
            raise BadRecord(Code.REQUEST_MAGIC, f"the request record's magic number is {self.magic:#010x}")
        versions.check(self.version, versions.REQUEST, Code.REQUEST_VERSION)
