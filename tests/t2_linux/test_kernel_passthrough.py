"""Passthrough on real mounts: data bypasses the daemon, in every way in which files are opened and used."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from t2_linux.kernel_fs.mounted import MiniMount, attached, serving

DATA = bytes(range(256)) * 4096


@pytest.fixture
def mini(storage: Path, tmp_path: Path) -> Iterator[MiniMount]:
    """A mount with passthrough."""
    with serving(storage, tmp_path / "mnt") as served:
        yield served


def opened(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o644)


def test_data_bypasses_the_daemon(mini: MiniMount) -> None:
    (mini.path / "f").write_bytes(DATA)
    assert (mini.source / "f").read_bytes() == DATA
    assert (mini.path / "f").read_bytes() == DATA
    fd = opened(mini.path / "f", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        page[:] = b"d" * 4096
        assert os.pwritev(fd, [page], 8192) == 4096
        assert os.preadv(fd, [page], 4096) == 4096
        assert page[:] == DATA[4096:8192]
    os.fsync(fd)
    os.close(fd)
    assert (mini.source / "f").read_bytes()[8192:12288] == b"d" * 4096
    counts = mini.counts()
    assert counts["open"] + counts["create"] == 3
    assert "read" not in counts and "write" not in counts


def test_without_a_backing_id_it_does_not(storage: Path, tmp_path: Path) -> None:
    with serving(storage, tmp_path / "mnt", plain=True) as mini:
        (mini.path / "f").write_bytes(DATA)
        assert (mini.path / "f").read_bytes() == DATA
        counts = mini.counts()
        assert counts["write"] > 0 and counts["read"] > 0 and "backing_open" not in counts


def test_one_backing_id_for_all_opens_of_a_file(mini: MiniMount) -> None:
    (mini.source / "f").write_bytes(b"")
    flags = (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY, os.O_RDWR | os.O_DIRECT, os.O_RDWR)
    fds = [opened(mini.path / "f", flag) for flag in flags]
    os.write(fds[1], b"one ")
    os.write(fds[2], b"two ")
    os.pwrite(fds[3], b"ONE", 0)
    assert os.read(fds[0], 100) == b"ONE two "
    counts = mini.counts()
    assert (counts["open"], counts["backing_open"], counts.get("backing_close")) == (6, 1, None)
    for fd in fds[:-1]:
        os.close(fd)
    mini.wait_for("release", 5)
    assert "backing_close" not in mini.counts()
    os.close(fds[-1])
    mini.wait_for("backing_close", 1)


def test_backing_ids_are_given_back_exactly_once(mini: MiniMount) -> None:
    for number in range(40):
        with open(mini.path / f"f{number % 4}", "a+b") as one, open(mini.path / f"f{number % 4}", "rb") as two:
            one.write(b"x")
            one.flush()
            assert two.read()[-1:] == b"x"
    left = opened(mini.path / "f0", os.O_RDONLY)
    mini.wait_for("release", 80)
    os.close(left)
    mini.wait_for("release", 81)
    mini.end()
    assert mini.last["backing_open"] == mini.last["backing_close"] > 4
    assert mini.last["open"] + mini.last["create"] == mini.last["release"] == 81


def test_the_first_open_decides(mini: MiniMount) -> None:
    """The kernel takes no mix on one inode, so what is open without a backing id stays so, and the other way."""
    path = mini.path / "f"
    path.write_bytes(b"data")
    os.setxattr(mini.path, "user.plain", b"1")
    plain = opened(path, os.O_RDONLY)
    os.setxattr(mini.path, "user.plain", b"0")
    second = opened(path, os.O_RDWR)
    assert os.read(second, 10) == b"data"
    assert mini.counts()["read"] == 1
    os.close(plain)
    os.close(second)
    mini.wait_for("release", 3)
    passed = opened(path, os.O_RDONLY)
    os.setxattr(mini.path, "user.plain", b"1")
    third = opened(path, os.O_RDWR)
    assert os.read(third, 10) == os.read(passed, 10) == b"data"
    assert mini.counts()["read"] == 1
    os.close(passed)
    os.close(third)


def test_append_finds_the_real_end(mini: MiniMount) -> None:
    path = mini.path / "f"
    fds = [opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for _ in range(2)]
    fds.append(opened(mini.source / "f", os.O_WRONLY | os.O_APPEND))
    records = [b"%d-%03d\n" % (writer, number) for number in range(100) for writer in range(3)]
    for number, record in enumerate(records):
        os.write(fds[number % 3], record)
    assert path.read_bytes() == b"".join(records)
    for fd in fds:
        os.close(fd)


def test_a_mapping_outlives_its_descriptor(mini: MiniMount) -> None:
    path = mini.path / "f"
    path.write_bytes(bytes(8192))
    # mmap.mmap() keeps a descriptor of its own; a shell's child has none.
    program = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
fd = os.open(sys.argv[1], os.O_RDWR)
address = libc.mmap(None, 8192, 3, 1, fd, 0)
os.close(fd)
print("closed", flush=True)
sys.stdin.readline()
ctypes.memmove(address + 4096, b"mapped", 6)
"""
    child = subprocess.Popen(
        ["/usr/bin/python3", "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "closed\n"
    mini.wait_for("release", 2)
    child.communicate("\n", timeout=20)
    assert child.returncode == 0
    assert (mini.source / "f").read_bytes()[4096:4102] == b"mapped"
    assert "write" not in mini.counts()


def test_growth_is_seen(mini: MiniMount) -> None:
    path = mini.path / "f"
    path.write_bytes(b"x" * 100)
    fd = opened(path, os.O_RDWR)
    os.pwrite(fd, b"y", 4999)
    assert os.fstat(fd).st_size == 5000
    with open(mini.source / "f", "ab") as other:
        other.write(b"z" * 1000)
    assert os.fstat(fd).st_size == os.lseek(fd, 0, os.SEEK_END) == 6000
    assert os.pread(fd, 10, 5995) == b"z" * 5
    os.ftruncate(fd, 10)
    assert (mini.source / "f").stat().st_size == 10
    os.close(fd)


def test_a_removed_file_stays_usable(mini: MiniMount) -> None:
    fd = opened(mini.path / "f", os.O_RDWR | os.O_CREAT)
    os.unlink(mini.path / "f")
    os.write(fd, b"still here")
    assert os.pread(fd, 100, 0) == b"still here"
    assert os.listdir(mini.path) == []
    os.close(fd)


def test_a_stacked_filesystem_is_served_without(tmp_path: Path) -> None:
    names = ("lower", "upper", "work", "merged")
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"below")
    merged = tmp_path / "merged"
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True, timeout=30)
    try:
        with serving(merged, tmp_path / "mnt") as mini:
            fd = opened(mini.path / "f", os.O_RDWR)
            assert os.pread(fd, 10, 0) == b"below"
            os.pwrite(fd, b"ABOVE", 0)
            os.close(fd)
            assert (merged / "f").read_bytes() == b"ABOVE"
            counts = mini.counts()
            assert (counts["read"] > 0, counts["write"], counts.get("backing_open")) == (True, 1, None)
    finally:
        subprocess.run(["umount", merged], check=True, timeout=30)


def test_the_kernel_is_asked_before_each_backing_id(storage: Path, tmp_path: Path) -> None:
    """Without the flag of INIT no passthrough is tried, and files open all the same."""
    with attached(storage, tmp_path / "mnt") as mini:
        mini.start(flags=0)
        (mini.path / "f").write_bytes(b"data")
        assert (mini.path / "f").read_bytes() == b"data"
        counts = mini.counts()
        assert counts["write"] == 1 and "backing_open" not in counts
        mini.end()
        assert (mini.status, mini.errors) == (0, "")
