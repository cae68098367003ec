"""The interface between lockd and the way in which hosts agree on locks, and how such backends are found.

A backend is one async object in lockd for each mounted share.  lockd alone calls it, and knows the
holders on this host; the backend knows other hosts.  Calls for one image never overlap; calls for
different images do.  A backend does storage I/O in worker threads only, never on the event loop.

A backend package announces itself by an entry point of the group ``lockfs.backends`` that names a `Spec`.
The module of the spec is imported by the mount helper to check options, so it must be light; what it loads with
`Spec.load` may be as heavy as it likes.
"""

from __future__ import annotations

import enum
import errno
import importlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, cast

from lockfs.errors import Denied, LockfsError, LockUnavailable, UsageError
from lockfs.linux.deadline import Deadline
from lockfs.text import from_bytes

if TYPE_CHECKING:
    import argparse

    from lockfs.options import Option

ENTRY_POINTS = "lockfs.backends"


class Mode(enum.Enum):
    """How an image is locked: by one owner, or by any number that know of each other (or only read)."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True, slots=True)
class Image:
    """One image as a backend sees it.

    `fd` is an open file description of its own, open for writing where the storage allows it, that stays
    open as long as the lock is held; a lock that belongs to an open file description may be put on it.
    `dev` and `ino` are those of the storage as this host sees it.  `relative` is the path below the source, `path` the
    path that programs use (mountpoint and all); both are bytes.
    """

    fd: int
    dev: int
    ino: int
    relative: bytes
    path: bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds an image, as far as anybody can tell.

    `since` is wall-clock time, for people; `token` a fencing token.
    """

    host: str
    mode: Mode
    pid: int = 0
    command: str = ""
    vm: str = ""
    since: float = 0.0
    path: str = ""
    token: int | None = None

    def __str__(self) -> str:
        who = [f"host {self.host}"]
        if self.pid:
            who.append(f"process {self.pid}" + (f" ({self.command})" if self.command else ""))
        elif self.command:
            who.append(self.command)
        if self.vm:
            who.append(f"VM {self.vm}")
        return ", ".join(who)


UNKNOWN_HOST = "unknown"


class Busy(LockfsError):
    """Another host holds the image in a mode that excludes the one asked for; nothing was granted."""

    errno = errno.EBUSY

    def __init__(self, holder: Holder) -> None:
        super().__init__(f"held by {holder}")
        self.holder = holder


class GrantLost(LockfsError):
    """The lock that was to be taken up is not there any more; nothing was taken."""


@dataclass(slots=True)
class Grant:
    """A lock that the backend has granted to this host.

    `keep` lists descriptors that must stay open as long as the lock is wanted, for whoever shares in keeping it;
    they belong to the backend.  `token` grows with each change of holder, where the backend has such a number.
    `forced` is set before the grant is told lost for the sake of somebody who may demand the image: then those who
    have it open are ended, and not only fenced, so that it gets free.
    """

    image: Image
    mode: Mode
    token: int | None = None
    keep: Sequence[int] = ()
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """One host that shares locks: its name, its state and when it was last seen.

    States are ``live``, ``failing`` (it has not renewed in time, but might still write), ``dead`` (others may take what
    it held), ``free`` (it has left) and ``unknown`` (it was not watched for long enough).  `last_seen` is wall-clock
    time, for people.  `number` is its host id where the backend has such, else 0; `here` is true for this host.
    """

    name: str
    state: str
    last_seen: float | None = None
    detail: str = ""
    number: int = 0
    here: bool = False
    holds: Sequence[str] = ()
    """What it holds, as far as this host can tell: paths, or the names of leases."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a backend is given: the share, the options of its own table, and the name of this host.

    `source_fd` is a directory descriptor of the share's top, `source` its path for messages, `fstype` and
    `fsoptions` how the storage is mounted on this host.
    """

    source_fd: int
    source: bytes
    mountpoint: bytes
    fstype: str
    fsoptions: Mapping[str, str]
    host: str
    options: Mapping[str, object]
    run_dir: str


