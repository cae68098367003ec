"""Without lockd nothing is granted, and everything else goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from harness import processes
from harness.actor import Actor
from harness.host import Host, Mount

GONE = "lockd is gone: images of .* cannot be opened for writing"


def kill_lockd(host: Host) -> None:
    pid = host.lockd()
    os.kill(pid, signal.SIGKILL)
    assert not processes.wait_until_gone([pid], 10)
    deadline = time.monotonic() + 10
    while "lockd is gone" not in host.log():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_opens_for_writing_get_enolck_and_reads_go_on(
    mount: Mount, host: Host, host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    expect_log(GONE)
    other = host_b.mount(storage, tmp_path / "b", "wait=0.3")
    for name in ("held", "free"):
        (storage / name).write_text("content")
    with Actor() as holder, Actor() as asker:
        fd = holder.call("open", mount / "held", os.O_RDWR)
        kill_lockd(host)
        for call in (("open", os.O_WRONLY), ("open", os.O_RDWR | os.O_TRUNC), ("truncate", 0), ("unlink",), ("chmod", 0o600)):
            assert asker.result(call[0], mount / "free", *call[1:]) == "ENOLCK"
        assert asker.result("rename", mount / "free", mount / "elsewhere") == "ENOLCK"
        assert asker.call("cat", mount / "free") == asker.call("cat", mount / "held") == "content"
        assert asker.result("stat", mount / "free") == "ok"
        assert json.loads(asker.call("getxattr", mount / "free", "user.lockfs.holder"))["state"] == "unknown"
        # What was granted is locked on: the lock lives in a descriptor that the mount daemon holds too.
        holder.call("write", fd, "written", 0)
        assert asker.result("open", other / "held", os.O_WRONLY) == "EBUSY"
        holder.call("close", fd)
        assert asker.result("open", other / "held", os.O_WRONLY) == "ok"
    assert host.log().count("lockd is gone") == 1
    assert (storage / "free").read_text() == "content"


def test_mounting_again_brings_it_back(mount: Mount, host: Host, storage: Path, tmp_path: Path, expect_log) -> None:
    expect_log(GONE)
    kill_lockd(host)
    mount.umount()
    again = host.mount(storage, tmp_path / "mnt")
    with Actor() as writer:
        assert writer.result("open", again / "new", os.O_WRONLY | os.O_CREAT) == "ok"


def test_a_mount_daemon_that_is_killed_frees_its_images(
    make_host: Callable[..., Host], host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    """Nothing can write through a daemon that is dead: where all data goes through it, its images are free at once."""
    host = make_host("host-a", LOCKFS_RESTARTS="0")
    expect_log("the daemon of .* is dead", optional=True)
    a = host.mount(storage, tmp_path / "a", "wait=0.3,data=gated")
    b = host_b.mount(storage, tmp_path / "b", "wait=0.3")
    (storage / "image").touch()
    with Actor() as holder, Actor() as other:
        fd = holder.call("open", a / "image", os.O_RDWR)
        assert other.result("open", b / "image", os.O_RDWR) == "EBUSY"
        os.kill(a.daemon(), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while other.result("open", b / "image", os.O_RDWR) == "EBUSY":
            assert time.monotonic() < deadline
        assert holder.result("write", fd, "x", 0) in ("ENOTCONN", "ECONNABORTED", "EIO")
        assert host.locks() == []
    assert (storage / "image").read_text() == ""


def test_what_can_still_be_written_stays_locked_when_the_mount_daemon_is_killed(
    make_host: Callable[..., Host], host_b: Host, storage: Path, tmp_path: Path, expect_log
) -> None:
    """Past the daemon, writing goes on without it; so does the lock, until the last handle is closed."""
    host = make_host("host-a", LOCKFS_RESTARTS="0")
    expect_log("the daemon of .* is dead", optional=True)
    a = host.mount(storage, tmp_path / "a", "wait=0.3,data=passthrough")
    b = host_b.mount(storage, tmp_path / "b", "wait=0.3")
    (storage / "image").touch()
    with Actor() as holder, Actor() as other:
        fd = holder.call("open", a / "image", os.O_RDWR)
        os.kill(a.daemon(), signal.SIGKILL)
        for number in range(5):
            assert other.result("open", b / "image", os.O_RDWR) == "EBUSY"
            holder.call("write", fd, str(number), 0)
            time.sleep(0.3)
        holder.result("close", fd)
        deadline = time.monotonic() + 10
        while other.result("open", b / "image", os.O_RDWR) == "EBUSY":
            assert time.monotonic() < deadline
    assert (storage / "image").read_text() == "4"
