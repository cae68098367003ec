"""The command line of ``lockfs lease``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from lockfs.cli.output import RED, YELLOW, coloured, print_json, printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, UsageError
from lockfs.text import to_bytes
from lockfs_paxos_lease.check.area import Kind
from lockfs_paxos_lease.check.finding import Finding, Level
from lockfs_paxos_lease.cli import describe, make, mend, places, survey, text
from lockfs_paxos_lease.cli.places import Area
from lockfs_paxos_lease.engine.timing import DEFAULT_IO_TIMEOUT, DEFAULT_TAKEOVER, Timing
from lockfs_paxos_lease.format import names, rindex
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.size import MIB, Geometry

LOOKS = 2
"""How often more is looked at what seems to be wrong."""
PAUSE = 0.3
"""Seconds between two looks: longer than one takes of its kind, shorter than anybody minds."""
PLACE = "a lease directory, a file, a device, or FILE:OFFSET (bytes, or MiB with an M)"


def fill(parser: argparse.ArgumentParser) -> None:
    """Fill in the parser of the command."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    looking = argparse.ArgumentParser(add_help=False)
    looking.add_argument("place", nargs="+", help=PLACE)
    looking.add_argument("--json", action="store_true", help="print JSON")
    each = actions.add_parser("list", parents=[looking], help="list leases: one a line")
    each.set_defaults(run=_list)
    each = actions.add_parser("dump", parents=[looking], help="show all that is on the storage")
    each.add_argument("--ballots", action="store_true", help="show the ballot blocks, too")
    each.set_defaults(run=_dump)
    each = actions.add_parser("check", parents=[looking], help="find what is wrong; exit code 2 if anything is")
    each.set_defaults(run=_check)
    each = actions.add_parser("repair", parents=[looking], help="mend what can be mended without any doubt")
    each.add_argument("--yes", action="store_true", help="write without asking")
    each.set_defaults(run=_repair)
    each = actions.add_parser("prune", help="remove leases of images that are not there any more")
    each.add_argument("source", help="the directory of the images, as it is mounted")
    each.add_argument("--leases", default="", metavar="DIR",
                      help="as the mount option (default: SOURCE/.lockfs/leases)")  # fmt: skip
    each.add_argument("--dry-run", action="store_true", help="only list them")
    each.add_argument("--json", action="store_true", help="print JSON")
    each.set_defaults(run=_prune)
    making = argparse.ArgumentParser(add_help=False)
    making.add_argument("place", help="a file, which is made if it is not there, a device, or FILE:OFFSET")
    making.add_argument("--lockspace", required=True, metavar="NAME", help="name of the lockspace, 48 bytes at most")
    making.add_argument("--takeover", default=f"{DEFAULT_TAKEOVER:g}", metavar="sanlock|SECONDS",
                        help="as the mount option; sanlock hosts need theirs (default: %(default)s)")  # fmt: skip
    making.add_argument("--sector", type=int, choices=(512, 4096), default=512, help="bytes (default: %(default)s)")
    making.add_argument("--align", metavar="MIB", type=int, choices=(1, 2, 4, 8), help="size of an area in MiB")
    making.add_argument("--overwrite", action="store_true", help="also where there is something already")
    making.add_argument("--json", action="store_true", help="print JSON")
    each = actions.add_parser("format", parents=[making], help="make a lockspace, on a volume with an index of leases")
    each.add_argument("--index", action="store_true", help="with an index of leases behind it, as on a SAN volume")
    each.add_argument("--max-leases", type=int, default=rindex.DEFAULT_RESOURCES, metavar="N",
                      help="room in the index (default: %(default)s)")  # fmt: skip
    each.add_argument("--io-timeout", type=int, default=DEFAULT_IO_TIMEOUT, metavar="SECONDS",
                      help="with --takeover sanlock (default: %(default)s)")  # fmt: skip
    each.set_defaults(run=_format)
    each = actions.add_parser("create", parents=[making], help="make a lease")
    each.add_argument("--name", required=True, help="name of the lease, 48 bytes at most")
    each.add_argument("--num-hosts", type=int, default=0, metavar="N", help="highest host id that may use it")
    each.set_defaults(run=_create)
    each = actions.add_parser("timing", help="show what happens when after the last renewal of a host")
    each.add_argument("--takeover", default=f"{DEFAULT_TAKEOVER:g}", metavar="sanlock|SECONDS", help="the mount option")
    each.add_argument("--io-timeout", type=int, default=DEFAULT_IO_TIMEOUT, metavar="SECONDS", help="with sanlock")
    each.add_argument("--markdown", action="store_true", help="print the tables of the documentation")
    each.add_argument("--json", action="store_true", help="print JSON")
    each.set_defaults(run=_timetable)


def _areas(wanted: Sequence[str]) -> list[Area]:
    return [area for each in wanted for area in places.areas(places.parse(each))]


def _list(arguments: argparse.Namespace) -> int:
    leases = [describe.area(each) for each in _areas(arguments.place) if each.kind is Kind.LEASE]
    if arguments.json:
        print_json({"leases": leases})
    else:
        print(text.listing(leases), end="")
    return EXIT_OK


def _dump(arguments: argparse.Namespace) -> int:
    found = [describe.area(each) for each in _areas(arguments.place)]
    if arguments.json:
        print_json({"areas": found})
    else:
        print(text.dump(found, ballots=arguments.ballots), end="")
    return EXIT_OK


