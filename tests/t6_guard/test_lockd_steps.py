"""lockd killed right before and right after all that it writes down, takes over, or asks a backend for."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import lockd, processes
from harness.actor import Actor, Refused
from harness.host import Host, Mount, without_kernel_module
from harness.logs import Expected
from harness.waiting import wait_until

from lockfs.steps import ENVIRONMENT, LOCKD

SOON = 10.0


@dataclass
class Scene:
    """Two hosts with a mount of one directory; on the first, lockd dies at the steps.  `holder` has ``held`` open."""

    host: Host
    mount: Mount
    other: Mount
    steps: Path
    holder: Actor
    asker: Actor
    outsider: Actor
    tmp_path: Path

    def kill_lockd(self) -> None:
        for pid in self.host.processes("lockfs.lockd"):
            os.kill(pid, signal.SIGKILL)
            processes.wait_until_gone([pid], SOON)

    # What is done at a step.  Nothing of it may fail.

    def open_and_close(self) -> None:
        fd = self.asker.call("open", self.mount / "free", os.O_RDWR | os.O_CREAT)
        assert self.asker.result("write", fd, "x", 0) == "ok"
        self.asker.call("close", fd)
        wait_until(lambda: self.outside("free") == "ok", SOON, "what was closed to be free on the other host")

    def restart(self) -> None:
        self.kill_lockd()
        assert self.asker.result("open", self.mount / "held", os.O_RDWR) == "EBUSY"

    def mount_another(self) -> None:
        again = self.host.mount(self.mount.source, self.tmp_path / "again")
        assert self.asker.result("open", again / "held", os.O_RDWR) == "EBUSY"
        again.umount()
        wait_until(lambda: self.mounts() == 1, SOON, "one mount to be left")

    def fence(self) -> None:
        fd = self.holder.call("open", self.mount / "fenced", os.O_RDWR | os.O_CREAT)
        # An admin whose command was cut short repeats it.
        while self.host.run("lockfs", "fence", self.mount / "fenced").returncode != 0:
            pass
        assert self.holder.result("write", fd, "x", 0) == "EIO"
        self.holder.result("close", fd)

    def idle(self) -> None:
        """lockd asks the mount daemon whether it lives, and dies before it hears that it does."""
        wait_until(lambda: not list(self.steps.iterdir()), SOON, "a sign of life")

    def outside(self, name: str) -> str:
        """Say how an open by the other host ends; one that is granted is closed at once."""
        try:
            fd = self.outsider.call("open", self.other / name, os.O_RDWR)
        except Refused as refused:
            return refused.name
        self.outsider.call("close", fd)
        return "ok"

    def at(self, step: str, act: Callable[[Scene], None]) -> None:
        (self.steps / step).touch()
        act(self)
        assert not (self.steps / step).exists(), f"nobody came to {step}"
        # Whatever happened: who holds the image still does, here and for the other host.
        assert self.asker.result("open", self.mount / "held", os.O_RDWR) == "EBUSY", step
        assert self.outside("held") == "EBUSY", step
        assert self.holder.result("stat", self.mount / "held") == "ok", step
        wait_until(lambda: self.locked() == ["held"], SOON, f"the locks after {step}")

    def mounts(self) -> int:
        try:
            return len(lockd.status(self.host.run_dir)["mounts"])
        except OSError:
            return 0  # it dies just now, as it should

    def locked(self) -> list[str]:
        return [each["image"]["relative"] for each in lockd.locks(self.host.run_dir) or []]


ACTS: dict[str, Callable[[Scene], None]] = {
    **dict.fromkeys([each for each in LOCKD if "hold-record" in each or "backend" in each or "free" in each or "vault" in each], Scene.open_and_close),
    **dict.fromkeys([each for each in LOCKD if "adopt" in each or "replacement" in each], Scene.restart),
    **dict.fromkeys([each for each in LOCKD if "mount" in each or "attached" in each or "left" in each], Scene.mount_another),
    **dict.fromkeys([each for each in LOCKD if "lost" in each], Scene.fence),
    "lockd.before-obeyed": Scene.idle,
}


def test_each_step_has_a_test() -> None:
    assert set(ACTS) == set(LOCKD)
    source = subprocess.run(
        ["grep", "-rhoE", r'step\("lockd\.[a-z-]+"\)', Path(__file__).parents[2] / "lockfs"], capture_output=True, text=True, check=True
    )
    assert sorted(line[6:-2] for line in source.stdout.split()) == sorted(LOCKD)


@pytest.fixture
def scene(make_host: Callable[..., Host], storage: Path, tmp_path: Path, expect_log: Expected) -> Iterator[Scene]:
    for each in ("lost the lock o[nf]", "fenced", "another lockd runs"):
        expect_log(each, optional=True)
    steps = tmp_path / "steps"
    steps.mkdir()
    host, host_b = make_host("host-a", **{ENVIRONMENT: str(steps)}), make_host("host-b")
    mount = host.mount(storage, tmp_path / "mnt", "wait=0.3")
    other = host_b.mount(storage, tmp_path / "other", "wait=0")
    with Actor() as holder, Actor() as asker, Actor() as outsider:
        fd = holder.call("open", mount / "held", os.O_RDWR | os.O_CREAT)
        yield Scene(host, mount, other, steps, holder, asker, outsider, tmp_path)
        holder.call("close", fd)
        mount.umount()
        wait_until(lambda: not host.processes("lockfs.lockd"), SOON, "lockd to leave")
        assert not (host.run_dir / "lockd.state").exists()


IDLE = pytest.param(
    Scene.idle,
    marks=pytest.mark.skipif(
        without_kernel_module(), reason="without the kernel module a mount daemon has no successor: none asks if it lives"
    ),
)


@pytest.mark.parametrize("act", [Scene.open_and_close, Scene.restart, Scene.mount_another, Scene.fence, IDLE])
def test_death_at_each_step(scene: Scene, act: Callable[[Scene], None]) -> None:
    for step, at in ACTS.items():
        if at is act:
            scene.at(step, act)
