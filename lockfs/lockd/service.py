"""The methods of the interface ``io.lockfs.Lockd``: from messages to the table and back."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import msgspec
import trio

import lockfs
from lockfs import text
from lockfs.backend import Holder, Image, Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd import hosts, nameless
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.events import Events
from lockfs.lockd.fence import Fencer
from lockfs.lockd.lock import Lock
from lockfs.lockd.share import Mounted
from lockfs.lockd.shares import Shares
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Ask, Table
from lockfs.lockd.upgrade import Version
from lockfs.protocol import messages
from lockfs.protocol.varlink import MESSAGE_LIMIT, ProtocolError
from lockfs.steps import step

LIST_BYTES = MESSAGE_LIMIT // 2
"""Bytes of locks in one answer; one lock more, and the envelope, fit in the other half."""
LIST_OWNERS = 200
"""Owners of one lock that are listed."""


@dataclass(slots=True)
class Client:
    """The other end of a connection; `mounted` is the mount whose life line it is."""

    pid: int
    uid: int
    mounted: Mounted | None = None


class Descriptors:
    """The descriptors that came with a call; `take` hands one out, and what is left is closed at the end."""

    def __init__(self, fds: Sequence[int]) -> None:
        self.left: dict[int, int] = dict(enumerate(fds))

    def peek(self, index: int) -> int:
        """Return a descriptor that stays here."""
        try:
            return self.left[index]
        except KeyError:
            raise ProtocolError(f"descriptor {index} did not come with the call") from None

    def take(self, index: int) -> int:
        """Return a descriptor that is the caller's from here on."""
        fd = self.peek(index)
        del self.left[index]
        return fd


@dataclass(slots=True)
class Answer:
    """A reply with the descriptors to send with it (they stay the table's), and what to undo if it cannot
    be sent.
    """

    parameters: msgspec.Struct
    fds: Sequence[int] = ()
    undo: Callable[[], Awaitable[None]] | None = field(default=None)


