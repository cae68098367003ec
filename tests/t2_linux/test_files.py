"""Calls on O_PATH descriptors."""

import os
from pathlib import Path

import pytest

from lockfs.linux import files


@pytest.fixture
def link(storage: Path):
    """An O_PATH descriptor of a symbolic link, which no call here may follow."""
    (storage / "target").write_text("x")
    (storage / "link").symlink_to("target")
    fd = os.open(storage / "link", os.O_PATH | os.O_NOFOLLOW)
    yield fd
    os.close(fd)


def test_times_to_the_nanosecond_and_one_left_alone(storage: Path, link: int) -> None:
    before = os.fstat(link)
    files.utimens(link, None, -1_500_000_001)
    after = os.fstat(link)
    assert (after.st_atime_ns, after.st_mtime_ns) == (before.st_atime_ns, -1_500_000_001)
    assert (storage / "target").stat().st_mtime_ns > 0


def test_chown_of_a_link_itself(storage: Path, link: int) -> None:
    files.chown(link, 1234, -1)
    assert (os.fstat(link).st_uid, os.fstat(link).st_gid) == (1234, 0)
    assert (storage / "target").stat().st_uid == 0


def test_link_to_a_link(storage: Path, link: int) -> None:
    directory = os.open(storage, os.O_RDONLY)
    files.link(link, directory, b"second")
    os.close(directory)
    assert (storage / "second").is_symlink()
    assert (storage / "second").lstat().st_ino == os.fstat(link).st_ino


def test_rename_flags(storage: Path) -> None:
    (storage / "a").write_text("a")
    (storage / "b").write_text("b")
    directory = os.open(storage, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            files.rename(directory, b"a", directory, b"b", files.RENAME_NOREPLACE)
        files.rename(directory, b"a", directory, b"b", files.RENAME_EXCHANGE)
        assert (storage / "a").read_text() == "b"
        with pytest.raises(OSError, match="Invalid argument"):
            files.rename(directory, b"a", directory, b"b", 0x80)
    finally:
        os.close(directory)
