"""Byte locks as the way in which hosts agree: byte 0, length 1, of the image or of a lock file, as
virtlockd has it.

Open-file-description locks, because the processes that keep an image open open and close it all the time,
which would drop classic POSIX locks; both kinds exclude each other, so virtlockd on another host, or on
this one, is seen and sees us. The rest of the file is left alone: QEMU and libvirt lock other bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import trio

from lockfs import text
from lockfs.backend import UNKNOWN_HOST, Busy, Context, Denied, Grant, GrantLost, Holder, Host, Image, Mode
from lockfs.cards import Cards, with_holds
from lockfs.errors import MountError
from lockfs.linux import mountinfo, ofd
from lockfs_fcntl_lockd import lockspace, preflight
from lockfs_fcntl_lockd.errors import unavailable

START, LENGTH = lockspace.START, lockspace.LENGTH
THREADS = 40
"""Storage calls at once.  More hang only where the storage does, and then more would not help."""

T = TypeVar("T")


class FcntlBackend:
    """See the module; what each method is for stands in `lockfs.backend.Backend`."""

    excludes = True
    deadline = None

    def __init__(self, context: Context) -> None:
        self._context = context
        self._source = text.from_bytes(context.source)
        self._lockspace = str(context.options["lockspace"])
        self._directory = -1
        self._cards = Cards(context.source_fd, self._source, f"{context.host}\0{context.run_dir}")
        self._limiter = trio.CapacityLimiter(THREADS)
        self._stopped = trio.Event()

    async def start(self) -> None:
        """Look whether other hosts see the locks, and whether there are any."""
        await self._in_thread(self._start)

    def _start(self) -> None:
        try:
            if self._lockspace:
                self._open_lockspace()
            else:
                preflight.check_options(self._source, self._context.fstype, self._context.fsoptions)
                preflight.probe(self._context.source_fd, self._source)
            if self._context.options["cards"] == "yes":
                self._cards.open()
        except BaseException:
            self._close()
            raise

    def _open_lockspace(self) -> None:
        where = self._lockspace
        try:
            self._directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            below = mountinfo.find(self._directory)
        except OSError as error:
            raise MountError(
                f"cannot open the lockspace {where}: {error.strerror}",
                hint="It must be a directory that all hosts share. Make it on one of them, with mode 0700.",
            ) from error
        preflight.check_options(where, below.fstype, below.fsoptions)
        if not preflight.probe(self._directory, where):
            raise MountError(f"no files can be made in the lockspace {where}")

    async def stop(self) -> None:
        """Close what is open."""
        self._stopped.set()
        await self._in_thread(self._close)

    def _close(self) -> None:
        self._cards.close()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    async def acquire(self, image: Image, mode: Mode, holder: Holder) -> Grant:
        """Lock the byte; then leave the card, so that it is there before anybody else is refused."""

        def work() -> Grant:
            exclusive = mode is Mode.EXCLUSIVE
            keep: Sequence[int] = ()
            if self._lockspace:
                fd = lockspace.take(self._directory, self._name(image), exclusive=exclusive)
                if fd is None:
                    raise Busy(self._who(image))
                keep = [fd]
            elif not ofd.lock(image.fd, exclusive=exclusive, start=START, length=LENGTH):
                raise Busy(self._who(image))
            self._cards.write(image.ino, holder)
            return Grant(image, mode, keep=keep)

        return await self._storage("lock", image, work)

    async def adopt(self, image: Image, mode: Mode, holder: Holder, keep: Sequence[int], token: int | None) -> Grant:
        """Look whether the lock is there: it lives in the descriptor, so there is nothing to do but that."""
        fds = keep[:1] if self._lockspace else [image.fd]
        path = text.from_bytes(image.path)
        if not fds or fds[0] < 0:
            raise GrantLost(f"nobody has the descriptor that the lock on {path} was put on")
        # The kernel of this host knows, for most filesystems: then no storage is asked, and no thread is needed.
        exclusive = ofd.held(fds[0], start=START)
        if exclusive is None and await self._storage("look at the lock on", image, partial(_is_held, fds[0], mode)):
            exclusive = mode is Mode.EXCLUSIVE
        if exclusive is None:
            raise GrantLost(f"the lock on {path} is not there any more")
        if mode is Mode.EXCLUSIVE and not exclusive:
            raise GrantLost(f"the lock on {path} has become one that others may share")
        return Grant(image, Mode.EXCLUSIVE if exclusive else Mode.SHARED, keep=list(keep))

    async def inherit(self) -> None:
        """Locks in descriptors are gone with these."""

    async def convert(self, grant: Grant, mode: Mode, holder: Holder) -> None:
        """Change the lock in one step: nobody gets in between."""

        def work() -> None:
            fd = grant.keep[0] if self._lockspace else grant.image.fd
            if not ofd.lock(fd, exclusive=mode is Mode.EXCLUSIVE, start=START, length=LENGTH):
                raise Busy(self._who(grant.image))
            grant.mode = mode
            self._cards.write(grant.image.ino, replace(holder, mode=mode))

        await self._storage("change the lock on", grant.image, work)

    async def release(self, grant: Grant) -> None:
        """Unlock the byte, for all who have the descriptor."""

        def work() -> None:
            self._cards.remove(grant.image.ino)
            if self._lockspace:
                exclusive = grant.mode is Mode.EXCLUSIVE
                lockspace.give_back(
                    self._directory, self._name(grant.image), grant.keep[0], exclusive=exclusive
                )
            else:
                ofd.unlock(grant.image.fd, start=START, length=LENGTH)

        await self._storage("unlock", grant.image, work)

    async def inspect(self, image: Image) -> Holder | None:
        """See whether a lock is in the way of one on this image, and who may have it."""

        def work() -> Holder | None:
            conflict = self._look(image)
            return None if conflict is None else self._name_holder(image, conflict)

        return await self._storage("look at the lock on", image, work)

    async def hosts(self) -> Sequence[Host]:
        """Locks have no list of hosts: this one is known."""
        host = Host(self._context.host, "live", time.time(), here=True)
        return with_holds([host], await self._in_thread(self._cards.all))

    async def confirm_dead(self, host: str) -> str:
        """The filesystem alone says when the locks of a host are free."""
        raise Denied(
            "the backend fcntl-lockd does not judge whether hosts live",
            hint="The shared filesystem frees the locks of a host that died: see what its server says.",
        )

    async def lost(self) -> AsyncIterator[Grant]:
        """Nothing tells that a filesystem has dropped a lock."""
        await self._stopped.wait()
        nothing: Sequence[Grant] = ()
        for grant in nothing:
            yield grant

    async def fenced(self, grant: Grant) -> None:
        """Nothing is ever lost."""

    # In threads ------------------------------------------------------------------------------

    def _look(self, image: Image) -> ofd.Conflict | None:
        if self._lockspace:
            return lockspace.look(self._directory, self._name(image))
        return ofd.test(image.fd, exclusive=True, start=START, length=LENGTH)

    def _name(self, image: Image) -> str:
        if self._context.options["key"] == "inode":
            return lockspace.name_of_inode(image.ino)
        return lockspace.name_of(image.path)

    def _who(self, image: Image) -> Holder:
        """Name the holder after a lock was refused; it may be gone already."""
        return self._name_holder(image, self._look(image) or ofd.Conflict(exclusive=True, pid=0))

    def _name_holder(self, image: Image, conflict: ofd.Conflict) -> Holder:
        mode = Mode.EXCLUSIVE if conflict.exclusive else Mode.SHARED
        if conflict.pid > 0:
            # A classic POSIX lock of a process on this host, as virtlockd's.
            return Holder(self._context.host, mode, conflict.pid, _command(conflict.pid))
        card = self._cards.read(image.ino)
        return replace(card, mode=mode) if card else Holder(UNKNOWN_HOST, mode)

    async def _storage(self, what: str, image: Image, work: Callable[[], T]) -> T:
        try:
            return await self._in_thread(work)
        except OSError as error:
            raise unavailable(f"{what} {text.from_bytes(image.path)}", error) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._limiter)


def _is_held(fd: int, mode: Mode) -> bool:
    return ofd.is_held(fd, exclusive=mode is Mode.EXCLUSIVE, start=START, length=LENGTH)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""
