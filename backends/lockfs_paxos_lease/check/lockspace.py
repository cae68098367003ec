"""What is wrong with a lockspace: one record for each host id."""

from __future__ import annotations

from collections import Counter

from lockfs_paxos_lease.check.finding import Findings, Remedy
from lockfs_paxos_lease.format import delta, names, version
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import SIZE, Leader, validate_delta
from lockfs_paxos_lease.format.size import Geometry


def records(area: bytes, geometry: Geometry) -> list[tuple[Leader, bytes]]:
    """Return record and bitmap of each host id, from 1."""
    size = geometry.sector
    return [delta.decode(area[at : at + size]) for at in range(0, geometry.max_hosts * size, size)]


def consensus(found: list[tuple[Leader, bytes]]) -> Leader:
    """Return a record that has what most of them say of the lockspace as a whole."""
    common = Counter((each.magic, each.version, each.flags, each.sector_size, each.space_name) for each, _ in found)
    wanted = common.most_common(1)[0][0]
    return next(
        each for each, _ in found if (each.magic, each.version, each.flags, each.sector_size, each.space_name) == wanted
    )


def check(area: bytes, geometry: Geometry) -> Findings:
    """Return what is wrong with the bytes of a lockspace."""
    found = Findings()
    hosts = records(area, geometry)
    common = consensus(hosts)
    for number, (record, bitmap) in enumerate(hosts):
        _check_host(found, geometry, number + 1, record, bitmap, common)
        _check_rest(found, geometry, number + 1, area)
    _check_timeouts(found, geometry, hosts)
    _check_names(found, geometry, hosts)
    end = geometry.max_hosts * geometry.sector
    if area[end:].strip(b"\0"):
        found.warn("area", end, "behind the records of the hosts there is something")
    return found


def _check_host(
    found: Findings, geometry: Geometry, host_id: int, record: Leader, bitmap: bytes, common: Leader
) -> None:
    where = (_name(host_id), geometry.delta_offset(host_id))
    try:
        validate_delta(record, common.space_name, wanted=common.version)
        if (record.flags, record.sector_size) != (common.flags, common.sector_size):
            raise BadRecord(Code.SIZES, "its sizes are not those of the other records")
    except BadRecord as problem:
        found.error(*where, problem.what, code=problem.code, host_id=host_id, remedy=Remedy.HOST)
        return
    # A record that its checksum confirms can still be at the wrong place, or be no host's.
    if record.owner_id not in (0, host_id):
        what = f"it is the record of host {record.owner_id}"
        found.error(*where, what, code=Code.RENEW_OWNER, host_id=host_id, remedy=Remedy.HOST)
    elif record.timestamp and not (record.owner_id and record.owner_generation):
        found.error(*where, "it is taken, but says no host or generation", host_id=host_id, remedy=Remedy.HOST)
    if record.max_hosts != 1 or record.num_hosts or record.lver or record.unused1:
        found.warn(*where, "fields that a host does not use are not as a new record has them", host_id=host_id)
    if record.unused2 or record.io_timeout > 0xFF:
        found.error(
            *where, "its io_timeout has more than 8 bits, or what stands beside it is not zero", host_id=host_id
        )
    if any(each > geometry.max_hosts for each in delta.called(bitmap)):
        found.warn(*where, "it calls host ids that there are none of", host_id=host_id)


def _check_timeouts(found: Findings, geometry: Geometry, hosts: list[tuple[Leader, bytes]]) -> None:
    """No checksum covers the io_timeout, but who judges a host goes by it, and one that is too short is deadly.

    Hosts may have another one than the maker of the lockspace, and even than each other, but that is seldom meant.
    """
    used = {number + 1: record for number, (record, _) in enumerate(hosts) if record.owner_generation}
    made = Counter(record.io_timeout for record, _ in hosts if not record.owner_generation)
    usual = _most_common(Counter(record.io_timeout for record in used.values()) or made)
    for number, (record, _) in enumerate(hosts):
        host_id, there = number + 1, record.io_timeout
        what = f"its io_timeout is {there} s"
        if host_id in used and there != usual:
            own = version.takeover_of(record.version) is not None
            note = found.error if own or there < usual else found.warn
            note(
                _name(host_id),
                geometry.delta_offset(host_id),
                f"{what}, that of other hosts {usual} s",
                host_id=host_id,
            )
        elif made and there != _most_common(made) and (host_id not in used or len(used) == 1):
            what = f"{what}, and the lockspace was made with {_most_common(made)} s"
            found.warn(_name(host_id), geometry.delta_offset(host_id), what, host_id=host_id)


def _most_common(counts: Counter[int]) -> int:
    return counts.most_common(1)[0][0]


def _check_rest(found: Findings, geometry: Geometry, host_id: int, area: bytes) -> None:
    start = geometry.delta_offset(host_id)
    end = start + geometry.sector
    behind = start + delta.BITMAP_OFFSET + delta.BITMAP_SIZE
    if area[start + SIZE : start + delta.BITMAP_OFFSET].strip(b"\0") or area[behind:end].strip(b"\0"):
        found.warn(_name(host_id), start, "bytes that belong to nothing are not zero", host_id=host_id)


def _check_names(found: Findings, geometry: Geometry, hosts: list[tuple[Leader, bytes]]) -> None:
    """A host is told by its name from another one with the same id; one name for two ids is somebody's mistake."""
    taken: dict[bytes, int] = {}
    for number, (record, _) in enumerate(hosts):
        if record.timestamp and record.resource_name:
            first = taken.setdefault(record.resource_name, number + 1)
            if first != number + 1:
                what = f"{names.shown(record.resource_name)} is host {first}, too: a machine that was cloned?"
                found.warn(_name(number + 1), geometry.delta_offset(number + 1), what, host_id=number + 1)


def _name(host_id: int) -> str:
    return f"host {host_id}"
