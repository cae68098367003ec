"""lockd and the mount daemon die at once: the vault has what both had, and nobody notices.  Nor if the vault dies alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import processes
from harness.actor import Actor, Refused
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_survival.successors import PATIENCE, told, wait_for_restart

from lockfs import steps
from lockfs.protocol import start

AT = (*steps.REVIVAL, *steps.VAULT)
USE = """
def use():
    os.pwrite(held, b'new', 0)
    return os.pread(held, 3, 0) == b'new' and os.pread(nameless, 9, 0) == b'x' and os.stat(top).st_nlink > 0
"""

pytestmark = pytest.mark.usefixtures("succession")


@dataclass
class Scene:
    """A mount and the same storage on another host; a program with two files open, one of them without a name."""

    host: Host
    mount: Mount
    other: Mount
    program: Puppet
    asker: Actor
    steps: Path

    def kill(self, *pids: int, how: signal.Signals = signal.SIGKILL) -> None:
        for pid in pids:
            os.kill(pid, how)

    def both(self) -> tuple[int, int]:
        return self.host.lockd(), self.mount.daemon()

    def opens(self, mount: Mount, name: str = "held") -> str:
        """Say how an open for writing ends; what is granted is closed again."""
        try:
            fd = self.asker.call("open", mount / name, os.O_RDWR)
        except Refused as refused:
            return refused.name
        self.asker.call("close", fd)
        return "ok"

    def goes_on(self) -> bool:
        assert self.program.tell("use()")
        assert [self.opens(each) for each in (self.other, self.mount)] == ["EBUSY", "EBUSY"]
        return True


@pytest.fixture
def options() -> str:
    return "data=gated"


@pytest.fixture
def scene(make_host: Callable[..., Host], storage: Path, tmp_path: Path, options: str) -> Iterator[Scene]:
    (tmp_path / "steps").mkdir()
    (storage / "held").write_bytes(bytes(100))
    host = make_host("host-a", LOCKFS_STEPS=str(tmp_path / "steps"), LOCKFS_RESTARTS="1000000", LOCKFS_HANG="1")
    where = options.format(tmp_path)
    mount = host.mount(storage, tmp_path / "mnt", f"{where},wait=0.3")
    backend = ",".join(each for each in where.split(",") if not each.startswith("data="))
    other = make_host("host-b").mount(storage, tmp_path / "other", f"wait=0{',' if backend else ''}{backend}")
    with Puppet() as program, Actor() as asker:
        program.tell(f"top = {str(mount.path)!r}")
        program.tell(USE)
        program.tell("held = os.open(top + '/held', os.O_RDWR)")
        program.tell("nameless = os.open(top + '/gone', os.O_RDWR | os.O_CREAT)")
        program.tell("os.write(nameless, b'x'); os.unlink(top + '/gone')")
        made = Scene(host, mount, other, program, asker, tmp_path / "steps")
        yield made
        program.tell("os.close(held)")
        program.tell("os.close(nameless)")
        for each in (other, mount):
            wait_until(lambda each=each: made.opens(each) == "ok", PATIENCE, "the image to be free")
        mount.umount()
    wait_until(lambda: not host.processes(), PATIENCE, "all daemons to end")
    assert not (host.run_dir / "lockd.state").exists()


@pytest.fixture(autouse=True)
def deaths(expect_log: Expected) -> None:
    for each in ("lockd is gone", "lockd is not running", "lockd closed", "did not come up", "the mount daemon failed", "lockd knows no mount", "the vault has ended", "the vault cannot hand out"):
        expect_log(each, optional=True)


@pytest.mark.parametrize("options", ["data=gated", "data=passthrough", "data=gated,lockspace={0}/space", "data=passthrough,backend=paxos-lease"])
def test_both_die(scene: Scene, tmp_path: Path) -> None:
    scene.kill(*scene.both())
    assert scene.goes_on()
    (scene.mount.source / "free").touch()
    assert scene.opens(scene.mount, "free") == "ok"
    wait_until(lambda: scene.opens(scene.other, "free") == "ok", PATIENCE, "what was closed to be free")


@pytest.fixture(autouse=True)
def lockspace(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()


def test_each_dies_at_its_steps_while_they_come_back(scene: Scene) -> None:
    for step in AT:
        (scene.steps / step).touch()
        if step.endswith("-answer"):  # then the vault has died as well: while a mount daemon lives that harms nobody
            scene.kill(scene.host.lockd())
            wait_until(lambda step=step: not (scene.steps / step).exists(), PATIENCE, step)
        elif step.startswith("vault."):
            os.kill(scene.mount.daemon(), signal.SIGSTOP)
            scene.kill(scene.host.lockd())
            wait_until(lambda step=step: not (scene.steps / step).exists(), PATIENCE, step)
            os.kill(scene.mount.daemon(), signal.SIGCONT)
        else:
            scene.kill(*scene.both())
        assert scene.goes_on(), step
        assert not (scene.steps / step).exists(), f"nobody came to {step}"


def test_the_vault_dies_and_is_filled_anew(scene: Scene, expect_log: Expected) -> None:
    for _ in range(2):
        vault = scene.host.vault()
        kept = len(processes.descriptors(vault))
        scene.kill(vault)
        processes.wait_until_gone([vault], PATIENCE)
        wait_until(lambda: scene.host.processes("lockfs.vault"), PATIENCE, "another vault")
        wait_until(lambda kept=kept: len(processes.descriptors(scene.host.vault())) >= kept, PATIENCE, "it to be filled")
        scene.kill(*scene.both())
        assert scene.goes_on()


def test_a_vault_that_is_stopped_is_replaced(scene: Scene, expect_log: Expected) -> None:
    expect_log("the vault has not answered for 1 s: it is killed")
    vault = scene.host.vault()
    scene.kill(vault, how=signal.SIGSTOP)
    assert processes.wait_until_gone([vault], PATIENCE) == []
    wait_until(lambda: scene.host.processes("lockfs.vault"), PATIENCE, "another vault")
    assert scene.goes_on()


@pytest.mark.parametrize("stopped", ["lockd", "mount daemon"])
def test_one_is_killed_and_the_other_stopped(scene: Scene, stopped: str, expect_log: Expected) -> None:
    expect_log("has not answered for|has not come back for")
    lockd, daemon = scene.both()
    scene.kill(lockd, how=signal.SIGSTOP if stopped == "lockd" else signal.SIGKILL)
    scene.kill(daemon, how=signal.SIGKILL if stopped == "lockd" else signal.SIGSTOP)
    assert scene.goes_on()
    assert not processes.running(lockd) and not processes.running(daemon)


def test_who_is_stopped_while_it_starts_lockd_does_not_keep_others_from_it(scene: Scene) -> None:
    code = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(99)"
    command = [sys.executable, "-S", "-E", "-c", code, scene.host.run_dir / start.START_LOCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == "\n"
        starter.send_signal(signal.SIGSTOP)
        scene.kill(*scene.both())
        assert scene.goes_on()
        assert starter.wait(PATIENCE) == -signal.SIGKILL


def test_what_is_closed_while_lockd_is_dead_is_free(scene: Scene) -> None:
    """Also for who is alone with it: a copy of what its lock lived in is in the vault."""
    for turn in range(2):
        names = [f"free{turn}-{number}" for number in range(4)]
        scene.program.tell(f"fds = [os.open(f'{{top}}/{{name}}', os.O_RDWR | os.O_CREAT) for name in {names}]")
        scene.kill(scene.host.lockd())
        scene.program.tell("for fd in fds: os.close(fd)")
        for name in names:
            assert scene.opens(scene.mount, name) == "ok"
        for name in names:
            wait_until(lambda name=name: scene.opens(scene.other, name) == "ok", PATIENCE, "what was closed to be free")


def test_it_is_unmounted_while_both_are_dead(scene: Scene, tmp_path: Path) -> None:
    again = scene.host.mount(scene.mount.source, tmp_path / "again", "data=gated")
    scene.kill(again.daemon(), *scene.both())
    subprocess.run(["umount", "--lazy", again.path], check=True)
    scene.host.mounts.remove(again)
    assert scene.goes_on()
    wait_for_restart(scene.mount, 0)
    wait_until(lambda: not told(again), PATIENCE, "it to be gone")
    assert scene.goes_on()


def test_it_ends_with_the_last_mount(host: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "mnt")
    os.kill(host.lockd(), signal.SIGKILL)
    mount.umount()
    wait_until(lambda: not host.processes(), PATIENCE, "all daemons to end")


def test_told_to_end_together_with_lockd_it_starts_no_other_one(
    host: Host, storage: Path, tmp_path: Path
) -> None:
    mount = host.mount(storage, tmp_path / "mnt")
    pids = [host.vault(), *host.processes("lockfs.fs"), host.lockd()]
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert processes.wait_until_gone(pids, PATIENCE) == []
    host.mounts.remove(mount)
    assert host.processes() == []
