"""lockd's units under a real systemd: activation by its socket, notification, watchdog, restart, reload, and the order at
the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.waiting import wait_until
from t8_system.booted import PATIENCE, UNITS, Booted, Unavailable

SERVICE, SOCKET, MOUNT = "lockfs-lockd.service", "lockfs-lockd.socket", "srv-images.mount"
IMAGE = "/srv/images/image"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Booted]:
    try:
        booted = Booted(tmp_path, {SERVICE: "[Service]\nWatchdogSec=2\n"})
    except Unavailable as error:
        pytest.skip(str(error))
    with booted:
        yield booted


def main_pid(systemd: Booted) -> int:
    """Return the process id of lockd as it is in there, 0 if it does not run."""
    return int(systemd.show(SERVICE, "MainPID"))


def vaults(systemd: Booted) -> list[str]:
    """Return the process ids of all vaults as they are in there."""
    return systemd.run("pgrep", "-f", "lockfs[.]vault").stdout.split()


def is_another(systemd: Booted, before: int) -> int:
    """Wait until another lockd serves; return its process id."""

    def look() -> int:
        now = main_pid(systemd)
        return now if now not in (0, before) and systemd.show(SERVICE, "ActiveState") == "active" else 0

    return wait_until(look, PATIENCE, "another lockd")


def test_the_units(systemd: Booted) -> None:
    verified = systemd.run("systemd-analyze", "verify", "--man=no", *(f"/run/units/{unit.name}" for unit in UNITS))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    assert main_pid(systemd) == 0
    systemd.systemctl("start", MOUNT)
    lockd = main_pid(systemd)
    assert lockd != 0
    assert systemd.show(SERVICE, "ActiveState") == "active"
    assert systemd.show(SERVICE, "StatusText") == "serves /run/lockfs"
    with Actor(systemd.prefix) as holder, Actor(systemd.prefix) as asker:
        fd = holder.call("open", IMAGE, os.O_RDWR | os.O_CREAT)

        def is_kept(what: str) -> None:
            assert asker.result("open", IMAGE, os.O_RDWR) == "EBUSY", what
            assert holder.call("write", fd, what, 0) == len(what), what
            assert holder.result("stat", IMAGE) == "ok", what

        is_kept("activated by its socket")
        systemd.systemctl("restart", SERVICE)
        lockd = is_another(systemd, lockd)
        is_kept("restarted")
        systemd.run("kill", "-KILL", str(lockd))
        lockd = is_another(systemd, lockd)
        assert systemd.show(SERVICE, "NRestarts") == "1"
        is_kept("killed")
        systemd.systemctl("reload", SERVICE)
        wait_until(lambda: "has come back" in systemd.run("tail", "-n", "1", "/run/lockfs/log/lockd.log").stdout, PATIENCE, "the mount to come back")
        assert main_pid(systemd) == lockd
        is_kept("reloaded")
        systemd.run("kill", "-STOP", str(lockd))
        lockd = is_another(systemd, lockd)
        assert systemd.show(SERVICE, "NRestarts") == "2"
        is_kept("stopped, which the watchdog has seen")
        (vault,) = vaults(systemd)
        daemon = systemd.show(MOUNT, "ControlGroup")
        (pid,) = systemd.run("cat", f"/sys/fs/cgroup{daemon}/cgroup.procs").stdout.split()
        systemd.run("kill", "-KILL", pid)
        is_kept("with another mount daemon")
        group = f"/sys/fs/cgroup{systemd.show(SERVICE, 'ControlGroup')}/cgroup.procs"
        (successor,) = {*systemd.run("cat", group).stdout.split()} - {str(lockd), *vaults(systemd)}
        systemd.systemctl("restart", SERVICE)
        lockd = is_another(systemd, lockd)
        assert successor in systemd.run("cat", group).stdout.split()
        is_kept("restarted, but not the mount daemon that it had started")
        systemd.run("kill", "-KILL", successor, str(lockd))
        is_kept("both killed")
        lockd = is_another(systemd, lockd)
        assert vaults(systemd) == [vault]
        systemd.systemctl("stop", SERVICE)
        is_kept("stopped")
        assert main_pid(systemd) not in (0, lockd)
        holder.call("close", fd)
    console = systemd.shut_down()
    ends = [line.partition(":")[0] for line in console.splitlines() if line.endswith(": Deactivated successfully.")]
    assert [each for each in ends[ends.index(MOUNT) :] if each in (MOUNT, SERVICE, SOCKET)] == [MOUNT, SERVICE, SOCKET], console
