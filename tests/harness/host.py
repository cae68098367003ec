"""A "host": a run directory with its own lockd and mounts.

Several of them on one machine behave like several machines.

Whatever a test does, `close_all` leaves no mount and no process, and says what it had to clean up by force.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness import logs, mounts, processes

BIN = Path(sys.executable).parent
PATIENCE = 10.0
"""Seconds that a daemon may take to end; far more than it needs, since test machines are slow."""


def without_kernel_module() -> bool:
    """Say whether the tests are run as on a host that lacks the extension: ``LOCKFS_KERNEL=off`` in their environment."""
    return os.environ.get("LOCKFS_KERNEL") == "off"


class MountFailed(Exception):
    """mount.lockfs did not exit with 0."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(f"mount.lockfs exited with {done.returncode}: {done.stderr}")
        self.exit_code = done.returncode
        self.stderr = done.stderr


@dataclass
class Mount:
    """One mount of a host.  Usable where a path is expected."""

    host: Host
    source: Path
    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str | Path) -> Path:
        return self.path / name

    def daemon(self) -> int:
        """Return the process id of the mount daemon.  Raises LookupError if there is none."""
        for pid in self.host.processes("lockfs.fs"):
            if str(self.path) in processes.command_line(pid):
                return pid
        raise LookupError(f"no mount daemon for {self.path}")

    def umount(self) -> None:
        """Unmount and wait until the mount daemon has ended.  Raises OSError if it is busy or stays."""
        pid = self.daemon()
        if complaint := mounts.umount(self.path):
            raise OSError(complaint)
        self.host.mounts.remove(self)
        if processes.wait_until_gone([pid], PATIENCE):
            raise OSError(f"{self.path} is unmounted, but its daemon still runs: {processes.describe(pid)}")


@dataclass
class Host:
    """One host.  *name* is what other hosts see."""

    name: str
    run_dir: Path
    variables: dict[str, str] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    prefix: tuple[str, ...] = ()
    """What its commands are started with."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every command and daemon of this host."""
        return {
            **os.environ,
            "LOCKFS_RUN_DIR": str(self.run_dir),
            "LOCKFS_HOST": self.name,
            "LOCKFS_CONFIG": os.devnull,  # not that of this machine
            "LOCKFS_LOG": "file",
            "LOCKFS_IDLE_EXIT": "1",
            # A descriptor that is dropped instead of closed becomes a warning, hence a failure, in the log.
            "PYTHONWARNINGS": "default::ResourceWarning",
            **self.variables,
        }

    def run(self, *command: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command of this host and return how it ended.  It is looked up beside Python first."""
        program = BIN / command[0] if (BIN / command[0]).exists() else command[0]
        return subprocess.run(
            [*self.prefix, program, *command[1:]],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout,
            check=False,
        )

    def mount(self, source: Path, mountpoint: Path, options: str = "") -> Mount:
        """Mount *source* as a person would; a missing mountpoint is made.  Raises `MountFailed`."""
        mountpoint.mkdir(parents=True, exist_ok=True)
        done = self.run("mount.lockfs", source, mountpoint, *(["-o", options] if options else []))
        if done.returncode != 0:
            if without_kernel_module() and "no data=passthrough here" in done.stderr:
                pytest.skip(done.stderr.strip())
            raise MountFailed(done)
        mount = Mount(self, source, mountpoint)
        self.mounts.append(mount)
        return mount

    def json(self, *arguments: str | Path) -> Any:
        """Run ``lockfs ... --json`` and return what it printed.  Raises RuntimeError if it failed."""
        done = self.run("lockfs", *arguments, "--json")
        if done.returncode != 0:
            raise RuntimeError(f"{done.args} exited with {done.returncode}: {done.stderr}")
        return json.loads(done.stdout)

    def locks(self) -> list[dict[str, Any]]:
        """Return the locks that this host holds; none if its lockd does not run."""
        answer = self.json("locks")
        found: list[dict[str, Any]] = answer["locks"]
        return found

    def processes(self, module: str = "") -> list[int]:
        """Return the processes of this host, or only those that run the Python module *module*."""
        pids = processes.of_run_dir(self.run_dir)
        return [pid for pid in pids if not module or module in processes.command_line(pid)]

    def lockd(self) -> int:
        """Return the process id of lockd.  Raises LookupError if it does not run."""
        for pid in self.processes("lockfs.lockd"):
            return pid
        raise LookupError(f"no lockd runs for {self.name}")

    def vault(self) -> int:
        """Return the process id of the vault.  Raises LookupError if it does not run."""
        for pid in self.processes("lockfs.vault"):
            return pid
        raise LookupError(f"no vault runs for {self.name}")

    def kill(self) -> None:
        """End all processes of this host, as its end does, and what they may just have started."""
        while pids := self.processes():
            processes.end(pids, signal.SIGKILL, PATIENCE)

    def log(self) -> str:
        """Return the logs of all daemons of this host so far."""
        return logs.read(self.run_dir)

    def close(self) -> list[str]:
        """Unmount all, end lockd, and return what was not as it should be, one complaint for each thing."""
        complaints = []
        for mount in reversed(self.mounts):
            if mounts.is_mounted(mount.path) and (problem := mounts.umount(mount.path)):
                complaints.append(f"{mount.path} had to be unmounted lazily: {problem}")
                mounts.umount(mount.path, lazy=True)
        self.mounts.clear()
        stays = processes.wait_until_gone(self.processes("lockfs.fs"), PATIENCE)
        complaints += [f"runs on without its mount: {processes.describe(pid)}" for pid in stays]
        stays = processes.end(self.processes("lockfs.lockd"), signal.SIGTERM, PATIENCE)
        stays += processes.end(self.processes("lockfs.vault"), signal.SIGTERM, PATIENCE)
        complaints += [f"did not end on SIGTERM: {processes.describe(pid)}" for pid in stays]
        left = [pid for pid in self.processes() if pid not in stays]
        complaints += [f"left behind: {processes.describe(pid)}" for pid in left]
        processes.end(self.processes(), signal.SIGKILL, PATIENCE)
        return [f"host {self.name}: {complaint}" for complaint in complaints]


def close_all(hosts: Sequence[Host], expected: logs.Expected) -> list[str]:
    """Close hosts and check their logs, in which a declared record may be in any; return all complaints."""
    complaints = [complaint for host in reversed(hosts) for complaint in host.close()]
    alarms = [alarm for host in hosts for alarm in logs.alarms(host.log())]
    return complaints + expected.complaints(alarms)
