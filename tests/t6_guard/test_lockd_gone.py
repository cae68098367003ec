"""lockd that is killed or told to stop: it is started again, takes up what was held, and nobody notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import lockd, processes
from harness.actor import Actor
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.fencing import daemon_gone, unmount_dead
from t6_guard.ways import HELPERS

SOON = 10.0


def kill_lockd(host: Host) -> int:
    pid = host.lockd()
    os.kill(pid, signal.SIGKILL)
    assert not processes.wait_until_gone([pid], SOON)
    return pid


def comes_back(host: Host, gone: int, mounts: int = 1) -> None:
    """Wait until a lockd that was started after *gone* knows all mounts again."""

    def is_back() -> bool:
        before, _, last = host.log().rpartition(" serves in ")
        return f"[{gone}]" not in before.rpartition("\n")[2] and last.count("has come back") == mounts

    wait_until(is_back, SOON, "the mount to come back")


@pytest.fixture
def other(host_b: Host, storage: Path, tmp_path: Path) -> Mount:
    """The same directory on another host."""
    return host_b.mount(storage, tmp_path / "b", "wait=0.3")


def test_nobody_notices_that_it_is_killed(mount: Mount, other: Mount, host: Host, storage: Path) -> None:
    for name in ("held", "free", "third"):
        (storage / name).write_text("content")
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", mount / "held", os.O_RDWR)
        before = host.locks()
        kill_lockd(host)
        # While there is none: calls wait, and do what they always do.
        assert asker.result("truncate", mount / "free", 3) == "ok"
        assert host.locks() == before
        assert asker.result("open", mount / "held", os.O_WRONLY) == "EBUSY"
        assert asker.result("open", other / "held", os.O_WRONLY) == "EBUSY"
        kill_lockd(host)
        assert asker.result("rename", mount / "third", mount / "fourth") == "ok"
        assert asker.call("cat", mount / "held") == "content"
        kill_lockd(host)
        assert json.loads(asker.call("getxattr", mount / "held", "user.lockfs.holder"))["holders"][0]["pid"] == holder.pid
        holder.call("write", fd, "written", 0)
        holder.call("close", fd)
        assert asker.result("open", other / "held", os.O_WRONLY) == "ok"
    wait_until(lambda: lockd.locks(host.run_dir) == [], SOON, "all to be given back")


def test_what_is_closed_while_there_is_none_is_free(mount: Mount, other: Mount, host: Host, storage: Path) -> None:
    with Actor() as holder, Actor() as asker:
        fds = [holder.call("open", mount / f"image{number}", os.O_RDWR | os.O_CREAT) for number in range(20)]
        gone = kill_lockd(host)
        for fd in fds[1:]:
            holder.call("close", fd)
        comes_back(host, gone)
        for number in range(1, 20):
            assert asker.result("open", other / f"image{number}", os.O_RDWR) == "ok"
        assert asker.result("open", other / "image0", os.O_RDWR) == "EBUSY"
        wait_until(lambda: len(lockd.locks(host.run_dir) or []) == 1, SOON, "one image to be left")


def test_an_open_that_waits_for_another_goes_on_to_wait(host: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "mnt", "wait=20")
    with Actor() as holder, Actor() as waiter:
        fd = holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        waiter.ask("open", mount / "image", os.O_RDWR)
        time.sleep(0.2)
        comes_back(host, kill_lockd(host))
        holder.call("close", fd)
        waiter.answer()
        assert [owner["pid"] for each in host.locks() for owner in each["owners"]] == [waiter.pid]


def test_two_mounts_of_one_directory_come_back(host: Host, other: Mount, storage: Path, tmp_path: Path) -> None:
    """One owner has an image through both, and many share one: each lock is one, however often it is handed over."""
    a, b = (host.mount(storage, tmp_path / name, "shareable=disk*") for name in ("one", "two"))
    with Actor() as holder, Actor() as second, Actor() as asker:
        fds = [holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT) for mount in (a, b)]
        shared = [each.call("open", mount / "disk", os.O_RDWR | os.O_CREAT) for each, mount in ((holder, a), (second, b))]
        for _ in range(3):
            comes_back(host, kill_lockd(host), 2)
            assert sorted((each["mode"], len(each["owners"])) for each in host.locks()) == [("exclusive", 2), ("shared", 2)]
            assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
            assert asker.result("open", other / "disk", os.O_RDWR) == "EBUSY"
        holder.call("close", fds[0])
        holder.call("close", shared[0])
        time.sleep(0.5)
        assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        holder.call("close", fds[1])
        second.call("close", shared[1])
        for name in ("image", "disk"):
            assert asker.result("open", other / name, os.O_RDWR) == "ok"


@pytest.mark.parametrize("options", ["lockspace={},key=path", "lockspace={},key=inode"])
def test_lock_files_come_back(host: Host, host_b: Host, storage: Path, tmp_path: Path, options: str) -> None:
    (tmp_path / "locks").mkdir()
    options = options.format(tmp_path / "locks")
    mount = host.mount(storage, tmp_path / "mnt", options)
    other = host_b.mount(storage, tmp_path / "mnt-b", options.replace("key=path", "key=inode"))
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        comes_back(host, kill_lockd(host))
        if "inode" in options:
            assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        assert len(os.listdir(tmp_path / "locks")) == 1
        holder.call("close", fd)
        wait_until(lambda: os.listdir(tmp_path / "locks") == [], SOON, "the lock file to be gone")


def test_a_fence_survives(mount: Mount, host: Host, storage: Path, expect_log: Expected) -> None:
    """What was fenced stays so, and locked, under the next lockd."""
    expect_log("lost the lock on")
    expect_log("lost the lock of")
    expect_log("fenced")
    (storage / "image").write_text("content")
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", mount / "image", os.O_RDWR)
        assert host.run("lockfs", "fence", mount / "image").returncode == 0
        assert holder.result("write", fd, "x", 0) == "EIO"
        comes_back(host, kill_lockd(host))
        assert holder.result("write", fd, "x", 0) == "EIO"
        assert asker.result("open", mount / "image", os.O_RDWR) == "ENOLCK"
        holder.result("close", fd)
        wait_until(lambda: asker.result("open", mount / "image", os.O_RDWR) == "ok", SOON, "it to be free")


def test_a_lock_that_is_not_there_any_more_is_fenced(mount: Mount, host: Host, storage: Path, expect_log: Expected) -> None:
    """Nothing is taken behind a holder's back: whoever had it meanwhile may have written."""
    expect_log("the lock on .* is not there any more")
    expect_log("lost the lock o[nf]")
    expect_log("fenced")
    (storage / "image").write_text("content")
    with Actor() as holder:
        fd = holder.call("open", mount / "image", os.O_RDWR)
        daemon = mount.daemon()
        # What a file server does that has forgotten its locks: the lock goes, and nobody is told.
        _unlock_in(daemon, storage / "image")
        kill_lockd(host)
        wait_until(lambda: "fenced" in host.log(), SOON, "the fence")
        wait_until(lambda: holder.result("write", fd, "x", 0) == "EIO", SOON, "the handle to fail")
    assert (storage / "image").read_text() == "content"


