"""The records of a lockspace on the disk, as operations: read and checked, and the writes of this host's own."""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.engine.actions import Area, DiskError, Operation, Settle, Write, read
from lockfs_paxos_lease.engine.errors import BadArea, StorageTrouble
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import Leader, validate_delta
from lockfs_paxos_lease.format.size import Geometry


@dataclass(frozen=True, slots=True)
class Records:
    """The area of the lockspace *space*."""

    space: bytes
    geometry: Geometry
    timing: Timing

    def quiet(self) -> Operation[None]:
        """Wait for the end of every write of ours to this area.  Raises `StorageTrouble`."""
        try:
            yield Settle(Area.LOCKSPACE, self.timing.io_timeout)
        except DiskError as error:
            what = "an earlier write to the lockspace has not ended yet"
            raise StorageTrouble(Code.IO_TIMEOUT, what) from error

    def read(self, host_id: int) -> Operation[Leader]:
        """Return the record of a host, checked in full.  Raises `BadArea`, `StorageTrouble`."""
        size = self.geometry.sector
        offset = self.geometry.delta_offset(host_id)
        try:
            sector = yield from read(Area.LOCKSPACE, offset, size, self.timing.io_timeout)
        except DiskError as error:
            raise StorageTrouble(
                Code.LEADER_READ, f"the record of host id {host_id} could not be read: {error}"
            ) from error
        return self._believed(sector, host_id)

    def look(self, length: int) -> Operation[bytes]:
        """Return the first *length* bytes of the area, unchecked.  Raises `StorageTrouble`."""
        try:
            return (yield from read(Area.LOCKSPACE, 0, length, self.timing.io_timeout))
        except DiskError as error:
            raise StorageTrouble(Code.LEADER_READ, f"the lockspace could not be read: {error}") from error

    def write(self, host_id: int, sector: bytes, not_after: float, timeout: float = 0.0) -> Write:
        """Return the action that writes a host's sector."""
        offset = self.geometry.delta_offset(host_id)
        return Write(Area.LOCKSPACE, offset, sector, timeout or self.timing.io_timeout, not_after)

    def _believed(self, sector: bytes, host_id: int) -> Leader:
        leader = Leader.decode(sector)
        try:
            validate_delta(leader, self.space, wanted=self.timing.delta_version)
        except BadRecord as error:
            raise BadArea(error, self.geometry.delta_offset(host_id)) from error
        return leader
