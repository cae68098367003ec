"""Files, directories and devices, and the areas in them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lockfs.errors import LockfsError, SystemError_, UsageError
from lockfs.linux import mountinfo
from lockfs.text import from_bytes
from lockfs_paxos_lease.check import index
from lockfs_paxos_lease.check.area import PROBE, Kind, Sizes, probe
from lockfs_paxos_lease.disk.file import ONE_HOST, DiskFile
from lockfs_paxos_lease.format import rindex
from lockfs_paxos_lease.format.size import MIB, Geometry

DEFAULT = Geometry()
LEASES = (b".lockfs", b"leases")
"""Below a share, unless its hosts agree on another place."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file or device, and where to begin in it: None for all of it."""

    path: bytes
    offset: int | None = None

    def __str__(self) -> str:
        return from_bytes(self.path) + ("" if self.offset is None else f":{self.offset}")


@dataclass(frozen=True, slots=True)
class Area:
    """An area as it was read.  `data` is empty where nothing known begins."""

    path: bytes
    offset: int
    sizes: Sizes
    data: bytes

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.sizes.kind

    @property
    def geometry(self) -> Geometry:
        """Its sizes."""
        return self.sizes.geometry

    @property
    def where(self) -> str:
        """Its place, for people."""
        return from_bytes(self.path) + (f":{self.offset}" if self.offset else "")


def parse(text: str) -> Place:
    """Take apart ``PATH`` or ``PATH:OFFSET``, where the offset may end in M.  Raises `UsageError`."""
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Place(os.fsencode(text))
    digits, unit = (number[:-1], MIB) if number.endswith("M") else (number, 1)
    if not (digits.isascii() and digits.isdigit()):
        return Place(os.fsencode(text))
    return Place(os.fsencode(path), int(digits) * unit)


def files(place: Place) -> list[Place]:
    """Return the files in a directory of leases, or in that of a share; or the place itself.  Raises `LockfsError`."""
    try:
        if not stat.S_ISDIR(os.stat(place.path).st_mode):
            return [place]
        below = os.path.join(place.path, *LEASES)
        if os.path.isdir(below):
            place = Place(below, place.offset)
        names = sorted(
            entry.name
            for entry in os.scandir(place.path)
            if entry.is_file(follow_symlinks=False) and entry.name[:1] != b"."
        )
    except OSError as error:
        raise failed(error, place.path) from error
    if place.offset is not None:
        raise UsageError(f"'{from_bytes(place.path)}' is a directory: an offset makes no sense there")
    return [Place(os.path.join(place.path, name)) for name in names]


def areas(place: Place) -> Iterator[Area]:
    """Yield the areas of a file or device, of a directory those of all files.  Raises `LockfsError`."""
    for each in files(place):
        with opened(each.path) as (file, size):
            if each.offset is not None:
                yield read_area(file, each.path, each.offset, size)
            else:
                yield from _all_areas(file, each.path, size)


def _all_areas(file: DiskFile, path: bytes, size: int) -> Iterator[Area]:
    """Yield area after area; the first one with nothing known ends it, but where an index says that there are more."""
    offset, last, guess = 0, 0, DEFAULT
    while offset < size and (size - offset >= PROBE or not offset):
        area = read_area(file, path, offset, size, guess)
        guess = area.geometry
        if area.kind is Kind.INDEX:
            header = rindex.Header.decode(area.data)
            last = max(
                (entry.offset for _, entry in index.entries(area.data, header) if entry.offset < size), default=0
            )
        if area.kind in (Kind.EMPTY, Kind.UNKNOWN):
            if offset == 0:
                yield area
            if offset > last:
                return
        else:
            yield area
        offset += guess.align


def read_area(file: DiskFile, path: bytes, offset: int, size: int, guess: Geometry = DEFAULT) -> Area:
    """Read the area at *offset* of a file of *size* bytes.  Raises `LockfsError`."""
    try:
        if offset + PROBE > size:
            raise UsageError(f"'{from_bytes(path)}' has {size} bytes: there is no area at {offset}")
        sizes = probe(file.read(offset, PROBE), guess)
        if sizes.kind in (Kind.EMPTY, Kind.UNKNOWN):
            return Area(path, offset, sizes, b"")
        if offset + sizes.geometry.align > size:
            raise SystemError_(
                f"'{from_bytes(path)}' is cut off: the {sizes.kind.value} at {offset} has {sizes.geometry.align} "
                f"bytes, and only {size - offset} are there"
            )
        return Area(path, offset, sizes, file.read(offset, sizes.geometry.align))
    except OSError as error:
        raise failed(error, path) from error


@contextmanager
def opened(path: bytes, *, write: bool = False) -> Iterator[tuple[DiskFile, int]]:
    """Open a file or device past the page cache; yield it with its size in bytes.  Raises `LockfsError`."""
    try:
        fd = _open(path, os.O_RDWR | os.O_DSYNC if write else os.O_RDONLY)
    except OSError as error:
        raise failed(error, path) from error
    file = DiskFile(fd)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"'{from_bytes(path)}' is neither a file nor a block device")
        yield file, os.lseek(fd, 0, os.SEEK_END)
    finally:
        file.close()


def _open(path: bytes, flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        # What only this host can have mounted has no cache but this one.
        if error.errno != errno.EINVAL or mountinfo.find(path).fstype not in ONE_HOST:
            raise
    return os.open(path, flags)


def failed(error: OSError, path: bytes) -> LockfsError:
    """Return what to raise for a path."""
    shown = from_bytes(path)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR):
        return UsageError(f"'{shown}': {error.strerror}")
    if error.errno == errno.EINVAL:
        hint = "Leases are read past the page cache, since other hosts write them."
        return SystemError_(f"'{shown}' has no direct I/O (O_DIRECT)", hint=hint)
    return SystemError_(f"'{shown}': {error.strerror}")