class Service:
    """What the interface does.  Methods raise `LockfsError` for what goes to the caller as an error."""

    def __init__(
        self,
        table: Table,
        shares: Shares,
        fencer: Fencer,
        succession: Succession,
        events: Events,
        run_dir: str,
        replace: Callable[[Version], Awaitable[None]],
    ) -> None:
        self._replace = replace
        self._table = table
        self._succession = succession
        self._shares = shares
        self._fencer = fencer
        self._events = events
        self._run_dir = run_dir
        self._since = time.time()
        self._connected: Counter[int] = Counter()
        self._hung_up = trio.Event()

    async def call(self, client: Client, request: msgspec.Struct, fds: Descriptors) -> Answer:
        """Do what *request* asks for, but for `Watch` and `Orders`."""
        match request:
            case messages.Acquire():
                return await self._acquire(client, request, fds)
            case messages.Release():
                mounted = self._shares.get(request.mount_id, client.pid)
                mode = Mode(request.mode)
                await self._table.release(mounted, request.dev, request.ino, request.owner, mode)
                return Answer(messages.Released())
            case messages.Inspect():
                return await self._inspect(client, request, fds)
            case messages.Register():
                return await self._register(client, request, fds)
            case messages.Attach():
                self._attach(client, request, fds)
                await self._shares.secure(self._shares.get(request.mount_id, client.pid))
                return Answer(messages.Attached())
            case messages.Detach():
                return Answer(messages.Detached(self._shares.detach(self._shares.get(request.mount_id, client.pid))))
            case messages.HandOver():
                await self._hand_over(client, request, fds)
                return Answer(messages.HandedOver())
            case messages.Resume():
                return await self._resume(client, request)
            case messages.Claim():
                mounted = self._shares.get(request.mount_id, client.pid)
                return Answer(messages.Claims(self._shares.claim(mounted, request)))
            case messages.Reclaim():
                mounted = self._shares.get(request.mount_id, client.pid)
                token, keep = self._table.kept_for(mounted, request.dev, request.ino)
                return Answer(messages.Reclaimed(token), keep)
            case messages.Entrust():
                self._entrust(client, request, fds)
                return Answer(messages.Entrusted())
            case messages.Dispose():
                nameless.dispose(self._shares.get(request.mount_id, client.pid), request.nodes)
                return Answer(messages.Noted())
            case messages.Fetch():
                nodes, kept = nameless.after(self._shares.get(request.mount_id, client.pid), request.after)
                return Answer(messages.Fetched(nodes), kept)
            case messages.Known():
                mounted = self._shares.get(request.mount_id, client.pid)
                return Answer(messages.KnownNodes(await self._shares.known(mounted, request.nodes)))
            case messages.TakeOver():
                mounted = self._shares.get(request.mount_id, client.pid)
                return await self._take_over(mounted)
            case messages.Obeyed():
                step("lockd.before-obeyed")
                self._shares.get(request.mount_id, client.pid).orders.obeyed(request.serial)
                return Answer(messages.Noted())
            case messages.Upgrade():
                await self._replace(Version(request.python, request.path))
                return Answer(messages.Upgrading())
            case messages.Replace():
                return Answer(messages.Replaced(await self._shares.replace_daemon(request.mount_id)))
            case messages.Fence():
                return Answer(messages.Fenced(await self._fencer.fence_these(request.images, request.reason)))
            case messages.Hosts():
                return Answer(await hosts.listed(self._shares.all(), request.source))
            case messages.ConfirmDead():
                shares = self._shares.all()
                return Answer(await hosts.confirm_dead(shares, request, client.pid, client.uid, self._events))
            case messages.ListLocks():
                return Answer(self._list(request.after))
            case messages.GetStatus():
                return Answer(self._status())
            case _:
                raise ProtocolError(f"{type(request).__name__} is not a call")

    def watch(self, drop: Callable[[], None]) -> AbstractContextManager[AsyncIterator[messages.Event]]:
        """Within the context, iterate over what happens; *drop* is called if that is too slow."""
        return self._events.watch(drop)

    def orders(self, client: Client, request: messages.Orders) -> AbstractContextManager[AsyncIterator[messages.Order]]:
        """Within the context, iterate over the orders to a mount daemon.  Raises `UnknownMount`."""
        return self._shares.get(request.mount_id, client.pid).orders.listen()

    async def leave(self, client: Client) -> None:
        """The connection has closed: if it was the life line of a mount, that is gone."""
        if client.mounted is not None:
            await self._shares.leave(client.mounted, client.pid)

    async def _register(self, client: Client, request: messages.Register, fds: Descriptors) -> Answer:
        if client.mounted is not None:
            raise ProtocolError("this connection is the life line of another mount already")
        mounted = await self._shares.join(request.mount, fds.peek(request.source_fd), client.pid, request.mount_id)
        client.mounted = mounted
        excludes, (index, sent) = mounted.share.backend.excludes, _deadline(mounted)
        return Answer(messages.Registered(mounted.mount_id, self._shares.host, excludes, index), sent)

    async def _take_over(self, mounted: Mounted) -> Answer:
        fenced = await self._shares.take_over(mounted)
        attachment = mounted.attachment
        if attachment is None:
            raise LockUnavailable(f"{mounted.mount.mountpoint} has been unmounted")
        return Answer(messages.TakenOver(attachment.dev, attachment.data, fenced), [attachment.root.number])

    async def _resume(self, client: Client, request: messages.Resume) -> Answer:
        if client.mounted is not None:
            raise ProtocolError("this connection is the life line of another mount already")
        before = self._shares.mounts.get(request.mount_id)
        if before is not None:
            # What the one before has asked for may be under way still, and is undone at its end.
            while self._connected[before.pid]:
                self._hung_up = trio.Event()
                await self._hung_up.wait()
        client.mounted = self._shares.resume(request.mount_id, request.token, client.pid)
        index, fds = _deadline(client.mounted)
        return Answer(messages.Resumed(client.mounted.mount, index), fds)

    @contextmanager
    def serving(self, client: Client) -> Iterator[None]:
        """Within the context a connection is served."""
        self._connected[client.pid] += 1
        try:
            yield
        finally:
            self._connected[client.pid] -= 1
            if not self._connected[client.pid]:
                del self._connected[client.pid]
            self._hung_up.set()

    def _attach(self, client: Client, request: messages.Attach, fds: Descriptors) -> None:
        mounted = self._shares.get(request.mount_id, client.pid)
        if request.root_fd == request.fuse_fd:
            raise ProtocolError("the root and the connection of a mount are two descriptors")
        root, fuse = fds.peek(request.root_fd), fds.peek(request.fuse_fd)
        try:
            self._shares.attach(mounted, request, root, fuse)
        except OSError as error:
            raise LockUnavailable(f"the mount daemon cannot be watched: {error.strerror}") from error
        fds.take(request.root_fd)
        fds.take(request.fuse_fd)

    async def _hand_over(self, client: Client, request: messages.HandOver, fds: Descriptors) -> None:
        mounted = self._shares.get(request.mount_id, client.pid)
        for each in request.images:
            for index in (each.lock_fd, *each.keep_fds) if each.lock_fd >= 0 else each.keep_fds:
                fds.peek(index)
        images = [
            (each, fds.take(each.lock_fd) if each.lock_fd >= 0 else -1, [fds.take(index) for index in each.keep_fds])
            for each in request.images
        ]
        await self._succession.hand_over(mounted, images, last=request.last)

    def _entrust(self, client: Client, request: messages.Entrust, fds: Descriptors) -> None:
        mounted = self._shares.get(request.mount_id, client.pid)
        if len(request.nodes) != len(fds.left):
            raise ProtocolError("there must be one descriptor for each node")
        nameless.keep(mounted, request.nodes, [fds.take(index) for index in range(len(request.nodes))])

    async def _acquire(self, client: Client, request: messages.Acquire, fds: Descriptors) -> Answer:
        mounted = self._shares.get(request.mount_id, client.pid)
        if mounted.detached:
            raise LockUnavailable(f"{mounted.mount.mountpoint} has been unmounted; nothing more can be fenced there")
        fd = Descriptor(fds.take(request.lock_fd), mounted.share.storage.closer)
        mode, owner = Mode(request.mode), request.owner
        holder = Holder(
            host=self._shares.host,
            mode=mode,
            pid=owner.pid,
            command=owner.command,
            vm=owner.vm,
            since=time.time(),
            path=request.image.path,
        )
        image = _image(request.image, fd)
        ask = Ask(mounted, image, fd, mode, owner.key, holder, max(request.wait, 0.0), request.node)
        lock = await self._table.acquire(ask)
        # From here to the answer nothing may wait: a hold that nobody answers for would stay.
        return Answer(
            messages.Acquired(
                lock.since, lock.grant.token if lock.grant else None, ask.first, ask.first and lock.fd is not ask.fd
            ),
            _to_keep(lock, ask) if ask.first else (),
            partial(self._table.release, mounted, image.dev, image.ino, owner.key, mode),
        )

    async def _inspect(self, client: Client, request: messages.Inspect, fds: Descriptors) -> Answer:
        mounted = self._shares.get(request.mount_id, client.pid)
        fd = Descriptor(fds.take(request.lock_fd), mounted.share.storage.closer)
        return Answer(messages.Inspected(await self._table.inspect(mounted, _image(request.image, fd), fd)))

    def _status(self) -> messages.Status:
        counts: dict[str, int] = {}
        for lock in self._table.locks.values():
            for mount_id in {hold.mounted.mount_id for hold in lock.holds.values()}:
                counts[mount_id] = counts.get(mount_id, 0) + 1
        return messages.Status(
            host=self._shares.host,
            version=lockfs.__version__,
            pid=os.getpid(),
            run_dir=self._run_dir,
            since=self._since,
            mounts=[
                _describe_mount(each, counts.get(each.mount_id, 0)) for each in self._shares.mounts.values()
            ],
            locks=sum(1 for lock in self._table.locks.values() if lock.grant),
        )

    def _list(self, after: str) -> messages.Locks:
        try:
            begin = tuple(int(part) for part in after.split(".")) if after else (-1,)
        except ValueError:
            raise ProtocolError(f"'{after}' is not where a list of locks ended") from None
        found: list[messages.LockInfo] = []
        size, last = 0, begin
        for key in sorted(key for key, lock in self._table.locks.items() if lock.grant and key > begin):
            if size > LIST_BYTES:
                return messages.Locks(found, ".".join(map(str, last)))
            info = _describe(self._table.locks[key])
            if info is not None:
                found.append(info)
                size += len(msgspec.json.encode(info))
            last = key
        return messages.Locks(found)


