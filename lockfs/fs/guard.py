"""The guard: who may write which image, as this mount sees it.

A `Hold` is the right of one open (or of one call, as unlink) to an image.  Holds of one owner share one lock at
lockd; the first takes it, the last gives it back.

Invariants:
- a hold exists only while lockd has granted its owner the mode, or a stronger one, and has not said otherwise since;
- every lock is put on, or backed by, one open file description, `_Image.carrier`, that stays open in this daemon
  too as long as the lock is wanted: where locks belong to descriptions, the lock then outlives lockd;
- a lock that died with its lockd before it was given back is gone before anybody asks for that image anew;
- nothing is granted when lockd cannot be asked.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from lockfs import text
from lockfs.backend import Busy, Mode
from lockfs.errors import LockUnavailable
from lockfs.fs.handover import Held
from lockfs.fs.nodes import Node, NodeTable
from lockfs.fs.policy import Policy
from lockfs.fs.work import Caller, Work
from lockfs.linux.deadline import Deadline
from lockfs.linux.files import proc_path
from lockfs.protocol import messages
from lockfs.protocol.messages import Owner

log = logging.getLogger("lockfs.guard")

_NOT_WRITABLE = frozenset({errno.ETXTBSY, errno.EACCES, errno.EPERM, errno.EROFS})
"""Errors of opening a file for writing that say nothing against removing or renaming it."""
_LATE_PAUSE = 0.01
"""Seconds between two looks whether a lock that is late was renewed."""


@dataclass(slots=True)
class Hold:
    """The right of one open, or of one call, to an image."""

    image: _Image
    owner: Owner
    mode: Mode

    @property
    def kept(self) -> list[int]:
        """Descriptors of the image that came from lockd."""
        return list(self.image.keep)


@dataclass(slots=True)
class _Owned:
    """What one owner holds of one image through this mount.  `turn` keeps its transitions apart."""

    owner: Owner
    counts: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))
    turn: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0


@dataclass(slots=True)
class _Image:
    """One image with all its owners in this mount.

    `lock_fd` is the descriptor that its lock was put on: the carrier, or one of another mount that has it too.  `keep`
    are others that came with the lock, `token` its token.  `nodes` are the ids by which it was taken.

    With `adrift` there may be a lock on the descriptors of which lockd does not know; `closing` is there while they are
    closed for that.
    """

    message: messages.Image
    node: Node
    owners: dict[str, _Owned] = field(default_factory=dict)
    carrier: int = -1
    lock_fd: int = -1
    keep: list[int] = field(default_factory=list)
    nodes: set[int] = field(default_factory=set)
    token: int | None = None
    users: int = 0
    lost: bool = False
    adrift: bool = False
    closing: trio.Event | None = None

    def held(self, mode: Mode) -> bool:
        return any(owned.counts[mode] for owned in self.owners.values())


class Lockd(Protocol):
    """What the guard asks of lockd; `lockfs.fs.session` is the real one."""

    deadline: Deadline | None
    """Until when the locks of this mount are safe; None if they do not expire."""

    @property
    def epoch(self) -> int:
        """How often all that is held was listed for a lockd that was started anew."""

    async def acquire(
        self, image: messages.Image, mode: Mode, owner: Owner, fd: int, node: int
    ) -> tuple[messages.Acquired, list[int]]:
        """Take a lock; return the answer and descriptors to keep open with it.  Raises `Busy`, `LockUnavailable`."""

    async def release(self, image: messages.Image, mode: Mode, owner: Owner) -> None:
        """Give it back; never fails."""

    async def inspect(self, image: messages.Image, fd: int) -> list[messages.HolderInfo]:
        """List who holds an image.  Raises `LockUnavailable`."""


class Guard:
    """All holds of one mount.

    *by_path* says that among hosts a lock goes by the path of an image.  *freed* is called with a node whose
    exclusive lock this mount has just given up.
    """

    def __init__(
        self,
        nodes: NodeTable,
        work: Work,
        policy: Policy,
        lockd: Lockd,
        mountpoint: bytes,
        by_path: bool,
        freed: Callable[[Node], None],
    ) -> None:
        self._nodes = nodes
        self._work = work
        self._lockd = lockd
        self._mountpoint = mountpoint
        self._by_path = by_path
        self._freed = freed
        self._images: dict[tuple[int, int], _Image] = {}
        self.policy = policy

    # What is held ----------------------------------------------------------------------------------

    def exclusive(self, node: Node) -> bool:
        """Tell whether this mount holds the image exclusively, so that nobody else can change it."""
        image = self._images.get(node.identity)
        return image is not None and not image.lost and image.held(Mode.EXCLUSIVE)

    def describe(self, node: Node) -> messages.Image:
        """Return the image as lockd is told of it."""
        path = node.path()
        full = self._mountpoint.rstrip(b"/") + b"/" + path
        return messages.Image(node.dev, node.ino, text.from_bytes(path), text.from_bytes(full))

    def held(self) -> list[Held]:
        """List all that this mount holds."""
        return [
            Held(image.message, holds, image.lock_fd, tuple(image.keep), image.lost, image.token)
            for image in self._images.values()
            if (holds := _holds(image))
        ]

    async def holders(self, node: Node, caller: Caller) -> list[messages.HolderInfo]:
        """List who holds the image of *node*, here or elsewhere.  Raises `LockUnavailable`, OSError."""
        with self._nodes.borrow(node) as fd:
            probe = await self._work.short(caller, _open_probe, fd)
        try:
            return await self._lockd.inspect(self.describe(node), probe)
        finally:
            os.close(probe)

    async def check_elsewhere(self, node: Node, caller: Caller) -> None:
        """Raise `Busy` if another host holds the image of *node*."""
        if not self.policy.guarded(node.path()) or self.exclusive(node):
            return
        for holder in await self.holders(node, caller):
            if not holder.here:
                raise Busy(holder.holder())

    async def until_safe(self, hold: Hold) -> None:
        """Return when it is safe to write under *hold*: at once, or when a lock that is late has been renewed.

        Raises OSError(EIO) if it was lost.
        """
        while not hold.image.lost:
            deadline = self._lockd.deadline
            if deadline is None or not deadline.is_late:
                return
            if deadline.is_lost:
                break
            await trio.sleep(_LATE_PAUSE)
        raise OSError(errno.EIO, "the lock was lost")

    # Taking and giving back ------------------------------------------------------------------------

    async def hold(self, node: Node, mode: Mode, owner: Owner, caller: Caller) -> Hold:
        """Take the image of *node* for *owner*, or share what the owner has.

        Raises `Busy` with the holder, `LockUnavailable`, or OSError if the file cannot be opened as the lock needs.
        """
        image = self._enter(node)
        owned = image.owners.setdefault(owner.key, _Owned(owner))
        owned.users += 1
        hold = Hold(image, owner, mode)
        try:
            while image.closing is not None:
                await image.closing.wait()
            async with owned.turn:
                if image.lost:
                    raise LockUnavailable(f"the lock of {image.message.path} was lost")
                if not owned.counts[mode]:
                    await self._open_carrier(image, node, mode, caller)
                    # From its answer to the count nothing may wait: a lockd that comes back is told what is counted.
                    acquired, kept = await self._acquire(image, mode, owner, node)
                    self._keep(image, acquired, kept)
                    image.nodes.add(node.id)
                owned.counts[mode] += 1
        except BaseException:
            await self._leave(image, owner.key, owned)
            raise
        return hold

    async def _acquire(
        self, image: _Image, mode: Mode, owner: Owner, node: Node
    ) -> tuple[messages.Acquired, list[int]]:
        epoch = self._lockd.epoch
        try:
            answer = await self._lockd.acquire(image.message, mode, owner, image.carrier, node.id)
        except BaseException as error:
            # The lockd that has died may have taken the lock, and the next one was not told.
            image.adrift |= self._lockd.epoch != epoch or not isinstance(error, Busy)
            raise
        image.adrift = False
        return answer

    def _keep(self, image: _Image, acquired: messages.Acquired, kept: list[int]) -> None:
        """Note which descriptors a lock lives in; those of an earlier one are of no use any more."""
        if not acquired.first:
            image.keep.extend(kept)
            return
        before = [*image.keep, *([image.lock_fd] if image.lock_fd not in (-1, image.carrier) else [])]
        image.lock_fd = kept.pop(0) if acquired.foreign else image.carrier
        image.keep, image.token = kept, acquired.token
        for fd in before:
            self._work.close(fd)

    def restore(self, node: Node, mode: Mode, owner: Owner) -> Hold:
        """Take over a hold of the daemon before, for which lockd has the lock still."""
        image = self._enter(node)
        owned = image.owners.setdefault(owner.key, _Owned(owner))
        owned.users += 1
        owned.counts[mode] += 1
        image.nodes.add(node.id)
        return Hold(image, owner, mode)

    async def reclaim(self, fetch: Callable[[messages.Image], Awaitable[tuple[int | None, list[int]]]]) -> None:
        """Have *fetch* return the token of each lock that was taken over, and the descriptors to keep with it."""
        for image in list(self._images.values()):
            if image.lock_fd >= 0 or image.keep:
                continue
            token, kept = await fetch(image.message)
            if kept and self._images.get(image.node.identity) is image and image.lock_fd < 0:
                image.lock_fd, image.keep, image.token = kept[0], kept[1:], token
            else:
                for fd in kept:
                    self._work.close(fd)

    def join(self, node: Node) -> Hold | None:
        """Share what an owner in this mount holds exclusively; None if none does.

        The lock then stays until both have given it back.
        """
        image = self._images.get(node.identity)
        if image is None or image.lost:
            return None
        for owned in image.owners.values():
            if owned.counts[Mode.EXCLUSIVE]:
                image.users += 1
                owned.users += 1
                owned.counts[Mode.EXCLUSIVE] += 1
                return Hold(image, owned.owner, Mode.EXCLUSIVE)
        return None

    async def release(self, hold: Hold) -> None:
        """Give one hold back.  Never fails, and is not cut short by a cancellation."""
        image, key = hold.image, hold.owner.key
        owned = image.owners[key]
        with trio.CancelScope(shield=True):
            async with owned.turn:
                owned.counts[hold.mode] -= 1
                if not owned.counts[hold.mode]:
                    # From here on others may write: what the kernel caches of the file must not be trusted any more.
                    if hold.mode is Mode.EXCLUSIVE and not image.held(Mode.EXCLUSIVE):
                        self._freed(image.node)
                    epoch = self._lockd.epoch
                    await self._lockd.release(image.message, hold.mode, hold.owner)
                    image.adrift |= self._lockd.epoch != epoch
            await self._leave(image, key, owned)

    async def hold_for_call(self, node: Node, owner: Owner, caller: Caller, *, moves: bool = False) -> Hold | None:
        """Take the image of *node* for the length of one call that removes or renames it.

        It is taken from everybody, also where many may write.  *moves* says that the image gets another name; where
        locks go by path, not even its owner may do that.  None if the file cannot be opened for writing, so that the
        lock cannot be taken, but nobody holds it.  Raises as `hold`.
        """
        if moves and self._by_path:
            # Under its new name the image would be another one to all other hosts, and free.
            for holder in await self.holders(node, caller):
                log.info("refused: to rename %s, which is held by %s", self.describe(node).path, holder.holder())
                raise Busy(holder.holder())
        try:
            return await self.hold(node, Mode.EXCLUSIVE, owner, caller)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
        for holder in await self.holders(node, caller):
            raise Busy(holder.holder())
        return None

    def _enter(self, node: Node) -> _Image:
        image = self._images.get(node.identity)
        if image is None:
            image = self._images[node.identity] = _Image(self.describe(node), node)
        image.users += 1
        return image

    async def _leave(self, image: _Image, key: str, owned: _Owned) -> None:
        if image.adrift and image.users == 1:
            await self._end_lock(image)
        owned.users -= 1
        if not owned.users:
            image.owners.pop(key, None)
        image.users -= 1
        if image.users:
            return
        self._images.pop(image.node.identity, None)
        for fd in {image.carrier, image.lock_fd, *image.keep}:
            if fd >= 0:
                self._work.close(fd)

    async def _end_lock(self, image: _Image) -> None:
        """Close the descriptors of an image that nobody holds, and with them a lock of which no lockd knows.

        Whoever asks for it next has other ones, and would meet that lock.
        """
        fds = {image.carrier, image.lock_fd, *image.keep} - {-1}
        image.carrier = image.lock_fd = -1
        image.keep, image.closing = [], trio.Event()
        try:
            await self._work.close_now(fds)
        finally:
            image.closing.set()
            image.closing, image.adrift = None, False

    async def _open_carrier(self, image: _Image, node: Node, mode: Mode, caller: Caller) -> None:
        if image.carrier >= 0:
            return
        with self._nodes.borrow(node) as fd:
            carrier = await self._work.short(caller, _open_carrier, fd, mode)
        if image.carrier >= 0:  # another owner's was faster
            os.close(carrier)
        else:
            image.carrier = carrier

    # Loss ------------------------------------------------------------------------------------------

    def lose(self, identity: tuple[int, int], why: str) -> None:
        """Mark the lock of an image as no longer safe: its writers get EIO from now on."""
        image = self._images.get(identity)
        if image is not None and not image.lost:
            image.lost = True
            log.error("lost the lock of %s: %s; its open handles can write no more", image.message.path, why)


def _holds(image: _Image) -> list[messages.HeldBy]:
    return [
        messages.HeldBy(owned.owner, mode.value, nodes=sorted(image.nodes))
        for owned in image.owners.values()
        for mode, count in owned.counts.items()
        if count
    ]


def _open_carrier(fd: int, mode: Mode) -> int:
    path = proc_path(fd)
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if error.errno == errno.EPERM:  # an append-only file
            return os.open(path, os.O_RDWR | os.O_APPEND | flags)
        if mode is Mode.SHARED and error.errno in _NOT_WRITABLE:
            return os.open(path, os.O_RDONLY | flags)
        raise


def _open_probe(fd: int) -> int:
    return os.open(proc_path(fd), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
