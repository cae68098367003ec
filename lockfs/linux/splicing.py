"""Processes at the moment they move data into a file by splice(2) and its relatives, and whether processes run.

Like `lockfs.linux.holders` this asks procfs only, and no filesystem.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable

from lockfs.linux import procfs
from lockfs.linux.mountids import MountIds

_X86 = os.uname().machine == "x86_64"
_TARGET_ARGUMENT = {
    275 if _X86 else 76: 2,  # splice
    40 if _X86 else 71: 0,  # sendfile
    326 if _X86 else 285: 2,  # copy_file_range, which the kernel does by splice between two FUSE mounts
}
"""By number of the system call, which argument is the descriptor that is written to."""
_FDINFO = re.compile(rb"\nmnt_id:\t(\d+)\nino:\t(\d+)\n")


def into(dev: int, inodes: Container[int], pids: Iterable[int]) -> dict[int, set[int]]:
    """Return which of the files *inodes* of the superblock *dev* the processes *pids* are splicing into.

    The kernel tells of a thread that waits inside of the call, not of one that runs.
    """
    mounts = MountIds(dev)
    found: dict[int, set[int]] = {}
    for pid in pids:
        for tid in _threads(pid):
            ino = _target(tid, mounts)
            if ino is not None and ino in inodes:
                found.setdefault(pid, set()).add(ino)
    return found


def run_times(pids: Iterable[int]) -> dict[int, int]:
    """Return how many nanoseconds the threads of each process have run; those that have gone are missing."""
    found: dict[int, int] = {}
    for pid in pids:
        for tid in _threads(pid):
            try:
                ran = int(procfs.contents(f"/proc/{tid}/schedstat").split()[0])
            except (OSError, ValueError, IndexError):
                continue
            found[pid] = found.get(pid, 0) + ran
    return found


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _target(tid: int, mounts: MountIds) -> int | None:
    """Return the inode number of the file that a thread is splicing into, if it is on the superblock."""
    try:
        words = procfs.contents(f"/proc/{tid}/syscall").split()
        argument = _TARGET_ARGUMENT.get(int(words[0])) if words and words[0].isdigit() else None
        if argument is None:
            return None
        # A descriptor is a C int: what lies above it in the register does not count.
        number = int(words[1 + argument], 16) & 0xFFFFFFFF
        info = _FDINFO.search(procfs.contents(f"/proc/{tid}/fdinfo/{number}"))
        if info is None:
            return None
        proc = os.open(f"/proc/{tid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, IndexError):
        return None
    try:
        return int(info[2]) if mounts.shows(proc, f"fd/{number}", int(info[1])) else None
    except OSError:
        return None
    finally:
        os.close(proc)
