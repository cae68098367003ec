"""The daemons of a host replaced by another version, while virtual machines run: nobody notices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount
from harness.load import Load
from harness.logs import Expected
from harness.waiting import wait_until

import lockfs
from lockfs.protocol.start import SOCKET, short_path

ROUNDS = int(os.environ.get("LOCKFS_ROUNDS") or 2)
HERE = Path(lockfs.__file__).parents[1]
SOON = 15.0
pytestmark = pytest.mark.timeout(120 + 20 * ROUNDS)


@pytest.fixture
def next_version(tmp_path: Path) -> Path:
    """A copy of the package that calls itself another version; return the directory that it is in."""
    copy = tmp_path / "next"
    shutil.copytree(HERE / "lockfs", copy / "lockfs", ignore=shutil.ignore_patterns("__pycache__"))
    for backend in (HERE / "backends").iterdir():
        if backend.name.startswith("lockfs_"):
            shutil.copytree(backend, copy / backend.name, ignore=shutil.ignore_patterns("__pycache__"))
    init = copy / "lockfs" / "__init__.py"
    text = init.read_text()
    assert lockfs.__version__ in text
    init.write_text(text.replace(lockfs.__version__, "99.0"))
    return copy


def upgrade(host: Host, path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``lockfs upgrade`` of the version that lies in *path*."""
    command = [sys.executable, "-P", "-m", "lockfs.cli.main", "upgrade"]
    environment = {**host.environment, "PYTHONPATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def children(pid: int) -> str:
    """Return the states of the children of a process."""
    command = ["ps", "-o", "stat=", "--ppid", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.usefixtures("succession")
def test_to_another_version_and_back_under_load(
    mount: Mount, host: Host, host_b: Host, storage: Path, tmp_path: Path, next_version: Path
) -> None:
    other = host_b.mount(storage, tmp_path / "other", "wait=0")
    with Actor() as holder, Actor() as rival, Load(mount.path, "disk") as load:
        holder.call("open", mount / "held", os.O_RDWR | os.O_CREAT)
        daemon = mount.daemon()
        for turn in range(ROUNDS):
            path, version = ((next_version, "99.0"), (HERE, lockfs.__version__))[turn % 2]
            done = upgrade(host, path)
            assert done.returncode == 0, done.stderr + done.stdout
            status = host.json("status")
            assert status["version"] == version
            assert mount.daemon() != daemon
            daemon = mount.daemon()
            assert f"PYTHONPATH={path}".encode() in Path(f"/proc/{daemon}/environ").read_bytes().split(b"\0")
            for name in ("held", "disk"):
                assert rival.result("open", mount / name, os.O_RDWR) == "EBUSY"
                assert rival.result("open", other / name, os.O_RDWR) == "EBUSY"
            load.check()
        holder.call("open", mount / "stop", os.O_RDWR | os.O_CREAT)
        turns, longest = load.finish()
        wait_until(lambda: "Z" not in children(host.lockd()), SOON, "those that were replaced to be gone")
        print(f"\n{ROUNDS} upgrades: {turns} turns of the load, the longest took {longest:.3f} s")
    wait_until(lambda: host.locks() == [], SOON, "all to be given back")


def test_a_version_that_cannot_read_the_state_is_refused_before_anything_stops(
    mount: Mount, host: Host, next_version: Path
) -> None:
    state = next_version / "lockfs" / "lockd" / "state.py"
    state.write_text(state.read_text().replace("READABLE = frozenset({1})", "READABLE = frozenset({2})"))
    with Actor() as holder:
        holder.call("open", mount / "held", os.O_RDWR | os.O_CREAT)
        before, daemon = host.json("status"), mount.daemon()
        done = upgrade(host, next_version)
        assert done.returncode != 0
        assert f"the state of lockd {lockfs.__version__} (format 1) cannot be read" in done.stderr
        assert "Nothing has changed" in done.stderr
        assert (host.json("status"), mount.daemon()) == (before, daemon)


def test_a_signal_replaces_lockd_in_place(mount: Mount, host: Host) -> None:
    """It is the same process, and its socket is there all the time."""
    refused: list[OSError] = []
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as sock, short_path(str(host.run_dir), SOCKET) as address:
                try:
                    sock.connect(address)
                except OSError as error:
                    refused.append(error)
            time.sleep(0.001)

    with Actor() as holder, Actor() as asker:
        holder.call("open", mount / "held", os.O_RDWR | os.O_CREAT)
        before = host.json("status")
        knocker = threading.Thread(target=knock)
        knocker.start()
        try:
            for _ in range(2):
                since = host.json("status")["since"]
                os.kill(host.lockd(), signal.SIGHUP)
                wait_until(lambda since=since: host.json("status")["since"] != since, SOON, "the next one")
                assert asker.result("open", mount / "held", os.O_RDWR) == "EBUSY"
        finally:
            over.set()
            knocker.join()
        after = host.json("status")
        assert refused == []
        assert after["pid"] == before["pid"]
        assert [each["mount_id"] for each in after["mounts"]] == [each["mount_id"] for each in before["mounts"]]
    mount.umount()
    wait_until(lambda: not host.processes("lockfs.lockd"), SOON, "lockd to leave")


def test_nothing_is_replaced_where_nothing_runs(host: Host) -> None:
    done = upgrade(host, HERE)
    assert done.returncode == 0
    assert "nothing is to be replaced" in done.stdout


def test_what_only_lockd_keeps_is_in_the_way(
    host: Host, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    expect_log("the daemon of .* is dead")
    expect_log("SIGHUP: the daemon of .* is dead, and only lockd keeps its locks")
    host.variables["LOCKFS_RESTARTS"] = "0"
    mount = host.mount(storage, tmp_path / "mnt", "data=passthrough")
    with Actor() as holder:
        holder.call("open", mount / "held", os.O_RDWR | os.O_CREAT)
        os.kill(mount.daemon(), signal.SIGKILL)
        wait_until(lambda: host.json("status")["mounts"][0]["daemon_gone"], SOON, "lockd to notice")
        assert "only lockd keeps its locks" in upgrade(host, HERE).stderr
        os.kill(host.lockd(), signal.SIGHUP)
        wait_until(lambda: "SIGHUP: " in host.log(), SOON, "the refusal")
        assert len(host.locks()) == 1
    wait_until(lambda: not host.json("status")["mounts"], SOON, "the mount to be gone")
    subprocess.run(["umount", mount.path], check=True)
    host.mounts.remove(mount)
