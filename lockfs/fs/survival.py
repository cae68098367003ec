"""What a mount daemon does so that its death is not noticed: it keeps a journal, and dies in an orderly way."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVarTuple

import trio

from lockfs import options, text
from lockfs.errors import EXIT_SYSTEM
from lockfs.fs.journal import records
from lockfs.fs.nameless import Nameless
from lockfs.fs.operations import Operations
from lockfs.fs.session import LockdSession
from lockfs.linux.libc import failed, libc
from lockfs.protocol.start import journal_path

if TYPE_CHECKING:
    from lockfs.fs.daemon import Request

log = logging.getLogger("lockfs.fs")
Ts = TypeVarTuple("Ts")

_CLONE_NEWNS = 0x20000


@dataclass(frozen=True, slots=True)
class Heir:
    """What lockd gives to a successor: the connection and the source, and the names of what it finds by itself."""

    run_dir: str
    mount_id: str
    token: str
    fuse_fd: int
    source_fd: int


def begin_journal(request: Request, operations: Operations, mount_id: str, dev: int) -> None:
    """Keep a journal from now on, in place of that of the daemon before if there was one.

    Without it, which is logged, the mount works as well.
    """
    if operations.negotiated is None:
        return
    if not operations.negotiated.resends:
        # Who waits for an answer of the dead daemon would wait for good.
        log.info("if this mount daemon dies it will have no successor: that needs Linux 6.9")
        return
    begin = records.Begin(
        format=records.FORMAT,
        mount_id=mount_id,
        dev=dev,
        data="gated" if operations.backing is None else "passthrough",
        fstype=operations.work.fstype,
        init=operations.negotiated.init,
        request=_as_text(request),
    )

    def snapshot() -> Iterator[records.Record]:
        backing = operations.backing
        yield records.Begin(
            begin.format, begin.mount_id, begin.dev, begin.data, begin.fstype, begin.init, begin.request,
            operations.nodes.last, operations.handles.last_serial, operations.handles.last,
            0 if backing is None else backing.last,
        )  # fmt: skip
        yield from operations.nodes.records()
        if backing is not None:
            for node, backing_id in backing.ids():
                yield records.Backed(node, backing_id)
        yield from operations.handles.records()
        yield from operations.effects.records()

    try:
        operations.effects.journal.begin(journal_path(request.run_dir, mount_id), snapshot)
    except OSError as error:
        log.error("there is no journal (%s): if this mount daemon dies it will have no successor", error)


def provide_for_nameless(
    operations: Operations, session: LockdSession, nursery: trio.Nursery, kept: Mapping[int, int] | None = None
) -> None:
    """Have lockd keep what is open and loses its last name, where there may be a successor; *kept* it has already."""
    if operations.effects.journal.begun:
        operations.nameless = Nameless(
            operations.nodes, operations.handles, operations.work, operations.backing, session, nursery
        )
        operations.nameless.restore(kept or {})


def _as_text(request: Request) -> dict[str, str]:
    return {
        "source": text.from_bytes(request.source),
        "mountpoint": text.from_bytes(request.mountpoint),
        "fsname": text.from_bytes(request.fsname),
        "options": options.join(request.options.text),
    }


async def vital(operations: Operations, work: Callable[[*Ts], Awaitable[object]], *arguments: *Ts) -> None:
    """Do what the mount cannot be without.

    If that fails and lockd starts a successor, this process ends at once: an orderly end would take the mount away.
    """
    try:
        await work(*arguments)
    except Exception:
        if not operations.attached:
            raise
        log.exception("the mount daemon fails, and leaves the mount to a successor")
        logging.shutdown()
        os._exit(EXIT_SYSTEM)


def enter_namespace(fd: int) -> None:
    """See the mounts of a mount namespace from now on; *fd* is closed.  Raises OSError."""
    try:
        if libc.setns(fd, _CLONE_NEWNS) < 0:
            raise failed()
    finally:
        os.close(fd)
