"""What is wrong with a lease: leader, request, and one block for each host id."""

from __future__ import annotations

from collections.abc import Mapping

from lockfs_paxos_lease.check.finding import Findings, Remedy
from lockfs_paxos_lease.format import rindex, version
from lockfs_paxos_lease.format.dblock import RELEASED, SHARED, Dblock, ModeBlock, decode_host_sector
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import CLEARED_MAGIC, PAXOS_MAGIC, SHORT_HOLD, SIZE, Leader, validate_paxos
from lockfs_paxos_lease.format.request import GRACEFUL, Request
from lockfs_paxos_lease.format.scan import used
from lockfs_paxos_lease.format.size import ALIGN_FLAGS, Geometry


def blocks(area: bytes, geometry: Geometry) -> dict[int, tuple[Dblock, ModeBlock]]:
    """Return the blocks of the hosts that have written one, by host id."""
    size = geometry.sector
    found = {}
    for number in used(area[: (geometry.max_hosts + 2) * size], size):
        if number >= 2:
            found[number - 1] = decode_host_sector(area[number * size : (number + 1) * size])
    return found


def check(
    area: bytes, geometry: Geometry, space: Leader | None = None, generations: Mapping[int, int] | None = None
) -> Findings:
    """Return what is wrong with the bytes of a lease.

    *space* is a good record of its lockspace, *generations* the highest generation that each of its host ids had;
    without them less can be told.
    """
    found = Findings()
    leader = Leader.decode(area)
    hosts = blocks(area, geometry)
    good = _check_leader(found, leader, area, geometry, space)
    _check_request(found, leader, area, geometry)
    for host_id, (dblock, mode) in hosts.items():
        _check_block(found, geometry, host_id, dblock, mode)
    if good:
        for host_id, (dblock, _) in hosts.items():
            _check_ballot(found, geometry, host_id, dblock, leader)
        _check_writer(found, leader, hosts)
        _check_release(found, geometry, leader, hosts)
    if generations is not None:
        _check_generations(found, geometry, leader, hosts, generations, good)
    if area[(geometry.max_hosts + 2) * geometry.sector :].strip(b"\0"):
        found.warn("area", (geometry.max_hosts + 2) * geometry.sector, "behind the blocks of the hosts there is data")
    return found


def _check_leader(found: Findings, leader: Leader, area: bytes, geometry: Geometry, space: Leader | None) -> bool:
    """Return True if the record can be gone by."""
    try:
        wanted = leader.version if space is None else _lease_version(space)
        space_name = leader.space_name if space is None else space.space_name
        if leader.magic != CLEARED_MAGIC:
            validate_paxos(leader, space_name, leader.resource_name, wanted=wanted)
        elif leader.checksum != leader.right_checksum():
            raise BadRecord(Code.LEADER_CHECKSUM, "the checksum of a deleted lease is wrong")
        if space is not None and (leader.flags & ALIGN_FLAGS, leader.sector_size) != (
            space.flags & ALIGN_FLAGS, space.sector_size
        ):  # fmt: skip
            raise BadRecord(Code.DBLOCK_CHECKSUM, "its sizes are not those of the lockspace")
        if leader.max_hosts != geometry.max_hosts or not 0 < leader.num_hosts <= geometry.max_hosts:
            raise BadRecord(Code.LEADER_NUM_HOSTS, f"it is for {leader.num_hosts} of {leader.max_hosts} hosts")
        if leader.flags & ~(ALIGN_FLAGS | SHORT_HOLD):
            raise BadRecord(Code.LEADER_VERSION, f"it has flags that nobody knows: {leader.flags:#x}")
        if leader.owner_id > leader.num_hosts or (leader.timestamp and not leader.owner_id):
            raise BadRecord(Code.ACQUIRE_OTHER, f"its owner, host {leader.owner_id}, cannot be")
    except BadRecord as problem:
        found.error("leader", 0, problem.what, code=problem.code)
        return False
    if leader.unused1 or leader.unused2 or leader.io_timeout or area[SIZE : geometry.sector].strip(b"\0"):
        found.warn("leader", 0, "bytes that belong to nothing are not zero")
    return leader.magic == PAXOS_MAGIC


def _lease_version(space: Leader) -> int:
    return version.PAXOS if version.takeover_of(space.version) is None else space.version


def _check_request(found: Findings, leader: Leader, area: bytes, geometry: Geometry) -> None:
    """What lies behind the record is not looked at: sanlock writes what its memory happens to hold."""
    where = ("request", geometry.sector)
    sector = area[geometry.sector : 2 * geometry.sector]
    if leader.resource_name == rindex.LEASE_NAME and not sector.strip(b"\0"):
        return  # sanlock makes none there: nobody asks for it
    request = Request.decode(sector)
    try:
        request.validate()
    except BadRecord as problem:
        found.error(*where, problem.what, code=problem.code, remedy=Remedy.REQUEST)
        return
    if request.version != Request().version:
        found.warn(*where, f"its version is {request.version:#x}", remedy=Remedy.REQUEST)
    if request.force_mode > GRACEFUL or (request.force_mode and not request.lver):
        what = f"it asks for version {request.lver} in the unknown way {request.force_mode}"
        found.error(*where, what, remedy=Remedy.REQUEST)
    elif request.lver > leader.lver + 1:
        what = f"it asks for version {request.lver}, while {leader.lver} is the latest: nobody can ask for the next one"
        found.error(*where, what, code=Code.REQUEST_LVER, remedy=Remedy.REQUEST)


