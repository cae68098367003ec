"""A host's sector in a lease: its ballot block (disk paxos) at byte 0 and its mode block (shared holds) at byte 128.

All other bytes of the sector mean nothing: sanlock may leave garbage there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from lockfs_paxos_lease.format.checksum import checksum as _checksum
from lockfs_paxos_lease.format.errors import BadRecord, Code

RELEASED = 0x01
"""In `Dblock.flags`: the host has given back what it was granted in this ballot."""
SHARED = 0x01
"""In `ModeBlock.flags`: the host holds the lease shared."""
MODE_OFFSET = 128
SIZE = 56
CHECKED = 48

_BALLOT = struct.Struct("<QQQQQQII")
_BALLOT_CHECKED = struct.Struct("<QQQQQQ")
_MODE = struct.Struct("<I4xQ")
_GLANCE = struct.Struct("<QQQQQQII72xI")
_ZEROS = bytes(SIZE)
_NO_MODE = bytes(_MODE.size)
_NOTHING = bytes(MODE_OFFSET + _MODE.size)


@dataclass(frozen=True, slots=True)
class Dblock:
    """The ballot block.  `flags` lies behind the checksum, unprotected.

    `mbal` is the highest ballot that the host has begun, `bal` that in which it has proposed `inp` (host id), `inp2`
    (generation) and `inp3` (time) as the next owner; `lver` is the version of the lease that the ballot is for.
    """

    mbal: int = 0
    bal: int = 0
    inp: int = 0
    inp2: int = 0
    inp3: int = 0
    lver: int = 0
    flags: int = 0
    checksum: int = 0

    @property
    def is_valid(self) -> bool:
        """True if the checksum is right, or it was never written.

        sanlock's rule: a block whose checksum, mbal, bal, inp and lver are all zero is not checked.
        """
        if not (self.checksum or self.mbal or self.bal or self.inp or self.lver):
            return True
        return self.checksum == self.right_checksum()

    @property
    def is_released(self) -> bool:
        """True if the host has given back what it was granted."""
        return bool(self.flags & RELEASED)

    def right_checksum(self) -> int:
        """Return the checksum that the block should have."""
        return _checksum(_BALLOT_CHECKED.pack(self.mbal, self.bal, self.inp, self.inp2, self.inp3, self.lver))

    def sealed(self) -> Dblock:
        """Return the block with the checksum that is right, equal to what is decoded after it was written."""
        return replace(self, checksum=self.right_checksum())

    def validate(self) -> None:
        """Raise `BadRecord` unless it is valid."""
        if not self.is_valid:
            what = f"a ballot block's checksum is {self.checksum:#010x} and should be {self.right_checksum():#010x}"
            raise BadRecord(Code.DBLOCK_CHECKSUM, what)


@dataclass(frozen=True, slots=True)
class ModeBlock:
    """The mode block: whether the host holds the lease shared, and in which generation.  It has no checksum."""

    flags: int = 0
    generation: int = 0

    @property
    def is_shared(self) -> bool:
        """True if the host holds the lease shared."""
        return bool(self.flags & SHARED)


NEVER = Dblock()
NONE = ModeBlock()


def encode_host_sector(dblock: Dblock, mode: ModeBlock, sector_size: int) -> bytes:
    """Return a whole sector, with the checksum that is right."""
    ballot = _BALLOT.pack(
        dblock.mbal, dblock.bal, dblock.inp, dblock.inp2, dblock.inp3, dblock.lver,
        dblock.right_checksum(), dblock.flags,
    )  # fmt: skip
    return (ballot.ljust(MODE_OFFSET, b"\0") + _MODE.pack(mode.flags, mode.generation)).ljust(sector_size, b"\0")


def decode_host_sector(sector: bytes | memoryview) -> tuple[Dblock, ModeBlock]:
    """Return what the sector says, be it good or not.  Raises ValueError if it is too short.

    Most sectors of a lease were never used: those cost next to nothing.
    """
    if len(sector) < MODE_OFFSET + _MODE.size:
        raise ValueError(f"a host's sector has 512 bytes at least, not {len(sector)}")
    if sector[:SIZE] == _ZEROS:
        dblock = NEVER
    else:
        mbal, bal, inp, inp2, inp3, lver, checksum, flags = _BALLOT.unpack_from(sector)
        dblock = Dblock(mbal, bal, inp, inp2, inp3, lver, flags, checksum)
    if sector[MODE_OFFSET : MODE_OFFSET + _MODE.size] == _NO_MODE:
        return dblock, NONE
    return dblock, ModeBlock(*_MODE.unpack_from(sector, MODE_OFFSET))


def glance(area: bytes, start: int) -> tuple[int, int, int, int, bool]:
    """Return `mbal`, `inp`, `inp3`, `lver` of the host sector at *start*, and whether it holds the lease shared.

    That is what tells whether the sector is worth to be decoded.  Raises `BadRecord` for a block that is not valid.
    """
    mbal, bal, inp, _, inp3, lver, found, _, mode = _GLANCE.unpack_from(area, start)
    if (found or mbal or bal or inp or lver) and found != _checksum(area[start : start + CHECKED]):
        decode_host_sector(area[start : start + len(_NOTHING)])[0].validate()
    return mbal, inp, inp3, lver, bool(mode & SHARED)


def is_empty(area: bytes, start: int) -> bool:
    """Say whether the host sector at *start* says nothing at all."""
    return area[start : start + len(_NOTHING)] == _NOTHING
