"""lockd dies, and then a mount daemon at each step of handing over what it holds to the next one.

The vault has all that it had, and nobody notices.  Where the vault has died, too, what lockd has been given by then lives
on.  For the rest nobody has kept the lock, and at no moment may two write: who had the image open gets errors, or, where
no error can reach it, keeps everybody else out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import mounts, processes
from harness.actor import Actor, Refused
from harness.host import Host, Mount
from harness.logs import Expected
from harness.waiting import wait_until
from t2_linux.puppet import Puppet
from t6_guard.ways import HELPERS
from t6_survival.successors import PATIENCE, wait_for_restart

from lockfs.fs.handover import AT_ONCE
from lockfs.steps import HANDOVER

BEFORE_CONNECTION = ("handover.before-attach",)
BEFORE_HOLDS = ("handover.after-attach", "handover.before-holds")
AMID_HOLDS = "handover.before-holds"
AFTER_HOLDS = ("handover.after-holds",)
WRITE = "outcome(os.pwrite, fd, b'new', 0)"
both = pytest.mark.parametrize("data", ["gated", "passthrough"])


@dataclass
class Scene:
    """A mount on a host whose daemons heed steps, the same storage on another host, and who has ``image`` open."""

    mount: Mount
    other: Mount
    writer: Puppet
    asker: Actor
    steps: Path

    def die(self, step: str, passes: int = 0, *, vault: bool = True) -> None:
        """Kill lockd and, if *vault*, the vault, and have the mount daemon die while it hands over."""
        (self.steps / step).write_text(str(passes) if passes else "")
        daemon, lockd = self.mount.daemon(), self.mount.host.lockd()
        if vault:
            os.kill(lockd, signal.SIGSTOP)  # it would start another one
            os.kill(self.mount.host.vault(), signal.SIGKILL)
        os.kill(lockd, signal.SIGKILL)
        assert not processes.wait_until_gone([lockd, daemon], PATIENCE), f"nobody came to {step}"
        assert not (self.steps / step).exists()

    def opens(self, mount: Mount, name: str = "image") -> str:
        """Say how an open for writing ends; what is granted is closed again."""
        try:
            fd = self.asker.call("open", mount / name, os.O_RDWR)
        except Refused as refused:
            return refused.name
        self.asker.call("close", fd)
        return "ok"

    def refused_everywhere(self, name: str = "image") -> bool:
        return {self.opens(each, name) for each in (self.mount, self.other)} == {"EBUSY"}


@pytest.fixture
def scene(make_host: Callable[..., Host], storage: Path, tmp_path: Path, data: str) -> Iterator[Scene]:
    (tmp_path / "steps").mkdir()
    (storage / "image").write_bytes(b"content")
    host = make_host("host-a", LOCKFS_STEPS=str(tmp_path / "steps"))
    mount = host.mount(storage, tmp_path / "mnt", f"data={data},wait=0.3")
    other = make_host("host-b").mount(storage, tmp_path / "other", "wait=0")
    with Puppet() as writer, Actor() as asker:
        writer.tell(HELPERS, top=str(mount.path))
        writer.tell("fd = os.open(top + '/image', os.O_RDWR)")
        yield Scene(mount, other, writer, asker, tmp_path / "steps")


@pytest.fixture
def lossy(expect_log: Expected) -> None:
    expect_log("nobody has the descriptor that the lock on .* was put on")
    expect_log("lost the lock o[nf] ")
    expect_log("fenced .*: its handles fail")


@both
@pytest.mark.parametrize("step", HANDOVER)
def test_what_the_vault_has_lives_on(scene: Scene, data: str, step: str) -> None:
    scene.writer.tell("nameless = os.open(top + '/nameless', os.O_RDWR | os.O_CREAT); os.write(nameless, b'x'); os.unlink(top + '/nameless')")
    scene.die(step, vault=False)
    assert scene.writer.tell(WRITE) == "ok"
    assert scene.refused_everywhere()
    assert scene.writer.tell("os.pread(fd, 99, 0) == b'newtent' and os.pread(nameless, 9, 0) == b'x' and os.close(nameless) is None")
    scene.writer.tell("os.close(fd)")
    for each in (scene.other, scene.mount):
        wait_until(lambda each=each: scene.opens(each) == "ok", PATIENCE, "the image to be free")


@both
@pytest.mark.parametrize("step", BEFORE_HOLDS)
@pytest.mark.usefixtures("succession", "lossy")
def test_before_it_has_said_what_it_holds(scene: Scene, data: str, step: str) -> None:
    """The lock was in descriptors of the two: it is gone, another host may have the image, and its writer gets errors."""
    scene.die(step)
    wait_for_restart(scene.mount, 0)
    assert scene.writer.tell(WRITE) == "EIO"
    wait_until(lambda: scene.opens(scene.other) == "ok", PATIENCE, "the image to be free for the other host")
    assert scene.opens(scene.mount) != "ok"
    assert scene.writer.tell("outcome(os.pwrite, fd, b'more', 0)") == "EIO"
    scene.writer.tell("outcome(os.close, fd)")
    wait_until(lambda: scene.opens(scene.mount) == "ok", PATIENCE, "the image to be free here")
    assert (scene.mount.source / "image").read_bytes() == b"content"
    scene.writer.tell("fd = os.open(top + '/image', os.O_RDWR)")
    assert scene.writer.tell(WRITE) == "ok"
    assert scene.refused_everywhere()


@both
@pytest.mark.usefixtures("succession", "lossy")
def test_amid_what_it_holds(scene: Scene, data: str) -> None:
    """It takes two messages to say, and dies between them: each image is either held, or its writer gets errors."""
    count = AT_ONCE + 20
    scene.writer.tell(f"fds = [os.open(f'{{top}}/{{n:03}}', os.O_RDWR | os.O_CREAT) for n in range({count})]")
    scene.die(AMID_HOLDS, passes=1)
    wait_for_restart(scene.mount, 0)
    outcomes = scene.writer.tell("[outcome(os.pwrite, fd, b'new', 0) for fd in fds]")
    assert (outcomes.count("ok"), outcomes.count("EIO")) in ((AT_ONCE, 20), (AT_ONCE - 1, 21))  # the 1 is "image"
    for number, outcome in enumerate(outcomes):
        if number % 20 == 0 or outcome == "EIO":
            assert scene.opens(scene.other, f"{number:03}") == ("EBUSY" if outcome == "ok" else "ok")
    scene.writer.tell("for fd in fds: outcome(os.close, fd)")
    wait_until(lambda: {scene.opens(scene.mount, f"{n:03}") for n in range(0, count, 20)} == {"ok"}, PATIENCE, "all to be free")


@both
@pytest.mark.parametrize("step", AFTER_HOLDS)
@pytest.mark.usefixtures("succession")
def test_when_it_has_said_what_it_holds(scene: Scene, data: str, step: str) -> None:
    """The new lockd keeps the lock, and starts a successor: nobody notices."""
    scene.die(step)
    assert scene.writer.tell(WRITE) == "ok"
    wait_for_restart(scene.mount, 0)
    assert scene.refused_everywhere()
    assert scene.writer.tell("os.pread(fd, 99, 0) == b'newtent' and os.close(fd) is None")
    for each in (scene.other, scene.mount):
        wait_until(lambda each=each: scene.opens(each) == "ok", PATIENCE, "the image to be free")


@both
@pytest.mark.parametrize("step", BEFORE_CONNECTION)
def test_before_it_has_given_its_connection(
    scene: Scene, data: str, step: str, storage: Path, tmp_path: Path, expect_log: Expected
) -> None:
    """The mount ends with the daemon.  Data that goes past it is written on: that image stays its writer's."""
    passes_by = data == "passthrough"
    if passes_by:
        expect_log("can be written to without a lock, since both daemons had died, by process")
        expect_log("is locked again")
    scene.die(step)
    assert scene.writer.tell(WRITE) in (("ok",) if passes_by else ("ENOTCONN", "ECONNABORTED"))
    host = scene.mount.host
    assert mounts.umount(scene.mount.path, lazy=True) == ""
    host.mounts.remove(scene.mount)
    scene.mount = host.mount(storage, tmp_path / "mnt", f"data={data},wait=0.3")
    if passes_by:
        wait_until(lambda: "is locked again" in host.log(), PATIENCE, "the lock")
        assert scene.refused_everywhere()
        assert scene.writer.tell(WRITE) == "ok"
    scene.writer.tell("outcome(os.close, fd)")
    for each in (scene.other, scene.mount):
        wait_until(lambda each=each: scene.opens(each) == "ok", PATIENCE, "the image to be free")
