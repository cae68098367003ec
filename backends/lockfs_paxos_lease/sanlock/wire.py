"""The messages of sanlock's socket protocol, version 0.1: pure, bytes in and out.

A message is a header of eight 32-bit words and a body of C structures in the byte order of the host (the daemon and its
clients are on one machine).  A reply repeats the header, with the result in `data`.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

MAGIC = 0x04282010
PROTOCOL = 1
SELF = -1
"""As `data2` of a command about leases: the process that this connection stands for."""
MAX_RESOURCES = 8
"""Leases that one connection can have, and one command can name."""
MAX_BODY = 4 << 20
"""Bytes.  No reply is as long as that: a longer one is none."""

_HEADER = struct.Struct("=6I2i")
_DISK = struct.Struct("=1024sQII")
_RESOURCE = struct.Struct("=48s48sQQIIII")
_OPTIONS = struct.Struct("=48sII")
_LOCKSPACE = struct.Struct("=48sQI4x")
_HOST = struct.Struct("=QQQII")
_RINDEX = struct.Struct("=IIQ48s")
_RENTRY = struct.Struct("=48sQII")
_STATE = struct.Struct("=IIIIQ48sII")
_KILLPATH = struct.Struct("=128s128s")

HEADER_BYTES = _HEADER.size
LOCKSPACE_BYTES = _LOCKSPACE.size + _DISK.size
RESOURCE_BYTES = _RESOURCE.size
HOST_BYTES = _HOST.size
STATE_BYTES = _STATE.size
NAME_BYTES = 48
PATH_BYTES = 1023
KILLPATH_BYTES = 127


class Command(enum.IntEnum):
    """What a client can ask for, as far as this one does."""

    REGISTER = 1
    ADD_LOCKSPACE = 2
    REM_LOCKSPACE = 3
    STATUS = 5
    ACQUIRE = 7
    RELEASE = 8
    INQUIRE = 9
    RESTRICT = 10
    REQUEST = 11
    HOST_STATUS = 15
    INQ_LOCKSPACE = 16
    KILLPATH = 17
    WRITE_LOCKSPACE = 18
    WRITE_RESOURCE = 19
    READ_LOCKSPACE = 20
    READ_RESOURCE = 21
    GET_LOCKSPACES = 22
    GET_HOSTS = 23
    READ_RESOURCE_OWNERS = 24
    CONVERT = 27
    VERSION = 28
    SET_CONFIG = 33
    FORMAT_RINDEX = 35
    LOOKUP_RINDEX = 37
    CREATE_RESOURCE = 38
    DELETE_RESOURCE = 39


class AcquireFlag(enum.IntFlag):
    """How to acquire."""

    LVB = 1
    ORPHAN = 2
    OWNER_NOWAIT = 8


class ResourceFlag(enum.IntFlag):
    """What a lease is, and what sizes it has; the sizes are 0 where its record is to be asked."""

    LVER = 1
    NUM_HOSTS = 2
    SHARED = 4
    PERSISTENT = 8


class Request(enum.IntEnum):
    """How the holder is to be moved to let go."""

    FORCE = 1
    GRACEFUL = 2


class HostState(enum.IntEnum):
    """How the daemon judges another host."""

    UNKNOWN = 1
    FREE = 2
    LIVE = 3
    FAIL = 4
    DEAD = 5


class ProtocolError(ValueError):
    """Bytes that are no message of the protocol, or a value that does not fit into one."""


@dataclass(frozen=True, slots=True)
class Header:
    """The head of a message.  `length` counts it, too."""

    command: int
    flags: int = 0
    length: int = HEADER_BYTES
    data: int = 0
    data2: int = 0

    def encode(self) -> bytes:
        """Return the bytes."""
        return _HEADER.pack(MAGIC, PROTOCOL, self.command, self.flags, self.length, 0, self.data, self.data2)

    def with_length(self, body: int) -> Header:
        """Return the head of a message with *body* more bytes."""
        return replace(self, length=HEADER_BYTES + body)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Raises `ProtocolError`."""
        if len(data) != HEADER_BYTES:
            raise ProtocolError("a header that is cut off")
        magic, _version, command, flags, length, _seq, result, more = _HEADER.unpack(data)
        if magic != MAGIC:
            raise ProtocolError(f"no message of sanlock: magic number {magic:#x}")
        return cls(command, flags, length, result, more)


