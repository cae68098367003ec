"""What the tests of survival share: which daemon serves a mount, and how often another one has taken over."""

from __future__ import annotations

import os
import signal
from typing import Any

from harness import lockd, processes
from harness.host import Mount
from harness.waiting import wait_until

PATIENCE = 20.0


def told(mount: Mount) -> dict[str, Any]:
    """Return what lockd says of a mount; nothing if it does not know it."""
    for each in lockd.status(mount.host.run_dir)["mounts"]:
        if each["mount"]["mountpoint"] == str(mount.path):
            found: dict[str, Any] = each
            return found
    return {}


def restarts(mount: Mount) -> int:
    """Return how many daemons have taken over so far."""
    return int(told(mount).get("restarts", 0))


def serving(mount: Mount) -> int:
    """Wait until a daemon serves; return its process id."""

    def look() -> int:
        found = told(mount)
        return 0 if found.get("restarting") else int(found["pid"])

    return wait_until(look, PATIENCE, "a daemon to serve")


def kill(mount: Mount, how: signal.Signals = signal.SIGKILL) -> None:
    """End or stop the daemon of a mount; return when another one serves."""
    before = restarts(mount)
    os.kill(serving(mount), how)
    wait_for_restart(mount, before)


def wait_for_restart(mount: Mount, before: int) -> None:
    """Return when more than *before* daemons have taken over."""
    wait_until(lambda: restarts(mount) > before, PATIENCE, "a successor")


def kill_lockd(mount: Mount) -> None:
    """Kill lockd; return when the next one has taken up all that the mounts of its host hold."""
    host = mount.host
    back = len(lockd.status(host.run_dir)["mounts"])
    before = host.log().count("has come back")
    gone = host.lockd()
    os.kill(gone, signal.SIGKILL)
    processes.wait_until_gone([gone], PATIENCE)
    wait_until(lambda: host.log().count("has come back") >= before + back, PATIENCE, "the mounts to come back")
