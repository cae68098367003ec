"""A backend in memory with a second host, whose calls can be made to hang; and a table with it.

The backend checks what lockd promises it: calls for one image never overlap, no grant is taken twice or
given back twice.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import trio

from lockfs.backend import Busy, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.errors import LockUnavailable
from lockfs.linux.closer import Closer
from lockfs.linux.deadline import Deadline
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.events import Events
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Mounted, Share
from lockfs.lockd.storage import Storage
from lockfs.lockd.table import Ask, Table
from lockfs.protocol import messages

DEV = 7
OTHER = Holder("other-host", Mode.EXCLUSIVE, 99, "qemu")


@dataclass
class FakeBackend:
    """`elsewhere` are images that another host has, `hang` those whose calls wait for the event, as in a
    thread: they cannot be cancelled, `gone` those whose locks are not there any more.  `calls` is what was
    asked.
    """

    excludes: bool = True
    deadline: Deadline | None = None
    elsewhere: dict[int, Holder] = field(default_factory=dict)
    hang: dict[int, trio.Event] = field(default_factory=dict)
    fail: dict[int, Exception] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    delay: float = 0.0
    calls: list[str] = field(default_factory=list)
    granted: dict[int, Grant] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    inherited: trio.Event = field(default_factory=trio.Event)
    others: Sequence[Host] = ()
    _busy: set[int] = field(default_factory=set)
    _losses: tuple[trio.MemorySendChannel[Grant], trio.MemoryReceiveChannel[Grant]] = field(
        default_factory=lambda: trio.open_memory_channel[Grant](10)
    )

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def _call(self, name: str, ino: int) -> None:
        self.calls.append(f"{name} {ino}")
        if ino in self._busy:
            self.wrong.append(f"{name} {ino} overlaps another call")
        self._busy.add(ino)
        try:
            with trio.CancelScope(shield=True):
                if self.delay:
                    await trio.sleep(self.delay)
                if ino in self.hang:
                    await self.hang[ino].wait()
        finally:
            self._busy.discard(ino)
        if ino in self.fail:
            raise self.fail[ino]

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        await self._call(f"acquire {mode.value}", image.ino)
        if image.ino in self.granted:
            self.wrong.append(f"{image.ino} is acquired twice")
        if image.ino in self.elsewhere:
            raise Busy(self.elsewhere[image.ino])
        os.fstat(image.fd)
        self.granted[image.ino] = Grant(image, mode)
        return self.granted[image.ino]

    async def inherit(self) -> None:
        self.inherited.set()

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        await self._call(f"adopt {mode.value}", image.ino)
        if image.ino in self.granted:
            self.wrong.append(f"{image.ino} is taken up twice")
        if image.ino in self.gone:
            raise GrantLost("it is gone")
        self.granted[image.ino] = Grant(image, mode, token, list(keep))
        return self.granted[image.ino]

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        await self._call(f"convert {mode.value}", grant.image.ino)
        if grant.image.ino in self.elsewhere and mode is Mode.EXCLUSIVE:
            raise Busy(self.elsewhere[grant.image.ino])
        grant.mode = mode

    async def release(self, grant: Grant) -> None:
        await self._call("release", grant.image.ino)
        os.fstat(grant.image.fd)
        if self.granted.pop(grant.image.ino, None) is not grant:
            self.wrong.append(f"{grant.image.ino} is released but was not granted")

    async def inspect(self, image: Image) -> Holder | None:
        await self._call("inspect", image.ino)
        return self.elsewhere.get(image.ino)

    async def hosts(self) -> Sequence[Host]:
        return self.others

    async def confirm_dead(self, host: str) -> str:
        self.calls.append(f"confirm-dead {host}")
        if host not in [other.name for other in self.others]:
            raise Denied(f"there is no host '{host}'")
        return host

    async def fenced(self, grant: Grant) -> None:
        self.calls.append(f"fenced {grant.image.ino}")

    def lose(self, grant: Grant) -> None:
        self._losses[0].send_nowait(grant)

    async def lost(self) -> AsyncIterator[Grant]:
        async for grant in self._losses[1]:
            yield grant


class Lab:
    """A table with one share on a `FakeBackend` and two mounts of it."""

    def __init__(self, nursery: trio.Nursery, backend: FakeBackend) -> None:
        self.backend = backend
        self.events = Events()
        self.table = Table(self.events)
        self.closer = Closer("lab")
        self.share = self.make_share("/srv", backend, nursery)
        self.a, self.b = (self.mount(self.share, name) for name in "ab")
        self.fds: list[int] = []

    def make_share(self, source: str, backend: FakeBackend, nursery: trio.Nursery) -> Share:
        top = Descriptor(os.open("/", os.O_RDONLY), self.closer)
        top.close()
        storage = Storage(nursery, source)
        storage.closer = self.closer
        return Share(DEV, 1, source, "fake", {}, top, backend, storage)

    def mount(self, share: Share, name: str) -> Mounted:
        mounted = Mounted(name, messages.Mount(share.source, f"/mnt/{name}", "ext4", {}, "fake"), 1, share)
        share.mounts[name] = mounted
        return mounted

    async def acquire(
        self,
        owner: str,
        ino: int = 1,
        mode: Mode = Mode.EXCLUSIVE,
        *,
        wait: float = 0.0,
        mounted: Mounted | None = None,
        node: int = 0,
    ) -> Lock:
        fd = os.open("/dev/null", os.O_RDWR)
        self.fds.append(fd)
        descriptor = Descriptor(fd, self.closer)
        image = Image(fd, DEV, ino, b"img", b"/mnt/img")
        holder = Holder("this-host", mode, 1, owner, path="/mnt/img")
        return await self.table.acquire(Ask(mounted or self.a, image, descriptor, mode, owner, holder, wait, node))

    async def release(
        self, owner: str, ino: int = 1, mode: Mode = Mode.EXCLUSIVE, *, mounted: Mounted | None = None
    ) -> None:
        await self.table.release(mounted or self.a, DEV, ino, owner, mode)

    def open_fds(self) -> list[int]:
        """Return the descriptors given to the table that are still open."""
        found = []
        for fd in self.fds:
            try:
                os.fstat(fd)
            except OSError:
                continue
            found.append(fd)
        return found


class StorageError(LockUnavailable):
    """What a backend says whose storage fails."""
