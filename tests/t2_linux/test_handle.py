"""File handles."""

import errno
import os
from pathlib import Path

import pytest

from lockfs.linux import handle


@pytest.fixture
def directory(storage: Path):
    fd = os.open(storage, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_handle_finds_the_file_after_a_rename(storage: Path, directory: int) -> None:
    (storage / "a").write_text("x")
    fd = os.open(storage / "a", os.O_PATH)
    found = handle.of_fd(fd)
    os.close(fd)
    assert found is not None
    (storage / "a").rename(storage / "b")
    again = handle.open_handle(directory, found)
    assert os.readlink(f"/proc/self/fd/{again}") == str(storage / "b")
    os.close(again)


def test_a_handle_never_finds_a_later_file(storage: Path, directory: int) -> None:
    (storage / "a").write_text("x")
    fd = os.open(storage / "a", os.O_PATH)
    old = handle.of_fd(fd)
    os.close(fd)
    assert old is not None
    (storage / "a").unlink()
    for number in range(100):  # the inode number is soon used again
        (storage / f"n{number}").write_text("y")
    with pytest.raises(OSError) as error:
        handle.open_handle(directory, old)
    assert error.value.errno == errno.ESTALE


def test_a_filesystem_without_handles_says_so() -> None:
    fd = os.open("/proc/self/status", os.O_PATH)
    assert handle.of_fd(fd) is None
    os.close(fd)


def test_symbolic_links_have_handles_of_their_own(storage: Path, directory: int) -> None:
    (storage / "link").symlink_to("nowhere")
    fd = os.open(storage / "link", os.O_PATH | os.O_NOFOLLOW)
    found = handle.of_fd(fd)
    os.close(fd)
    assert found is not None
    again = handle.open_handle(directory, found)
    assert os.readlink(b"", dir_fd=again) == b"nowhere"
    os.close(again)
