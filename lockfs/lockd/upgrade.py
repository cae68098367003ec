"""lockd replaces itself by another version of itself, with every lock in place.

It is the same process before and after (execve(2)), with the socket and the lock of the run directory, so that nobody
finds either missing.  All else goes as after a death: the mounts come back with what they hold.

Before that, the new version itself looks whether it can read the state of this one; and nothing may depend on this
process alone.  If anything is in the way, nothing is stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import trio

import lockfs
from lockfs.errors import MountError
from lockfs.linux import service
from lockfs.lockd.claims import Claims
from lockfs.lockd.shares import Shares

CHECK_TIMEOUT = 30.0
"""Seconds for the new version to read the state."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Version:
    """How to run one: the interpreter, and the directory that the package is in."""

    python: str = sys.executable
    path: str = os.path.dirname(os.path.dirname(os.path.abspath(lockfs.__file__)))

    def command(self, module: str, *arguments: str) -> list[str]:
        """Return the command line that runs a module."""
        return [self.python, "-P", "-m", module, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which that finds the module."""
        return {**os.environ, "PYTHONPATH": self.path}


async def check(version: Version, run_dir: str, shares: Shares, claims: Claims) -> None:
    """Raise `MountError` with the reason if lockd cannot be replaced by *version* now."""
    shares.check_expendable()
    if claims:
        mounts = ", ".join(each.mount.mount.mount.mountpoint for each in claims.all())
        raise MountError(f"lockd cannot be replaced before it is known what is held by way of {mounts}")
    command = version.command("lockfs.cli.main", "--run-dir", run_dir, "upgrade", "--check")
    try:
        done = await trio.to_thread.run_sync(
            partial(
                subprocess.run, command, env=version.environment, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=CHECK_TIMEOUT, check=False, cwd="/",
            )
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"the new version does not run: {error}") from error
    if done.returncode != 0:
        reason = done.stderr.strip().removeprefix("lockfs: ") or f"it exited with {done.returncode}"
        raise MountError(f"the new version cannot take over: {reason}", hint="Nothing has changed.")
    # While it was looking, something may have happened.
    shares.check_expendable()


def replace(version: Version, arguments: list[str], fds: dict[str, int]) -> None:
    """Become *version*, and hand *fds* on.  Returns never, but raises OSError."""
    log.info("lockd %s replaces itself", lockfs.__version__)
    service.notify_reloading()
    for handler in logging.getLogger().handlers:
        handler.flush()
    # One more request to do so must not end what does not listen yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    service.replace_process(version.command("lockfs.lockd", *arguments), version.environment, fds)
