"""A mount daemon that is killed and gets no successor: data that bypasses it goes on, and what is open for writing stays
locked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import mounts, processes
from harness.actor import Actor
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.fencing import daemon_gone, mounts_of, unmount_dead
from t6_guard.ways import HELPERS

GONE = "the daemon of .* is dead"
SOON = 5.0
"""Seconds; it should take one or less."""


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host whose lockd starts no mount daemon again."""
    return make_host("host-a", LOCKFS_RESTARTS="0")


@pytest.fixture
def mounted(host: Host, storage: Path, tmp_path: Path, expect_log: Expected) -> Iterator[Mount]:
    """A mount whose daemon is to be killed; the test has to close all in time."""
    expect_log(GONE, optional=True)
    (storage / "image").write_bytes(bytes(8192))
    mount = host.mount(storage, tmp_path / "mnt", "data=passthrough,wait=0.3")
    yield mount
    if mount in host.mounts:
        wait_until(lambda: str(mount.path) not in mounts_of(host), SOON, "lockd to let go of the mount")
        unmount_dead(mount)


@pytest.fixture
def other(mounted: Mount, host_b: Host, storage: Path, tmp_path: Path) -> Mount:
    """The same storage on another host."""
    return host_b.mount(storage, tmp_path / "other", "data=passthrough,wait=0.3")


@contextmanager
def user(mount: Mount, opening: str) -> Iterator[Puppet]:
    with Puppet() as made:
        made.tell(HELPERS, path=str(mount / "image"))
        made.tell(opening)
        yield made


def kill_daemon(mount: Mount) -> None:
    pid = mount.daemon()
    os.kill(pid, signal.SIGKILL)
    assert not processes.wait_until_gone([pid], SOON)


def is_free(image: Path) -> bool:
    try:
        os.close(os.open(image, os.O_RDWR))
    except OSError:
        return False
    return True


def test_data_goes_on_and_the_image_stays_locked(mounted: Mount, other: Mount, host: Host, storage: Path) -> None:
    with user(mounted, "fd = os.open(path, os.O_RDWR)") as writer:
        kill_daemon(mounted)
        wait_until(lambda: daemon_gone(mounted), SOON, "lockd to notice")
        assert "daemon gone" in host.run("lockfs", "status").stdout
        assert writer.tell("outcome(os.pwrite, fd, b'data', 0)") == "ok"
        assert (storage / "image").read_bytes()[:4] == b"data"
        # Everything else fails at once, and hangs nowhere.
        calls = ["os.stat(path)", "os.open(path, os.O_RDONLY)", "os.fstat(fd)", "os.ftruncate(fd, 1)", "os.listdir(os.path.dirname(path))"]
        for call in calls:
            assert writer.tell(f"outcome(lambda: {call})") == "ENOTCONN"
        time.sleep(1.5)
        assert [each["owners"][0]["pid"] for each in host.locks()] == [writer.pid]
        assert not is_free(other / "image")
        assert writer.tell("outcome(os.close, fd)") == "ENOTCONN"
        begin = time.monotonic()
        wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")
        assert time.monotonic() - begin < 2
    assert host.locks() == []


@pytest.mark.parametrize("opening", [
    "fd = os.open(path, os.O_RDWR); os.set_inheritable(fd, True); child = os.fork()\nif child == 0: libc.prctl(1, 9); time.sleep(1000)\nos.close(fd)",
    "mapped(os.open(path, os.O_RDWR), RW, SHARED)",
    "mapped(os.open(path, os.O_RDWR), RO, SHARED)",
    "a, b = socket.socketpair(); fd = os.open(path, os.O_RDWR); socket.send_fds(a, [b'x'], [fd]); os.close(fd)",
    "registered([os.open(path, os.O_RDWR)])",
], ids=["by a child", "mapped", "mapped for reading", "on its way through a socket", "in an io_uring"])  # fmt: skip
def test_whoever_could_still_write_keeps_it(mounted: Mount, other: Mount, opening: str) -> None:
    with user(mounted, opening):
        kill_daemon(mounted)
        time.sleep(2)
        assert not is_free(other / "image")
    wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")


def test_a_loop_device_keeps_it(mounted: Mount, other: Mount) -> None:
    device = subprocess.check_output(["losetup", "--find", "--show", mounted / "image"], text=True).strip()
    try:
        kill_daemon(mounted)
        time.sleep(2)
        assert not is_free(other / "image")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")


def test_who_only_reads_does_not_keep_it(mounted: Mount, other: Mount) -> None:
    with user(mounted, "fd = os.open(path, os.O_RDONLY)") as reader, user(mounted, "fd = os.open(path, os.O_RDWR)") as writer:
        kill_daemon(mounted)
        assert writer.tell("outcome(os.close, fd)") == "ENOTCONN"
        wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")
        assert reader.tell("outcome(os.pread, fd, 1, 0)") == "ok"


