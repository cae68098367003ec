"""Detached mounts."""

import os
from pathlib import Path

import pytest

from lockfs.linux import mount, tree


def test_a_clone_does_not_show_what_is_mounted_below(storage: Path) -> None:
    below = storage / "below"
    below.mkdir()
    (below / "underneath").touch()
    mount.mount(b"none", os.fsencode(below), "tmpfs", 0)
    try:
        (below / "on top").touch()
        fd = tree.clone(os.fsencode(storage))
        try:
            inside = os.open("below", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            assert os.listdir(inside) == ["underneath"]
            os.close(inside)
        finally:
            os.close(fd)
    finally:
        mount.umount(os.fsencode(below))


@pytest.mark.parametrize("propagation", [mount.MS_PRIVATE, 1 << 20], ids=["private", "shared"])
def test_a_clone_does_not_get_later_mounts(storage: Path, propagation: int) -> None:
    outer = os.fsencode(storage)
    mount.mount(b"none", outer, "tmpfs", 0)
    try:
        mount.mount(b"none", outer, "", propagation)
        below = storage / "below"
        below.mkdir()
        (below / "underneath").touch()
        fd = tree.clone(outer)
        try:
            mount.mount(b"none", os.fsencode(below), "tmpfs", 0)
            try:
                inside = os.open("below", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
                assert os.listdir(inside) == ["underneath"]
                os.close(inside)
            finally:
                mount.umount(os.fsencode(below))
        finally:
            os.close(fd)
    finally:
        mount.umount(outer)


def test_a_missing_directory_is_an_error(storage: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tree.clone(os.fsencode(storage / "missing"))


def test_the_control_filesystem_can_be_reached_without_a_mountpoint() -> None:
    before = Path("/proc/self/mountinfo").read_text()
    fd = tree.detached(b"fusectl")
    os.listdir(fd)
    os.close(fd)
    assert Path("/proc/self/mountinfo").read_text() == before
