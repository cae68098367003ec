"""The bodies of the requests that `lockfs.kernel.extra` serves, of notifications and of ioctls.  Pure.

From include/uapi/linux/fuse.h of Linux 6.18, protocol 7.45.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOOKUP = 1
GETATTR = 3
OPEN = 14
CREATE = 35
FALLOCATE = 43
LSEEK = 46
COPY_FILE_RANGE = 47
COPY_FILE_RANGE_64 = 53
"""What Linux 6.18 sends first; answered ENOSYS, it falls back to the other."""

DONT_MASK = 1 << 6
HANDLE_KILLPRIV_V2 = 1 << 28
INIT_EXT = 1 << 30
PASSTHROUGH = 1 << 37
HAS_RESEND = 1 << 39
"""The kernel can be made to send unanswered requests again."""

_NOTIFY_INVAL_INODE = 2
_NOTIFY_RESEND = 7
_NOTIFY_PRUNE = 9

_SECOND = 1_000_000_000
_IN_HEADER_SIZE = 40
_OUT_HEADER = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIIII")
_OPEN_IN = struct.Struct("=II")
_CREATE_IN = struct.Struct("=IIII")
_OPEN_OUT = struct.Struct("=QIi")
_ATTR = "QQQQQQIIIIIIIIII"
_ENTRY_OUT = struct.Struct("=QQQQII" + _ATTR)
_ATTR_OUT = struct.Struct("=QII" + _ATTR)
_FALLOCATE_IN = struct.Struct("=QQQII")
_LSEEK_IN = struct.Struct("=QQII")
_OFFSET_OUT = struct.Struct("=Q")
_COPY_FILE_RANGE_IN = struct.Struct("=QQQQQQQ")
_WRITE_OUT = struct.Struct("=II")
_INVAL_INODE_OUT = struct.Struct("=Qqq")
_PRUNE_OUT = struct.Struct("=IIQ")
_BACKING_MAP = struct.Struct("=iIQ")

_OPEN_KILL_SUIDGID = 1
_FOPEN_DIRECT_IO = 1 << 0
_FOPEN_KEEP_CACHE = 1 << 1
_FOPEN_NONSEEKABLE = 1 << 2
_FOPEN_PASSTHROUGH = 1 << 7

BACKING_OPEN = 0x4010E501
"""_IOW(229, 1, struct fuse_backing_map)"""
BACKING_CLOSE = 0x4004E502
"""_IOW(229, 2, uint32_t)"""

MAX_COPY = 0xFFFFF000
"""The most that a reply to COPY_FILE_RANGE can report, down to a whole page."""


@dataclass(frozen=True, slots=True)
class Init:
    """The kernel's INIT request: its protocol version and the flags that it offers."""

    major: int
    minor: int
    flags: int


@dataclass(frozen=True, slots=True)
class Open:
    """A request to open a file; `kill_suidgid` as in `lockfs.kernel.session.Current`."""

    flags: int
    kill_suidgid: bool


@dataclass(frozen=True, slots=True)
class Create:
    """A request to make a file and open it."""

    flags: int
    mode: int
    umask: int
    kill_suidgid: bool
    name: bytes


class Attributes(NamedTuple):
    """What struct fuse_entry_out tells of a file.  Times in nanoseconds since 1970, timeouts in seconds."""

    node: int
    generation: int
    entry_timeout: float
    attr_timeout: float
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    blksize: int


@dataclass(frozen=True, slots=True)
class Fallocate:
    """A request to allocate or free space."""

    fh: int
    offset: int
    length: int
    mode: int


@dataclass(frozen=True, slots=True)
class Lseek:
    """A request for the next hole, or the next data."""

    fh: int
    offset: int
    whence: int


@dataclass(frozen=True, slots=True)
class CopyFileRange:
    """A request to copy inside the storage."""

    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    length: int
    flags: int


def parse_init(request: bytes) -> Init:
    """Parse a whole INIT request, header included."""
    # Kernels before 5.17 send no more than 32 flags.
    body = request[_IN_HEADER_SIZE:].ljust(_INIT_IN.size, b"\0")
    major, minor, _readahead, flags, more = _INIT_IN.unpack_from(body)
    return Init(major, minor, flags | more << 32 if flags & INIT_EXT else flags)


def parse_open(body: bytes) -> Open:
    """Parse struct fuse_open_in.  Raises struct.error if it is too short, as all of these do."""
    flags, open_flags = _OPEN_IN.unpack_from(body)
    return Open(flags, bool(open_flags & _OPEN_KILL_SUIDGID))


