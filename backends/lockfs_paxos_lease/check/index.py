"""What is wrong with the index of a volume."""

from __future__ import annotations

from collections.abc import Mapping

from lockfs_paxos_lease.check.finding import Findings
from lockfs_paxos_lease.format import names, rindex
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.leader import PAXOS_MAGIC, Leader
from lockfs_paxos_lease.format.size import Geometry

HEADER_BYTES = 80


def check(
    area: bytes, offset: int, geometry: Geometry, leaders: Mapping[int, Leader], space: Leader | None = None
) -> Findings:
    """Return what is wrong with the bytes of an index at *offset* of a volume.

    *leaders* has the leader record of each area of the volume, by offset.
    """
    found = Findings()
    header = rindex.Header.decode(area)
    try:
        header.validate(space.space_name if space is not None else header.space_name, offset)
        told = header.geometry
    except BadRecord as problem:
        found.error("index", 0, problem.what, code=problem.code)
        return found
    if told != geometry or header.version != rindex.Header.of(geometry, b"", 0).version:
        found.error("index", 0, "its sizes or its version are not those of the volume", code=Code.RINDEX_VERSION)
    if not _is_possible(header) or header.unused or header.flags & ~0xF:
        found.error("index", 0, f"its header has values that cannot be, such as room for {header.resources} leases")
    if area[HEADER_BYTES : geometry.sector].strip(b"\0") or b"\0" in header.space_name:
        found.warn("index", 0, "bytes of its header that belong to nothing are not zero")
    _check_entries(found, area, header, leaders)
    return found


def entries(area: bytes, header: rindex.Header) -> list[tuple[int, rindex.Entry]]:
    """Return number and entry of each lease; none where the header cannot be right."""
    return list(rindex.entries(area, header)) if _is_possible(header) else []


def _is_possible(header: rindex.Header) -> bool:
    try:
        return header.resources <= rindex.Header.of(header.geometry, b"", 0, 0).resources
    except BadRecord:
        return False


def _check_entries(found: Findings, area: bytes, header: rindex.Header, leaders: Mapping[int, Leader]) -> None:
    seen: dict[bytes, int] = {}
    for number, entry in entries(area, header):
        where = (f"entry {number}", header.entry_offset(number))
        wanted = header.resource_offset(number)
        leader = leaders.get(entry.offset)
        if entry.flags or entry.unused or b"\0" in entry.name:
            found.error(*where, "it has flags that nobody knows, or something behind the end of its name")
        if not entry.name or entry.offset != wanted:
            what = f"it says that {names.shown(entry.name)} lies at {entry.offset}, but its place is {wanted}"
            found.error(*where, what, code=Code.RINDEX_OFFSET)
        elif leader is None or leader.magic != PAXOS_MAGIC:
            found.error(*where, f"there is no lease at {entry.offset}", code=Code.LEADER_MAGIC)
        elif not names.same(leader.resource_name, entry.name):
            what = f"it is for {names.shown(entry.name)}, but the lease there is {names.shown(leader.resource_name)}"
            found.error(*where, what, code=Code.LEADER_RESOURCE)
        first = seen.setdefault(entry.name, number)
        if first != number:
            found.error(*where, f"{names.shown(entry.name)} has entry {first}, too: which one is used, is chance")
    _check_left_over(found, area, header, leaders)


def _check_left_over(found: Findings, area: bytes, header: rindex.Header, leaders: Mapping[int, Leader]) -> None:
    """A lease without an entry is what is left of a creation or deletion that did not get to its end."""
    known = {entry.offset for _, entry in entries(area, header)}
    first = header.resource_offset(0)
    for offset, leader in leaders.items():
        if offset >= first and leader.magic == PAXOS_MAGIC and offset not in known:
            what = f"the lease {names.shown(leader.resource_name)} at {offset} has no entry"
            found.warn("index", 0, what)
