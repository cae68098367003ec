"""The records of the journal, as bytes and back.  Pure.

A record is its length and its CRC-32, 32 bits each, and a MessagePack array.  The last record may be torn: reading ends
at the first one that is not whole.  `FORMAT` changes with every change that an older or newer daemon would misread.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import msgspec

from lockfs.protocol.messages import ModeName, Owner

FORMAT = 1
_FRAME = struct.Struct("<II")


class Record(msgspec.Struct, frozen=True, array_like=True):
    """The base of them all."""


class Begin(Record, frozen=True, tag=1):
    """The first one.  `request` has the fields of `lockfs.fs.daemon.Request`, `init` the kernel's INIT request.

    The last four are the highest numbers given so far; no number is given twice.
    """

    format: int
    mount_id: str
    dev: int
    data: str
    fstype: str
    init: bytes
    request: dict[str, str]
    last_node: int = 0
    last_serial: int = 0
    last_number: int = 0
    last_backing_id: int = 0


class Found(Record, frozen=True, tag=2):
    """A node that the kernel gets to know: its inode, and the name by which it was found.

    `handle` is None where the filesystem has no file handles.
    """

    node: int
    dev: int
    ino: int
    parent: int
    name: bytes
    handle: bytes | None
    lookups: int = 0
    pinned: bool = False


class Looked(Record, frozen=True, tag=3):
    """The kernel's count of lookups of a node has changed by so much."""

    node: int
    count: int


class Moved(Record, frozen=True, tag=4):
    """A node has another name."""

    node: int
    parent: int
    name: bytes


class Pinned(Record, frozen=True, tag=5):
    """A node may have lost its last name."""

    node: int


class Fenced(Record, frozen=True, tag=6):
    """A node is fenced."""

    node: int


class Forgotten(Record, frozen=True, tag=7):
    """The kernel knows a node no more."""

    node: int


class Hold(Record, frozen=True):
    """The right of one open to an image."""

    owner: Owner
    mode: ModeName


class Opened(Record, frozen=True, tag=8):
    """An open file.  `flags` are those with which the daemon opened it, as user `uid` and group `gid`.

    `unique` is the request, `serial` a number that is never used again.  `hold`, `manager`, `counted`, `mappable` and
    `uncached` are as in `lockfs.fs.handles.FileHandle`.
    """

    serial: int
    number: int
    node: int
    flags: int
    writable: bool
    uid: int
    gid: int
    unique: int
    counted: bool
    mappable: bool
    hold: Hold | None
    manager: Owner | None
    answered: bool = False
    uncached: bool = False


class Answered(Record, frozen=True, tag=20):
    """The kernel has taken the answer that a file is open."""

    serial: int


class Took(Record, frozen=True, tag=9):
    """The handle of a manager has got its hold."""

    serial: int
    hold: Hold


class Closed(Record, frozen=True, tag=10):
    """A file was closed.  With `lingers` its hold stays, since the file may be mapped still."""

    serial: int
    lingers: bool


class Freed(Record, frozen=True, tag=11):
    """A hold that lingered is given back."""

    serial: int


class Backed(Record, frozen=True, tag=12):
    """What is open of a node bypasses the daemon by this backing id."""

    node: int
    backing_id: int


class Unbacked(Record, frozen=True, tag=13):
    """A backing id was given back."""

    backing_id: int


class OpenedDirectory(Record, frozen=True, tag=14):
    """An open directory."""

    number: int
    node: int
    unique: int


class Listed(Record, frozen=True, tag=15):
    """The listing of an open directory that offsets point into."""

    number: int
    names: list[bytes]


class ClosedDirectory(Record, frozen=True, tag=16):
    """A directory was closed."""

    number: int


class Intended(Record, frozen=True, tag=17):
    """A request is about to be carried out.  What the fields mean depends on the handler."""

    unique: int
    identity: tuple[int, int] = (0, 0)
    other: tuple[int, int] = (0, 0)
    size: int = 0


class Done(Record, frozen=True, tag=18):
    """A request was carried out; its answer may have been lost.  `node` or `value` is what the answer tells."""

    unique: int
    node: int = 0
    value: int = 0


class Undone(Record, frozen=True, tag=19):
    """A request that was about to be carried out has changed nothing."""

    unique: int


Any = (
    Begin | Found | Looked | Moved | Pinned | Fenced | Forgotten | Opened | Took | Closed | Freed | Backed | Unbacked
    | Answered | OpenedDirectory | Listed | ClosedDirectory | Intended | Done | Undone
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Any)


def encode(record: Record) -> bytes:
    """Return a record as bytes."""
    body = _encoder.encode(record)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def decode(data: bytes | memoryview) -> Iterator[Any]:
    """Yield the records in *data* up to the first one that is not whole.

    Raises msgspec.DecodeError for one that is whole and not known: it was written by another version.
    """
    view = memoryview(data)
    at = 0
    while len(view) - at >= _FRAME.size:
        size, check = _FRAME.unpack_from(view, at)
        body = view[at + _FRAME.size : at + _FRAME.size + size]
        if not size or len(body) < size or zlib.crc32(body) != check:
            return
        yield _decoder.decode(body)
        at += _FRAME.size + size