def _check_block(found: Findings, geometry: Geometry, host_id: int, dblock: Dblock, mode: ModeBlock) -> None:
    where = (f"host {host_id}", geometry.host_offset(host_id))
    if not dblock.is_valid:
        right = dblock.right_checksum()
        what = f"the checksum of its ballot block is {dblock.checksum:#010x} and should be {right:#010x}"
        found.error(*where, what, code=Code.DBLOCK_CHECKSUM, host_id=host_id, remedy=Remedy.BALLOT)
    elif not dblock.checksum and (dblock.inp2 or dblock.inp3):
        found.warn(*where, "its ballot block was never written, but is not empty", host_id=host_id)
    if dblock.flags & ~RELEASED:
        found.error(*where, f"its ballot block has flags that nobody knows: {dblock.flags:#x}", host_id=host_id)
    if mode.flags & ~SHARED:
        found.error(*where, f"its mode has flags that nobody knows: {mode.flags:#x}", host_id=host_id)
    elif mode.is_shared and not mode.generation:
        found.error(*where, "it shares the lease, but says no generation: nobody counts it", host_id=host_id)
    elif mode.generation and not mode.is_shared:
        found.warn(*where, "its mode names a generation, but does not share the lease", host_id=host_id)


def _check_ballot(found: Findings, geometry: Geometry, host_id: int, dblock: Dblock, leader: Leader) -> None:
    if not dblock.is_valid or not dblock.mbal:
        return
    where = (f"host {host_id}", geometry.host_offset(host_id))
    if dblock.mbal % leader.max_hosts != host_id % leader.max_hosts:
        found.error(*where, f"its ballot number {dblock.mbal} is not one of its own", host_id=host_id)
    if dblock.bal > dblock.mbal or dblock.inp > geometry.max_hosts:
        found.error(*where, "what it has proposed cannot be", host_id=host_id)
    if dblock.lver > leader.lver + 1:
        what = f"it is at version {dblock.lver}, while {leader.lver} is the latest: the leader record is an old one"
        found.error(*where, what, code=Code.DBLOCK_LVER, host_id=host_id)


def _check_writer(found: Findings, leader: Leader, hosts: Mapping[int, tuple[Dblock, ModeBlock]]) -> None:
    """No checksum covers who wrote the leader, but it decides whether a RELEASED mark counts."""
    if not leader.lver:
        if leader.write_id or leader.write_generation:
            found.error("leader", 0, f"it was never held, but host {leader.write_id} has written it")
        return
    dblock = hosts.get(leader.write_id, (None, None))[0]
    if not 0 < leader.write_id <= leader.num_hosts:
        found.error("leader", 0, f"host {leader.write_id}, which is to have written it, cannot be")
    elif dblock is None or (dblock.is_valid and dblock.checksum and dblock.mbal and dblock.lver < leader.lver):
        what = f"host {leader.write_id} is to have written it, but took no part in the ballot for version {leader.lver}"
        found.error("leader", 0, what)
    if leader.write_id == leader.owner_id and leader.write_generation < leader.owner_generation:
        found.error("leader", 0, f"it was written by generation {leader.write_generation} of its owner, which is older")
    if leader.write_id and not leader.write_generation:
        found.error("leader", 0, "it was written by a host without a generation")


def _check_release(
    found: Findings, geometry: Geometry, leader: Leader, hosts: Mapping[int, tuple[Dblock, ModeBlock]]
) -> None:
    """The mark that a host has let go is not covered by a checksum either."""
    owner = leader.owner_id
    if owner not in hosts or leader.resource_name == rindex.LEASE_NAME:
        return
    dblock, mode = hosts[owner]
    where = (f"host {owner}", geometry.host_offset(owner))
    current = dblock.is_valid and dblock.lver == leader.lver and dblock.inp == owner
    if not current or leader.write_id != owner:
        return
    if leader.timestamp and dblock.is_released:
        found.warn(*where, "it has begun to let go of the lease, and did not get to the end", host_id=owner)
    if not leader.timestamp and not dblock.is_released and not mode.is_shared:
        found.warn(*where, "the lease is free, but its last owner has not marked that", host_id=owner)


def _check_generations(
    found: Findings, geometry: Geometry, leader: Leader, hosts: Mapping[int, tuple[Dblock, ModeBlock]],
    generations: Mapping[int, int], good: bool,
) -> None:  # fmt: skip
    """No host can have been at a generation that it has not reached yet."""
    if good:
        for what, host_id, generation in (
            ("owned", leader.owner_id, leader.owner_generation),
            ("written", leader.write_id, leader.write_generation),
        ):
            if host_id and generation > generations.get(host_id, 0):
                found.error("leader", 0, f"it is {what} by generation {generation} of host {host_id}, which never was")
    for host_id, (_, mode) in hosts.items():
        if mode.is_shared and mode.generation > generations.get(host_id, 0):
            what = f"it is shared by generation {mode.generation}, which never was"
            found.error(f"host {host_id}", geometry.host_offset(host_id), what, host_id=host_id)
