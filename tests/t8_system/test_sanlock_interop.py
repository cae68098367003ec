"""Hosts with the real sanlock and hosts with lockfs on one lockspace: each sees what the other holds.

``LOCKFS_LONG=1`` also has each kind take over from a dead host of the other, which takes more than a minute.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from t3_backends.lease_process import LeaseHost
from t3_backends.sanlock_daemon import Daemon, direct
from t8_system.cluster import DEAD, OPTIONS, Cluster, got, until

LONG = pytest.mark.long


@pytest.fixture
def cluster(storage: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(storage, tmp_path)
    yield made
    made.close()


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


@LONG
@pytest.mark.timeout(300)
def test_each_kind_takes_over_from_a_dead_host_of_the_other_when_its_rule_says_so(tmp_path: Path) -> None:
    """Both at once, on two shares.  Counted from the last renewal of the dead host that the storage has."""
    clusters = []
    try:
        for name in ("ours-dies", "theirs-dies"):
            (tmp_path / name / "storage").mkdir(parents=True)
            cluster = Cluster(tmp_path / name / "storage", tmp_path / name)
            clusters.append(cluster)
            ours = cluster.add_lockfs("ours")
            ours.call("acquire")
            theirs = cluster.add_sanlock("theirs", 7)
        for_sanlock, for_lockfs = clusters
        ours.call("release")
        for_lockfs.hold_by_sanlock(theirs, "/bin/sleep", "1000")
        until(lambda: "owner_id 7" in direct("read_leader", "-r", for_lockfs.resource), 30, "sanlock's acquire")
        theirs.close()
        for_sanlock.lockfs[0].kill()
        with ThreadPoolExecutor() as pool:
            sanlock = pool.submit(sanlock_takes_over, for_sanlock, 1)
            until(lambda: got(for_lockfs.lockfs[0]), DEAD + 60, "our takeover")
            ages = {"lockfs": age_of_record(for_lockfs, 7), "sanlock": sanlock.result()}
        print(f"taken over so long after the last renewal: {ages}")
        assert all(DEAD < age < DEAD + 15 for age in ages.values()), ages
    finally:
        for cluster in clusters:
            cluster.close()


def age_of_record(cluster: Cluster, host_id: int) -> float:
    """Return how long ago a host has renewed its lease; up to a second too much, since records have whole seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - cluster.record(host_id).timestamp


def sanlock_takes_over(cluster: Cluster, host_id: int) -> float:
    """Return how long after the last renewal of a host with lockfs the one with sanlock has got what it held."""
    began = time.monotonic()
    # A client waits for a dead owner by itself, but not for one that it has seen alive a moment ago.
    while cluster.hold_by_sanlock(cluster.sanlock[0], "/bin/true").wait(200):
        assert time.monotonic() < began + DEAD + 60
    return age_of_record(cluster, host_id)


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
    with pytest.raises(RuntimeError, match="needs leases="):
        LeaseHost("ours", storage, tmp_path / "run", names="libvirt", takeover="sanlock")
    with pytest.raises(RuntimeError, match="needs takeover=sanlock"):
        LeaseHost("ours", storage, tmp_path / "run", names="libvirt", leases=str(tmp_path))
