"""lockd comes when it is needed, once, and leaves when it is not."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from harness import processes
from harness.host import Host
from harness.logs import Expected
from harness.waiting import wait_until
from t4_lockd.clients import bare, client, mounted

from lockfs.errors import LockUnavailable, SystemError_, UsageError
from lockfs.linux import ofd
from lockfs.protocol import hung, start
from lockfs.protocol import messages as m
from lockfs.protocol.client import LockdClient

ENSURE = "from lockfs.protocol.start import *; ensure_lockd(run_dir())"


def lockd_process(host: Host, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "lockfs.lockd", "--run-dir", str(host.run_dir), *options]
    return subprocess.Popen(command, env=host.environment, stderr=subprocess.PIPE, text=True)


def test_twenty_that_start_at_once_start_one(host: Host) -> None:
    command = [sys.executable, "-P", "-c", ENSURE]
    environment = {**host.environment, "LOCKFS_IDLE_EXIT": "60"}
    starters = [subprocess.Popen(command, env=environment) for _ in range(20)]
    assert [each.wait(60) for each in starters] == [0] * 20
    assert len(host.processes("lockfs.lockd")) == 1
    assert host.log().count(" serves in ") == 1


def test_it_is_nobodys_child_and_keeps_nothing_open(lockd: Host) -> None:
    pid = lockd.lockd()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["PPid"]) != os.getpid()
    assert os.getsid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert "pipe:" not in str(processes.descriptors(pid))


def test_only_root_gets_at_its_socket(lockd: Host) -> None:
    info = (lockd.run_dir / start.SOCKET).stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_uid == 0


async def test_it_leaves_when_nobody_needs_it(environment: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "0.3")
    run_dir = str(environment.run_dir)
    await trio.to_thread.run_sync(start.ensure_lockd, run_dir)
    pid = environment.lockd()
    async with client(environment.run_dir):
        await trio.sleep(0.8)
        assert processes.running(pid)
    stays = await trio.to_thread.run_sync(processes.wait_until_gone, [pid], 10)
    assert not stays
    assert not (environment.run_dir / start.SOCKET).exists()
    with pytest.raises(LockUnavailable, match="lockd is not running in"):
        await LockdClient.connect(run_dir)


async def test_a_mount_keeps_it(environment: Host, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "0.1")
    await trio.to_thread.run_sync(start.ensure_lockd, str(environment.run_dir))
    async with mounted(environment.run_dir, storage) as mount:
        await trio.sleep(0.5)
        assert await mount.holders() == []


async def test_who_needs_it_while_it_leaves_gets_one(environment: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves all the time here; whoever asks to have it started is never left without."""
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "0.02")
    run_dir = str(environment.run_dir)

    async def come_and_go(number: int) -> None:
        for turn in range(6):
            made = await LockdClient.connect(run_dir, start=True)
            await made.call(m.GetStatus(), m.Status)
            await made.aclose()
            await trio.sleep((number * 13 + turn * 7) % 10 / 100)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(come_and_go, number)
    wait_until(lambda: "nobody has needed lockd" in environment.log(), 10, "it to leave")


def test_a_second_one_refuses(lockd: Host) -> None:
    with lockd_process(lockd) as second:
        _, said = second.communicate(timeout=20)
    assert second.returncode == 2
    assert f"lockd: another lockd runs in {lockd.run_dir}" in said
    assert "fuser -v" in said
    with bare(lockd.run_dir) as connection:
        connection.call("org.varlink.service.GetInfo")
        assert connection.receive()["parameters"]["product"] == "lockd"