def parse_create(body: bytes) -> Create:
    """Parse struct fuse_create_in and the name after it."""
    flags, mode, umask, open_flags = _CREATE_IN.unpack_from(body)
    name, _, _ = body[_CREATE_IN.size :].partition(b"\0")
    return Create(flags, mode, umask, bool(open_flags & _OPEN_KILL_SUIDGID), name)


def open_out(fh: int, backing_id: int, *, direct_io: bool, keep_cache: bool, nonseekable: bool) -> bytes:
    """Return struct fuse_open_out.  With a backing id the others do not count: the kernel answers most with EIO."""
    if backing_id:
        return _OPEN_OUT.pack(fh, _FOPEN_PASSTHROUGH, backing_id)
    flags = direct_io * _FOPEN_DIRECT_IO | keep_cache * _FOPEN_KEEP_CACHE | nonseekable * _FOPEN_NONSEEKABLE
    return _OPEN_OUT.pack(fh, flags, 0)


def entry_out(found: Attributes) -> bytes:
    """Return struct fuse_entry_out."""
    entry, entry_ns = _seconds(round(found.entry_timeout * _SECOND))
    attr, attr_ns = _seconds(round(found.attr_timeout * _SECOND))
    return _ENTRY_OUT.pack(found.node, found.generation, entry, attr, entry_ns, attr_ns, *_attr(found))


def attr_out(found: Attributes) -> bytes:
    """Return struct fuse_attr_out."""
    attr, attr_ns = _seconds(round(found.attr_timeout * _SECOND))
    return _ATTR_OUT.pack(attr, attr_ns, 0, *_attr(found))


def _attr(found: Attributes) -> tuple[int, ...]:
    atime, atime_ns = _seconds(found.atime_ns)
    mtime, mtime_ns = _seconds(found.mtime_ns)
    ctime, ctime_ns = _seconds(found.ctime_ns)
    return (
        found.node, found.size, found.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        found.mode, found.nlink, found.uid, found.gid, found.rdev, found.blksize, 0,
    )  # fmt: skip


def _seconds(nanoseconds: int) -> tuple[int, int]:
    seconds, rest = divmod(nanoseconds, _SECOND)
    return seconds & 0xFFFFFFFFFFFFFFFF, rest  # the kernel takes it as signed


def parse_fallocate(body: bytes) -> Fallocate:
    """Parse struct fuse_fallocate_in."""
    fh, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(body)
    return Fallocate(fh, offset, length, mode)


def parse_lseek(body: bytes) -> Lseek:
    """Parse struct fuse_lseek_in."""
    fh, offset, whence, _ = _LSEEK_IN.unpack_from(body)
    return Lseek(fh, offset, whence)


def parse_copy_file_range(body: bytes) -> CopyFileRange:
    """Parse struct fuse_copy_file_range_in."""
    return CopyFileRange(*_COPY_FILE_RANGE_IN.unpack_from(body))


def offset_out(value: int) -> bytes:
    """Return struct fuse_lseek_out, or fuse_copy_file_range_out, which is the same."""
    return _OFFSET_OUT.pack(value)


def write_out(size: int) -> bytes:
    """Return struct fuse_write_out, which answers COPY_FILE_RANGE."""
    return _WRITE_OUT.pack(size, 0)


def backing_map(fd: int, flags: int) -> bytes:
    """Return struct fuse_backing_map."""
    return _BACKING_MAP.pack(fd, flags, 0)


def backing_id(number: int) -> bytes:
    """Return the argument of BACKING_CLOSE."""
    return struct.pack("=I", number)


def inval_inode(node: int, offset: int, length: int) -> bytes:
    """Return a whole notification: forget attributes and, from an *offset* that is not negative, data."""
    return _notification(_NOTIFY_INVAL_INODE, _INVAL_INODE_OUT.pack(node, offset, length))


def resend() -> bytes:
    """Return a whole notification: send all unanswered requests again."""
    return _notification(_NOTIFY_RESEND, b"")


def prune(nodes: Sequence[int]) -> bytes:
    """Return a whole notification: forget these nodes if nobody uses them."""
    return _notification(_NOTIFY_PRUNE, _PRUNE_OUT.pack(len(nodes), 0, 0) + struct.pack(f"={len(nodes)}Q", *nodes))


def _notification(code: int, body: bytes) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, 0) + body
