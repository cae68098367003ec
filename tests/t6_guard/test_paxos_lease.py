"""Leases under a real mount: who gets what on two hosts, what a killed lockd and storage that hangs lead to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount
from harness.waiting import wait_until

TAKEOVER = 8.0
LATER = 20.0
OPTIONS = f"backend=paxos-lease,takeover={TAKEOVER:g},wait=0.2"


@pytest.fixture
def a(host: Host, storage: Path, tmp_path: Path) -> Mount:
    return host.mount(storage, tmp_path / "a", OPTIONS)


@pytest.fixture
def b(host_b: Host, storage: Path, tmp_path: Path) -> Mount:
    return host_b.mount(storage, tmp_path / "b", OPTIONS)


def test_an_image_has_one_writer_on_all_hosts(a: Mount, b: Mount, storage: Path) -> None:
    (storage / "img").write_text("content")
    with Actor() as one, Actor() as other:
        fd = one.call("open", a / "img", os.O_RDWR)
        for call in (("open", os.O_WRONLY), ("open", os.O_RDWR | os.O_TRUNC), ("truncate", 0), ("unlink",)):
            assert other.result(call[0], b / "img", *call[1:]) == "EBUSY"
        assert other.call("cat", b / "img") == "content"
        one.call("write", fd, "written", 0)
        said = json.loads(other.call("getxattr", b / "img", "user.lockfs.holder"))
        assert said["holders"][0]["host"] == "host-a"
        one.call("close", fd)
        assert other.result("open", b / "img", os.O_RDWR) == "ok"
        assert one.result("open", a / "img", os.O_RDWR) == "EBUSY"
    assert ".lockfs" not in os.listdir(a)


def test_a_holder_that_is_killed_leaves_nothing_locked(a: Mount, b: Mount, storage: Path) -> None:
    (storage / "img").write_text("content")
    with Actor() as other:
        with Actor() as one:
            one.call("open", a / "img", os.O_RDWR)
        wait_until(lambda: other.result("open", b / "img", os.O_RDWR) == "ok", LATER, "the image is free")


def test_a_host_that_dies_is_succeeded_in_time(host: Host, a: Mount, b: Mount, storage: Path, expect_log) -> None:
    expect_log("lockd is gone|still joining", optional=True)
    (storage / "img").write_text("content")
    with Actor() as other:
        with Actor() as one:
            one.call("open", a / "img", os.O_RDWR)
            # All that the host is, at once: nobody gives anything back.
            lockd = host.lockd()
            os.kill(lockd, signal.SIGSTOP)
        os.kill(lockd, signal.SIGKILL)
        assert other.result("open", b / "img", os.O_RDWR) == "EBUSY"
        wait_until(lambda: other.result("open", b / "img", os.O_RDWR) == "ok", TAKEOVER + LATER, "a takeover")


def test_a_lockd_that_is_killed_costs_nobody_anything(
    host: Host, a: Mount, b: Mount, storage: Path, expect_log
) -> None:
    """Its successor takes host id, generation and leases up before they run out."""
    expect_log("lockd is gone|still joining", optional=True)
    (storage / "img").write_text("content")
    (storage / "other").write_text("content")
    with Actor() as one, Actor() as other:
        fd = one.call("open", a / "img", os.O_RDWR)
        os.kill(host.lockd(), signal.SIGKILL)
        until = time.monotonic() + TAKEOVER + 2
        while time.monotonic() < until:
            assert other.result("open", b / "img", os.O_RDWR) == "EBUSY"
            assert one.result("write", fd, "written", 0) == "ok"
        assert one.result("open", a / "other", os.O_RDWR) == "ok"
        one.call("close", fd)
        wait_until(lambda: other.result("open", b / "img", os.O_RDWR) == "ok", LATER, "the image is free")
    assert "was told lost" not in host.log()


def test_what_a_host_holds_is_fenced_when_its_record_is_not_its_own_any_more(
    a: Mount, host: Host, storage: Path, expect_log
) -> None:
    expect_log("this host's record was overwritten")
    expect_log("lost the lock o[nf]")
    expect_log("fenced .*: its handles fail")
    expect_log("cannot join the lockspace|the record of host id 1 is damaged", optional=True)
    (storage / "img").write_text("content")
    with Actor() as one:
        fd = one.call("open", a / "img", os.O_RDWR)
        one.call("write", fd, "written", 0)
        lockspace = storage / ".lockfs" / "leases" / "lockspace"
        # Its record is not its own any more: as if another host had taken its host id.
        data = bytearray(lockspace.read_bytes())
        data[40] ^= 0xFF
        lockspace.write_bytes(data)
        wait_until(lambda: one.result("write", fd, "more", 0) != "ok", LATER, "the fence")
        assert one.result("write", fd, "more", 0) == "EIO"


def test_a_damaged_lease_keeps_everybody_from_its_image_and_from_no_other(
    a: Mount, host: Host, storage: Path
) -> None:
    (storage / "img").write_text("content")
    (storage / "other").write_text("content")
    lease = storage / ".lockfs" / "leases" / f"i-{(storage / 'img').stat().st_ino:x}.lease"
    with Actor() as one:
        one.call("close", one.call("open", a / "img", os.O_RDWR))
        wait_until(lambda: not host.locks(), LATER, "the release, which comes after the close")
        with lease.open("r+b") as file:
            file.seek(48)
            file.write(b"\xff")
        assert one.result("open", a / "img", os.O_RDWR) == "ENOLCK"
        assert one.result("open", a / "img", os.O_RDONLY) == "ok"
        assert one.result("open", a / "other", os.O_RDWR) == "ok"
    refusal = f"refused: {a / 'img'} for host host-a, process {one.pid}"
    (line,) = [line for line in host.log().splitlines() if refusal in line]
    assert f"the lease {lease} is damaged: at byte 0 of the area" in line
    done = host.run("lockfs", "lease", "check", lease.parent)
    assert done.returncode == 2
    assert f"{lease}: error: leader: " in done.stdout


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Callable[[bool], None]]:
    """A filesystem of its own at ``disk``, that can be made to hang: what writes to it waits."""
    image, disk = tmp_path / "disk.img", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    state = {"frozen": False}

    def freeze(yes: bool) -> None:
        if state["frozen"] != yes:
            subprocess.run(["fsfreeze", "--freeze" if yes else "--unfreeze", disk], check=True)
            state["frozen"] = yes

    yield freeze
    freeze(False)
    wait_until(lambda: subprocess.run(["umount", disk], check=False).returncode == 0, LATER, "the unmount")


def see_fenced_in_time(
    host: Host, tmp_path: Path, frozen: Callable[[bool], None], befall: Callable[[], None] = lambda: None
) -> None:
    """A writer's storage hangs, and what *befall* does happens too: no byte of it lands that is written afterwards."""
    mount = host.mount(tmp_path / "disk", tmp_path / "mnt", OPTIONS)
    with Actor() as one:
        fd = one.call("open", mount / "img", os.O_RDWR | os.O_CREAT)
        one.call("write", fd, "before", 0)
        frozen(True)
        begin = time.monotonic()
        befall()
        wait_until(lambda: "its handles fail" in host.log(), TAKEOVER / 2 + LATER, "the fence")
        assert time.monotonic() - begin < TAKEOVER * 3 / 4, "others could have it by now"
        assert one.result("write", fd, "after", 0) == "EIO"
        frozen(False)
        assert one.result("write", fd, "after", 0) == "EIO"
        one.result("close", fd)
        wait_until(lambda: one.result("open", mount / "img", os.O_RDWR) == "ok", TAKEOVER + LATER, "a new lease")
    assert (tmp_path / "disk" / "img").read_text() == "before"
    mount.umount()


def test_what_a_host_holds_on_storage_that_hangs_is_fenced_in_time(
    frozen: Callable[[bool], None], make_host: Callable[..., Host], tmp_path: Path, expect_log
) -> None:
    for record in ("could not be renewed", "is to be fenced", "lost the lock o[nf]", "fenced .*: its handles fail"):
        expect_log(record)
    expect_log("cannot join|is slow|has not answered|could not be given back", optional=True)
    see_fenced_in_time(make_host("host-a"), tmp_path, frozen)


def test_a_lockd_that_is_killed_while_the_storage_hangs_is_succeeded_by_one_that_fences_in_time(
    frozen: Callable[[bool], None], make_host: Callable[..., Host], tmp_path: Path, expect_log
) -> None:
    """It cannot even look whether the lockspace is there; but it knows from its predecessor until when all is safe."""
    for record in ("does not let us look", "has run out", "lost the lock o[nf]", "fenced .*: its handles fail"):
        expect_log(record)
    expect_log("lockd is gone|cannot join|still joining|is slow|has not answered|not renewed|fenced|not be", optional=True)
    host = make_host("host-a")
    see_fenced_in_time(host, tmp_path, frozen, lambda: os.kill(host.lockd(), signal.SIGKILL))