def _unlock_in(pid: int, image: Path) -> None:
    """Drop the lock on the open file descriptions that a process has of an image."""
    script = """
import ctypes, fcntl, os, struct, sys
pid, image = int(sys.argv[1]), os.stat(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(pid)
done = 0
for name in os.listdir(f"/proc/{pid}/fd"):
    info = os.stat(f"/proc/{pid}/fd/{name}")
    if (info.st_dev, info.st_ino) == (image.st_dev, image.st_ino):
        fd = libc.syscall(438, pidfd, int(name), 0)  # pidfd_getfd
        assert fd >= 0, os.strerror(ctypes.get_errno())
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_UNLCK, 0, 0, 1, 0)); done += 1
        except OSError:
            pass  # an O_PATH descriptor
assert done
"""
    subprocess.run([sys.executable, "-c", script, str(pid), str(image)], check=True)


def test_it_ends_with_the_last_mount_as_ever(mount: Mount, host: Host) -> None:
    with Actor() as holder:
        holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        comes_back(host, kill_lockd(host))
    mount.umount()
    wait_until(lambda: not host.processes("lockfs.lockd"), SOON, "lockd to leave")
    assert not (host.run_dir / "lockd.state").exists()


def test_a_mount_that_is_unmounted_while_there_is_none_ends(mount: Mount, host: Host) -> None:
    kill_lockd(host)
    mount.umount()
    assert "cannot be told" not in host.log()


