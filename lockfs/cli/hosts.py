"""``lockfs hosts``: the hosts that share locks with this one; and to say that one of them is dead."""

from __future__ import annotations

from lockfs.cli import query
from lockfs.cli.output import GREEN, RED, YELLOW, coloured, columns, fields, moment, print_json, printable
from lockfs.errors import EXIT_OK, LockUnavailable
from lockfs.protocol.messages import HostInfo, ShareHosts

COLOURS = {"live": GREEN, "failing": YELLOW, "dead": RED}
SHOWN = 3
"""Images of one host that are shown; JSON has all."""


def run(run_dir: str, *, as_json: bool) -> int:
    """Show the hosts, by source directory."""
    found = query.hosts(run_dir)
    if as_json:
        print_json({"running": found is not None, "shares": fields(found.shares if found else [])})
    elif found is None:
        print(f"no lockd is running in {run_dir}: nothing is mounted")
    elif not found.shares:
        print("nothing is mounted")
    else:
        print("\n".join(map(_describe, found.shares)), end="")
    return EXIT_OK


def confirm_dead(host: str, source: str, reason: str, run_dir: str, *, as_json: bool) -> int:
    """Say that a host is dead, and show what came of it.  Raises `LockfsError`."""
    done = query.confirm_dead(run_dir, host, source, reason)
    if done is None:
        raise LockUnavailable(f"no lockd is running in {run_dir}", hint="Without it no host is known.")
    if as_json:
        print_json(fields(done))
    else:
        for each in done.sources:
            print(f"{printable(each)}: what host {printable(done.host)} held is free")
    return EXIT_OK


def _describe(share: ShareHosts) -> str:
    head = f"{printable(share.source)} ({share.backend})"
    if share.problem:
        return f"{head}: {coloured('unknown', YELLOW)}\n  {printable(share.problem)}\n"
    if not share.hosts:
        return f"{head}: no other host is known\n"
    header = ("HOST", "ID", "STATE", "LAST SEEN", "HOLDS", "")
    return f"{head}:\n" + columns([header, *map(_row, share.hosts)], indent="  ")


def _row(host: HostInfo) -> tuple[str, ...]:
    holds = [printable(each) for each in host.holds[:SHOWN]]
    more = len(host.holds) - SHOWN
    return (
        printable(host.name) + (" (this host)" if host.here else ""),
        str(host.number or ""),
        coloured(host.state.ljust(7), COLOURS.get(host.state, YELLOW)),
        moment(host.last_seen),
        ", ".join(holds) + (f" and {more} more" if more > 0 else ""),
        printable(host.detail),
    )