def _deadline(mounted: Mounted) -> tuple[int | None, list[int]]:
    """Return the index of the deadline's descriptor in an answer, and the descriptors of that."""
    deadline = mounted.share.backend.deadline
    return (None, []) if deadline is None else (0, [deadline.fd])


def _image(image: messages.Image, fd: Descriptor) -> Image:
    relative, path = text.to_bytes(image.relative), text.to_bytes(image.path)
    return Image(fd.number, image.dev, image.ino, relative, path)


def _to_keep(lock: Lock, ask: Ask) -> list[int]:
    """What a mount has to keep open with its first hold: the lock's descriptor if it is another mount's,
    and more.
    """
    if lock.grant is None or lock.fd is None:
        return []
    foreign = [lock.fd.number] if lock.fd is not ask.fd else []
    return [*foreign, *lock.grant.keep]


def _describe_mount(mounted: Mounted, locks: int) -> messages.MountInfo:
    return messages.MountInfo(
        mounted.mount_id,
        mounted.mount,
        mounted.pid,
        mounted.since,
        locks,
        mounted.attachment.data if mounted.attachment is not None else "",
        mounted.gone,
        mounted.restarts,
        mounted.revival is not None,
    )


def _describe(lock: Lock) -> messages.LockInfo | None:
    if lock.grant is None or lock.mount is None:
        return None
    image = lock.grant.image
    holds = list(lock.holds.values())[:LIST_OWNERS]
    return messages.LockInfo(
        source=lock.mount.mount.source,
        mountpoint=lock.mount.mount.mountpoint,
        image=messages.Image(image.dev, image.ino, text.from_bytes(image.relative), text.from_bytes(image.path)),
        mode=lock.grant.mode.value,
        since=lock.since,
        backend=lock.share.backend_name,
        owners=[messages.HolderInfo.of(hold.holder, here=True) for hold in holds],
        token=lock.grant.token,
    )
