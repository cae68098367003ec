"""Locks of the last lockd that live on in descriptors which the vault has kept.

Who takes one up has it from `Vault.inherited` before anybody else may ask for the image.  What nobody takes up had been
given back, or was never told to a mount: it is ended here, for all who share the open file description, before it could
be met by who asks for the image next.
"""

from __future__ import annotations

import logging
import os
import socket
from functools import partial

import trio

from lockfs.errors import LockUnavailable
from lockfs.linux import ofd
from lockfs.linux.closer import Closer
from lockfs.lockd.claims import Claims
from lockfs.lockd.state import Identity
from lockfs.lockd.storage import STORAGE_TIMEOUT
from lockfs.lockd.vault import Vault
from lockfs.vault.wire import lock_key

THREADS = 8
"""Locks that are ended at once; more hang only where the storage does."""

log = logging.getLogger(__name__)


class Heirlooms:
    """See the module.  Its tasks live in *nursery*."""

    def __init__(self, nursery: trio.Nursery, vault: Vault, claims: Claims) -> None:
        self._nursery = nursery
        self._vault = vault
        self._claims = claims
        self._ending: dict[str, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(THREADS)
        self._closer = Closer("heirlooms")

    def begin(self) -> None:
        """End what nobody can take up, now and whenever a claim is settled."""
        known = {claim.mount_id for claim in self._claims.all()}
        there = {key.split("/")[1] for key in self._vault.inherited if not key.startswith("lock/")}
        for mount_id in there - known:
            self._vault.forget(mount_id)
        self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        if self._claims.blind:
            return
        while locks := [key for key in self._vault.inherited if key.startswith("lock/")]:
            for key in locks:
                _, dev, ino = key.split("/")
                if self._claims.strongest((int(dev), int(ino))) is None:
                    self._end(key)
            await self._claims.changed()

    async def clear(self, identity: Identity) -> None:
        """Return when no lock of the last lockd is on an image that nobody claims.  Raises `LockUnavailable`."""
        key = lock_key(*identity)
        if key in self._vault.inherited:
            self._end(key)
        if (done := self._ending.get(key)) is None:
            return
        with trio.move_on_after(STORAGE_TIMEOUT):
            await done.wait()
            return
        raise LockUnavailable("the storage has not ended the last lock on this image yet")

    def _end(self, key: str) -> None:
        fds = self._vault.take(key)
        if fds is not None:
            self._ending[key] = trio.Event()
            self._nursery.start_soon(self._do, key, fds)

    async def _do(self, key: str, fds: list[int]) -> None:
        for fd in fds:
            try:
                if not self._claims.blind:  # then a mount may have it that nobody knows of
                    await trio.to_thread.run_sync(partial(_end_lock, fd), limiter=self._limiter)
            except OSError as error:
                log.warning("a lock of the last lockd could not be ended: %s", error.strerror)
        self._closer.close(fds)
        self._vault.drop(key)
        self._ending.pop(key).set()


def _end_lock(fd: int) -> None:
    """End the lock that lives in a descriptor, whoever else has a copy of it.  Raises OSError."""
    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.shutdown(socket.SHUT_RDWR)  # to a daemon that goes by its end
    else:
        ofd.unlock(fd, start=0, length=0)
