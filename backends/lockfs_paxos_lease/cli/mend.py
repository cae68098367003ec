"""What can be mended without any doubt, and only that.

Each remedy is safe for a reason of its own:

* A *request record* may be written by anybody at any time; what is lost is a request, which can be made again.
* A *ballot block* with a wrong checksum keeps every host from beginning a ballot for the lease.  When the area has not
  changed for longer than a ballot can pause, none is under way.  The new block takes part in no ballot, and its number
  is higher than any that its host can have chosen before: whoever should write in between meets a number that is too
  high, and begins anew.  Not if its host is the owner of the lease: then it writes the block itself when it lets go,
  and only it knows what else it may be about to write there (it could convert its hold to a shared one).
* A *host record* that nobody has changed for as long as it takes to be dead is that of a dead host: a live one would
  have found it overwritten at its next renewal, and have fenced.  The new record is free, and of a higher generation
  than any that a lease names.

Everything else needs a person: who owned a lease whose leader record is damaged, nobody can tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from lockfs.errors import LockfsError, LockUnavailable
from lockfs_paxos_lease.check import lease as lease_check
from lockfs_paxos_lease.check import lockspace as lockspace_check
from lockfs_paxos_lease.check.area import Kind
from lockfs_paxos_lease.check.finding import Finding, Level, Remedy
from lockfs_paxos_lease.cli.places import Area, failed, opened, read_area
from lockfs_paxos_lease.cli.survey import Survey
from lockfs_paxos_lease.engine.timing import WATCHDOG
from lockfs_paxos_lease.format import delta, version
from lockfs_paxos_lease.format.dblock import Dblock, decode_host_sector, encode_host_sector
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.request import Request

AHEAD = 2
"""How many rounds of ballot numbers a mended block is ahead of the highest one that is known."""

Clock = Callable[[], float]
Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One remedy.  `quiet` is for how many seconds what is mended must not have changed before; `why_not` says why it
    is not done, empty if it can be.
    """

    area: Area
    finding: Finding
    quiet: float = 0.0
    why_not: str = ""


def plan(survey: Survey) -> list[Step]:
    """Return what would be done about each finding, and what cannot be done and why."""
    steps: dict[tuple[bytes, int, Remedy, int], Step] = {}
    for area, finding in survey.findings:
        if finding.level is Level.ERROR or finding.remedy is not Remedy.NONE:
            step = _step(survey, area, finding)
            steps.setdefault((area.path, area.offset, finding.remedy, finding.offset), step)
    return list(steps.values())


def _step(survey: Survey, area: Area, finding: Finding) -> Step:
    match finding.remedy:
        case Remedy.REQUEST:
            return Step(area, finding)
        case Remedy.BALLOT:
            return Step(area, finding, 3 * _io_timeout(survey) + 2, _why_no_ballot(survey, area, finding))
        case Remedy.HOST:
            own = version.takeover_of(survey.space.version) if survey.space is not None else None
            quiet = 8 * _io_timeout(survey) + WATCHDOG if own is None else own
            why = "" if survey.space is not None else "its lockspace could not be made out"
            return Step(area, finding, quiet, why)
        case _:
            return Step(area, finding, why_not="nobody can tell from the storage what it should be")


def _io_timeout(survey: Survey) -> int:
    """Return the longest io_timeout of any host, or sanlock's own where there is no lockspace to ask."""
    found = [
        record.timeout
        for area in survey.areas
        if area.kind is Kind.LOCKSPACE
        for record, _ in lockspace_check.records(area.data, area.geometry)
    ]
    return max(found, default=10)


def _why_no_ballot(survey: Survey, area: Area, finding: Finding) -> str:
    if any(each.record == "leader" and each.level is Level.ERROR for where, each in survey.findings if where is area):
        return "the leader record of the lease is damaged, too"
    leader = Leader.decode(area.data)
    if leader.timestamp and leader.owner_id == finding.host_id:
        return f"host {finding.host_id} holds the lease, and writes the block anew when it lets go"
    return ""


def carry_out(survey: Survey, steps: list[Step], sleep: Sleep = time.sleep) -> list[str]:
    """Do the steps that can be done, and return what was done.  Raises `LockfsError` when something has changed."""
    todo = [step for step in steps if not step.why_not]
    quiet = max((step.quiet for step in todo), default=0.0)
    if quiet:
        sleep(quiet)
    return [_do(survey, step) for step in todo]


def _do(survey: Survey, step: Step) -> str:
    area = step.area
    with opened(area.path, write=True) as (file, size):
        now = read_area(file, area.path, area.offset, size, area.geometry)
        start, length = step.finding.offset, area.geometry.sector
        # A lease is quiet as a whole; other hosts of a lockspace go on with theirs.
        quiet = now.data[start : start + length] == area.data[start : start + length]
        if not quiet or (step.finding.remedy is Remedy.BALLOT and now.data != area.data):
            raise _changed(area, step.finding)
        sector = _sector(survey, area, step.finding)
        try:
            file.write(area.offset + start, sector)
            after = file.read(area.offset + start, length)
        except OSError as error:
            raise failed(error, area.path) from error
    if after != sector:
        raise _changed(area, step.finding)
    return f"{area.where}: {step.finding.record}: {step.finding.remedy.value}"


def _sector(survey: Survey, area: Area, finding: Finding) -> bytes:
    size = area.geometry.sector
    match finding.remedy:
        case Remedy.REQUEST:
            return Request().encode(size)
        case Remedy.BALLOT:
            _, mode = decode_host_sector(area.data[finding.offset : finding.offset + size])
            return encode_host_sector(_idle_block(area, finding.host_id), mode, size)
        case _:
            return delta.encode(_free_host(survey, area, finding.host_id), b"", size)


def _idle_block(area: Area, host_id: int) -> Dblock:
    leader = Leader.decode(area.data)
    blocks = lease_check.blocks(area.data, area.geometry)
    highest = max((dblock.mbal for dblock, _ in blocks.values() if dblock.is_valid), default=0)
    rounds = highest // leader.max_hosts + AHEAD
    return Dblock(mbal=rounds * leader.max_hosts + host_id, lver=leader.lver)


def _free_host(survey: Survey, area: Area, host_id: int) -> Leader:
    records = lockspace_check.records(area.data, area.geometry)
    common = lockspace_check.consensus(records)
    return replace(
        common, owner_id=host_id, owner_generation=_last_generation(survey, records, host_id) + 1, timestamp=0,
        resource_name=b"", num_hosts=0, max_hosts=1, lver=0, unused1=0, unused2=0,
        write_id=0, write_generation=0, write_timestamp=0,
    )  # fmt: skip


def _last_generation(survey: Survey, records: list[tuple[Leader, bytes]], host_id: int) -> int:
    """Return the highest generation of a host that any lease or its own damaged record names, if that can be."""
    damaged = records[host_id - 1][0].owner_generation
    found = [damaged] if damaged < 1 << 32 else []
    for area in survey.areas:
        if area.kind is not Kind.LEASE:
            continue
        leader = Leader.decode(area.data)
        found += [leader.owner_generation] if leader.owner_id == host_id else []
        for number, (dblock, mode) in lease_check.blocks(area.data, area.geometry).items():
            found += [dblock.inp2] if dblock.is_valid and dblock.inp == host_id else []
            found += [mode.generation] if number == host_id and mode.is_shared else []
    return max((each for each in found if each < 1 << 32), default=0)


def _changed(area: Area, finding: Finding) -> LockfsError:
    return LockUnavailable(
        f"{area.where}: {finding.record} has changed meanwhile: a host is at work there; nothing was written",
        hint="Check again: it may have mended that itself.",
    )
