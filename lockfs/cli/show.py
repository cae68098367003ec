"""``lockfs status`` and ``lockfs locks``: what lockd has on this host."""

from __future__ import annotations

from lockfs.cli import query
from lockfs.cli.output import columns, fields, moment, print_json, printable
from lockfs.errors import EXIT_OK
from lockfs.protocol.messages import LockInfo, MountInfo


def status(run_dir: str, *, as_json: bool) -> int:
    """Show lockd and its mounts.  That none runs is an answer, not an error."""
    found = query.status(run_dir)
    if as_json:
        document = fields(found)
        print_json({"running": True, **document} if isinstance(document, dict) else {"running": False})
    elif found is None:
        print(_not_running(run_dir))
    else:
        print(
            f"lockd {found.version} runs in {printable(found.run_dir)}: host {printable(found.host)}, "
            f"process {found.pid}, since {moment(found.since)}"
        )
        if found.mounts:
            header = ("MOUNTPOINT", "SOURCE", "BACKEND", "LOCKS", "PROCESS", "SINCE")
            print(columns([header, *map(_mount_row, found.mounts)]), end="")
        else:
            print("nothing is mounted")
    return EXIT_OK


def locks(run_dir: str, *, as_json: bool) -> int:
    """Show the locks that this host holds, one line for each holder."""
    found = query.locks(run_dir)
    if as_json:
        print_json({"running": found is not None, "locks": fields(found or [])})
    elif found is None:
        print(_not_running(run_dir))
    elif not found:
        print("this host holds no image")
    else:
        rows = [row for each in found for row in _lock_rows(each)]
        print(columns([("IMAGE", "MODE", "PROCESS", "SINCE"), *rows]), end="")
    return EXIT_OK


def _not_running(run_dir: str) -> str:
    return f"no lockd is running in {run_dir}: nothing is mounted"


def _mount_row(each: MountInfo) -> tuple[str, ...]:
    return (
        printable(each.mount.mountpoint),
        printable(each.mount.source),
        each.mount.backend,
        str(each.locks),
        "daemon gone" if each.daemon_gone else "restarting" if each.restarting else str(each.pid),
        moment(each.since),
    )


def _lock_rows(each: LockInfo) -> list[tuple[str, ...]]:
    path = printable(each.image.path)
    rows: list[tuple[str, ...]] = []
    for owner in each.owners:
        who = f"{owner.pid or ''} {owner.command}".strip() + (f", VM {owner.vm}" if owner.vm else "")
        rows.append((path, owner.mode, printable(who), moment(owner.since or each.since)))
    return rows or [(path, each.mode, "", moment(each.since))]
