"""The bodies of the requests that `lockfs.kernel.extra` serves, of notifications and of ioctls.  Pure.

From include/uapi/linux/fuse.h of Linux 6.18, protocol 7.45.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

FALLOCATE = 43
LSEEK = 46
COPY_FILE_RANGE = 47
COPY_FILE_RANGE_64 = 53
"""What Linux 6.18 sends first; answered ENOSYS, it falls back to the other."""

DONT_MASK = 1 << 6
HANDLE_KILLPRIV_V2 = 1 << 28
INIT_EXT = 1 << 30
PASSTHROUGH = 1 << 37

_NOTIFY_INVAL_INODE = 2
_NOTIFY_RESEND = 7
_NOTIFY_PRUNE = 9

_IN_HEADER_SIZE = 40
_OUT_HEADER = struct.Struct("=IiQ")
_INIT_IN = struct.Struct("=IIIII")
_FALLOCATE_IN = struct.Struct("=QQQII")
_LSEEK_IN = struct.Struct("=QQII")
_OFFSET_OUT = struct.Struct("=Q")
_COPY_FILE_RANGE_IN = struct.Struct("=QQQQQQQ")
_WRITE_OUT = struct.Struct("=II")
_INVAL_INODE_OUT = struct.Struct("=Qqq")
_PRUNE_OUT = struct.Struct("=IIQ")
_BACKING_MAP = struct.Struct("=iIQ")

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
    """Parse a whole INIT request, header included.  Raises struct.error if it is too short."""
    major, minor, _readahead, flags, more = _INIT_IN.unpack_from(request, _IN_HEADER_SIZE)
    return Init(major, minor, flags | more << 32 if flags & INIT_EXT else flags)


def parse_fallocate(body: bytes) -> Fallocate:
    """Parse struct fuse_fallocate_in.  Raises struct.error if it is too short, as all of these do."""
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