def test_a_mount_daemon_that_dies_while_there_is_none_has_a_successor(host: Host, storage: Path, tmp_path: Path) -> None:
    """Its images stay locked: what that takes is in the vault."""
    first, second = (host.mount(storage, tmp_path / name, "data=gated,wait=0.3") for name in ("one", "two"))
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", first / "image", os.O_RDWR | os.O_CREAT)
        kill_both_while_the_other_is_stopped(host, first, second)
        assert asker.result("open", second / "image", os.O_RDWR) == "EBUSY"
        assert holder.result("write", fd, "x", 0) == "ok"
        holder.call("close", fd)
        assert asker.result("open", second / "image", os.O_RDWR) == "ok"


def test_a_mount_that_ends_while_there_is_none_leaves_nothing(host: Host, storage: Path, tmp_path: Path) -> None:
    """Without the vault, too, its images are free as soon as there is a lockd again: nobody can write without it."""
    first, second = (host.mount(storage, tmp_path / name, "data=gated") for name in ("one", "two"))
    with Actor() as holder, Actor() as asker:
        holder.call("open", first / "image", os.O_RDWR | os.O_CREAT)
        kill_both_while_the_other_is_stopped(host, first, second, host.vault())
        assert asker.result("open", second / "image", os.O_RDWR) == "ok"
    unmount_dead(first)


def kill_both_while_the_other_is_stopped(host: Host, mount: Mount, other: Mount, *more: int) -> None:
    daemon = mount.daemon()
    os.kill(other.daemon(), signal.SIGSTOP)
    os.kill(host.lockd(), signal.SIGSTOP)  # one that starts another vault now would be too fast for what follows
    for pid in (*more, host.lockd(), daemon):
        os.kill(pid, signal.SIGKILL)
    os.kill(other.daemon(), signal.SIGCONT)


