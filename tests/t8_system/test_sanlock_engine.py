"""Real mounts whose leases a sanlock daemon handles: two hosts, each with its lockd and its sanlock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import processes
from harness.actor import Actor
from harness.host import Host
from harness.waiting import wait_until
from t3_backends.sanlock_daemon import Daemon

OPTIONS = "backend=paxos-lease,engine=sanlock,io_timeout=1,wait=0.2"
PATIENCE = 30.0


@pytest.fixture
def sanlocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Daemon, Path]]]:
    made = {}
    for name in ("host-a", "host-b"):
        run_dir = tmp_path_factory.mktemp("s") / "d"
        made[name] = (Daemon(name, run_dir), run_dir)
    yield made
    for daemon, _ in made.values():
        daemon.close()


def leases(daemon: Daemon) -> list[str]:
    return [line for line in daemon.client("status").splitlines() if line.startswith("r ")]


def test_leases_of_sanlock_under_real_mounts(
    sanlocks: dict[str, tuple[Daemon, Path]],  # before the hosts, which are ended first
    make_host: Callable[..., Host],
    storage: Path,
    tmp_path: Path,
    expect_log: Callable[..., None],
) -> None:
    hosts = {name: make_host(name, SANLOCK_RUN_DIR=str(run_dir)) for name, (_, run_dir) in sanlocks.items()}
    a, b = (host.mount(storage, tmp_path / name, OPTIONS) for name, host in hosts.items())
    host, (daemon, _) = hosts["host-a"], sanlocks["host-a"]
    (storage / "img").write_text("content")
    with Actor() as one, Actor() as other:
        fd = one.call("open", a / "img", os.O_RDWR)
        assert other.result("open", b / "img", os.O_RDWR) == "EBUSY"
        assert len(leases(daemon)) == 1
        (share,) = host.json("hosts")["shares"]
        assert not share["problem"]
        wait_until(
            lambda: {each["name"] for each in host.json("hosts")["shares"][0]["hosts"]} == {"host-a", "host-b"},
            PATIENCE, "sanlock has seen both hosts",
        )  # fmt: skip
        rows = [line.split() for line in host.run("lockfs", "hosts").stdout.splitlines()]
        assert rows[0] == [str(storage), "(paxos-lease):"]
        assert next(row for row in rows if row[0] == "host-a")[1:5] == ["(this", "host)", "1", "live"]
        assert str(a / "img") in next(row for row in rows if row[0] == "host-a")
        assert host.run("lockfs", "hosts", "confirm-dead", "host-b").returncode == 1
        # lockd is killed: the mount daemon keeps the connection, and the next lockd goes on with it.
        lockd = host.lockd()
        os.kill(lockd, signal.SIGKILL)
        wait_until(lambda: [pid for pid in host.processes("lockfs.lockd") if pid != lockd], PATIENCE, "the next lockd")
        wait_until(lambda: [each["image"]["path"] for each in host.locks()] == [str(a / "img")], PATIENCE, "its lock")
        assert len(leases(daemon)) == 1
        assert other.result("open", b / "img", os.O_RDWR) == "EBUSY"
        one.call("write", fd, "written", 0)
        # Another host asks for the lease: sanlock passes that on, lockd fences, and only then the lease is let go.
        lockd = host.lockd()
        (lease,) = (storage / ".lockfs/leases").glob("*.lease")
        space = next(line.split()[1] for line in daemon.client("status").splitlines() if line.startswith("s "))
        resource = f"{space.split(':')[0]}:{lease.stem}:{lease}:0"
        sanlocks["host-b"][0].client("request", "-r", f"{resource}:2", "-f", "2")
        wait_until(lambda: one.result("write", fd, "at last", 0) == "EIO", PATIENCE, "the fence")
        wait_until(lambda: not leases(daemon), PATIENCE, "the lease is let go")
        assert processes.running(lockd)
        assert host.lockd() == lockd
        # It has the image, while the first one still has it open.
        theirs = other.call("open", b / "img", os.O_RDWR)
        other.call("write", theirs, "theirs!", 0)
        assert one.result("write", fd, "too late", 0) == "EIO"
        assert (storage / "img").read_text() == "theirs!"
    wait_until(lambda: not host.locks(), PATIENCE, "the image is closed")
    for pattern in ("lost the lock o[nf] ", "fenced ", "says that host host-b is dead; not believed"):
        expect_log(pattern)
    for pattern in ("sanlock (is leaving|has left)", "sanlock refuses", "lockd is gone", "could not give back"):
        expect_log(pattern, optional=True)
