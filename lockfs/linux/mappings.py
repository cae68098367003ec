"""The shared mappings that a process has of files, as procfs shows them without asking the filesystem.

On Linux 6.11 and later an ioctl finds them without the rest of the address space having to be read, which for a program
with thousands of libraries or arenas is most of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lockfs.linux.procfs import threads

_PROCMAP_QUERY = 0xC0686611
"""_IOWR('f', 17, struct procmap_query), linux/fs.h."""
_QUERY = struct.Struct("=9Q4I2Q")
_WRITABLE = 0x02
_SHARED = 0x08
_COVERING_OR_NEXT = 0x10
_FILE_BACKED = 0x20
_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .([w-]).s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) ([0-9]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A shared mapping of a file, as it is mapped now.  `dev` and `ino` are those of the file as its user sees it."""

    start: int
    end: int
    dev: int
    ino: int
    writable: bool


def of_process(proc: int, pid: int, dev: int, wanted: Callable[[int], bool]) -> set[tuple[int, bool]]:
    """Return the inode numbers *wanted* of *dev* that a process has mapped shared, each with whether it can write.

    *proc* is a descriptor of the directory of process *pid* in procfs.  Raises OSError.
    """
    # Threads share their memory, but the first one may have exited: then it shows none.
    for tid in threads(proc, pid):
        try:
            maps = os.open(f"task/{tid}/maps", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            return {
                (each.ino, each.writable or _may_become_writable(tid, each))
                for each in shared(maps)
                if each.dev == dev and wanted(each.ino)
            }
        except ProcessLookupError:
            continue
        finally:
            os.close(maps)
    return set()


def _may_become_writable(tid: int, mapping: Mapping) -> bool:
    """Say whether mprotect(2) can make a shared mapping writable: if its descriptor was open for writing.

    VM_MAYWRITE says the same, but the kernel shows that in ``smaps`` only, which counts every page of the process.
    """
    try:
        link = os.lstat(f"/proc/{tid}/map_files/{mapping.start:x}-{mapping.end:x}")
    except FileNotFoundError:
        return True  # it changed at this moment: in doubt it counts
    return bool(link.st_mode & stat.S_IWUSR)


def shared(maps: int) -> Iterator[Mapping]:
    """Yield the shared file mappings in *maps*, an open ``maps`` file of procfs.  Raises OSError."""
    try:
        yield from by_query(maps)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        yield from by_text(maps)


def by_query(maps: int) -> Iterator[Mapping]:
    """Ask for them one by one.  Raises OSError: ENOTTY before Linux 6.11, ESRCH if the process has no memory."""
    flags = _SHARED | _FILE_BACKED | _COVERING_OR_NEXT
    address = 0
    while True:
        query = _QUERY.pack(_QUERY.size, flags, address, *[0] * 12)
        try:
            answer = _QUERY.unpack(fcntl.ioctl(maps, _PROCMAP_QUERY, query))
        except FileNotFoundError:
            return
        start, address = answer[3:5]
        yield Mapping(start, address, os.makedev(*answer[9:11]), answer[8], bool(answer[5] & _WRITABLE))


def by_text(maps: int) -> Iterator[Mapping]:
    """Find them in the text.  Raises OSError: ESRCH if the process has no memory."""
    os.lseek(maps, 0, os.SEEK_SET)
    text = b""
    while part := os.read(maps, 1 << 16):
        text += part
    if not text:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    for start, end, write, major, minor, ino in _LINE.findall(text):
        dev = os.makedev(int(major, 16), int(minor, 16))
        yield Mapping(int(start, 16), int(end, 16), dev, int(ino), write == b"w")
