"""All areas of some places, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lockfs_paxos_lease.check import index as index_check
from lockfs_paxos_lease.check import lease as lease_check
from lockfs_paxos_lease.check import lockspace as lockspace_check
from lockfs_paxos_lease.check.area import Kind
from lockfs_paxos_lease.check.finding import Finding, Findings, Level, Remedy
from lockfs_paxos_lease.cli.places import Area
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import Leader


@dataclass(slots=True)
class Survey:
    """What was found in which area."""

    areas: list[Area]
    findings: list[tuple[Area, Finding]] = field(default_factory=list)
    space: Leader | None = None

    @property
    def failed(self) -> bool:
        """True if there is an error."""
        return any(finding.level is Level.ERROR for _, finding in self.findings)


def take(areas: Iterable[Area]) -> Survey:
    """Check areas.  If one of them is their lockspace, leases are held against what it says of hosts."""
    survey = Survey(list(areas))
    spaces = [area for area in survey.areas if area.kind is Kind.LOCKSPACE]
    generations: dict[int, int] | None = None
    if len(spaces) == 1:
        records = lockspace_check.records(spaces[0].data, spaces[0].geometry)
        survey.space = lockspace_check.consensus(records)
        found = lockspace_check.check(spaces[0].data, spaces[0].geometry)
        # Of a host whose record is damaged nobody knows the generation.
        if not any(finding.remedy is Remedy.HOST for finding in found):
            generations = {number + 1: record.owner_generation for number, (record, _) in enumerate(records)}
    leaders = {
        (area.path, area.offset): Leader.decode(area.data)
        for area in survey.areas
        if area.kind in (Kind.LEASE, Kind.DELETED)
    }
    for area in survey.areas:
        here = {offset: leader for (path, offset), leader in leaders.items() if path == area.path}
        for finding in _check(area, survey.space, generations, here):
            survey.findings.append((area, finding))
    return survey


def _check(
    area: Area, space: Leader | None, generations: dict[int, int] | None, leaders: dict[int, Leader]
) -> Findings:
    found = Findings()
    if area.sizes.problem is not None:
        found.error("area", 0, area.sizes.problem.what, code=area.sizes.problem.code)
    match area.kind:
        case Kind.LOCKSPACE:
            found += lockspace_check.check(area.data, area.geometry)
        case Kind.LEASE | Kind.DELETED:
            found += lease_check.check(area.data, area.geometry, space, generations)
        case Kind.INDEX:
            found += index_check.check(area.data, area.offset, area.geometry, leaders, space)
        case Kind.UNKNOWN:
            found.error("area", 0, "it begins with nothing that is known", code=Code.LEADER_MAGIC)
        case Kind.EMPTY:
            found.error("area", 0, "it is empty", code=Code.LEADER_MAGIC)
    return found
