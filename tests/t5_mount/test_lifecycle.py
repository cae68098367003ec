"""Thousands of rounds leave nothing behind: no descriptor, no process, no mount, no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import mounts, processes
from harness.host import Host, Mount
from harness.waiting import wait_until

from lockfs.protocol import client

ROUNDS = int(os.environ.get("LOCKFS_ROUNDS", "0"))
"""How many rounds of each kind; 0 for as many as a usual run has time for."""
PATIENCE = 10.0


def kinds(pid: int) -> Counter[str]:
    """Count what a process has open, by kind: numbers that differ from socket to socket are left out.

    Not the O_PATH descriptors with which the mount daemon keeps up with what the kernel knows: the kernel says how long.
    """
    found = processes.descriptors(pid)
    return Counter(what.partition(":")[0] for fd, what in found.items() if not is_path_only(pid, fd))


def is_path_only(pid: int, fd: int) -> bool:
    """Tell whether a descriptor of a process is an O_PATH one."""
    try:
        lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
    except FileNotFoundError:
        return False
    return bool(int(next(line for line in lines if line.startswith("flags:")).split()[1], 8) & os.O_PATH)


def quiet(pid: int) -> Counter[str]:
    """Return `kinds` when it no longer changes: a daemon hears of a close a little later than the caller."""
    before = kinds(pid)
    while True:
        time.sleep(0.1)
        now = kinds(pid)
        if now == before:
            return now
        before = now


@contextmanager
def nothing_stays(mount: Mount, patience: float = PATIENCE) -> Iterator[None]:
    """Fail if the daemons hold more descriptors, or any lock, a while after the block than before it."""
    daemons = {"mount daemon": mount.daemon(), "lockd": mount.host.lockd()}
    before = {name: quiet(pid) for name, pid in daemons.items()}
    yield
    for name, pid in daemons.items():

        # The mount daemon keeps connections to lockd for the next call: one for each that it made at once.
        allowed = before[name] + Counter(socket=client.KEPT)

        def settled(pid: int = pid, allowed: Counter[str] = allowed) -> bool:
            return not kinds(pid) - allowed

        try:
            wait_until(settled, patience, f"{name} to close what it opened")
        except TimeoutError:
            pytest.fail(f"{name} keeps open: {kinds(pid) - allowed}", pytrace=False)
    wait_until(lambda: not mount.host.locks(), patience, "all locks to be released")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_the_check_sees_what_stays(mount: Mount, flags: int) -> None:
    (mount / "image").write_bytes(b"x")
    with pytest.raises(pytest.fail.Exception, match="mount daemon keeps open"), nothing_stays(mount, 0.5):
        fd = os.open(mount / "image", flags)
    os.close(fd)


def use(directory: Mount, number: int) -> None:
    """Do a bit of everything that takes and gives back a descriptor or a lock."""
    image = directory / f"image-{number % 7}"
    with open(image, "a+b", buffering=0) as writer:
        writer.write(b"%d\n" % number)
        with open(image, "rb", buffering=0) as reader:
            reader.read(1)
    os.truncate(image, 10)
    os.listdir(directory)
    if number % 7 == 6:
        os.rename(image, directory / "renamed")
        os.unlink(directory / "renamed")


@pytest.mark.timeout(120 + ROUNDS)
def test_opening_and_closing(mount: Mount) -> None:
    for number in range(20):
        use(mount, number)
    with nothing_stays(mount):
        for number in range(ROUNDS or 1000):
            use(mount, number)


def test_refusals(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> None:
    first = host.mount(storage, tmp_path / "a", "wait=0")
    second = host_b.mount(storage, tmp_path / "b", "wait=0")
    with open(first / "image", "wb"):
        with pytest.raises(OSError, match="busy"), open(second / "image", "r+b"):
            pass
        with nothing_stays(second):
            for _ in range(ROUNDS or 200):
                with pytest.raises(OSError, match="busy"):
                    os.open(second / "image", os.O_RDWR)
                with pytest.raises(OSError, match="busy"):
                    os.truncate(second / "image", 0)
    with nothing_stays(first):
        pass


HOLDER = "import os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR); print('held', flush=True); time.sleep(60)"


def test_holders_that_are_killed(mount: Mount) -> None:
    (mount / "image").write_bytes(b"x")
    with nothing_stays(mount):
        for _ in range(ROUNDS or 20):
            command = [sys.executable, "-S", "-E", "-c", HOLDER, mount / "image"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
                assert holder.stdout is not None
                assert holder.stdout.readline() == "held\n"
                holder.send_signal(signal.SIGKILL)


HOARDER = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
kept = [os.open(os.path.join(sys.argv[1], str(number)), os.O_RDWR) for number in range(2000)]
print('open', flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("options", ["data=gated", "data=auto"])
def test_unmounting_while_closes_are_under_way(host: Host, storage: Path, tmp_path: Path, options: str) -> None:
    for number in range(2000):
        (storage / str(number)).touch()
    for _ in range(2):
        mount = host.mount(storage, tmp_path / "mnt", options)
        command = [sys.executable, "-S", "-E", "-c", HOARDER, mount]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hoarder:
            assert hoarder.stdout is not None
            assert hoarder.stdout.readline() == "open\n"
        mount.umount()
        assert host.locks() == []


@pytest.mark.timeout(120 + 3 * ROUNDS)
def test_mounting_and_unmounting(host: Host, storage: Path, tmp_path: Path) -> None:
    kept = host.mount(storage, tmp_path / "kept")
    lockd = host.lockd()
    with nothing_stays(kept):
        for number in range(ROUNDS or 25):
            mount = host.mount(storage, tmp_path / f"mnt-{number % 3}")
            use(mount, number)
            mount.umount()
    assert host.processes("lockfs.fs") == [kept.daemon()]
    assert host.lockd() == lockd
    assert [each.path for each in mounts.below(tmp_path)] == [kept.path]


def test_many_mounts_at_once(host: Host, storage: Path, tmp_path: Path) -> None:
    kept = host.mount(storage, tmp_path / "kept")
    with nothing_stays(kept):
        several = [host.mount(storage, tmp_path / f"mnt-{number}") for number in range(8)]
        for number, mount in enumerate(several):
            use(mount, number)
        for mount in several:
            mount.umount()


def test_the_last_unmount_ends_lockd_after_a_while(host: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "mnt")
    lockd = host.lockd()
    mount.umount()
    assert processes.wait_until_gone([lockd], PATIENCE) == []
    assert host.processes() == []
    again = host.mount(storage, tmp_path / "mnt")
    (again / "image").write_bytes(b"x")
    assert host.lockd() != lockd


def test_a_mount_in_use_is_not_unmounted(mount: Mount) -> None:
    daemon = mount.daemon()
    with open(mount / "image", "wb", buffering=0) as image:
        with pytest.raises(OSError, match="busy"):
            mount.umount()
        image.write(b"goes on")
        assert processes.running(daemon)
    mount.umount()
    assert (mount.source / "image").read_bytes() == b"goes on"
