"""The files of one superblock that a process has open, as procfs shows them without asking the filesystem."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lockfs.linux.libc import libc
from lockfs.linux.mountids import MountIds
from lockfs.linux.procfs import contents, names, threads

_FDINFO = re.compile(rb"\nflags:\t([0-7]+)\nmnt_id:\t(\d+)\nino:\t(\d+)\n")
_RING = "anon_inode:[io_uring]"
_RING_FILE = re.compile(rb"^ *\d+: (/.*)$", re.MULTILINE)
_RING_TRIES = 20
_SYS_KCMP = 312 if os.uname().machine == "x86_64" else 272
_KCMP_FILES = 2


@dataclass(slots=True)
class Descriptors:
    """`files` has the inode number of each open file and whether it is open for writing.

    `ring` is true if an io_uring ring has registered some file of the superblock; the kernel does not say which.
    """

    files: set[tuple[int, bool]] = field(default_factory=set)
    ring: bool = False


@dataclass(frozen=True, slots=True)
class _Open:
    mount_id: int
    ino: int
    writable: bool


def of_process(proc: int, pid: int, dev: int, wanted: Callable[[int], bool], mounts: MountIds) -> Descriptors:
    """Return what a process has open of the inode numbers *wanted* of *dev*, which *mounts* knows too.

    *proc* is a descriptor of the directory of process *pid* in procfs.  Raises OSError.
    """
    found = Descriptors()
    for table in _tables(proc, pid):
        candidates: list[tuple[str, _Open]] = []
        for name, target in _links(proc, table):
            # Sockets, pipes and their like have no path; most descriptors end here.
            if target.startswith("/"):
                info = _info(proc, table, name)
                if info is not None and wanted(info.ino) and _shows(mounts, proc, table, name, info):
                    candidates.append((name, info))
            elif target == _RING and not found.ring:
                found.ring = _ring_has_files(proc, table, name, mounts)
        # What was known of its mount may be older than the descriptor, and the mount another: look once more, between
        # two looks at the descriptor, which kept the mount meanwhile.
        fresh = MountIds(dev) if candidates else mounts
        for name, info in candidates:
            if _shows(fresh, proc, table, name, info) and _info(proc, table, name) == info:
                found.files.add((info.ino, info.writable))
    return found


def _tables(proc: int, pid: int) -> Iterator[str]:
    """Yield the directory of one thread for each descriptor table of a process.

    Threads share one as a rule, but a thread may have its own, and the first may have exited.  A table counts as seen
    while a thread that has it is still there after it was looked at.
    """
    seen: list[int] = []
    for tid in threads(proc, pid):
        if not any(_share_descriptors(tid, other) for other in seen):
            seen.append(tid)
            yield f"task/{tid}"


def _share_descriptors(one: int, other: int) -> bool:
    """Say whether two threads have one descriptor table; False if it cannot be told."""
    return bool(libc.syscall(_SYS_KCMP, one, other, _KCMP_FILES, 0, 0) == 0)


def _links(proc: int, table: str) -> Iterator[tuple[str, str]]:
    try:
        numbers = names(f"{table}/fd", proc)
    except (FileNotFoundError, ProcessLookupError):
        return
    for number in numbers:
        try:
            yield number, os.readlink(f"{table}/fd/{number}", dir_fd=proc)
        except (FileNotFoundError, ProcessLookupError):
            pass


def _info(proc: int, table: str, name: str) -> _Open | None:
    """Return what a descriptor is open for; None if it has been closed.  Raises OSError."""
    try:
        text = contents(f"{table}/fdinfo/{name}", proc)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not text:
        return None
    found = _FDINFO.search(text)
    if found is None:
        raise OSError(errno.ENOSYS, "the kernel does not say which inode a descriptor is of (Linux 5.14 does)")
    flags = int(found[1], 8)
    writable = not flags & os.O_PATH and flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
    return _Open(int(found[2]), int(found[3]), writable)


def _shows(mounts: MountIds, proc: int, table: str, name: str, info: _Open) -> bool:
    try:
        return mounts.shows(proc, f"{table}/fd/{name}", info.mount_id)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ring_has_files(proc: int, table: str, name: str, mounts: MountIds) -> bool:
    """Say whether a ring has registered files below a mountpoint of the superblock: it shows their paths only."""
    for _ in range(_RING_TRIES):
        try:
            text = contents(f"{table}/fdinfo/{name}", proc)
        except (FileNotFoundError, ProcessLookupError):
            return False
        if b"\nUserFiles:" in text:
            break
        # The ring was locked by its user at this moment, and then the kernel leaves everything out.
    paths = _RING_FILE.findall(text)
    if paths:
        mounts.learn_namespace(proc)
    return any(mounts.holds(path) for path in paths)
