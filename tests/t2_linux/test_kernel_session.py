"""Sessions on real mounts: how they start, what they agree on, and how they go on when things go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from t2_linux.kernel_fs.mounted import MiniMount, attached, serving

from lockfs.kernel import wire
from lockfs.linux import tree


@pytest.fixture
def mini(storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    """A mount with passthrough."""
    with serving(storage, tmp_path / "mnt") as served:
        yield served


def test_what_this_kernel_agrees_to(mini: MiniMount) -> None:
    major, minor = mini.hello["version"]
    assert major == 7 and minor >= 40
    wanted = wire.PASSTHROUGH | wire.HANDLE_KILLPRIV_V2 | wire.DONT_MASK | wire.INIT_EXT
    assert mini.hello["granted"] & wanted == wanted
    assert mini.hello["granted"] & ~mini.hello["offered"] == 0


def test_the_limits_are_in_force(mini: MiniMount) -> None:
    control = tree.detached(b"fusectl")
    try:
        found = []
        for name in ("max_background", "congestion_threshold"):
            fd = os.open(f"{os.minor(mini.path.stat().st_dev)}/{name}", os.O_RDONLY, dir_fd=control)
            found.append(int(os.read(fd, 20)))
            os.close(fd)
    finally:
        os.close(control)
    assert found == [1000, 750]


@pytest.mark.parametrize(
    ("force", "words"), [(False, "pyfuse3 was imported before"), (True, "pyfuse3 calls libfuse directly")]
)
def test_the_wrong_order_is_noticed(storage: Path, tmp_path: Path, force: bool, words: str) -> None:
    """By `load`, and, were that not enough, when the session starts."""
    with attached(storage, tmp_path / "mnt") as mini:
        mini.start("early", force=force)
        assert words in mini.hello["error"]


def test_a_device_that_is_not_mounted(storage: Path, tmp_path: Path) -> None:
    for device, words in (("/dev/fuse", "cannot read the INIT request: Operation not permitted"), ("/dev/zero", "")):
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        mini = MiniMount(storage, tmp_path, fd)
        try:
            mini.start()
            assert "the FUSE session did not start: " + words in mini.hello["error"]
        finally:
            mini.end()
            os.close(fd)


def test_a_request_that_vanishes_does_not_stop_the_daemon(storage: Path, tmp_path: Path) -> None:
    """pyfuse3 reads with the interpreter's lock held: while a read waits for a request, nothing else runs."""
    with serving(storage, tmp_path / "mnt", lie=True) as mini:
        (storage / "f").write_bytes(b"data")
        for _ in range(3):
            (mini.path / "f").stat()
            before = mini.counts().get("ticks", 0)
            time.sleep(0.5)
            assert mini.counts().get("ticks", 0) - before > 10
        assert (mini.path / "f").read_bytes() == b"data"


def test_callers_are_killed_all_the_time(mini: MiniMount) -> None:
    (mini.source / "f").write_bytes(b"data")
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        children = [subprocess.Popen(["/bin/sh", "-c", "while :; do test -e f; done"], cwd=mini.path) for _ in range(6)]
        time.sleep(0.05)
        for child in children:
            child.kill()
        for child in children:
            child.wait(timeout=20)
    begun = time.monotonic()
    assert (mini.path / "f").read_bytes() == b"data"
    assert time.monotonic() - begun < 1


def test_prune_brings_forget_once_nobody_uses_a_file(mini: MiniMount) -> None:
    path = mini.path / "f"
    path.write_bytes(b"data")
    node = str(path.stat().st_ino).encode()
    fd = os.open(path, os.O_RDONLY)
    os.setxattr(mini.path, "user.prune", node)
    os.setxattr(mini.path, "user.prune", b"99999999")  # what is not there is no error
    assert "forget" not in mini.counts()
    os.close(fd)
    mini.wait_for("release", 2)
    os.setxattr(mini.path, "user.prune", node)
    mini.wait_for("forget", 1)


def test_invalidation_drops_cached_data(storage: Path, tmp_path: Path) -> None:
    with serving(storage, tmp_path / "mnt", plain=True) as mini:
        path = mini.path / "f"
        path.write_bytes(b"data")
        fd = os.open(path, os.O_RDONLY)
        os.pread(fd, 4, 0)
        before = mini.counts()["read"]
        os.pread(fd, 4, 0)
        assert mini.counts()["read"] == before
        os.setxattr(mini.path, "user.invalidate", str(path.stat().st_ino).encode())
        os.pread(fd, 4, 0)
        assert mini.counts()["read"] == before + 1
        os.setxattr(mini.path, "user.invalidate", b"99999999")
        assert mini.counts()["invalidated"] == 1
        os.close(fd)


def kill(mini: MiniMount) -> None:
    assert mini.daemon is not None
    mini.daemon.send_signal(signal.SIGKILL)
    mini.daemon.communicate(timeout=20)


def test_another_daemon_goes_on(storage: Path, tmp_path: Path) -> None:
    with attached(storage, tmp_path / "mnt") as mini:
        mini.start()
        first = mini.hello
        (mini.path / "f").write_bytes(b"0" * 8)  # with its close the kernel learns that it need not ask for FLUSH
        for times in range(3):
            fd = os.open(mini.path / "f", os.O_RDWR)
            # The kernel asks for security.capability before the first write to an inode; then it knows.
            os.pwrite(fd, b"-", 7)
            kill(mini)
            os.pwrite(fd, b"%d" % times, times)  # data does not notice
            assert os.pread(fd, 1, times) == b"%d" % times
            waiting = subprocess.Popen(["stat", "-c", "%s", mini.path / "f"], stdout=subprocess.PIPE)
            mini.start(resume=first["init"])
            assert waiting.communicate(timeout=20)[0] == b"8\n"
            assert os.fstat(fd).st_size == 8
            os.close(fd)
            assert mini.hello == first
        assert (storage / "f").read_bytes() == b"0120000-"


def test_what_the_dead_daemon_had_in_hand_is_sent_again(storage: Path, tmp_path: Path) -> None:
    with attached(storage, tmp_path / "mnt") as mini:
        mini.start(slow=60)
        first = mini.hello
        (mini.path / "a").write_bytes(b"data")  # with its close the kernel learns that it need not ask for FLUSH
        source, target = os.open(mini.path / "a", os.O_RDONLY), os.open(mini.path / "b", os.O_WRONLY | os.O_CREAT)
        result: list[int] = []
        caller = threading.Thread(target=lambda: result.append(os.copy_file_range(source, target, 4)), daemon=True)
        caller.start()
        mini.wait_for("copy_file_range", 1)
        kill(mini)
        assert caller.is_alive()
        mini.start(resume=first["init"])
        caller.join(20)
        assert result == [0]
        assert mini.counts()["copy_file_range"] == 1
        os.close(source)
        os.close(target)
        mini.wait_for("release", 2)
