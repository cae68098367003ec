"""When a filesystem is mounted nowhere any more."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import mounts
from harness.waiting import wait_until
from t2_linux.puppet import Puppet

from lockfs.linux.unmounting import MountChanges, is_mounted, is_mounted_here


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mnt"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    yield path
    while mounts.is_mounted(path):
        mounts.umount(path, lazy=True)


@pytest.fixture
def changes() -> Iterator[MountChanges]:
    changes = MountChanges()
    yield changes
    changes.close()


def readable(changes: MountChanges, seconds: float = 0.0) -> bool:
    return bool(select.select([changes.fileno()], [], [], seconds)[0])


def test_it_is_told_once_for_each_change(mounted: Path, changes: MountChanges) -> None:
    assert readable(changes)  # whatever was before
    changes.clear()
    # Others may mount and unmount here, too: so only what must be there is looked for.
    mounts.umount(mounted)
    assert readable(changes, 5)
    changes.clear()
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    assert readable(changes, 5)


def test_a_change_while_nobody_looks_is_not_lost(mounted: Path, changes: MountChanges) -> None:
    changes.clear()
    mounts.umount(mounted)
    assert readable(changes, 5)
    assert readable(changes, 5)  # a look takes nothing away


def test_here_and_elsewhere(mounted: Path) -> None:
    dev = os.stat(mounted).st_dev
    assert is_mounted_here(dev)
    assert is_mounted(dev)
    with Puppet("unshare", "--mount", "--propagation", "private"):
        mounts.umount(mounted)
        assert not is_mounted_here(dev)
        assert is_mounted(dev)
    wait_until(lambda: not is_mounted(dev), 10, "the other namespace to end")


def test_a_bind_mount_is_one_too(mounted: Path, tmp_path: Path) -> None:
    dev = os.stat(mounted).st_dev
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "--bind", mounted, other], check=True)
    try:
        mounts.umount(mounted)
        assert is_mounted_here(dev)
    finally:
        mounts.umount(other)
    assert not is_mounted_here(dev)
