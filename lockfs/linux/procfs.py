"""Reading the directory of one process in procfs through a descriptor of it.

Such a descriptor (O_PATH will do) stands for the process that it was opened for, never for a later one of the same
number: once that has gone, all calls raise FileNotFoundError or ProcessLookupError.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_LINKS = 2
"""The links of a task directory besides one for each thread."""


def contents(path: str, dir_fd: int | None = None) -> bytes:
    """Return what a file of procfs has to say.  Raises OSError."""
    # No file object, which costs more than the reading.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        found = os.read(fd, 1 << 16)
        while part := os.read(fd, 1 << 16) if found else b"":
            found += part
        return found
    finally:
        os.close(fd)


def names(path: str, dir_fd: int) -> list[str]:
    """Return the names in a directory.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def threads(proc: int, pid: int) -> Iterator[int]:
    """Yield the ids of the threads of process *pid*, its first one first, until there are no new ones.  Raises OSError.

    The first thread has the number of the process, and stays as a zombie if it exits before the others.
    """
    yield pid
    if os.stat("task", dir_fd=proc).st_nlink == _LINKS + 1:
        return  # which is cheaper to learn than a list
    seen = {pid}
    while fresh := {int(name) for name in names("task", proc)} - seen:
        seen |= fresh
        yield from sorted(fresh)


def start_time(proc: int) -> int:
    """Return when a process started, in clock ticks since boot.  Raises OSError."""
    # The command may contain anything, parentheses too: fields start after the last one.
    return int(contents("stat", proc).rpartition(b")")[2].split()[19])
