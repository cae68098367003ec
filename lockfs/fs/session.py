"""The mount daemon's side of its talk with lockd.

When lockd is gone, nothing new is granted: the guard gets `LockUnavailable`, and callers ENOLCK.  What was granted
stays where locks live in descriptors that this daemon holds too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import trio

from lockfs.backend import Mode
from lockfs.errors import LockfsError, LockUnavailable
from lockfs.protocol import messages
from lockfs.protocol.client import LockdClient
from lockfs.protocol.messages import Owner

log = logging.getLogger("lockfs.lockd-client")


CLAIMS = 1000
"""Holds that are claimed in one message."""


class LockdSession:
    """One registered mount."""

    def __init__(self, client: LockdClient, mount_id: str, wait: float) -> None:
        self._client = client
        self._mount_id = mount_id
        self._wait = wait

    @classmethod
    async def begin(cls, run_dir: str, mount: messages.Mount, source_fd: int, wait: float) -> LockdSession:
        """Register a mount.  Raises `MountError` if lockd or the backend refuses it, `LockUnavailable` without
        lockd.
        """
        client = await LockdClient.connect(run_dir, start=True)
        try:
            registered = await client.register(messages.Register(mount), source_fd)
        except BaseException:
            with trio.CancelScope(shield=True):
                await client.aclose()
            raise
        return cls(client, registered.mount_id, wait)

    @classmethod
    async def resume(cls, run_dir: str, mount_id: str, token: str, wait: float) -> LockdSession:
        """Register as the successor of a mount daemon that died.  Raises `LockUnavailable`."""
        client = await LockdClient.connect(run_dir)
        try:
            await client.resume(messages.Resume(mount_id, token))
        except BaseException:
            with trio.CancelScope(shield=True):
                await client.aclose()
            raise
        return cls(client, mount_id, wait)

    @property
    def mount_id(self) -> str:
        """What lockd knows the mount by."""
        return self._mount_id

    async def claim(self, claims: list[messages.Claimed]) -> list[messages.Claimed]:
        """Say what the daemon before has held, and all of it; return what is not safe to write under.

        Raises `LockUnavailable`.
        """
        unsafe: list[messages.Claimed] = []
        for at in range(0, max(1, len(claims)), CLAIMS):
            last = at + CLAIMS >= len(claims)
            call = messages.Claim(self._mount_id, claims[at : at + CLAIMS], last)
            answer, _ = await self._client.call(call, messages.Claims)
            unsafe += answer.unsafe
        return unsafe

    async def take_over(self) -> list[int]:
        """Say that this daemon answers from now on, and heeds orders; return the nodes that are fenced.

        Raises `LockUnavailable`.
        """
        answer, _ = await self._client.call(messages.TakeOver(self._mount_id), messages.TakenOver)
        return answer.fenced

    async def reclaim(self, image: messages.Image) -> list[int]:
        """Return the descriptors that are to be kept with the lock of an image.  Raises `LockfsError`."""
        call = messages.Reclaim(self._mount_id, image.dev, image.ino)
        _, keep = await self._client.call(call, messages.Reclaimed)
        return keep

    async def acquire(self, image: messages.Image, mode: Mode, owner: Owner, fd: int, node: int) -> list[int]:
        """Take a lock; return descriptors to keep open with it.  Raises `Busy`, `LockUnavailable`."""
        call = messages.Acquire(self._mount_id, image, mode.value, owner, self._wait, node=node)
        _acquired, keep = await self._client.call(call, messages.Acquired, [fd])
        return keep

    async def release(self, image: messages.Image, mode: Mode, owner: Owner) -> None:
        """Give it back.  Without lockd there is nothing to give back to, but the descriptors, which the guard
        closes.
        """
        call = messages.Release(self._mount_id, image.dev, image.ino, mode.value, owner.key)
        try:
            await self._client.call(call, messages.Released)
        except LockUnavailable as error:
            log.info("could not release %s: %s", image.path, error)
        except LockfsError as error:
            log.error("could not release %s: %s", image.path, error)

    async def inspect(self, image: messages.Image, fd: int) -> list[messages.HolderInfo]:
        """List who holds an image.  Raises `LockUnavailable`."""
        inspected, fds = await self._client.call(messages.Inspect(self._mount_id, image), messages.Inspected, [fd])
        for each in fds:
            os.close(each)
        return inspected.holders

    async def attach(
        self, dev: int, data: messages.DataPath, root_fd: int, fuse_fd: int, *, resumable: bool
    ) -> None:
        """Give lockd what it needs to fence images of this mount by itself, and to start a successor of this daemon.

        Raises `LockUnavailable`.
        """
        call = messages.Attach(self._mount_id, dev, data, resumable=resumable)
        await self._client.call(call, messages.Attached, [root_fd, fuse_fd])

    async def detach(self) -> bool:
        """Tell lockd that the mount is mounted nowhere any more.  Return False while images are held.

        Raises `LockUnavailable`.
        """
        detached, _ = await self._client.call(messages.Detach(self._mount_id), messages.Detached)
        return detached.done

    async def follow(
        self,
        mountpoint: str,
        obey: Callable[[messages.Order], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Have *obey* carry out lockd's orders until lockd is gone; log that.  Started when orders arrive."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._obey, obey)
            task_status.started()
            await self._client.lost()
            nursery.cancel_scope.cancel()
        log.error(
            "lockd is gone: images of %s cannot be opened for writing until it is mounted again; open ones stay locked",
            mountpoint,
        )

    async def _obey(
        self,
        obey: Callable[[messages.Order], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            async with self._client.orders(self._mount_id) as orders:
                task_status.started()
                async for order in orders:
                    obey(order)
                    await self._client.call(messages.Obeyed(self._mount_id, order.serial), messages.Noted)
        except LockUnavailable:
            task_status.started()  # the life line tells

    async def end(self) -> None:
        """Leave; lockd then frees what is left of the mount."""
        await self._client.aclose()
