"""Set-id bits and the umask: what the kernel leaves to the daemon by HANDLE_KILLPRIV_V2 and DONT_MASK."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from t2_linux.kernel_fs.mounted import MiniMount, serving

STRANGER = 12345
WRITES = 200


@pytest.fixture(params=["passthrough", "plain"])
def mini(storage: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MiniMount]:
    """A mount with passthrough, and one without."""
    with serving(storage, tmp_path / "mnt", plain=request.param == "plain") as served:
        yield served


def as_stranger(program: str, directory: Path, uid: int = STRANGER) -> None:
    """Run a program as somebody else; it has the directory as descriptor `top`.

    It becomes somebody else by itself: others may not come to this interpreter by its path.
    """
    become = f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})"
    top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import os, posix; top = {top}; {become}\n{program}"],
            pass_fds=[top], check=True, timeout=30,
        )  # fmt: skip
    finally:
        os.close(top)


def new_file(directory: Path, mode: int) -> Path:
    path = directory / f"file-in-{directory.name}"
    path.write_bytes(b"x" * 100)
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    return path


OPEN = "fd = os.open('{name}', os.O_RDWR{more}, dir_fd=top)\n"
WAYS = {
    "write": OPEN + "os.write(fd, b'y')",
    "ftruncate": OPEN + "os.ftruncate(fd, 50)",
    "fallocate": OPEN + "os.posix_fallocate(fd, 0, 10000)",
    "truncating open": OPEN.replace("{more}", " | os.O_TRUNC"),
    "reading": OPEN + "os.read(fd, 1)",
}


@pytest.mark.parametrize("mode", [0o6777, 0o4767, 0o2777, 0o777])
@pytest.mark.parametrize("way", WAYS)
def test_set_id_bits_go_as_on_the_storage(mini: MiniMount, storage: Path, way: str, mode: int) -> None:
    modes = []
    for directory in (mini.path, storage):
        path = new_file(directory, mode)
        as_stranger(WAYS[way].format(name=path.name, more=""), directory)
        modes.append(stat.S_IMODE(path.stat().st_mode))
    assert modes[0] == modes[1]
    assert stat.S_IMODE((storage / "file-in-mnt").stat().st_mode) == modes[0]
    assert modes[0] == (mode if way == "reading" else mode & 0o777)


def test_root_keeps_them(mini: MiniMount) -> None:
    path = new_file(mini.path, 0o6777)
    with open(path, "r+b") as file:
        file.write(b"y")
    assert stat.S_IMODE(path.stat().st_mode) == 0o6777


def test_writes_ask_for_no_attributes(storage: Path, tmp_path: Path) -> None:
    """Without HANDLE_KILLPRIV_V2 each write of passthrough data would ask for security.capability first."""
    with serving(storage, tmp_path / "mnt") as mini:
        path = new_file(mini.path, 0o6777)
        before = mini.counts()
        program = OPEN.format(name=path.name, more="") + f"for _ in range({WRITES}): os.write(fd, b'y')"
        as_stranger(program, mini.path)
        counts = mini.counts()
        asked = sum(counts[name] - before.get(name, 0) for name in ("getxattr", "setattr"))
        assert asked < 10
        assert counts["kill"] == 1 and "write" not in counts


@pytest.mark.parametrize("default_acl", [True, False])
@pytest.mark.parametrize("umask", [0o077, 0o022, 0])
def test_modes_of_new_files_as_on_the_storage(mini: MiniMount, storage: Path, default_acl: bool, umask: int) -> None:
    storage.chmod(0o777)
    if default_acl:
        subprocess.run(["setfacl", "-d", "-m", "u::rwx,g::rwx,o::r,u:12346:rw", storage], check=True, timeout=30)
    create = "os.umask({umask}); os.open('{name}', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=top)"
    found = []
    for directory in (mini.path, storage):
        name = f"new-in-{directory.name}"
        as_stranger(create.format(name=name, umask=umask), directory)
        listed = subprocess.run(["getfacl", "-cn", name], cwd=directory, capture_output=True, text=True, check=True)
        found.append((listed.stdout, stat.S_IMODE((directory / name).stat().st_mode)))
    assert found[0] == found[1]
    assert found[0][1] == (0o664 if default_acl else 0o666 & ~umask)
