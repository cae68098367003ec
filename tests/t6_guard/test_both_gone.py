"""Both daemons and the vault killed at once: what is open past them is written on, and nobody else gets it."""

from __future__ import annotations

import os
import signal
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
from t6_guard.ways import HELPERS

from lockfs.lockd.orphans import FIRST_PAUSE

SOON = 10.0
IDLE_EXIT = 0.3


def kill_everything(mount: Mount) -> None:
    """As ``kill -9`` of all that belongs to a host; then unmount what is left."""
    mount.host.kill()
    assert mounts.umount(mount.path, lazy=True) == ""
    mount.host.mounts.remove(mount)


@contextmanager
def writer(mount: Mount, opening: str = "fd = os.open(path, os.O_RDWR)") -> Iterator[Puppet]:
    with Puppet() as made:
        made.tell(HELPERS, path=str(mount / "image"))
        made.tell(opening)
        yield made


def result(image: Path, flags: int = os.O_RDWR) -> str:
    with Actor() as asker:
        return asker.result("open", image, flags)


@pytest.fixture(autouse=True)
def lonely_successor(expect_log: Expected) -> None:
    """A mount daemon that was just being started by the lockd that is killed says so, and ends."""
    expect_log("lockd is not running", optional=True)
    expect_log("lockd closed the connection|lockd is gone", optional=True)
    expect_log("the mount daemon failed", optional=True)


@pytest.fixture
def image(storage: Path) -> Path:
    path = storage / "image"
    path.write_bytes(bytes(8192))
    return path


def mounted(host: Host, storage: Path, tmp_path: Path, more: str = "") -> Mount:
    return host.mount(storage, tmp_path / "mnt", f"data=passthrough,wait=0.3{more}")


@pytest.mark.parametrize("opening", ["fd = os.open(path, os.O_RDWR)", "mapped(os.open(path, os.O_RDWR), RW, SHARED)"])
def test_who_writes_on_keeps_the_image(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, image: Path, expect_log: Expected, opening: str
) -> None:
    expect_log("can be written to without a lock, since both daemons had died, by process")
    expect_log("is locked again")
    mount = mounted(host, storage, tmp_path)
    with writer(mount, opening) as orphan:
        kill_everything(mount)
        if "fd" in opening:
            assert orphan.tell("outcome(os.pwrite, fd, b'data', 0)") == "ok"
            assert image.read_bytes()[:4] == b"data"
        again = mounted(host, storage, tmp_path)
        assert result(again / "image") == "EBUSY"
        assert result(again / "image", os.O_RDONLY) == "ok"
        assert result(again / "other", os.O_RDWR | os.O_CREAT) == "ok"
        assert f"process  {orphan.pid} " in host.run("lockfs", "who", again / "image").stdout
        # Its lock is taken for it, for all hosts.
        other = host_b.mount(storage, tmp_path / "b", "wait=0.3")
        wait_until(lambda: "is locked again" in host.log(), SOON, "the lock")
        assert result(other / "image") == "EBUSY"
        assert [owner["pid"] for each in host.locks() for owner in each["owners"]] == [orphan.pid]
        time.sleep(7 * FIRST_PAUSE)  # at least two more looks at all processes
        assert result(again / "image") == "EBUSY"
    wait_until(lambda: result(again / "image") == "ok", SOON, "the image to be free")
    wait_until(lambda: result(other / "image") == "ok", SOON, "it to be free for the other host")
    assert len(host.json("status")["mounts"]) == 1
    assert (host.run_dir / "lockd.state").read_text().count('["mount"') <= 4


def test_the_option_has_them_killed(host: Host, storage: Path, tmp_path: Path, image: Path, expect_log: Expected) -> None:
    expect_log("can be written to without a lock")
    expect_log("killed process .* left behind by the daemons")
    mount = mounted(host, storage, tmp_path, ",orphans=kill")
    with writer(mount) as orphan, writer(mount, "fd = os.open(path, os.O_RDONLY)") as reader:
        kill_everything(mount)
        again = mounted(host, storage, tmp_path)
        wait_until(lambda: result(again / "image") == "ok", SOON, "the image to be free")
        assert not processes.running(orphan.pid)
        assert processes.running(reader.pid)


