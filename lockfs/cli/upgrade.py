"""``lockfs upgrade``: replace lockd and the mount daemons of this host by this version, with every lock in place.

First all is read that a daemon of this version would have to read.  If it cannot, nothing is touched.
"""

from __future__ import annotations

import os
import sys
import time

import lockfs
from lockfs.cli import query
from lockfs.cli.output import fields, print_json, printable
from lockfs.errors import EXIT_OK, EXIT_SYSTEM, LockUnavailable
from lockfs.fs.journal import state as journal
from lockfs.lockd import statefile
from lockfs.protocol.messages import MountInfo, Status
from lockfs.protocol.start import journal_path

BACK_TIMEOUT = 60.0
"""Seconds for all mounts to have come back to the new lockd; they take well under one."""
PAUSE = 0.05


def check(run_dir: str) -> int:
    """See whether this version can take over.  Raises `LockfsError` if not."""
    for mount_id in statefile.read(run_dir).mounts:
        try:
            with open(journal_path(run_dir, mount_id), "rb") as file:
                journal.replay(file.read())
        except FileNotFoundError:
            pass  # such a mount has no successor, with which version soever
    return EXIT_OK


def run(run_dir: str, *, as_json: bool) -> int:
    """Replace all daemons.  Raises `LockfsError` if nothing was done."""
    before = query.status(run_dir)
    if before is None:
        check(run_dir)
        print(f"no lockd is running in {run_dir}: nothing is to be replaced")
        return EXIT_OK
    query.upgrade(run_dir, sys.executable, os.path.dirname(os.path.dirname(os.path.abspath(lockfs.__file__))))
    after = _wait_until_back(run_dir, before)
    kept = [each for each in after.mounts if not query.replace(run_dir, each.mount_id)]
    if as_json:
        print_json({"before": before.version, "after": after.version, "mounts": fields(after.mounts),
                    "not_replaced": [each.mount_id for each in kept]})  # fmt: skip
    else:
        print(f"lockd {before.version} was replaced by {after.version}, process {after.pid}")
        for each in after.mounts:
            print(f"  {printable(each.mount.mountpoint)}: {_outcome(each, kept)}")
    return EXIT_SYSTEM if kept else EXIT_OK


def _outcome(mount: MountInfo, kept: list[MountInfo]) -> str:
    if mount in kept:
        return f"its daemon (process {mount.pid}) stays as it is until it is unmounted and mounted again"
    return f"its daemon was replaced; {mount.locks} images are held"


def _wait_until_back(run_dir: str, before: Status) -> Status:
    wanted = {each.mount_id for each in before.mounts if not each.daemon_gone}
    until = time.monotonic() + BACK_TIMEOUT
    while True:
        try:
            now = query.status(run_dir)
        except LockUnavailable:
            now = None  # it was just leaving
        if now is not None and now.since != before.since and wanted <= {each.mount_id for each in now.mounts}:
            return now
        if time.monotonic() > until:
            raise LockUnavailable("not all mounts have come back to the new lockd", hint="`lockfs status` shows which.")
        time.sleep(PAUSE)
