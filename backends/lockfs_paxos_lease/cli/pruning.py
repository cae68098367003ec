"""``lockfs lease prune``: removing leases that nobody needs."""

from __future__ import annotations

import os
from functools import partial

import trio

from lockfs.cli.output import print_json, printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, SystemError_
from lockfs.linux import mountinfo
from lockfs_paxos_lease.directory import DEFAULT
from lockfs_paxos_lease.disk.file import Disks
from lockfs_paxos_lease.prune import Pruned, Pruner, timing_of, unneeded


def prune(source: str, leases: str, *, dry_run: bool, as_json: bool) -> int:
    """Remove the leases of images that *source* does not have.  Raises `LockfsError`."""
    leases = leases or os.path.join(source, *DEFAULT)
    try:
        names = unneeded(os.fsencode(source), leases)
        timing = timing_of(leases)
    except (OSError, ValueError) as error:
        raise SystemError_(
            f"cannot look for leases in {printable(leases)}: {error}",
            hint="Name the directory of the images where it is not hidden by the mount of lockfs, or use --leases.",
        ) from error
    pruned = Pruned()
    if names and not dry_run:
        pruner = Pruner(Disks(mountinfo.find(leases).fstype), leases, timing)
        told = (lambda name: None) if as_json else (lambda name: print(f"removed: {name}", flush=True))
        pruned = trio.run(partial(pruner.prune, names, told))
    if as_json:
        print_json({"unneeded": names, "removed": pruned.removed, "in_use": pruned.in_use, "problems": pruned.problems})
    elif dry_run:
        print("".join(f"unneeded: {name}\n" for name in names), end="")
    else:
        print("".join(f"in use: {name}\n" for name in pruned.in_use), end="")
        print("".join(f"not removed: {printable(each)}\n" for each in pruned.problems), end="")
        print(f"{len(pruned.removed)} of {len(names)} unneeded leases removed")
    return EXIT_SYSTEM if pruned.problems else EXIT_OK
