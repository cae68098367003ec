"""Hosts with sanlock and hosts with lockfs contend for one lease, shared and exclusive: never two are inside.

The checker knows nothing of leases: whoever has the lease locks a file on this machine, in the same mode, without
waiting; if that fails, somebody is inside who must not be.

``LOCKFS_CONTENTION_SECONDS`` is how long they contend in each place (default 3).
"""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness.host import BIN
from t3_backends.lease_process import LeaseHost
from t3_backends.sanlock_daemon import Daemon
from t8_system.cluster import Cluster, got

SECONDS = float(os.environ.get("LOCKFS_CONTENTION_SECONDS", "3"))
INSIDE = 0.02
"""Seconds that each stays inside."""
SHARED = 0.4
"""The part of the attempts that are for a shared lease."""
VIOLATION = 99
VOLUME_MIB = {512: 8, 4096: 48}
PATIENCE = 60.0
"""Seconds more for those who had no luck, on a busy machine."""


class Checker:
    """The file that is locked, and who has held it when: host, mode, and when it came and left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.holds: list[tuple[float, str, str]] = []
        """When each left, which host, and in which mode."""
        self.violations: list[str] = []
        self._lock = threading.Lock()

    def note(self, name: str, mode: str, good: bool) -> None:
        """Take note of a hold."""
        with self._lock:
            if not good:
                self.violations.append(f"{name} ({mode}) at {time.monotonic():.3f} after {self.holds[-3:]}")
            self.holds.append((time.monotonic(), name, mode))

    def stay(self, name: str, mode: str) -> None:
        """Be inside for a while."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            how = fcntl.LOCK_SH if mode == "shared" else fcntl.LOCK_EX
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                self.note(name, mode, False)
            else:
                time.sleep(INSIDE)
                self.note(name, mode, True)
        finally:
            os.close(fd)

    def command(self, mode: str) -> list[str]:
        """Return the program that is inside for a while.

        Whoever has the lease ends after who has the lock: as one process they could let go of it in either order.
        """
        how = "--shared" if mode == "shared" else "--exclusive"
        lock = f"flock {how} --nonblock --conflict-exit-code {VIOLATION} {self.path} sleep {INSIDE}"
        return ["/bin/sh", "-c", f"{lock}; exit $?"]

    def has_seen_all(self) -> bool:
        """Say whether each kind of host was inside in each mode."""
        with self._lock:
            return len({(name.partition("-")[0], mode) for _, name, mode in self.holds}) == 4

    def handovers(self) -> int:
        """Return how often the one inside was another than the one before, where one of both was alone there."""
        between = zip(self.holds, self.holds[1:], strict=False)
        return sum(a[1] != b[1] and "exclusive" in (a[2], b[2]) for a, b in between)


def volume(sector: int, backing: Path) -> str:
    """Make a volume on a loop device with sectors of that size."""
    with backing.open("wb") as file:
        file.truncate(VOLUME_MIB[sector] << 20)
    attach = ["losetup", "-f", "--show", "--sector-size", str(sector), backing]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    command = [BIN / "lockfs", "lease", "format", "--index", "--max-leases", "8", "--lockspace", "SAN", "--takeover", "sanlock",
               "--io-timeout", "1", "--sector", str(sector), device]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return device


def populate(cluster: Cluster) -> None:
    """Have two hosts of each kind join, and the lease be there."""
    first = cluster.add_lockfs("ours-1")
    assert got(first)
    first.call("release")
    cluster.add(["ours-2"], [("theirs-1", 11), ("theirs-2", 12)])


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[dict[str, Cluster]]:
    """One in each kind of place.  Most of what they do first is to wait, so they do it at once."""
    made, devices = {}, []
    try:
        for sector, place in ((0, "directory"), (512, "loop device, 512"), (4096, "loop device, 4096")):
            top = tmp_path / str(sector)
            (top / "storage").mkdir(parents=True)
            if sector:
                devices.append(volume(sector, top / "backing"))
            made[place] = Cluster(top / "storage", top, devices[-1] if sector else "")
        with ThreadPoolExecutor() as pool:
            list(pool.map(populate, made.values()))
        yield made
    finally:
        for cluster in made.values():
            cluster.close()
        for device in devices:
            subprocess.run(["losetup", "-d", device], check=True)


class Contest:
    """All hosts of a cluster want its lease again and again, for `SECONDS` and until each kind had it in each mode."""

    def __init__(self, cluster: Cluster, checker: Checker) -> None:
        self.troubles: list[BaseException] = []
        self._checker = checker
        self._resource = cluster.resource
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._contend, args=(self._ours, each)) for each in cluster.lockfs]
        self._threads += [threading.Thread(target=self._contend, args=(self._theirs, each)) for each in cluster.sanlock]
        for each in self._threads:
            each.start()

    def _contend(self, step: Callable[[Any, str], None], host: LeaseHost | Daemon) -> None:
        chance = random.Random(host.name)
        try:
            while not self._is_over() and not self.troubles:
                step(host, "shared" if chance.random() < SHARED else "exclusive")
                time.sleep(chance.uniform(0, 2 * INSIDE))
        except BaseException as error:
            self.troubles.append(error)

    def _is_over(self) -> bool:
        age = time.monotonic() - self._began
        return age > SECONDS + PATIENCE or (age > SECONDS and self._checker.has_seen_all())

    def _ours(self, host: LeaseHost, mode: str) -> None:
        if got(host, mode):
            self._checker.stay(host.name, mode)
            host.call("release")

    def _theirs(self, daemon: Daemon, mode: str) -> None:
        name = self._resource + (":SH" if mode == "shared" else "")
        status = daemon.command(name, *self._checker.command(mode)).wait(60)
        if status in (0, VIOLATION):
            self._checker.note(daemon.name, mode, status == 0)

    def end(self) -> None:
        """Wait for the end."""
        for each in self._threads:
            each.join()


@pytest.mark.timeout(SECONDS + PATIENCE + 120)
def test_they_contend_and_never_two_are_inside(clusters: dict[str, Cluster], tmp_path: Path) -> None:
    checkers = {place: Checker(tmp_path / place.replace(", ", "-").replace(" ", "-")) for place in clusters}
    contests = {place: Contest(cluster, checkers[place]) for place, cluster in clusters.items()}
    for place, contest in contests.items():
        contest.end()
        checker = checkers[place]
        counted = Counter((name, mode) for _, name, mode in checker.holds)
        print(f"{place}, {SECONDS:g} s: {len(checker.holds)} holds, {checker.handovers()} hand-overs, {dict(sorted(counted.items()))}")
    for place, checker in checkers.items():
        assert contests[place].troubles == []
        assert checker.violations == []
        assert checker.has_seen_all(), checker.holds
        assert checker.handovers() > 2


def test_the_checker_finds_two_inside(tmp_path: Path) -> None:
    checker = Checker(tmp_path / "inside")
    for first, second, good in (("exclusive", "shared", False), ("shared", "exclusive", False), ("shared", "shared", True)):
        checker.violations.clear()
        fd = os.open(checker.path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_SH if first == "shared" else fcntl.LOCK_EX)
        checker.stay("one", second)
        assert (not checker.violations) is good
        assert (subprocess.run(checker.command(second), check=False).returncode == VIOLATION) is not good
        os.close(fd)
