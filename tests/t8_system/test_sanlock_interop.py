"""Hosts with the real sanlock and hosts with lockfs on one lockspace: they exclude each other.

Who holds the image makes a file that must not be there; that file is the checker, and knows nothing of leases.

``LOCKFS_CONTENTION_SECONDS`` is how long they contend (default 6); ``LOCKFS_LONG=1`` also has each kind take over from
a dead host of the other, which takes more than a minute each.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from t3_backends.lease_process import LeaseHost
from t3_backends.sanlock_daemon import Daemon, direct

SECONDS = float(os.environ.get("LOCKFS_CONTENTION_SECONDS", "6"))
LONG = pytest.mark.skipif(not os.environ.get("LOCKFS_LONG"), reason="takes minutes: LOCKFS_LONG=1")
OPTIONS = {"takeover": "sanlock", "io_timeout": "1"}
DEAD = 68
"""Seconds after which a host is dead: 8 times io_timeout, and 60."""
HOLD = r"""
import os, sys, time
inside, journal, name = sys.argv[1:]
try:
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
except FileExistsError:
    open(journal, "a").write(f"VIOLATION {name}\n")
    sys.exit(1)
time.sleep(0.02)
os.unlink(inside)
open(journal, "a").write(f"held {name}\n")
"""


class Cluster:
    """A share with one image, and hosts of both kinds."""

    def __init__(self, storage: Path, tmp_path: Path) -> None:
        self.storage = storage
        self.leases = storage / ".lockfs" / "leases"
        self.inside, self.journal = tmp_path / "inside", tmp_path / "journal"
        self.journal.touch()
        self._tmp_path = tmp_path
        self.lockfs: list[LeaseHost] = []
        self.sanlock: list[Daemon] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def add_lockfs(self, name: str, **more: str) -> LeaseHost:
        host = LeaseHost(name, self.storage, self._tmp_path / "run", **OPTIONS, **more)
        self.lockfs.append(host)
        return host

    def add_sanlock(self, name: str, host_id: int) -> Daemon:
        daemon = Daemon(name, self._tmp_path / name)
        self.sanlock.append(daemon)
        daemon.client("add_lockspace", "-s", f"{self.space}:{host_id}:{self.leases}/lockspace:0", "-o", "1")
        return daemon

    @property
    def space(self) -> str:
        return (self.leases / "lockspace").read_bytes()[56:104].rstrip(b"\0").decode()

    @property
    def resource(self) -> str:
        (path,) = self.leases.glob("*.lease")
        return f"{self.space}:{path.stem}:{path}:0"

    def hold_by_sanlock(self, daemon: Daemon, *command: str) -> subprocess.Popen[bytes]:
        child = daemon.command(self.resource, *command)
        self._children.append(child)
        return child

    def close(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        for daemon in self.sanlock:
            daemon.close()
        for host in self.lockfs:
            host.close()


@pytest.fixture
def cluster(storage: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(storage, tmp_path)
    yield made
    made.close()


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; return how long it took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() > begin + seconds:
            raise TimeoutError(f"after {seconds:g} s still waiting for {what}")
        time.sleep(0.05)
    return time.monotonic() - begin


def got(host: LeaseHost) -> bool:
    try:
        host.call("acquire")
    except RuntimeError as error:
        if "Busy" not in str(error):
            raise
        return False
    return True


def test_each_kind_sees_what_the_other_holds(cluster: Cluster) -> None:
    ours = cluster.add_lockfs("ours")
    token = ours.call("acquire")
    theirs = cluster.add_sanlock("theirs", 7)
    # Ours is held: sanlock says so, and by whom.
    refused = cluster.hold_by_sanlock(theirs, "/bin/true")
    assert refused.wait(30) != 0
    assert f"lver {token}" in direct("read_leader", "-r", cluster.resource)
    ours.call("release")
    # Theirs is held: we say so, and by whom.
    child = cluster.hold_by_sanlock(theirs, "/bin/sleep", "1000")
    until(lambda: "owner_id 7" in direct("read_leader", "-r", cluster.resource), 30, "sanlock's acquire")
    with pytest.raises(RuntimeError, match="Busy: host theirs"):
        ours.call("acquire")
    assert ours.call("holder") == "host theirs"
    until(lambda: ["theirs", "live"] in [each[:2] for each in ours.call("hosts")], 30, "a second look at theirs")
    child.kill()
    child.wait()
    until(lambda: got(ours), 30, "sanlock's release")


def test_sharing_is_seen_by_each_kind(cluster: Cluster) -> None:
    ours = cluster.add_lockfs("ours")
    ours.call("acquire", mode="shared")
    theirs = cluster.add_sanlock("theirs", 7)
    exclusive = cluster.hold_by_sanlock(theirs, "/bin/true")
    assert exclusive.wait(30) != 0
    child = theirs.command(f"{cluster.resource}:SH", "/bin/sleep", "1000")
    cluster._children.append(child)
    data = Path(cluster.resource.split(":")[2])
    until(lambda: data.read_bytes()[8 * 512 + 128] == 1, 30, "sanlock's shared acquire")
    with pytest.raises(RuntimeError, match="Busy: host theirs"):
        ours.call("convert", mode="exclusive")
    child.kill()
    child.wait()
    until(lambda: data.read_bytes()[8 * 512 + 128] == 0, 30, "sanlock's release")
    ours.call("convert", mode="exclusive")


def test_they_contend_and_never_two_are_inside(cluster: Cluster) -> None:
    first = cluster.add_lockfs("ours-1")
    first.call("acquire")
    first.call("release")
    ours = [first, cluster.add_lockfs("ours-2")]
    theirs = [cluster.add_sanlock("theirs-1", 11), cluster.add_sanlock("theirs-2", 12)]
    stop = time.monotonic() + SECONDS
    troubles: list[BaseException] = []
    hold = ["/usr/bin/python3", "-c", HOLD, str(cluster.inside), str(cluster.journal)]

    def contend_ours(host: LeaseHost) -> None:
        while time.monotonic() < stop:
            if got(host):
                subprocess.run([*hold, host.name], check=False)
                host.call("release")
            time.sleep(0.02)

    def contend_theirs(daemon: Daemon) -> None:
        while time.monotonic() < stop:
            daemon.command(cluster.resource, *hold, daemon.name).wait(60)
            time.sleep(0.02)

    def watched(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=watched, args=(lambda host=host: contend_ours(host),)) for host in ours]
    threads += [
        threading.Thread(target=watched, args=(lambda daemon=daemon: contend_theirs(daemon),)) for daemon in theirs
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert troubles == []
    said = cluster.journal.read_text().splitlines()
    assert [line for line in said if line.startswith("VIOLATION")] == []
    for name in ("ours", "theirs"):
        assert sum(line.startswith(f"held {name}") for line in said) > 3, said


@LONG
@pytest.mark.timeout(300)
def test_lockfs_takes_over_from_a_dead_host_with_sanlock(cluster: Cluster) -> None:
    ours = cluster.add_lockfs("ours")
    ours.call("acquire")
    ours.call("release")
    theirs = cluster.add_sanlock("theirs", 7)
    cluster.hold_by_sanlock(theirs, "/bin/sleep", "1000")
    until(lambda: "owner_id 7" in direct("read_leader", "-r", cluster.resource), 30, "sanlock's acquire")
    theirs.close()
    took = until(lambda: got(ours), DEAD + 30, "the takeover")
    print(f"taken over after {took:.1f} s")
    assert took > DEAD - 5


@LONG
@pytest.mark.timeout(300)
def test_sanlock_takes_over_from_a_dead_host_with_lockfs(cluster: Cluster) -> None:
    ours = cluster.add_lockfs("ours")
    ours.call("acquire")
    theirs = cluster.add_sanlock("theirs", 7)
    ours.kill()
    begin = time.monotonic()
    while True:
        if cluster.hold_by_sanlock(theirs, "/bin/true").wait(200) == 0:
            break
        assert time.monotonic() < begin + DEAD + 60
        time.sleep(0.5)
    took = time.monotonic() - begin
    print(f"taken over after {took:.1f} s")
    assert took > DEAD - 5


def test_leases_are_those_of_libvirts_sanlock_driver(storage: Path, tmp_path: Path) -> None:
    """What that driver does to lock a disk, done by hand; its files are ours, whoever makes them."""
    leases, md5 = tmp_path / "leases", hashlib.md5(b"/mnt/images/img").hexdigest()
    leases.mkdir()
    options = {**OPTIONS, "names": "libvirt", "leases": str(leases)}
    ours = LeaseHost("ours", storage, tmp_path / "run", **options)
    theirs = Daemon("theirs", tmp_path / "theirs")
    try:
        ours.call("acquire")
        assert sorted(path.name for path in leases.iterdir()) == sorted(["__LIBVIRT__DISKS__", md5])
        theirs.client("add_lockspace", "-s", f"__LIBVIRT__DISKS__:7:{leases}/__LIBVIRT__DISKS__:0", "-o", "1")
        resource = f"__LIBVIRT__DISKS__:{md5}:{leases}/{md5}:0"
        assert theirs.command(resource, "/bin/true").wait(60) != 0
        ours.call("release")
        assert theirs.command(resource, "/bin/true").wait(60) == 0
    finally:
        ours.close()
        theirs.close()


def test_libvirts_names_need_libvirts_timing_and_directory(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="needs takeover=sanlock"):
        LeaseHost("ours", storage, tmp_path / "run", names="libvirt")
