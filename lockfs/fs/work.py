"""Where a call to the storage runs, and as whom.

On storage that answers from this machine, short metadata calls run on the event loop: a hop to a thread costs
several times as much.  Calls that may block for long, and every call to storage that other machines answer, run in
worker threads. The kernel has checked the caller's rights on the mount already (``default_permissions``); a call
runs as the caller so that new files, quotas and file servers see the right user.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar, TypeVarTuple, Unpack

import trio

from lockfs.linux import credentials, process

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LOCAL_FILESYSTEMS = frozenset(
    {"bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "squashfs", "tmpfs",
    "vfat", "xfs", "zfs"} )  # fmt: skip
"""Filesystems whose metadata calls do not wait for another machine; anything else is taken to do so."""

METADATA_THREADS = 64
DATA_THREADS = 64
SYNC_THREADS = 64
"""Each kind has its own threads, so that a storm of one, or a device that hangs in it, does not stop the others."""


class Caller(Protocol):
    """Who makes a request: pyfuse3's RequestContext, or the daemon itself."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def pid(self) -> int: ...


class _Daemon:
    uid = gid = pid = 0


DAEMON: Caller = _Daemon()


class Work:
    """Runs calls to one source.  `remote` says that other machines answer for it."""

    def __init__(self, fstype: str) -> None:
        self.fstype = fstype
        self.remote = fstype not in LOCAL_FILESYSTEMS
        self._metadata = trio.CapacityLimiter(METADATA_THREADS)
        self._data = trio.CapacityLimiter(DATA_THREADS)
        self._sync = trio.CapacityLimiter(SYNC_THREADS)
        self._closing: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._closer = threading.Thread(target=self._close_each, name="closer", daemon=True)
        self._closer.start()

    async def short(self, caller: Caller, call: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a metadata call that is short on local storage and does not depend on who makes it there."""
        if not self.remote:
            return call(*args)
        return await self._run(self._metadata, caller, call, *args)

    async def long(self, caller: Caller, call: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a metadata call that may block, as the caller."""
        return await self._run(self._metadata, caller, call, *args)

    async def as_seen(self, caller: Caller, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a metadata call whose effect on the set-group-id bit depends on the caller's groups and rights."""
        groups = process.groups(caller.pid) if caller.pid else None

        def as_caller() -> T:
            credentials.become(caller.uid, caller.gid, groups or ())
            credentials.use_capability(credentials.CAP_FSETID, caller.uid == 0)
            try:
                return call(*args)
            finally:
                credentials.use_capability(credentials.CAP_FSETID, True)
                credentials.become(0, 0)

        return await trio.to_thread.run_sync(as_caller, limiter=self._metadata)

    async def data(self, call: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a read or write that may block."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._data)

    async def sync(self, call: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a call that waits for the storage to make something durable."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._sync)

    def close(self, fd: int) -> None:
        """Close a descriptor some time soon: the last one of a removed file makes the storage free all its blocks."""
        self._closing.put(fd)

    async def close_now(self, fds: Iterable[int]) -> None:
        """Close descriptors, and return when that is done.  Never fails, and is not cut short by a cancellation."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_close_all, tuple(fds), limiter=self._sync)

    def finish(self) -> None:
        """Close what is still to be closed, and end."""
        self._closing.put(-1)
        self._closer.join()

    def _close_each(self) -> None:
        while (fd := self._closing.get()) >= 0:
            _close_all([fd])

    async def _run(
        self, limiter: trio.CapacityLimiter, caller: Caller, call: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> T:
        uid, gid = caller.uid, caller.gid
        # Only a file server looks at groups: here the kernel has decided, and the capabilities stay.
        groups = (process.groups(caller.pid) if caller.pid else ()) if self.remote else None

        def as_caller() -> T:
            credentials.become(uid, gid, groups)
            try:
                return call(*args)
            finally:
                credentials.become(0, 0)

        return await trio.to_thread.run_sync(as_caller, limiter=limiter)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass  # it reports on data that somebody else wrote; the descriptor is gone all the same