def test_a_pinned_image_stays_pinned_while_it_is_read(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    expect_log(GONE)
    (storage / "image").write_bytes(b"template")
    options = "data=passthrough,pin=image,wait=0.3"
    mount, other = host.mount(storage, tmp_path / "mnt", options), host_b.mount(storage, tmp_path / "other", options)
    with user(mount, "fd = os.open(path, os.O_RDONLY)"):
        kill_daemon(mount)
        time.sleep(1.5)
        assert not is_free(other / "image")
    wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")
    unmount_dead(mount)


def test_images_become_free_one_by_one(mounted: Mount, other: Mount, host: Host) -> None:
    with user(mounted, "fds = [os.open(path + str(n), os.O_RDWR | os.O_CREAT) for n in range(10)]") as writer:
        kill_daemon(mounted)
        wait_until(lambda: daemon_gone(mounted), SOON, "lockd to notice")
        for number in range(9):
            writer.tell(f"outcome(os.close, fds[{number}])")
        wait_until(lambda: len(host.locks()) == 1, SOON, "nine images to be free")
        assert is_free(Path(f"{other / 'image'}3"))
        assert not is_free(Path(f"{other / 'image'}9"))


def test_a_call_that_the_daemon_had_in_its_hands_gets_an_answer(mounted: Mount, other: Mount) -> None:
    mounted_again = mounted.host.mount(mounted.source, mounted.path.parent / "patient", "data=passthrough,wait=30")
    with user(mounted_again, "mine = os.open(path + '2', os.O_RDWR | os.O_CREAT)") as waiting, Actor() as holder:
        holder.call("open", other / "image", os.O_RDWR)
        waiting.begin("outcome(os.open, path, os.O_RDWR)")
        time.sleep(0.3)
        kill_daemon(mounted_again)
        assert waiting.process.stdout is not None
        begin = time.monotonic()
        assert "ENOTCONN" in waiting.process.stdout.readline()
        assert time.monotonic() - begin < SOON
    wait_until(lambda: str(mounted_again.path) not in mounts_of(mounted.host), SOON, "lockd to let go")
    unmount_dead(mounted_again)
    mounted.umount()


def test_it_can_be_unmounted_and_mounted_again(mounted: Mount, host: Host) -> None:
    with user(mounted, "fd = os.open(path, os.O_RDWR)") as writer, Actor() as asker:
        kill_daemon(mounted)
        wait_until(lambda: daemon_gone(mounted), SOON, "lockd to notice")
        assert mounts.umount(mounted.path, lazy=True) == ""
        host.mounts.remove(mounted)
        again = host.mount(mounted.source, mounted.path, "data=passthrough,wait=0.3")
        # What goes on at the old mount keeps others from the image at the new one; its owner may have it.
        assert asker.result("open", again / "image", os.O_RDWR) == "EBUSY"
        assert asker.result("open", again / "other", os.O_RDWR | os.O_CREAT) == "ok"
        assert writer.tell("outcome(os.pwrite, fd, b'data', 0)") == "ok"
        assert writer.tell("outcome(lambda: os.close(os.open(path, os.O_RDWR)))") == "ok"
        writer.tell("outcome(os.close, fd)")
        wait_until(lambda: asker.result("open", again / "image", os.O_RDWR) == "ok", SOON, "the image to be free")
    again.umount()


def test_a_mount_without_anything_open_is_gone_at_once(mounted: Mount, host: Host) -> None:
    kill_daemon(mounted)
    wait_until(lambda: not mounts_of(host), SOON, "lockd to forget the mount")
    assert mounts.umount(mounted.path) == ""
    host.mounts.remove(mounted)
    host.mount(mounted.source, mounted.path).umount()


def test_lockd_stays_while_it_is_needed(host: Host, mounted: Mount) -> None:
    with user(mounted, "fd = os.open(path, os.O_RDWR)") as writer:
        kill_daemon(mounted)
        time.sleep(2.5)  # LOCKFS_IDLE_EXIT is 1
        assert host.lockd()
        assert len(host.locks()) == 1
        assert writer.tell("outcome(os.close, fd)") == "ENOTCONN"
    wait_until(lambda: not host.processes("lockfs.lockd"), SOON, "lockd to leave")


def test_gated_data_ends_with_the_daemon(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> None:
    (storage / "image").write_bytes(b"")
    mount, other = host.mount(storage, tmp_path / "mnt", "data=gated"), host_b.mount(storage, tmp_path / "other")
    with user(mount, "fd = os.open(path, os.O_RDWR)") as writer:
        kill_daemon(mount)
        wait_until(lambda: is_free(other / "image"), SOON, "the image to be free")
        assert writer.tell("outcome(os.pwrite, fd, b'data', 0)") in ("ENOTCONN", "ECONNABORTED")
    unmount_dead(mount)