@dataclass(frozen=True, slots=True)
class Disk:
    """A place: a file or device, and where in it (bytes)."""

    path: bytes
    offset: int = 0

    def encode(self) -> bytes:
        """Raises `ProtocolError` for a path that is too long."""
        return _DISK.pack(fitting(self.path, PATH_BYTES, "path"), self.offset, 0, 0)

    @classmethod
    def decode(cls, data: bytes) -> Disk:
        """The opposite of `encode`."""
        path, offset, _, _ = _unpack(_DISK, data)
        return cls(_text(path), offset)


@dataclass(frozen=True, slots=True)
class Lockspace:
    """A lockspace, this host's id in it, and where it lies.  `flags` of one that the daemon lists: 1 is being joined, 2
    is being left.
    """

    name: bytes
    host_id: int = 0
    disk: Disk = field(default=Disk(b""))
    flags: int = 0

    def encode(self) -> bytes:
        """Raises `ProtocolError` for a name or path that is too long."""
        name = fitting(self.name, NAME_BYTES, "name of a lockspace")
        return _LOCKSPACE.pack(name, self.host_id, self.flags) + self.disk.encode()

    @classmethod
    def decode(cls, data: bytes) -> Lockspace:
        """The opposite of `encode`."""
        name, host_id, flags = _unpack(_LOCKSPACE, data[: _LOCKSPACE.size])
        return cls(_text(name), host_id, Disk.decode(data[_LOCKSPACE.size :]), flags)


@dataclass(frozen=True, slots=True)
class Resource:
    """A lease and where it lies."""

    lockspace: bytes
    name: bytes
    disk: Disk = field(default=Disk(b""))
    lver: int = 0
    flags: int = 0
    num_hosts: int = 0

    def encode(self, *, disks: bool = True) -> bytes:
        """Return the bytes, with the place if *disks*.  Raises `ProtocolError` for a name or path that is too long."""
        space = fitting(self.lockspace, NAME_BYTES, "name of a lockspace")
        name = fitting(self.name, NAME_BYTES, "name of a lease")
        head = _RESOURCE.pack(space, name, self.lver, 0, self.num_hosts, 0, self.flags, 1)
        return head + self.disk.encode() if disks else head

    @classmethod
    def decode(cls, data: bytes) -> Resource:
        """Return a lease without its place."""
        space, name, lver, _, data32, _, flags, _ = _unpack(_RESOURCE, data)
        return cls(_text(space), _text(name), lver=lver, flags=flags, num_hosts=data32)


@dataclass(frozen=True, slots=True)
class Host:
    """A host id as the daemon sees it.  `timestamp` is the last one it read, in seconds of that host's clock."""

    host_id: int
    generation: int
    timestamp: int
    io_timeout: int
    flags: int

    @property
    def state(self) -> HostState:
        """How the daemon judges the host; only `GET_HOSTS` says."""
        value = self.flags & 0xF
        return HostState(value) if value in HostState.__members__.values() else HostState.UNKNOWN

    @classmethod
    def decode(cls, data: bytes) -> Host:
        """Raises `ProtocolError`."""
        return cls(*_unpack(_HOST, data))


@dataclass(frozen=True, slots=True)
class State:
    """One record of a status: what it is about, and ``key=value`` words about it."""

    kind: int
    data32: int
    data64: int
    name: bytes
    length: int
    words: dict[str, str] = field(default_factory=dict)

    @classmethod
    def decode(cls, data: bytes) -> State:
        """Return the record without its words, which are the next `length` bytes."""
        kind, _, data32, _, data64, name, length, _ = _unpack(_STATE, data)
        return cls(kind, data32, data64, _text(name), length)

    def with_words(self, text: bytes) -> State:
        """Return the same with its words."""
        pairs = (word.partition("=") for word in _text(text).decode(errors="backslashreplace").split())
        words = {key: value for key, _, value in pairs}
        return State(self.kind, self.data32, self.data64, self.name, self.length, words)


