"""The leader record: 200 bytes at the start of a host's delta sector and of a lease's first sector.

The checksum covers bytes 0 to 167; `io_timeout` and the three ``write_`` fields lie behind it, unprotected.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from lockfs_paxos_lease.format import names, version
from lockfs_paxos_lease.format.checksum import checksum
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.size import Geometry

DELTA_MAGIC = 0x12212010
PAXOS_MAGIC = 0x06152010
CLEARED_MAGIC = 0x11282016
"""A lease that was deleted."""
SHORT_HOLD = 0x01
"""In `Leader.flags`: its owner has it only as long as it takes to note down a shared holder."""
SIZE = 200
CHECKED = 168
"""Bytes that the checksum covers."""

_LAYOUT = struct.Struct("<IIIIQQQQQ48s48sQQIHHQQQ")
_NAMES = slice(9, 11)
_TIMEOUT_MASK = 0xFF


@dataclass(frozen=True, slots=True)
class Leader:
    """A leader record, field for field; what is decoded and encoded again is the same, but for a wrong checksum.

    In a delta lease: `max_hosts` is 1, `owner_id` the host id, `resource_name` the name of the host, `timestamp` its
    last renewal, the ``write_`` fields an event (target generation, event, data).  In a paxos lease: `num_hosts` is the
    highest host id that may use it, `max_hosts` the stride of ballot numbers, `lver` counts its changes of owner,
    `timestamp` says when the owner asked for it, the ``write_`` fields who wrote the record and when.
    A `timestamp` of 0 means: free.
    """

    magic: int
    version: int
    flags: int = 0
    sector_size: int = 512
    num_hosts: int = 0
    max_hosts: int = 0
    owner_id: int = 0
    owner_generation: int = 0
    lver: int = 0
    space_name: bytes = b""
    resource_name: bytes = b""
    timestamp: int = 0
    unused1: int = 0
    checksum: int = 0
    unused2: int = 0
    io_timeout: int = 0
    write_id: int = 0
    write_generation: int = 0
    write_timestamp: int = 0

    @classmethod
    def decode(cls, sector: bytes | memoryview) -> Leader:
        """Return what the first 200 bytes say, be it good or not.  Raises ValueError if there are fewer."""
        if len(sector) < SIZE:
            raise ValueError(f"a leader record has {SIZE} bytes, not {len(sector)}")
        fields = list(_LAYOUT.unpack_from(sector))
        # Zeros at the end only: what else there is, is kept, so that records can be compared as a whole.
        fields[_NAMES] = (name.rstrip(b"\0") for name in fields[_NAMES])
        return cls(*fields)

    def encode(self) -> bytes:
        """Return the 200 bytes, with the checksum that is right.  Raises ValueError for a name that is too long."""
        data = self._pack()
        return data[:CHECKED] + checksum(data[:CHECKED]).to_bytes(4, "little") + data[CHECKED + 4 :]

    def sealed(self) -> Leader:
        """Return the record with the checksum that is right, equal to what is decoded after it was written."""
        return replace(self, checksum=self.right_checksum())

    def right_checksum(self) -> int:
        """Return the checksum that the record should have."""
        return checksum(self._pack()[:CHECKED])

    def _pack(self) -> bytes:
        return _LAYOUT.pack(
            self.magic, self.version, self.flags, self.sector_size, self.num_hosts, self.max_hosts,
            self.owner_id, self.owner_generation, self.lver,
            names.checked(self.space_name), names.checked(self.resource_name),
            self.timestamp, self.unused1, self.checksum, self.unused2, self.io_timeout,
            self.write_id, self.write_generation, self.write_timestamp,
        )  # fmt: skip

    @property
    def geometry(self) -> Geometry:
        """The sizes that the record tells.  Raises `BadRecord`."""
        return Geometry.of_flags(self.flags, self.sector_size)

    @property
    def timeout(self) -> int:
        """The owner's io_timeout in seconds: sanlock uses the lower 8 bits."""
        return self.io_timeout & _TIMEOUT_MASK


def validate_paxos(
    leader: Leader, space: bytes, resource: bytes, own_host_id: int = 0, *, wanted: int = version.PAXOS
) -> None:
    """Raise `BadRecord` unless this is the leader of lease *resource* and has room for *own_host_id*.

    *wanted* is the version word that the lockspace goes by.
    """
    if leader.magic != PAXOS_MAGIC:
        cleared = leader.magic == CLEARED_MAGIC
        what = "the lease was deleted" if cleared else f"there is no lease: its magic number is {leader.magic:#010x}"
        raise BadRecord(Code.LEADER_MAGIC, what)
    version.check(leader.version, wanted, Code.LEADER_VERSION)
    _check_space(leader, space)
    if not names.same(leader.resource_name, resource):
        what = f"it is the lease {names.shown(leader.resource_name)}, not {names.shown(resource)}"
        raise BadRecord(Code.LEADER_RESOURCE, what)
    if leader.num_hosts < own_host_id:
        what = f"it may be used by host ids up to {leader.num_hosts}, not by {own_host_id}"
        raise BadRecord(Code.LEADER_NUM_HOSTS, what)
    _check_sum(leader)


def validate_delta(leader: Leader, space: bytes, *, wanted: int = version.DELTA) -> None:
    """Raise `BadRecord` unless this is a host's record of lockspace *space*.  *wanted*: as in `validate_paxos`."""
    if leader.magic != DELTA_MAGIC:
        raise BadRecord(Code.LEADER_MAGIC, f"there is no lockspace: its magic number is {leader.magic:#010x}")
    version.check(leader.version, wanted, Code.LEADER_VERSION)
    _check_space(leader, space)
    _check_sum(leader)


def _check_space(leader: Leader, space: bytes) -> None:
    if not names.same(leader.space_name, space):
        what = f"it belongs to the lockspace {names.shown(leader.space_name)}, not {names.shown(space)}"
        raise BadRecord(Code.LEADER_LOCKSPACE, what)


def _check_sum(leader: Leader) -> None:
    right = leader.right_checksum()
    if leader.checksum != right:
        raise BadRecord(Code.LEADER_CHECKSUM, f"its checksum is {leader.checksum:#010x} and should be {right:#010x}")
