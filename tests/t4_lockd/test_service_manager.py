"""lockd under a service manager: one that speaks the real protocols of socket activation and notification.

`Manager` does what systemd does for ``lockfs-lockd.socket`` and ``.service``: it has the socket for good, starts lockd
when somebody connects, and hears what that has to say.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import processes
from harness.host import Host
from harness.waiting import wait_until
from t4_lockd.clients import bare, mounted

from lockfs.protocol import start

UNITS = Path(__file__).parents[2] / "mount-helpers" / "systemd"
# What stands between fork and exec in a service manager: the socket becomes descriptor 3, the process learns its own id.
LAUNCHER = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """See the module."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host = host
        self.path = host.run_dir / start.SOCKET
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.path))
        self.path.chmod(0o600)
        self.listener.listen(100)
        self.hears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.hears.bind(str(directory / "notify"))
        self.hears.settimeout(20)
        self.environment = {
            **host.environment, "NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "300000",
            "LISTEN_FDS": "1", "LISTEN_FDNAMES": "lockfs-lockd.socket",
        }  # fmt: skip
        self.lockd: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        fd = self.listener.fileno()
        command = [sys.executable, "-c", LAUNCHER, str(fd), sys.executable, "-P", "-m", "lockfs.lockd", "--run-dir", str(self.host.run_dir)]
        self.lockd = subprocess.Popen(command, env=self.environment, pass_fds=[fd])
        return self.lockd

    def start_on_demand(self) -> subprocess.Popen[bytes]:
        """Start it as soon as somebody connects."""
        assert select.select([self.listener], [], [], 20)[0]
        return self.start()

    def heard(self, wanted: str) -> dict[str, str]:
        """Return the next message that has a *wanted* line."""
        while True:
            lines = self.hears.recv(4096).decode().splitlines()
            if wanted in lines:
                return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        if self.lockd is not None and self.lockd.poll() is None:
            self.lockd.terminate()
            self.lockd.wait(20)
        self.listener.close()
        self.hears.close()


@pytest.fixture
def manager(environment: Host, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(environment, tmp_path)
    yield made
    made.close()


def ask(run_dir: Path) -> str:
    with bare(run_dir) as connection:
        connection.call("io.lockfs.Lockd.GetStatus")
        return str(connection.receive()["parameters"]["pid"])


def test_it_is_started_by_who_connects_and_says_when_it_serves(manager: Manager) -> None:
    with bare(manager.host.run_dir) as early:
        early.call("io.lockfs.Lockd.GetStatus")
        lockd = manager.start_on_demand()
        assert manager.heard("READY=1")["MAINPID"] == str(lockd.pid)
        assert early.receive()["parameters"]["pid"] == lockd.pid
    assert ask(manager.host.run_dir) == str(lockd.pid)
    assert start.is_running(str(manager.host.run_dir))


def test_the_watchdog_hears_of_the_event_loop(manager: Manager) -> None:
    lockd = manager.start()
    for _ in range(4):
        manager.heard("WATCHDOG=1")
    # One that is stopped does not say that it lives.
    os.kill(lockd.pid, signal.SIGSTOP)
    try:
        while select.select([manager.hears], [], [], 0.05)[0]:
            manager.hears.recv(4096)
        manager.hears.settimeout(1)
        with pytest.raises(TimeoutError):
            manager.hears.recv(4096)
    finally:
        os.kill(lockd.pid, signal.SIGCONT)
    manager.hears.settimeout(20)
    manager.heard("WATCHDOG=1")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_socket_stays_and_who_connects_meanwhile_waits_for_the_next(manager: Manager, how: signal.Signals) -> None:
    first = manager.start()
    manager.heard("READY=1")
    first.send_signal(how)
    if how is signal.SIGTERM:
        manager.heard("STOPPING=1")
    assert first.wait(20) == (0 if how is signal.SIGTERM else -9)
    with bare(manager.host.run_dir) as waiting:
        waiting.call("io.lockfs.Lockd.GetStatus")
        second = manager.start_on_demand()
        assert waiting.receive()["parameters"]["pid"] == second.pid


def test_it_replaces_itself_when_it_is_to_reload(manager: Manager) -> None:
    lockd = manager.start()
    manager.heard("READY=1")
    with bare(manager.host.run_dir) as before:
        lockd.send_signal(signal.SIGHUP)
        assert int(manager.heard("RELOADING=1")["MONOTONIC_USEC"]) > 0
        manager.heard("READY=1")
        assert before.receive() is None
    assert ask(manager.host.run_dir) == str(lockd.pid)
    assert len(manager.host.processes("lockfs.lockd")) == 1
    lockd.send_signal(signal.SIGTERM)
    assert lockd.wait(20) == 0
    assert manager.path.exists()


async def test_mounts_work_as_ever(manager: Manager, storage: Path) -> None:
    lockd = manager.start()
    manager.heard("READY=1")
    async with mounted(manager.host.run_dir, storage) as mount:
        for fd in await mount.acquire("x"):
            os.close(fd)
        assert len(await mount.client.locks()) == 1
    wait_until(lambda: not manager.host.locks(), 10, "it to be free")
    assert processes.running(lockd.pid)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_the_units_are_units(tmp_path: Path) -> None:
    for unit in UNITS.glob("lockfs-lockd.*"):
        # Where it is installed does not matter here.
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/lib/lockfs/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *tmp_path.glob("lockfs-lockd.*")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
