"""What cases are made of: files of each kind, and the users they are done as."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

USER = 1000
OTHER = 65534
GROUP = 1000
EXTRA_GROUP = 2000
OLD = (1_000_000_000, 123_456_789)
"""A time long ago, so that a snapshot compares it."""

KINDS = ("file", "dir", "symlink", "dirlink", "dangling", "loop", "fifo", "missing")


def make(kind: str, name: str, mode: int = 0o644) -> None:
    """Make something called *name*; a link's target is called *name*-target."""
    if kind == "file":
        write(name, b"0123456789", mode)
    elif kind == "empty":
        write(name, b"", mode)
    elif kind in ("dir", "fulldir"):
        os.mkdir(name)
        os.chmod(name, mode | (mode & 0o444) >> 2)
        if kind == "fulldir":
            write(f"{name}/inside", b"x")
    elif kind == "symlink":
        write(f"{name}-target", b"0123456789", mode)
        os.symlink(f"{name}-target", name)
    elif kind == "dirlink":
        os.mkdir(f"{name}-target")
        os.symlink(f"{name}-target", name)
    elif kind == "dangling":
        os.symlink(f"{name}-target", name)
    elif kind == "loop":
        os.symlink(name, name)
    elif kind == "fifo":
        os.mkfifo(name)
        os.chmod(name, mode)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(name)
    elif kind == "hardlink":
        write(f"{name}-first", b"0123456789", mode)
        os.link(f"{name}-first", name)
    elif kind == "device":
        os.mknod(name, 0o020000 | mode, os.makedev(1, 3))
    elif kind != "missing":
        raise ValueError(kind)


def write(name: str | bytes, data: bytes, mode: int = 0o644) -> None:
    """Make a file with this content and exactly this mode."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.fchmod(fd, mode)
    os.close(fd)


def read(name: str | bytes) -> bytes:
    """Return the content of a file."""
    with open(name, "rb") as file:
        return file.read()


def become(uid: int, gid: int | None = None, groups: Sequence[int] = ()) -> None:
    """Be another user from here on; there is no way back."""
    os.setgroups(groups)
    os.setresgid(*(3 * [uid if gid is None else gid]))
    os.setresuid(*(3 * [uid]))


@contextmanager
def aside(name: str) -> Iterator[None]:
    """Work in a new directory, so that one case can do many things that do not touch each other."""
    os.mkdir(name)
    os.chdir(name)
    try:
        yield
    finally:
        os.chdir("..")