def test_the_reason_is_handed_on_if_it_cannot_start(environment: Host) -> None:
    fd = os.open(environment.run_dir / start.LOCKD_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(SystemError_, match="lockd did not start: another lockd runs in"):
        start.ensure_lockd(str(environment.run_dir))
    os.close(fd)


def test_it_says_where_to_look_if_it_dies(environment: Host) -> None:
    (environment.run_dir / "log").touch()
    with pytest.raises(SystemError_, match=r"lockd did not start: .*FileExistsError"):
        start.ensure_lockd(str(environment.run_dir))
    (environment.run_dir / "log").unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_ends_well_and_leaves_no_socket(host: Host, number: signal.Signals) -> None:
    with lockd_process(host) as process:
        wait_until(lambda: start.is_running(str(host.run_dir)), 10, "lockd serves")
        process.send_signal(number)
        assert process.wait(10) == 0
    assert not (host.run_dir / start.SOCKET).exists()
    assert f"{number.name}: lockd stops" in host.log()


async def test_one_that_is_told_to_stop_frees_no_lock(lockd: Host, storage: Path, expect_log: Expected) -> None:
    """A VM may still write: the lock stays with the descriptors that the mount daemon has."""
    expect_log("lockd stops while 1 mounts need it")
    async with mounted(lockd.run_dir, storage) as mount:
        fd = os.open(mount.source / "img", os.O_RDWR | os.O_CREAT)
        image = mount.image()
        call = m.Acquire(mount.registered.mount_id, image, "exclusive", m.Owner("x"))
        await mount.client.call(call, m.Acquired, [fd])
        pid = lockd.lockd()
        os.kill(pid, signal.SIGTERM)
        with trio.fail_after(10):
            await mount.client.lost()
        assert not await trio.to_thread.run_sync(processes.wait_until_gone, [pid], 10)
        with pytest.raises(LockUnavailable, match="lockd"):
            await mount.holders()
        with (mount.source / "img").open("r+b") as other:
            assert ofd.test(other.fileno(), exclusive=True, start=0, length=1) is not None
            os.close(fd)
            # A process counts as gone a little before its last thread has closed its files.
            wait_until(
                lambda: ofd.test(other.fileno(), exclusive=True, start=0, length=1) is None, 2, "it is free"
            )


def test_a_killed_one_leaves_nothing_in_the_way_of_the_next(lockd: Host) -> None:
    first = lockd.lockd()
    processes.end([first], signal.SIGKILL, 10)
    assert (lockd.run_dir / start.SOCKET).exists()
    start.ensure_lockd(str(lockd.run_dir))
    assert lockd.lockd() != first


# The run directory -------------------------------------------------------------------------------


def test_the_run_directory_is_made_for_root_alone(tmp_path: Path) -> None:
    start.prepare_run_dir(str(tmp_path / "a" / "b"))
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_run_directory_that_others_own_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(SystemError_, match="belongs to user 65534, not to 0"):
        start.ensure_lockd(str(tmp_path))


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o1777])
def test_a_run_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(SystemError_, match=f"others may write to .*mode {mode:04o}") as caught:
        start.ensure_lockd(str(tmp_path))
    assert "chmod 0700" in caught.value.hint


def test_a_run_directory_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemError_, match="is not a directory"):
        start.ensure_lockd(str(tmp_path / "file"))
    with pytest.raises(SystemError_, match="cannot make the run directory"):
        start.ensure_lockd(str(tmp_path / "file" / "below"))


def test_a_run_directory_may_have_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address of a Unix socket holds 107 bytes."""
    deep = tmp_path / ("x" * 120) / ("y" * 120)
    monkeypatch.setenv("LOCKFS_LOG", "file")
    monkeypatch.setenv("LOCKFS_RUN_DIR", str(deep))
    start.ensure_lockd(start.run_dir())
    assert start.is_running(str(deep))
    host = Host("deep", deep)
    (lockd,) = host.processes("lockfs.lockd")
    assert processes.end([lockd], signal.SIGTERM, 10) == []


def test_a_wrong_time_is_not_taken(environment: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "soon")
    with pytest.raises(UsageError, match="LOCKFS_IDLE_EXIT=soon: must be a number of seconds"):
        start.ensure_lockd(str(environment.run_dir))


def test_one_that_is_stopped_is_found_by_its_lock(lockd: Host) -> None:
    pid = lockd.lockd()
    os.kill(pid, signal.SIGSTOP)
    assert hung.end(str(lockd.run_dir)) == pid
    assert not processes.wait_until_gone([pid], 10)
    assert hung.end(str(lockd.run_dir)) == 0


def test_who_only_looks_at_the_lock_is_no_lockd(host: Host) -> None:
    host.run_dir.joinpath(start.LOCKD_LOCK).touch()
    with host.run_dir.joinpath(start.LOCKD_LOCK).open(), host.run_dir.joinpath("start.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert hung.end(str(host.run_dir)) == 0


async def test_one_that_was_stopped_while_it_started_is_ended(environment: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its seat, and does not listen: nobody else could start."""
    monkeypatch.setattr(start, "START_TIMEOUT", 1.0)
    monkeypatch.setenv("LOCKFS_IDLE_EXIT", "60")
    lock = environment.run_dir / start.LOCKD_LOCK
    program = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", program, lock], stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout is not None
        stopped.stdout.readline()
        stopped.send_signal(signal.SIGSTOP)
        with pytest.raises(SystemError_, match="lockd was not ready"):
            await LockdClient.connect(str(environment.run_dir), start=True)
        assert stopped.wait(20) == -signal.SIGKILL
    with trio.fail_after(20):
        while True:
            try:
                made = await LockdClient.connect(str(environment.run_dir), start=True)
                break
            except (LockUnavailable, SystemError_):
                await trio.sleep(0.1)
    await made.aclose()