def test_one_that_is_stopped_is_replaced(
    make_host: Callable[..., Host], other: Mount, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    """By a mount that waits for it, and by one that comes."""
    expect_log(r"lockd \(process \d+\) has not answered for 1 s: it is killed")
    expect_log("the daemon of .* has not answered", optional=True)
    host = make_host("host-c", LOCKFS_HANG="1")
    mount = host.mount(storage, tmp_path / "mnt", "wait=0.3")
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        pid = host.lockd()
        os.kill(pid, signal.SIGSTOP)
        assert asker.result("open", mount / "free", os.O_RDWR | os.O_CREAT) == "ok"
        assert not processes.running(pid)
        second = host.lockd()
        os.kill(second, signal.SIGSTOP)
        os.kill(mount.daemon(), signal.SIGSTOP)
        try:
            again = host.mount(storage, tmp_path / "again", "wait=0.3")
            assert not processes.running(second)
        finally:
            os.kill(mount.daemon(), signal.SIGCONT)
        for each in (mount, again, other):
            assert asker.result("open", each / "image", os.O_RDWR) == "EBUSY"
        holder.call("close", fd)


# Told to stop ------------------------------------------------------------------------------------


def test_told_to_stop_it_is_started_again(mount: Mount, other: Mount, host: Host, expect_log: Expected) -> None:
    expect_log("lockd stops while 1 mounts need it")
    with Actor() as holder, Actor() as asker:
        holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        pid = host.lockd()
        os.kill(pid, signal.SIGTERM)
        comes_back(host, pid)
        assert asker.result("open", mount / "image", os.O_RDWR) == "EBUSY"
        assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"


def test_a_lockd_that_is_told_to_stop_leaves_no_writer_without_a_lock(
    make_host: Callable[..., Host], other: Mount, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    """It alone keeps the lock of a mount whose daemon is dead: who could still write is cut off before it ends."""
    expect_log("the daemon of .* is dead", optional=True)
    expect_log("lockd stops while 1 mounts need it", optional=True)
    expect_log("lost the lock on")
    expect_log("fenced")
    host = make_host("host-c", LOCKFS_RESTARTS="0")
    mount = host.mount(storage, tmp_path / "mnt", "data=passthrough,wait=0.3")
    (storage / "image").write_bytes(bytes(8192))
    image = str(mount / "image")
    with Puppet() as plain, Puppet() as mapper:
        for each in (plain, mapper):
            each.tell(HELPERS, path=image)
        plain.tell("fd = os.open(path, os.O_RDWR)")
        os.kill(mount.daemon(), signal.SIGKILL)
        wait_until(lambda: daemon_gone(mount), SOON, "lockd to notice")
        with Actor() as asker:
            assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
            assert plain.tell("outcome(os.pwrite, fd, b'data', 0)") == "ok"
            pid = host.lockd()
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: asker.result("open", other / "image", os.O_RDWR) == "ok", SOON, "the image to be free")
            assert plain.tell("outcome(os.pwrite, fd, b'more', 0)") in ("EIO", "ENOTCONN")
            assert not processes.wait_until_gone([pid], SOON)
    assert (storage / "image").read_bytes()[:4] == b"data"
    unmount_dead(mount)


# A mount that goes away for good ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["lazily", "by force", "with its namespace"])
def test_a_mount_that_is_gone_keeps_what_can_be_written(
    host: Host, other: Mount, storage: Path, tmp_path: Path, expect_log: Expected, how: str
) -> None:
    """Also while lockd is killed."""
    expect_log("the daemon of .* is dead", optional=True)
    expect_log("the mount daemon fails, and leaves the mount to a successor", optional=True)
    expect_log("a daemon of .* did not come up", optional=True)
    (storage / "image").write_bytes(bytes(8192))
    mount = host.mount(storage, tmp_path / "mnt", "data=passthrough,wait=0.3")
    daemon = mount.daemon()
    with Puppet() as writer, Actor() as asker:
        writer.tell(HELPERS, path=str(mount / "image"))
        if how == "with its namespace":
            writer.tell("checked(libc.unshare(0x20000)); checked(libc.mount(b'none', b'/', None, 0x84000, None))")
        writer.tell("fd = os.open(path, os.O_RDWR)")
        if how == "by force":
            subprocess.run(["umount", "--force", mount.path], check=False, capture_output=True)
        subprocess.run(["umount", "--lazy", mount.path], check=False, capture_output=True)
        if how == "with its namespace":
            writer.tell("checked(libc.umount2(os.path.dirname(path).encode(), 2))")
        host.mounts.remove(mount)
        for _ in range(2):
            assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
            assert writer.tell("outcome(os.pwrite, fd, b'data', 0)") == "ok"
            time.sleep(0.5)
            if how != "by force":  # then lockd alone keeps the lock
                kill_lockd(host)
        assert asker.result("open", other / "image", os.O_RDWR) == "EBUSY"
        writer.tell("outcome(os.close, fd)")
        wait_until(lambda: asker.result("open", other / "image", os.O_RDWR) == "ok", SOON, "the image to be free")
    assert (storage / "image").read_bytes()[:4] == b"data"
    assert not processes.wait_until_gone([daemon], SOON)
    wait_until(lambda: not host.processes(), SOON, "all daemons to end")


# Races -------------------------------------------------------------------------------------------


def test_however_many_start_at_once_one_serves(mount: Mount, host: Host) -> None:
    """Each that serves has the one lock of the run directory; the others end, whoever was killed before."""
    command = [sys.executable, "-P", "-m", "lockfs.lockd", "--run-dir", str(host.run_dir), "--idle-exit", "60"]
    with Actor() as holder:
        holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        for _ in range(3):
            gone = kill_lockd(host)
            rivals = [subprocess.Popen(command, env=host.environment, stderr=subprocess.DEVNULL) for _ in range(4)]
            comes_back(host, gone)
            wait_until(lambda rivals=rivals: sum(each.poll() is None for each in rivals) <= 1, 30, "all but one to end")
            wait_until(lambda: len(host.processes("lockfs.lockd")) == 1, 30, "one lockd to be left")
            assert {each.wait() for each in rivals if each.poll() is not None} <= {2}
            survivor = [each for each in rivals if each.poll() is None]
            assert len(host.locks()) == 1
            for each in survivor:
                os.kill(each.pid, signal.SIGKILL)
                each.wait()
                wait_until(lambda: host.processes("lockfs.lockd"), SOON, "another one")
