"""Which source directories are mounted on this host, and the backend of each.

One of them, a share, has one backend with one set of options, whatever mount it is reached by: two ways to agree on
locks would exclude nobody.  What asks a storage that hangs waits for a limited time, and holds up no other share.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import trio

from lockfs import options, text
from lockfs.backend import Backend, Context, Spec, find
from lockfs.errors import LockfsError, MountError
from lockfs.linux.closer import Closer
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.fence import Fencer
from lockfs.lockd.share import Share
from lockfs.lockd.state import Identity
from lockfs.lockd.storage import STORAGE_TIMEOUT, Job, Storage
from lockfs.lockd.succession import Succession
from lockfs.lockd.table import Table
from lockfs.lockd.threads import Threads, TooSlow
from lockfs.lockd.vault import Vault
from lockfs.protocol import messages

log = logging.getLogger(__name__)


class Sources:
    """The shares that are open.  Their tasks live in *nursery*; *host* is the name of this host."""

    def __init__(
        self, nursery: trio.Nursery, table: Table, fencer: Fencer, succession: Succession, host: str, run_dir: str,
        vault: Vault | None = None,
    ) -> None:  # fmt: skip
        self._nursery = nursery
        self._table = table
        self._fencer = fencer
        self._succession = succession
        self._host = host
        self._run_dir = run_dir
        self._vault = vault or Vault()
        self._open: dict[Identity, Share] = {}
        self._gates: dict[Identity, trio.Lock] = {}
        self._looks: dict[str, tuple[Threads, Closer]] = {}

    def all(self) -> list[Share]:
        """Return the shares that are open."""
        return list(self._open.values())

    def get(self, identity: Identity) -> Share | None:
        """Return the share whose top that is, None if it is not open."""
        return self._open.get(identity)

    @asynccontextmanager
    async def shared(self, mount: messages.Mount, source_fd: int) -> AsyncIterator[Share]:
        """Within the context, have the share that *mount* is of; it stays open if it has a mount by the end.

        Raises `MountError` if it cannot be mounted so, `LockfsError` of the backend, OSError.
        """
        identity = await self._identify(mount.source, source_fd)
        spec = await trio.to_thread.run_sync(find, mount.backend)
        values = parse_options(spec, mount.options)
        async with self._gates.setdefault(identity, trio.Lock()):
            share = self._open.get(identity)
            if share is not None and self._is_unused(share):
                await self._close(share)
                share = None
            if share is None:
                share = await self._begin(mount, source_fd, identity, spec, values)
            _check_same(share, mount, values)
            yield share

    async def close_if_unused(self, share: Share) -> None:
        """Close a share that has no mount any more, and nothing to give back."""
        async with self._gates[share.dev, share.ino]:
            if self._is_unused(share):
                await self._close(share)

    async def _identify(self, source: str, source_fd: int) -> Identity:
        """Return what a source directory is known by.

        On a storage that hangs that takes one thread, however often it is tried.  Raises `MountError`, OSError.
        """
        threads, closer = self._looks.setdefault(source, (Threads(self._nursery, 1), Closer(source)))
        top = Descriptor(os.dup(source_fd), closer)
        try:
            info = await threads.run(STORAGE_TIMEOUT, partial(os.fstat, top.number), [top])
        except TooSlow:
            raise MountError(
                f"the storage of {source} does not answer",
                hint=f"Look whether {source} can be used without lockfs, as with: stat -f {source}",
            ) from None
        finally:
            top.close()
        self._looks.pop(source, None)
        return info.st_dev, info.st_ino

    async def _begin(
        self,
        mount: messages.Mount,
        source_fd: int,
        identity: Identity,
        spec: Spec,
        values: Mapping[str, object],
    ) -> Share:
        storage = Storage(self._nursery, mount.source)
        top = Descriptor(os.dup(source_fd), storage.closer)
        try:
            context = _context(mount, top.number, values, self._host, self._run_dir)
            backend = await trio.to_thread.run_sync(spec.load, context)
            share = Share(*identity, mount.source, mount.backend, values, top, backend, storage, self._vault)
            await storage.run(share, partial(_start, backend, top))
        except BaseException:
            top.close()
            raise
        self._open[identity] = share
        self._nursery.start_soon(self._attend, share)
        return share

    async def _attend(self, share: Share) -> None:
        with share.ended:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._inherit, share)
                async for grant in share.backend.lost():
                    self._fencer.lose(share, grant)

    async def _inherit(self, share: Share) -> None:
        await self._succession.claims.settled()
        try:
            await share.storage.finish(share, lambda _: share.backend.inherit())
        except LockfsError as error:
            log.warning("what the last lockd held on %s could not be given back: %s", share.source, error)

    def _is_unused(self, share: Share) -> bool:
        known = self._open.get((share.dev, share.ino)) is share
        return known and not share.mounts and not self._table.uses(share)

    async def _close(self, share: Share) -> None:
        share.ended.cancel()
        await share.storage.finish(share, lambda _: share.backend.stop())
        share.top.close()
        del self._open[share.dev, share.ino]


def parse_options(spec: Spec, given: Mapping[str, str]) -> dict[str, object]:
    """Return the values of a backend's options, and of ``key``, which it may go by.

    Raises `MountError` for a value that cannot be.
    """
    table = [*spec.options, *(option for option in options.OPTIONS if option.name == "key")]
    values: dict[str, object] = {}
    for option in table:
        value = given.get(option.name, option.default)
        try:
            values[option.name] = option.parse(value)
        except ValueError as error:
            raise MountError(f"option {option.name}={value}: must be {error}") from None
    return values


def _check_same(share: Share, mount: messages.Mount, values: Mapping[str, object]) -> None:
    if (share.backend_name, share.options) == (mount.backend, values):
        return
    other = next(iter(share.mounts.values())).mount.mountpoint if share.mounts else "a mount that is going away"
    if share.backend_name != mount.backend:
        what = f"with backend {share.backend_name}, not {mount.backend}"
    else:
        wrong = [name for name, value in values.items() if share.options.get(name) != value]
        what = f"with other values of: {', '.join(wrong)}"
    raise MountError(
        f"{mount.source} is already mounted on {other} {what}",
        hint=f"All mounts of one directory must agree on this. Use the same, or unmount {other} first.",
    )


async def _start(backend: Backend, top: Descriptor, job: Job[None]) -> None:
    with top.in_use():
        await backend.start()
        if job.given_up():
            with trio.CancelScope(shield=True):
                await backend.stop()


def _context(
    mount: messages.Mount, source_fd: int, values: Mapping[str, object], host: str, run_dir: str
) -> Context:
    return Context(
        source_fd=source_fd,
        source=text.to_bytes(mount.source),
        mountpoint=text.to_bytes(mount.mountpoint),
        fstype=mount.fstype,
        fsoptions=mount.fsoptions,
        host=host,
        options=values,
        run_dir=run_dir,
    )