class Backend(Protocol):
    """What lockd asks of a backend.  Every method may raise `LockUnavailable`: the lock service cannot say."""

    excludes: bool
    """False for a backend that grants everything; then lockd refuses nobody on this host either."""

    @property
    def deadline(self) -> Deadline | None:
        """Until when all grants are safe, for locks that expire unless they are renewed; None for others.

        There when `start` returns, and moved whenever the locks were renewed.  Where data goes through the mount
        daemon, no write begins while it is late; when it is lost they fail.
        """

    async def start(self) -> None:
        """Check that the share can keep the promise, and begin.  Raises `LockfsError` if it cannot."""

    async def stop(self) -> None:
        """End.  All grants were released before."""

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Take the lock, without waiting for another host.  Raises `Busy` if one has it.

        *holder* is what other hosts may be told about who is going to hold it.
        """

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """Take up a lock that the last lockd of this host was granted, and that a mount still goes by.

        Called after `start`, and before any other call for the image.  *mode* is the strongest that is held, *token*
        that of the grant.  `image.fd` is the open file description that the lock was put on, *keep* are those of
        `Grant.keep` in their order; both are what a mount has kept, and *keep* is the backend's if this returns, else
        it stays the caller's.

        Sees to it that the lock is there and has been all the time, and never takes one: raises `GrantLost` if it is
        not, or is weaker than *mode*.  The grant says what there is, which may be stronger.  If the storage does not
        answer in time, raise `LockUnavailable`: then lockd asks again, and the image counts as held meanwhile.  Or
        return the grant, and tell by `lost` if it turns out not to be safe.

        What the last lockd was granted and nobody takes up is free: locks in descriptors are gone with these; a backend
        that has written them to the storage gives them back when `acquire` is called next, or by `inherit`.
        """

    async def inherit(self) -> None:
        """Take note that all has been taken up of what the last lockd of this host was granted and is still in use.

        The rest is free: a backend that has written it to the storage gives it back now.  Not called where lockd cannot
        know for sure.
        """

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Change the mode of a grant.  Raises `Busy` and changes nothing if another host is in the way."""

    async def release(self, grant: Grant) -> None:
        """Give the lock back.  Afterwards another host gets it at once."""

    async def inspect(self, image: Image) -> Holder | None:
        """Say which other host holds the image; None if none does.  Never takes a lock."""

    async def hosts(self) -> Sequence[Host]:
        """List the hosts that share locks, as far as the backend knows."""

    async def confirm_dead(self, host: str) -> str:
        """Take an admin's word that a host (its name, or its number) is dead, so that what it held is free at once.

        Return its name.  Raises `Denied` if there is no such host, if it is seen to live, and from a backend that
        judges no hosts.  May take as long as a live host needs to show itself.
        """

    def lost(self) -> AsyncIterator[Grant]:
        """Yield each grant that is no longer safe to write under.  Never ends before `stop`."""

    async def fenced(self, grant: Grant) -> None:
        """Take note that nobody on this host can write any more under a grant that was lost.

        It stays a grant until it is released, which is when all have closed the image.  Also called for what could not
        be taken up (`adopt` raised `GrantLost`), of which the backend knows no grant, with one that tells the image; at
        the latest when all have closed that.
        """


@dataclass(frozen=True, slots=True)
class Command:
    """A command that a backend adds to ``lockfs``.

    `arguments` is ``module:callable``; the callable is given an `argparse.ArgumentParser`, adds what it needs, and sets
    the default ``run`` to what takes the parsed arguments and returns the exit code.
    """

    name: str
    summary: str
    arguments: str

    def fill(self, parser: argparse.ArgumentParser) -> None:
        """Import the command and let it add its arguments to *parser*."""
        _named(self.arguments)(parser)


@dataclass(frozen=True, slots=True)
class Spec:
    """A backend as its entry point names it: light enough for the mount helper to import.

    `factory` is ``module:callable``; the callable takes a `Context` and returns a `Backend`.
    """

    name: str
    summary: str
    factory: str
    options: Sequence[Option] = field(default=())
    commands: Sequence[Command] = field(default=())

    def load(self, context: Context) -> Backend:
        """Import the backend and make one for a share."""
        return cast(Backend, _named(self.factory)(context))


def _named(where: str) -> Callable[..., object]:
    module, _, attribute = where.partition(":")
    return cast("Callable[..., object]", getattr(importlib.import_module(module), attribute))


def installed() -> dict[str, str]:
    """Return the names of all installed backends, with the entry point of each."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def find(name: str) -> Spec:
    """Return the spec of the backend *name*.  Raises `UsageError`, which lists the installed ones."""
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return cast(Spec, point.load())
        except (ImportError, AttributeError) as error:
            hint = f"It is announced as {point.value}: install the package again, or remove it."
            raise UsageError(f"the backend '{name}' does not load: {error}", hint=hint) from error
    names = ", ".join(sorted(installed())) or "none"
    raise UsageError(f"unknown backend '{from_bytes(os.fsencode(name))}'", hint=f"Installed backends: {names}.")


def commands() -> list[Command]:
    """Return the commands of all installed backends; one that does not load has none."""
    found: list[Command] = []
    for name in sorted(installed()):
        try:
            found += find(name).commands
        except UsageError:
            continue
    return found


__all__ = [
    "UNKNOWN_HOST", "Backend", "Busy", "Command", "Context", "Denied", "Grant", "GrantLost", "Holder", "Host",
    "Image", "LockUnavailable", "Mode", "Spec", "commands", "find", "installed",
]  # fmt: skip
