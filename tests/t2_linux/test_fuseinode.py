"""Inodes of a FUSE mount by their node id, on a real mount."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from t2_linux.kernel_fs.mounted import MiniMount, serving

from lockfs.linux import fuseinode, tree


@pytest.fixture
def mini(storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    (storage / "f").write_bytes(bytes(8192))
    with serving(storage, tmp_path / "mnt") as served:
        yield served


@pytest.fixture
def root(mini: MiniMount) -> Iterator[int]:
    fd = tree.clone(os.fsencode(mini.path))
    yield fd
    os.close(fd)


def node(mini: MiniMount) -> int:
    return os.stat(mini.source / "f").st_ino  # of which minifs makes its node ids


def test_what_the_kernel_knows(mini: MiniMount, root: int) -> None:
    fd = os.open(mini.path / "f", os.O_RDWR)
    assert fuseinode.is_known(root, node(mini))
    assert not fuseinode.is_known(root, node(mini) + 12345)
    assert not fuseinode.is_known(root, (1 << 63) + 5)
    os.close(fd)


def test_without_a_changed_type_nothing_is_fenced(mini: MiniMount, root: int) -> None:
    fd = os.open(mini.path / "f", os.O_RDWR)
    assert not fuseinode.fence(root, node(mini))
    assert os.pwrite(fd, b"x", 0) == 1
    before = os.fstat(fd)
    # Nor is such an inode drained, which would change its owner if it were not for the fence.
    assert not fuseinode.drain(root, node(mini))
    after = os.fstat(fd)
    assert (before.st_ctime_ns, before.st_uid) == (after.st_ctime_ns, after.st_uid)
    os.close(fd)


def test_what_the_kernel_does_not_know_needs_no_fence(mini: MiniMount, root: int) -> None:
    assert fuseinode.fence(root, node(mini) + 12345)
    assert fuseinode.drain(root, node(mini) + 12345)


def test_whether_it_is_bad_is_asked_of_the_kernel_alone(mini: MiniMount, root: int) -> None:
    fd = os.open(mini.path / "f", os.O_RDWR)
    assert mini.daemon is not None
    mini.daemon.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        handle = fuseinode.open_node(root, node(mini))
        assert handle is not None
        assert not fuseinode.is_bad(handle)
        assert time.monotonic() - begin < 1
        asks = threading.Thread(target=fuseinode.refresh, args=(handle,))
        asks.start()
        asks.join(0.2)
        assert asks.is_alive()  # that one does wait for the daemon
    finally:
        mini.daemon.send_signal(signal.SIGCONT)
    asks.join(10)
    os.close(handle)
    os.close(fd)


def test_a_descriptor_that_is_no_root(mini: MiniMount, storage: Path) -> None:
    path_only = os.open(mini.path, os.O_PATH)
    with pytest.raises(OSError) as caught:
        fuseinode.open_node(path_only, 1)
    assert caught.value.errno == errno.EBADF
    os.close(path_only)
