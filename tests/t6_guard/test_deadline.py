"""Locks that expire: with data=gated a write that finds its lock late waits, and fails only when it is lost."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.host import Host, Mount
from harness.waiting import wait_until

from lockfs.linux.deadline import Deadline, now

PLUGINS = Path(__file__).parents[1] / "harness" / "plugins"
AGES = 1000.0
SOON = 15.0


@pytest.fixture(params=["with the kernel module", "without"])
def gated(request: pytest.FixtureRequest, host: Host, storage: Path, tmp_path: Path) -> Mount:
    (storage / "image").write_bytes(b"-" * 8192)
    host.variables["PYTHONPATH"] = str(PLUGINS)
    if request.param == "without":
        host.variables["LOCKFS_KERNEL"] = "off"
    return host.mount(storage, tmp_path / "mnt", "backend=expiring,data=gated")


@pytest.fixture
def deadline(gated: Mount) -> Iterator[Deadline]:
    """That of the backend, as lockd has it."""
    fds = Path(f"/proc/{gated.host.lockd()}/fd")
    found = next(each for each in fds.iterdir() if "memfd:lockfs-deadline" in os.readlink(each))
    deadline = Deadline(os.open(found, os.O_RDWR), writable=True)
    yield deadline
    deadline.set(math.inf, math.inf)
    deadline.close()


WRITES: dict[str, Callable[[int], object]] = {
    "write": lambda fd: os.pwrite(fd, b"new", 0),
    "large write": lambda fd: os.pwrite(fd, b"new" * (1 << 20), 0),
    "truncate": lambda fd: os.ftruncate(fd, 3),
}


class Attempt:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[int], object], fd: int) -> None:
        self.error: int | None = None
        self._thread = threading.Thread(target=self._do, args=(call, fd))
        self._thread.start()

    def _do(self, call: Callable[[int], object], fd: int) -> None:
        try:
            call(fd)
            self.error = 0
        except OSError as error:
            self.error = error.errno

    def waits(self, seconds: float = 0.3) -> bool:
        self._thread.join(seconds)
        return self._thread.is_alive()

    def outcome(self) -> int | None:
        self._thread.join(SOON)
        return self.error


@pytest.mark.parametrize("call", WRITES)
def test_late_then_renewed(gated: Mount, deadline: Deadline, storage: Path, call: str) -> None:
    fd = os.open(gated / "image", os.O_RDWR)
    try:
        deadline.set(now() + AGES, now() + AGES)
        assert os.pwrite(fd, b"old", 0) == 3
        deadline.set(now() - 1, now() + AGES)
        attempt = Attempt(WRITES[call], fd)
        assert attempt.waits()
        assert (storage / "image").read_bytes() == b"old".ljust(8192, b"-")
        deadline.set(now() + AGES, now() + AGES)
        assert attempt.outcome() == 0
        assert (storage / "image").read_bytes() != b"old".ljust(8192, b"-")
    finally:
        os.close(fd)


@pytest.mark.parametrize("call", WRITES)
def test_late_then_lost(gated: Mount, deadline: Deadline, storage: Path, call: str) -> None:
    fd = os.open(gated / "image", os.O_RDWR)
    try:
        deadline.set(now() - 1, now() + 0.7)
        attempt = Attempt(WRITES[call], fd)
        assert attempt.waits(0.2)
        assert attempt.outcome() == errno.EIO
        assert Attempt(WRITES[call], fd).outcome() == errno.EIO
        assert (storage / "image").read_bytes() == b"-" * 8192
    finally:
        os.close(fd)


def test_reading_goes_on(gated: Mount, deadline: Deadline) -> None:
    """Unless a write waits: as with any filesystem it has what it writes to locked."""
    fd = os.open(gated / "image", os.O_RDWR)
    try:
        deadline.set(0, 0)
        assert os.pread(fd, 3, 0) == b"---"
        assert (gated / "image").read_bytes() == b"-" * 8192
    finally:
        os.close(fd)


def test_time_passes_also_when_lockd_hangs(gated: Mount, deadline: Deadline, storage: Path) -> None:
    fd = os.open(gated / "image", os.O_RDWR)
    lockd = gated.host.lockd()
    try:
        deadline.set(now() + 0.3, now() + 0.5)
        os.kill(lockd, signal.SIGSTOP)
        wait_until(lambda: Attempt(WRITES["write"], fd).outcome() == errno.EIO, SOON, "writes to fail")
    finally:
        os.kill(lockd, signal.SIGCONT)
        os.close(fd)


def test_an_image_that_is_not_guarded_has_no_deadline(host: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "notes").write_text("old")
    host.variables["PYTHONPATH"] = str(PLUGINS)
    mount = host.mount(storage, tmp_path / "mnt", "backend=expiring,data=gated,images=*.img")
    fds = Path(f"/proc/{host.lockd()}/fd")
    found = next(each for each in fds.iterdir() if "memfd:lockfs-deadline" in os.readlink(each))
    deadline = Deadline(os.open(found, os.O_RDWR), writable=True)
    deadline.set(0, 0)
    (mount / "notes").write_text("new")
    assert (storage / "notes").read_text() == "new"
    deadline.close()