def test_when_another_host_was_faster_they_are_killed(
    host: Host, host_b: Host, storage: Path, tmp_path: Path, image: Path, expect_log: Expected
) -> None:
    """Nobody could keep the other host out; from then on its writer is the one."""
    expect_log("can be written to without a lock")
    expect_log("killed process .* it can write to .*, which is held by host host-b")
    other = host_b.mount(storage, tmp_path / "b", "wait=0.3")
    mount = mounted(host, storage, tmp_path)
    with writer(mount) as orphan, Actor() as heir:
        kill_everything(mount)
        heir.call("open", other / "image", os.O_RDWR)
        again = mounted(host, storage, tmp_path)
        wait_until(lambda: not processes.running(orphan.pid), SOON, "it to be killed")
        assert result(again / "image") == "EBUSY"
        assert heir.result("stat", other / "image") == "ok"


def test_where_all_ended_with_them_all_is_free(host: Host, storage: Path, tmp_path: Path, image: Path) -> None:
    mount = mounted(host, storage, tmp_path)
    with writer(mount):
        pass
    with writer(mount, "fd = os.open(path, os.O_RDONLY)"):
        kill_everything(mount)
        again = mounted(host, storage, tmp_path)
        assert result(again / "image") == "ok"


def test_data_through_the_daemon_ends_with_it(host: Host, storage: Path, tmp_path: Path, image: Path) -> None:
    mount = host.mount(storage, tmp_path / "mnt", "data=gated,wait=0.3")
    with writer(mount) as orphan:
        kill_everything(mount)
        again = mounted(host, storage, tmp_path)
        assert result(again / "image") == "ok"
        assert orphan.tell("outcome(os.pwrite, fd, b'data', 0)") in ("ENOTCONN", "ECONNABORTED")


def test_lockd_stays_for_them_and_ends_them_when_it_is_told_to_stop(
    make_host: Callable[..., Host], host_b: Host, storage: Path, tmp_path: Path, image: Path, expect_log: Expected
) -> None:
    expect_log("can be written to without a lock")
    expect_log("is locked again")
    expect_log("killed process .* lockd stops, and nobody else keeps its lock")
    expect_log("lockd stops while", optional=True)
    host = make_host("host-c", LOCKFS_IDLE_EXIT=str(IDLE_EXIT))
    mount = mounted(host, storage, tmp_path)
    other = host_b.mount(storage, tmp_path / "b", "wait=0.3")
    with writer(mount) as orphan:
        kill_everything(mount)
        again = mounted(host, storage, tmp_path)
        wait_until(lambda: "is locked again" in host.log(), SOON, "the lock")
        again.umount()
        time.sleep(3 * IDLE_EXIT)  # it would have left by now
        assert result(other / "image") == "EBUSY"
        lockd = host.lockd()
        os.kill(lockd, signal.SIGTERM)
        assert not processes.wait_until_gone([lockd], SOON)
        wait_until(lambda: not processes.running(orphan.pid), SOON, "it to be killed")
    assert result(other / "image") == "ok"


def test_a_state_that_cannot_be_read_keeps_everybody_waiting(
    mount: Mount, host: Host, storage: Path, expect_log: Expected
) -> None:
    """A record in the middle that is damaged: the mounts are known, and say themselves what they hold."""
    expect_log("some of the state in .* cannot be read")
    with Actor() as holder, Actor() as asker:
        holder.call("open", mount / "image", os.O_RDWR | os.O_CREAT)
        os.kill(mount.daemon(), signal.SIGSTOP)
        lockd = host.lockd()
        os.kill(lockd, signal.SIGKILL)
        processes.wait_until_gone([lockd], SOON)
        path = host.run_dir / "lockd.state"
        lines = path.read_bytes().splitlines(keepends=True)
        damaged = [line.replace(b"exclusive", b"exclusivX") for line in lines]
        path.write_bytes(b"".join(damaged) + b'12345678 ["torn')
        os.kill(mount.daemon(), signal.SIGCONT)
        assert asker.result("open", mount / "image", os.O_RDWR) == "EBUSY"
        assert asker.result("open", mount / "other", os.O_RDWR | os.O_CREAT) == "ok"
