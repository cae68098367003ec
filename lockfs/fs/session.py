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

    async def acquire(self, image: messages.Image, mode: Mode, owner: Owner, fd: int) -> list[int]:
        """Take a lock; return descriptors to keep open with it.  Raises `Busy`, `LockUnavailable`."""
        call = messages.Acquire(self._mount_id, image, mode.value, owner, self._wait)
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

    async def follow(self, mountpoint: str, lose: Callable[[str, str], None]) -> None:
        """Tell *lose* of each lock of this mount that is no longer safe, with the reason, until lockd is gone; log
        that.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, mountpoint, lose)
            await self._client.lost()
            nursery.cancel_scope.cancel()
        log.error(
            "lockd is gone: images of %s cannot be opened for writing until it is mounted again; open ones stay locked",
            mountpoint,
        )

    async def _watch(self, mountpoint: str, lose: Callable[[str, str], None]) -> None:
        try:
            async with self._client.watch() as events:
                async for event in events:
                    if event.kind == "lost" and event.mountpoint == mountpoint:
                        lose(event.image, event.reason)
        except LockUnavailable:
            pass  # the life line tells

    async def end(self) -> None:
        """Leave; lockd then frees what is left of the mount."""
        await self._client.aclose()
