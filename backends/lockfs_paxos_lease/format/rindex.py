"""The resource index of a volume: a header sector, then 64-byte entries that say where leases lie.

The index takes one area, the next one is an ordinary lease named `LEASE_NAME` that guards it, and the leases begin in
the area after that.  Neither header nor entries have a checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lockfs_paxos_lease.format import names
from lockfs_paxos_lease.format import version as versions
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.size import MIB, Geometry

MAGIC = 0x01042018
LEASE_NAME = b"rindex_lease"
DEFAULT_RESOURCES = 4096
ENTRY_SIZE = 64

_HEADER = struct.Struct("<IIIIIIQ48s")
_ENTRY = struct.Struct("<QII48s")
_FLAGS = {MIB: 1, 2 * MIB: 2, 4 * MIB: 4, 8 * MIB: 8}
_ALIGNS = {flag: align for align, flag in _FLAGS.items()}
_LIMITS = {MIB: 16000, 2 * MIB: 32000, 4 * MIB: 64000, 8 * MIB: 128000}


@dataclass(frozen=True, slots=True)
class Header:
    """The header.  `offset` is that of the index itself; `max_resources` 0 means as many as there is room for."""

    flags: int
    sector_size: int
    max_resources: int
    offset: int
    space_name: bytes
    magic: int = MAGIC
    version: int = versions.RINDEX
    unused: int = 0

    @classmethod
    def of(cls, geometry: Geometry, space: bytes, offset: int, max_resources: int = DEFAULT_RESOURCES) -> Header:
        """Return the header of a new index.  Raises ValueError if there is no room for that many."""
        if not 0 <= max_resources <= _LIMITS[geometry.align]:
            raise ValueError(f"an index has at most {_LIMITS[geometry.align]} leases, not {max_resources}")
        return cls(_FLAGS[geometry.align], geometry.sector, max_resources, offset, space)

    @classmethod
    def decode(cls, sector: bytes | memoryview) -> Header:
        """Return what the sector says, be it good or not.  Raises ValueError if it is too short."""
        if len(sector) < _HEADER.size:
            raise ValueError(f"an index header has {_HEADER.size} bytes, not {len(sector)}")
        magic, version, flags, sector_size, max_resources, unused, offset, space = _HEADER.unpack_from(sector)
        return cls(flags, sector_size, max_resources, offset, space.rstrip(b"\0"), magic, version, unused)

    def encode(self) -> bytes:
        """Return the header sector.  Raises ValueError for a name that is too long."""
        return _HEADER.pack(
            self.magic, self.version, self.flags, self.sector_size, self.max_resources, self.unused, self.offset,
            names.checked(self.space_name),
        ).ljust(self.sector_size, b"\0")  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        """The sizes that the header tells.  Raises `BadRecord`."""
        align = _ALIGNS.get(self.flags & 0xF)
        if align is None:
            raise BadRecord(Code.SIZES, f"the index's flags {self.flags:#x} name no area size")
        return Geometry(self.sector_size, align)

    @property
    def resources(self) -> int:
        """How many leases there may be.  Raises `BadRecord`."""
        return self.max_resources or _LIMITS[self.geometry.align]

    def validate(self, space: bytes, offset: int) -> None:
        """Raise `BadRecord` unless it is the header of the index at *offset* of lockspace *space*."""
        if self.magic != MAGIC:
            raise BadRecord(Code.RINDEX_MAGIC, f"there is no index of leases: its magic number is {self.magic:#010x}")
        versions.check(self.version, versions.RINDEX, Code.RINDEX_VERSION)
        if not names.same(self.space_name, space):
            what = f"the index belongs to the lockspace {names.shown(self.space_name)}, not {names.shown(space)}"
            raise BadRecord(Code.RINDEX_LOCKSPACE, what)
        if self.offset != offset:
            raise BadRecord(Code.RINDEX_OFFSET, f"the index says that it lies at {self.offset}, not at {offset}")

    def lease_offset(self) -> int:
        """Return where the lease lies that guards the index."""
        return self.offset + self.geometry.align

    def resource_offset(self, number: int) -> int:
        """Return where lease *number* (from 0) lies."""
        return self.offset + (2 + number) * self.geometry.align

    def entry_offset(self, number: int) -> int:
        """Return where entry *number* (from 0) begins, counted from the start of the index."""
        return self.sector_size + number * ENTRY_SIZE


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: the lease `name` lies at `offset`; 0 and no name if it is free."""

    offset: int = 0
    name: bytes = b""
    flags: int = 0
    unused: int = 0

    @property
    def is_free(self) -> bool:
        """True if it names no lease."""
        return not self.offset and not self.name

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Entry:
        """Return what 64 bytes say.  Raises ValueError if there are fewer."""
        if len(data) < _ENTRY.size:
            raise ValueError(f"an index entry has {_ENTRY.size} bytes, not {len(data)}")
        offset, flags, unused, name = _ENTRY.unpack_from(data)
        return cls(offset, name.rstrip(b"\0"), flags, unused)

    def encode(self) -> bytes:
        """Return the 64 bytes.  Raises ValueError for a name that is too long."""
        return _ENTRY.pack(self.offset, self.flags, self.unused, names.checked(self.name))


def entries(index: bytes | memoryview, header: Header) -> Iterator[tuple[int, Entry]]:
    """Yield number and entry of all leases in an index area that was read as a whole; free ones are left out."""
    view = memoryview(index)
    free = bytes(ENTRY_SIZE)
    for number in range(header.resources):
        start = header.entry_offset(number)
        data = view[start : start + ENTRY_SIZE]
        if data != free:
            entry = Entry.decode(data)
            if not entry.is_free:
                yield number, entry


def first_free(index: bytes | memoryview, header: Header) -> int | None:
    """Return the number of the first free entry, None if the index is full."""
    taken = {number for number, _ in entries(index, header)}
    return next((number for number in range(header.resources) if number not in taken), None)
