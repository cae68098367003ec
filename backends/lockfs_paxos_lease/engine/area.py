"""The records of one lease on the disk, as operations: read and checked, or written under this host's own lease."""

from __future__ import annotations

from lockfs_paxos_lease.engine.actions import Area, DiskError, IOTimeout, Operation, Settle, Write, read
from lockfs_paxos_lease.engine.errors import BadArea, StorageTrouble
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.format.dblock import Dblock, ModeBlock, decode_host_sector, encode_host_sector
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import Leader, validate_paxos
from lockfs_paxos_lease.format.request import Request


class LeaseArea:
    """The area of the lease *name* in the lockspace of *membership*.

    *num_hosts* is how many host ids the first read is to cover, before the leader record has said how many there may
    be; 0: all that there can be, in one large read.
    """

    def __init__(self, name: bytes, membership: Membership, num_hosts: int = 0) -> None:
        self.name = name
        self.membership = membership
        self.geometry = membership.geometry
        self.timing = membership.timing
        self._census = membership.census
        self._num_hosts = num_hosts or membership.geometry.max_hosts

    def quiet(self) -> Operation[None]:
        """Wait for the end of every write of ours to this area.  Raises `StorageTrouble`."""
        try:
            yield Settle(Area.LEASE, self.timing.io_timeout)
        except DiskError as error:
            raise StorageTrouble(Code.IO_TIMEOUT, "an earlier write to the lease has not ended yet") from error

    def read_all(self) -> Operation[tuple[Leader, bytes]]:
        """Return the leader, checked, and an area that holds it and all host sectors that it allows, from one read."""
        while True:
            length = self.geometry.ballot_bytes(self._num_hosts)
            area = yield from self._read(0, length, Code.DBLOCK_READ, "lease")
            leader = self._checked(area)
            covered, self._num_hosts = self._num_hosts, leader.num_hosts
            if self.geometry.ballot_bytes(leader.num_hosts) <= self.geometry.ballot_bytes(covered):
                self._census.note(self.name, leader, area)
                return leader, area

    def read_used(self) -> Operation[tuple[Leader, bytes]]:
        """Return the leader, checked, and an area that holds it and all host sectors that can say anything.

        It shows what `read_all` would have shown: see `engine.census`.
        """
        census, me = self._census, self.membership.host_id
        if not census.is_current(self.membership.clock()) and census.is_look_worthwhile(self.name, self._num_hosts, me):
            try:
                yield from self.membership.look()
            except StorageTrouble:
                pass  # then the lease is read as a whole, if it can be
        if census.is_known(self.name) and census.is_current(self.membership.clock()):
            bound = census.bound(self.name, self._num_hosts, me)
            area = yield from self._read(0, census.length(bound, self._num_hosts), Code.DBLOCK_READ, "lease")
            leader = self._checked(area)
            if not census.is_another(self.name, leader) and self._is_enough(bound, leader.num_hosts):
                self._num_hosts = leader.num_hosts
                census.follow(self.name, leader)
                return leader, area
        return (yield from self.read_all())

    def read_ballot(self, num_hosts: int) -> Operation[bytes]:
        """Return what a ballot looks at, after `read_used`: all host sectors that can say anything."""
        census = self._census
        if census.is_known(self.name) and census.is_current(self.membership.clock()):
            bound = census.bound(self.name, num_hosts, self.membership.host_id)
            area = yield from self._read(0, census.length(bound, num_hosts), Code.DBLOCK_READ, "ballot blocks")
            if self._is_enough(bound, num_hosts):
                return area
        return (yield from self._read(0, self.geometry.ballot_bytes(num_hosts), Code.DBLOCK_READ, "ballot blocks"))

    def _is_enough(self, bound: int, num_hosts: int) -> bool:
        """Say whether a read that has ended now, up to host id *bound*, has shown all that there can be."""
        census = self._census
        return bound >= num_hosts or (
            census.is_known(self.name)
            and census.is_current(self.membership.clock())
            and census.bound(self.name, num_hosts, self.membership.host_id) <= bound
        )

    def read_leader(self) -> Operation[Leader]:
        """Return the leader, checked."""
        return self._checked((yield from self._read(0, self.geometry.sector, Code.LEADER_READ, "leader record")))

    def write_leader(self, leader: Leader, not_after: float) -> Operation[None]:
        """Write the leader, with a right checksum, unless *not_after* or our own lease has passed."""
        sector = leader.encode().ljust(self.geometry.sector, b"\0")
        yield from self._write(0, sector, not_after, Code.LEADER_WRITE, "leader record")
        self._census.follow(self.name, leader)

    def read_host(self, host_id: int) -> Operation[tuple[Dblock, ModeBlock]]:
        """Return what a host's sector says, unchecked."""
        offset, size = self.geometry.host_offset(host_id), self.geometry.sector
        return decode_host_sector((yield from self._read(offset, size, Code.DBLOCK_READ, f"block of host {host_id}")))

    def write_host(self, host_id: int, sector: bytes) -> Operation[None]:
        """Write a host's sector."""
        yield from self._write(
            self.geometry.host_offset(host_id), sector, self.membership.valid_until, Code.DBLOCK_WRITE,
            f"block of host {host_id}",
        )  # fmt: skip

    def write_blocks(self, host_id: int, block: Dblock, mode: ModeBlock) -> Operation[None]:
        """Write a host's sector, with a right checksum."""
        yield from self.write_host(host_id, encode_host_sector(block, mode, self.geometry.sector))

    def read_request(self) -> Operation[Request]:
        """Return the request record, checked."""
        size = self.geometry.sector
        request = Request.decode((yield from self._read(size, size, Code.GENERAL, "request record")))
        try:
            request.validate()
        except BadRecord as error:
            raise BadArea(error, size) from error
        return request

    def write_request(self, request: Request) -> Operation[None]:
        """Write the request record."""
        size = self.geometry.sector
        until = self.membership.valid_until
        yield from self._write(size, request.encode(size), until, Code.GENERAL, "request record")

    def _read(self, offset: int, length: int, code: Code, what: str) -> Operation[bytes]:
        try:
            return (yield from read(Area.LEASE, offset, length, self.timing.io_timeout))
        except DiskError as error:
            raise self._trouble(error, code, f"the {what} could not be read") from error

    def _write(self, offset: int, data: bytes, not_after: float, code: Code, what: str) -> Operation[None]:
        self.membership.check()
        until = min(not_after, self.membership.valid_until)
        try:
            yield Write(Area.LEASE, offset, data, self.timing.io_timeout, until)
        except DiskError as error:
            self.membership.check()
            raise self._trouble(error, code, f"the {what} could not be written") from error

    def _trouble(self, error: DiskError, code: Code, what: str) -> StorageTrouble:
        if isinstance(error, IOTimeout):
            return StorageTrouble(Code.IO_TIMEOUT, f"{what}: no answer for {self.timing.io_timeout:g} seconds")
        return StorageTrouble(code, f"{what}: {error}")

    def _checked(self, area: bytes) -> Leader:
        leader = Leader.decode(area)
        ours = self.membership
        try:
            validate_paxos(leader, ours.space, self.name, ours.host_id, wanted=self.timing.lease_version)
            if leader.geometry != self.geometry or leader.max_hosts != self.geometry.max_hosts:
                raise BadRecord(Code.SIZES, "its sizes are not those of the lockspace")
            if leader.num_hosts > leader.max_hosts:
                raise BadRecord(Code.LEADER_NUM_HOSTS, f"it is for {leader.num_hosts} hosts, more than there can be")
        except BadRecord as error:
            raise BadArea(error, 0) from error
        return leader
