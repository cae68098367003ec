"""The requests that pyfuse3 lacks, on real mounts, compared with the same calls on the storage."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.waiting import wait_until
from t2_linux.kernel_fs.mounted import MiniMount, attached, serving

KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@pytest.fixture
def mini(storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    """A mount with passthrough."""
    with serving(storage, tmp_path / "mnt") as served:
        yield served


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    return 0 if libc.fallocate(fd, mode, offset, length) == 0 else ctypes.get_errno()


def state(path: Path) -> tuple[int, int, bytes]:
    found = path.stat()
    return found.st_size, found.st_blocks, path.read_bytes()


@pytest.mark.parametrize(
    ("mode", "offset", "length"),
    [
        (0, 0, 3 * MIB),
        (0, 512 * 1024, 100),
        (KEEP_SIZE, 0, 3 * MIB),
        (PUNCH_HOLE | KEEP_SIZE, 64 * 1024, 128 * 1024),
        (PUNCH_HOLE | KEEP_SIZE, 100, 50_000),
        (ZERO, MIB - 4096, 2 * MIB),
        (ZERO | KEEP_SIZE, MIB - 4096, 2 * MIB),
        (PUNCH_HOLE, 0, 4096),  # invalid without KEEP_SIZE
        (0, -1, 4096),
        (0, 0, 0),
        (0, 1 << 62, 4096),  # EFBIG
    ],
)
def test_fallocate_as_on_the_storage(mini: MiniMount, storage: Path, mode: int, offset: int, length: int) -> None:
    results = []
    for directory in (mini.path, storage):
        path = directory / f"in-{directory.name}"
        path.write_bytes(b"x" * MIB)
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)  # else blocks are counted that are not allocated yet
        error = fallocate(fd, mode, offset, length)
        os.fsync(fd)
        results.append((error, os.fstat(fd).st_size, state(path)))
        os.close(fd)
    assert results[0] == results[1]
    assert state(mini.path / "in-mnt") == state(storage / "in-mnt")


@pytest.mark.parametrize("mode", [COLLAPSE, INSERT, UNSHARE])
def test_what_the_kernel_does_not_pass_on(mini: MiniMount, mode: int) -> None:
    fd = os.open(mini.path / "f", os.O_RDWR | os.O_CREAT)
    assert fallocate(fd, mode, 0, 4096) == errno.EOPNOTSUPP
    os.close(fd)
    assert "fallocate" not in mini.counts()


def test_fallocate_needs_a_descriptor_for_writing(mini: MiniMount) -> None:
    (mini.path / "f").write_bytes(b"x")
    fd = os.open(mini.path / "f", os.O_RDONLY)
    assert fallocate(fd, 0, 0, 4096) == errno.EBADF
    os.close(fd)


def sparse(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for offset in (MIB, 5 * MIB):
        os.pwrite(fd, b"d" * 65536, offset)
    os.ftruncate(fd, 8 * MIB)
    os.fsync(fd)
    return fd


def seek(fd: int, offset: int, whence: int) -> int | str:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        return error.strerror


def test_holes_and_data(mini: MiniMount, storage: Path) -> None:
    ours, theirs = sparse(mini.path / "a"), sparse(storage / "b")
    found = []
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (0, MIB, MIB + 65536, 4 * MIB, 6 * MIB, 8 * MIB - 1, 8 * MIB, 1 << 40):
            found.append(seek(ours, offset, whence))
            assert found[-1] == seek(theirs, offset, whence)
    assert found[0] == MIB and found[8] == 0 and found[7] == os.strerror(errno.ENXIO)
    os.lseek(ours, 0, os.SEEK_DATA)
    assert os.read(ours, 4) == b"dddd"  # the position is where the data is
    assert os.lseek(ours, -1, os.SEEK_END) == 8 * MIB - 1
    assert mini.counts()["lseek"] >= 14
    os.close(ours)
    os.close(theirs)


def test_cp_keeps_holes(mini: MiniMount, storage: Path) -> None:
    os.close(sparse(mini.path / "a"))
    subprocess.run(["cp", "--sparse=auto", "--reflink=never", "a", "b"], cwd=mini.path, check=True, timeout=30)
    assert (storage / "b").read_bytes() == (storage / "a").read_bytes()
    assert (storage / "b").stat().st_blocks == (storage / "a").stat().st_blocks == 256


def test_copy_file_range(mini: MiniMount, storage: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    (storage / "a").write_bytes(data)
    with open(mini.path / "a", "rb") as source, open(mini.path / "b", "wb") as target:
        copied = 0
        while step := os.copy_file_range(source.fileno(), target.fileno(), 1 << 40, copied + 7, copied + 3):
            copied += step
        assert copied == len(data) - 7
        assert os.fstat(target.fileno()).st_size == len(data) - 4
    assert (storage / "b").read_bytes() == bytes(3) + data[7:]
    counts = mini.counts()
    assert counts["copy_file_range"] >= 1 and "read" not in counts and "write" not in counts


COPY = """
import os, signal, sys
beats = 0
def beat(*_):
    global beats
    beats += 1
signal.signal(signal.SIGALRM, beat)
a, b = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
copied = os.copy_file_range(a, b, 1 << 20)
signal.setitimer(signal.ITIMER_REAL, 0)
print(copied, beats)
"""


@pytest.fixture
def slow(storage: Path, tmp_path: Path) -> Iterator[Callable[..., MiniMount]]:
    """Start a daemon whose copies take a second."""
    (storage / "a").write_bytes(os.urandom(MIB))
    with attached(storage, tmp_path / "mnt") as served:
        served.start(slow=1)
        yield served
        served.end()
        assert (served.status, served.errors) == (0, "")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_signal_during_a_copy(slow: MiniMount) -> None:
    """The copy is done once, and whole, and the daemon sleeps meanwhile."""
    assert slow.daemon is not None
    before = cpu_seconds(slow.daemon.pid)
    command = [sys.executable, "-c", COPY, str(slow.path / "a"), str(slow.path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    copied, beats = map(int, done.stdout.split())
    assert (copied, beats > 0) == (MIB, True)
    assert cpu_seconds(slow.daemon.pid) - before < 0.5
    assert slow.counts()["copy_file_range"] == 1
    assert (slow.source / "b").read_bytes() == (slow.source / "a").read_bytes()


def test_a_caller_is_killed_during_a_copy(slow: MiniMount) -> None:
    child = subprocess.Popen([sys.executable, "-c", COPY, str(slow.path / "a"), str(slow.path / "b")])
    slow.wait_for("copy_file_range", 1)
    begun = time.monotonic()
    child.kill()
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert time.monotonic() - begun < 5
    wait_until(lambda: slow.counts().get("release", 0) >= 2, 10, "the release of both files")
    assert (slow.source / "b").stat().st_size == MIB


def test_a_copy_that_breaks(storage: Path, tmp_path: Path) -> None:
    (storage / "a").write_bytes(b"data")
    with attached(storage, tmp_path / "mnt") as mini:
        mini.start(broken=True)
        with open(mini.path / "a", "rb") as source, open(mini.path / "b", "wb") as target:
            with pytest.raises(OSError) as failure:
                os.copy_file_range(source.fileno(), target.fileno(), 4)
            assert failure.value.errno == errno.EIO
        mini.end()
        assert "broken on purpose" in mini.errors and mini.status == 0
