"""The libvirt hook, called as libvirt calls it, on two hosts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from harness.actor import Actor
from harness.host import Host, Mount

HOOK = Path(__file__).parents[2] / "mount-helpers" / "libvirt" / "qemu"
DOMAIN = """<domain type='qemu'><name>guest</name><devices>
  <disk type='file' device='disk'><source file='{disk}'/><target dev='vda'/>{more}</disk>
  <disk type='block' device='disk'><source dev='/dev/null'/></disk>
  <disk type='file' device='cdrom'><readonly/></disk>
</devices></domain>"""


@pytest.fixture
def mounts(host: Host, host_b: Host, storage: Path, tmp_path: Path) -> tuple[Mount, Mount]:
    (storage / "disk").touch()
    return host.mount(storage, tmp_path / "a"), host_b.mount(storage, tmp_path / "b")


def call(mount: Mount, operation: str, phase: str, more: str = "", name: str = "guest") -> tuple[int, str]:
    done = subprocess.run(
        [HOOK, name, operation, phase, "-"], input=DOMAIN.format(disk=mount / "disk", more=more),
        env={**mount.host.environment, "LOCKFS_HOOK_WAIT": "0.2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_free_disk_may_be_used(mounts: tuple[Mount, Mount]) -> None:
    assert call(mounts[0], "prepare", "begin") == (0, "")


def test_a_held_disk_is_refused_with_its_holder(mounts: tuple[Mount, Mount]) -> None:
    a, b = mounts
    with Actor() as actor:
        actor.call("open", a / "disk", os.O_RDWR)
        for mount in mounts:
            code, said = call(mount, "prepare", "begin")
            assert code == 1
            assert f"{mount / 'disk'} is held by process" in said
            assert f"on host {a.host.name}" in said
        assert call(b, "prepare", "begin", "<readonly/>")[0] == 0
        assert call(b, "prepare", "begin", "<shareable/>")[0] == 0
        assert call(b, "start", "begin")[0] == 0
    assert call(b, "prepare", "begin") == (0, "")


def test_a_machine_that_migrates_here_is_let_through_once(mounts: tuple[Mount, Mount]) -> None:
    a, b = mounts
    with Actor() as actor:
        actor.call("open", a / "disk", os.O_RDWR)
        assert call(b, "migrate", "begin") == (0, "")
        assert call(b, "prepare", "begin", name="other/one")[0] == 1
        assert call(b, "prepare", "begin") == (0, "")
        assert call(b, "prepare", "begin")[0] == 1
        assert call(b, "migrate", "begin") == (0, "")
        assert call(b, "release", "end") == (0, "")
        assert call(b, "prepare", "begin")[0] == 1


def test_disks_elsewhere_are_not_its_business(host: Host, tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    assert call(Mount(host, tmp_path, tmp_path), "prepare", "begin") == (0, "")
