"""What lockd writes down, so that a successor knows what it had: records, and what they add up to.

Pure.  A record is one line: the CRC-32 of the rest in hex, a space, JSON.  A line that was not written to its end is
ignored if it is the last one: what it would have said was not done yet, or will be said again by the mount.

Invariants:
* A hold is written down before the backend is asked for it, and before its mount is told; so what a mount believes to
  hold is written down.  The reverse does not hold: a mount that comes back says what is true.
* Each record says what is from then on, not what has changed; so to read one twice changes nothing.

`FORMAT` grows when an older lockd could misunderstand a record; `READABLE` are the formats that this one understands.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from lockfs.errors import SystemError_
from lockfs.protocol.messages import DataPath, HeldBy, Image, ModeName, Mount

FORMAT = 1
READABLE = frozenset({1})

Identity = tuple[int, int]
"""Device and inode number on the storage."""


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """The first record: of which format the others are, which lockd wrote it, and since which boot of which host."""

    format: int
    version: str
    host: str
    boot: str


class MountIs(msgspec.Struct, frozen=True, array_like=True, tag="mount"):
    """A mount is registered.

    *start* is the start time of its daemon *pid*, *top* is the source directory's identity.
    """

    mount_id: str
    mount: Mount
    pid: int
    start: int
    top: Identity
    since: float


class AttachedAs(msgspec.Struct, frozen=True, array_like=True, tag="attached"):
    """A mount serves, under this device number."""

    mount_id: str
    dev: int
    data: DataPath


class MountLeft(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """A mount is gone, and nobody can write by it any more."""

    mount_id: str


class HoldIs(msgspec.Struct, frozen=True, array_like=True, tag="hold"):
    """One owner is to hold an image through a mount, or holds it."""

    mount_id: str
    image: Image
    by: HeldBy


class HoldLeft(msgspec.Struct, frozen=True, array_like=True, tag="free"):
    """One owner holds an image through a mount no more."""

    mount_id: str
    dev: int
    ino: int
    owner: str
    mode: ModeName


class ImageLost(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """The lock of an image is no longer safe: all who hold it are being fenced."""

    dev: int
    ino: int


Record = Begin | MountIs | AttachedAs | MountLeft | HoldIs | HoldLeft | ImageLost


class OtherFormat(SystemError_):
    """The records are of a format that this lockd does not understand."""

    def __init__(self, found: Begin) -> None:
        super().__init__(
            f"the state of lockd {found.version} (format {found.format}) cannot be read by this version",
            hint=f"Run lockfs {found.version} on this host, or unmount all lockfs mounts first.",
        )


@dataclass(slots=True)
class ImageState:
    """What is held of one image through one mount, by owner and mode."""

    image: Image
    holds: dict[tuple[str, ModeName], HeldBy] = field(default_factory=dict)
    lost: bool = False

    @property
    def nodes(self) -> set[int]:
        """The numbers by which the kernel knows the file."""
        return {node for by in self.holds.values() for node in by.nodes}


@dataclass(slots=True)
class MountState:
    """One mount and what it holds.  `attached` is None before it serves."""

    mount: MountIs
    attached: AttachedAs | None = None
    images: dict[Identity, ImageState] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """What all records add up to.  `damaged` says that some could not be read, and were not the last."""

    begin: Begin | None = None
    mounts: dict[str, MountState] = field(default_factory=dict)
    damaged: bool = False

    def apply(self, record: Record) -> None:
        """Take one record into account.  Raises `OtherFormat`."""
        match record:
            case Begin():
                if record.format not in READABLE:
                    raise OtherFormat(record)
                self.begin = record
            case MountIs():
                if (known := self.mounts.get(record.mount_id)) is not None:
                    known.mount = record
                else:
                    self.mounts[record.mount_id] = MountState(record)
            case MountLeft():
                self.mounts.pop(record.mount_id, None)
            case ImageLost():
                for mount in self.mounts.values():
                    if (image := mount.images.get((record.dev, record.ino))) is not None:
                        image.lost = True
            case _:
                if (mounted := self.mounts.get(record.mount_id)) is not None:
                    _apply(mounted, record)

    def records(self) -> Iterator[Record]:
        """Return the fewest records that add up to this, without the first."""
        lost: set[Identity] = set()
        for mount_id, each in self.mounts.items():
            yield each.mount
            if each.attached is not None:
                yield each.attached
            for identity, image in each.images.items():
                yield from (HoldIs(mount_id, image.image, by) for by in image.holds.values())
                if image.lost:
                    lost.add(identity)
        yield from (ImageLost(*identity) for identity in lost)


def _apply(mounted: MountState, record: AttachedAs | HoldIs | HoldLeft) -> None:
    match record:
        case AttachedAs():
            mounted.attached = record
        case HoldIs(image=image, by=by):
            state = mounted.images.setdefault((image.dev, image.ino), ImageState(image))
            state.holds[by.owner.key, by.mode] = by
        case HoldLeft(dev=dev, ino=ino):
            state_or_none = mounted.images.get((dev, ino))
            if state_or_none is None:
                return
            state_or_none.holds.pop((record.owner, record.mode), None)
            if not state_or_none.holds:
                del mounted.images[dev, ino]


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """Return one record as a line."""
    text = _encoder.encode(record)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> Record:
    """Return the record of a line without its end.  Raises ValueError for what is none, `OtherFormat`."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("the checksum of a record is wrong")
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError as error:
        # A later version may have added to the first record, too; but not taken away from its beginning.
        if text.startswith(b'["begin",'):
            parts = msgspec.json.decode(text)
            raise OtherFormat(Begin(int(parts[1]), str(parts[2]), "", "")) from None
        raise ValueError(f"not a record: {error}") from None


def replay(data: bytes) -> State:
    """Return what the records in *data* add up to.  Raises `OtherFormat`."""
    state = State()
    lines = data.split(b"\n")
    for number, line in enumerate(lines):
        try:
            if line or number < len(lines) - 1:
                state.apply(decode(line))
        except ValueError:
            if number < len(lines) - 1:
                state.damaged = True
    return state


def lines(begin: Begin, records: Iterable[Record]) -> bytes:
    """Return records, after the first one, as they stand in a file."""
    return b"".join(map(encode, [begin, *records]))


__all__ = [
    "FORMAT", "READABLE", "AttachedAs", "Begin", "HoldIs", "HoldLeft", "Identity", "ImageLost", "ImageState", "MountIs",
    "MountLeft", "MountState", "OtherFormat", "Record", "State", "decode", "encode", "lines", "replay",
]  # fmt: skip