@dataclass(frozen=True, slots=True)
class Rindex:
    """An index of the leases on a volume."""

    lockspace: bytes
    disk: Disk
    max_resources: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        """Raises `ProtocolError` for a name or path that is too long."""
        name = fitting(self.lockspace, NAME_BYTES, "name of a lockspace")
        return _RINDEX.pack(self.flags, self.max_resources, 0, name) + self.disk.encode()


@dataclass(frozen=True, slots=True)
class Rentry:
    """A lease in the index: its name and where it begins (bytes)."""

    name: bytes
    offset: int = 0

    def encode(self) -> bytes:
        """Raises `ProtocolError` for a name that is too long."""
        return _RENTRY.pack(fitting(self.name, NAME_BYTES, "name of a lease"), self.offset, 0, 0)

    @classmethod
    def decode(cls, data: bytes) -> Rentry:
        """The opposite of `encode`."""
        name, offset, _, _ = _unpack(_RENTRY, data)
        return cls(_text(name), offset)


@dataclass(frozen=True, slots=True)
class Held:
    """A lease that a client has.  `lver` is None if it shares it."""

    lockspace: bytes
    name: bytes
    disk: Disk
    lver: int | None


def held(text: bytes) -> list[Held]:
    """Return the leases of an ``INQUIRE``: ``LOCKSPACE:NAME:PATH:OFFSET:LVER`` or ``:SH``, with blanks between them.

    Raises `ProtocolError`.
    """
    found = []
    for word in _split(_text(text), b" "):
        parts = [_unescaped(part) for part in _split(word, b":")]
        if len(parts) != 5 or not parts[3].isdigit() or not (parts[4] == b"SH" or parts[4].isdigit()):
            raise ProtocolError(f"a lease that is described by {word!r}")
        lver = None if parts[4] == b"SH" else int(parts[4])
        found.append(Held(parts[0], parts[1], Disk(parts[2], int(parts[3])), lver))
    return found


def _split(text: bytes, at: bytes) -> list[bytes]:
    """Split at each *at* that no backslash precedes."""
    parts = re.findall(rb"(?:\\.|[^\\" + at + rb"])+", text, re.DOTALL)
    return [bytes(part) for part in parts]


def _unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", text, flags=re.DOTALL)


def acquire_body(resources: Sequence[Resource]) -> bytes:
    """Return the body of ``ACQUIRE``."""
    return b"".join(each.encode() for each in resources) + _OPTIONS.pack(b"", 0, 0)


def killpath_body(program: bytes, arguments: Sequence[bytes]) -> bytes:
    """Return the body of ``KILLPATH``: a program, and at most seven arguments.  Raises `ProtocolError`."""
    if len(arguments) > 7:
        raise ProtocolError("more than seven arguments")
    # The daemon splits the text at blanks, and takes a blank or backslash behind a backslash as it stands.
    escaped = (each.replace(b"\\", b"\\\\").replace(b" ", b"\\ ") for each in arguments)
    words = b" ".join(escaped)
    return _KILLPATH.pack(fitting(program, KILLPATH_BYTES, "program"), fitting(words, KILLPATH_BYTES, "arguments"))


def records(size: int, data: bytes) -> list[bytes]:
    """Cut a body into records of *size* bytes.  Raises `ProtocolError` if something is left."""
    if len(data) % size:
        raise ProtocolError("a record that is cut off")
    return [data[at : at + size] for at in range(0, len(data), size)]


def fitting(value: bytes, most: int, what: str) -> bytes:
    """Return *value* if it has no more than *most* bytes and no zero.  Raises `ProtocolError`."""
    if len(value) > most or b"\0" in value:
        raise ProtocolError(f"a {what} has at most {most} bytes, none of them zero: {value!r}")
    return value


def _text(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


def _unpack(form: struct.Struct, data: bytes) -> tuple[Any, ...]:
    if len(data) != form.size:
        raise ProtocolError(f"{len(data)} bytes where {form.size} were expected")
    return form.unpack(data)