def _survey(wanted: Sequence[str]) -> survey.Survey:
    """Check places.  What was not so a moment later was a host at work, whose writes were read one after the other."""
    taken = survey.take(_areas(wanted))
    for _ in range(LOOKS):
        if not taken.findings:
            break
        time.sleep(PAUSE)
        again = survey.take(_areas(wanted))
        known = {(area.path, area.offset, finding) for area, finding in taken.findings}
        again.findings = [each for each in again.findings if (each[0].path, each[0].offset, each[1]) in known]
        taken = again
    return taken


def _check(arguments: argparse.Namespace) -> int:
    taken = _survey(arguments.place)
    if arguments.json:
        print_json({"areas": len(taken.areas), "findings": [_document(*each) for each in taken.findings]})
    else:
        print("".join(f"{_line(*each)}\n" for each in taken.findings), end="")
        print(f"{len(taken.areas)} areas checked, {len(taken.findings) or 'no'} findings")
    return EXIT_SYSTEM if taken.failed else EXIT_OK


def _repair(arguments: argparse.Namespace) -> int:
    taken = _survey(arguments.place)
    steps = mend.plan(taken)
    done: list[str] = []
    if not arguments.json:
        print("".join(_step_line(step) + "\n" for step in steps) or "nothing to mend\n", end="")
    if any(not step.why_not for step in steps) and (arguments.yes or _agreed(steps)):
        done = mend.carry_out(taken, steps)
    if arguments.json:
        print_json({
            "steps": [
                {**_document(step.area, step.finding), "remedy": step.finding.remedy.value, "quiet": step.quiet,
                 "why_not": step.why_not}
                for step in steps
            ],
            "done": done,
        })  # fmt: skip
    elif done:
        print("".join(f"done: {printable(each)}\n" for each in done), end="")
    return EXIT_OK if len(done) == len(steps) else EXIT_SYSTEM


def _agreed(steps: Sequence[mend.Step]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("nothing was written: there is nobody to ask", hint="Say --yes to have it done.")
    wait = max(step.quiet for step in steps)
    print(
        f"Write this now{f', after watching for {wait:.0f} s that nobody is at work there' if wait else ''}? [y/N] ",
        end="",
    )
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _format(arguments: argparse.Namespace) -> int:
    wanted = _making(arguments, arguments.io_timeout)
    if arguments.index:
        return _made(arguments, make.volume(wanted, arguments.max_leases))
    return _made(arguments, make.lockspace(wanted))


def _create(arguments: argparse.Namespace) -> int:
    return _made(
        arguments, make.lease(_making(arguments, DEFAULT_IO_TIMEOUT), _name(arguments.name), arguments.num_hosts)
    )


def _prune(arguments: argparse.Namespace) -> int:
    from lockfs_paxos_lease.cli import pruning  # it brings in trio

    return pruning.prune(arguments.source, arguments.leases, dry_run=arguments.dry_run, as_json=arguments.json)


def _timetable(arguments: argparse.Namespace) -> int:
    # Here and not above: it brings in trio, which the other actions do without.
    from lockfs_paxos_lease.cli import timetable

    timing = _timing(arguments.takeover, arguments.io_timeout)
    if arguments.markdown:
        print(timetable.document(), end="")
    elif arguments.json:
        print_json({"moments": [{"at": each.at, "what": each.what} for each in timetable.moments(timing)]})
    else:
        print(timetable.text(timing), end="")
    return EXIT_OK


def _made(arguments: argparse.Namespace, what: str) -> int:
    if arguments.json:
        print_json({"done": what})
    else:
        print(printable(what))
    return EXIT_OK


def _making(arguments: argparse.Namespace, io_timeout: int) -> make.Making:
    timing = _timing(arguments.takeover, io_timeout)
    try:
        geometry = Geometry(arguments.sector, (arguments.align or (1 if arguments.sector == 512 else 8)) * MIB)
    except BadRecord as error:
        raise UsageError(error.what) from None
    return make.Making(
        place=places.parse(arguments.place),
        geometry=geometry,
        lockspace=_name(arguments.lockspace),
        delta_version=timing.delta_version,
        lease_version=timing.lease_version,
        io_timeout=timing.stored,
        overwrite=arguments.overwrite,
    )


def _timing(takeover: str, io_timeout: int) -> Timing:
    try:
        return Timing.sanlock(io_timeout) if takeover == "sanlock" else Timing.own(float(takeover))
    except ValueError as error:
        raise UsageError(f"--takeover {takeover}: {error}") from None


def _name(given: str) -> bytes:
    try:
        name = names.checked(to_bytes(given))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not name or b"\0" in name:
        raise UsageError("a name must not be empty")
    return name


def _line(area: Area, finding: Finding) -> str:
    level = coloured(finding.level.value, RED if finding.level is Level.ERROR else YELLOW)
    code = f" (sanlock: {finding.code})" if finding.code else ""
    return f"{printable(area.where)}: {level}: {finding.record}: {printable(finding.what)}{code}"


def _step_line(step: mend.Step) -> str:
    remedy = f"not mended: {step.why_not}" if step.why_not else step.finding.remedy.value
    return f"{_line(step.area, step.finding)}\n  {remedy}"


def _document(area: Area, finding: Finding) -> dict[str, object]:
    return {
        "path": os.fsdecode(area.path).encode(errors="backslashreplace").decode(),
        "area": area.offset,
        "offset": area.offset + finding.offset,
        "level": finding.level.value,
        "record": finding.record,
        "host_id": finding.host_id,
        "what": finding.what,
        "code": finding.code,
    }
