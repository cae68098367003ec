"""The sizes of sectors and areas: five combinations exist, and all areas of one lockspace have the same."""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.format.errors import BadRecord, Code

MIB = 1 << 20

_MAX_HOSTS = {(512, MIB): 2000, (4096, MIB): 250, (4096, 2 * MIB): 500, (4096, 4 * MIB): 1000, (4096, 8 * MIB): 2000}
_FLAGS = {MIB: 0x10, 2 * MIB: 0x20, 4 * MIB: 0x40, 8 * MIB: 0x80}
_ALIGNS = {flag: align for align, flag in _FLAGS.items()}
_BEFORE_FLAGS = {512: MIB, 4096: 8 * MIB}
ALIGN_FLAGS = sum(_ALIGNS)
"""All bits of a leader's flags that tell the size of an area."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sector size and area size (*align*: areas lie at its multiples), in bytes.

    Raises `BadRecord` for a combination that does not exist.
    """

    sector: int = 512
    align: int = MIB

    def __post_init__(self) -> None:
        if (self.sector, self.align) not in _MAX_HOSTS:
            raise BadRecord(Code.SIZES, f"there are no leases with sectors of {self.sector} and areas of {self.align}")

    @classmethod
    def of_flags(cls, flags: int, sector_size: int) -> Geometry:
        """Return what a leader record says.  Raises `BadRecord`.

        Without any flag, as sanlock up to 3.6 left it, the sector size decides.
        """
        if sector_size not in _BEFORE_FLAGS:
            raise BadRecord(Code.LEADER_SECTOR_SIZE, f"the sector size {sector_size} is neither 512 nor 4096")
        bits = flags & ALIGN_FLAGS
        align = _ALIGNS.get(bits) if bits else _BEFORE_FLAGS[sector_size]
        if align is None:
            raise BadRecord(Code.SIZES, f"the flags {flags:#x} name more than one area size")
        return cls(sector_size, align)

    @property
    def max_hosts(self) -> int:
        """The highest host id that there is room for."""
        return _MAX_HOSTS[self.sector, self.align]

    @property
    def flag(self) -> int:
        """The bit of a leader's flags that tells the area size."""
        return _FLAGS[self.align]

    def delta_offset(self, host_id: int) -> int:
        """Return where a host's sector begins in the lockspace area."""
        return (host_id - 1) * self.sector

    def host_offset(self, host_id: int) -> int:
        """Return where a host's sector begins in the area of a lease."""
        return (host_id + 1) * self.sector

    def ballot_bytes(self, num_hosts: int) -> int:
        """Return how much of a lease area sanlock reads in a ballot: leader, request and host sectors, up to a power
        of two of sectors.
        """
        count: int = 1 << (num_hosts + 1).bit_length()
        return min(count * self.sector, self.align)


ALL = tuple(Geometry(*sizes) for sizes in _MAX_HOSTS)
"""Every combination that exists."""
