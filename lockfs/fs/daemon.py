"""The mount daemon: puts a mount together, serves it until it is unmounted, and leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pyfuse3
import trio

from lockfs import kernel, options, text
from lockfs.errors import LockUnavailable, MountError
from lockfs.fs import connection, lifetime, source, survival
from lockfs.fs.base import Parts, distrust
from lockfs.fs.guard import Guard
from lockfs.fs.handles import Handles
from lockfs.fs.journal import records
from lockfs.fs.journal.effects import Effects
from lockfs.fs.journal.file import Journal
from lockfs.fs.mappings import Mappings
from lockfs.fs.nodes import NodeTable
from lockfs.fs.operations import Operations
from lockfs.fs.owners import Owners
from lockfs.fs.policy import Policy
from lockfs.fs.session import LockdSession
from lockfs.fs.work import Work
from lockfs.kernel.backing import Backing
from lockfs.linux import credentials, mount, mountinfo, tree
from lockfs.protocol import messages
from lockfs.steps import step

log = logging.getLogger("lockfs.fs")

MIN_TASKS = 10
MAX_TASKS = 5000
"""Requests that may wait at once: opens that wait for a lock must not keep a stat from being answered."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be mounted where."""

    source: bytes
    mountpoint: bytes
    fsname: bytes
    flags: tuple[str, ...]
    data: tuple[str, ...]
    options: options.MountOptions
    run_dir: str


async def serve(request: Request, ready: Callable[[], None]) -> None:
    """Mount, call *ready* when the mount answers, and serve until it is unmounted.

    Raises `LockfsError` if the mount cannot keep its promise; then nothing is left mounted.
    """
    set_up_process()
    storage = mountinfo.find(request.source)
    values = request.options.values
    try:
        root = tree.clone(request.source)
    except OSError as error:
        raise MountError(f"cannot open {text.from_bytes(request.source)}: {error.strerror}") from error
    try:
        session = await LockdSession.begin(
            request.run_dir, _registration(request, storage), root, float(str(values["wait"]))
        )
        try:
            async with trio.open_nursery() as nursery:
                operations = assemble(request, root, storage.fstype, session)
                try:
                    await _serve(request, operations, session, nursery, ready)
                finally:
                    with trio.CancelScope(shield=True):
                        await operations.close()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await session.end()
    except LockUnavailable as error:
        raise MountError(str(error), hint="See lockd's log in the run directory, or the journal.") from error
    finally:
        os.close(root)


def set_up_process() -> None:
    """Make this process fit to act for others: their modes as given, their identities, room for descriptors."""
    os.umask(0)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    credentials.keep_capabilities()
    # With it the storage would let everybody write past quotas and into the blocks that are kept for root.
    credentials.drop_capability(credentials.CAP_SYS_RESOURCE)
    logging.getLogger("pyfuse3").addFilter(_is_awaited)


def _is_awaited(record: logging.LogRecord) -> bool:
    """Tell whether a record of pyfuse3 is worth keeping: a reply that nobody waits for, once unmounted, is not."""
    lost = record.args == (os.strerror(errno.ENOENT),) or record.args == (os.strerror(errno.ENODEV),)
    return not (lost and "fuse_reply_* failed" in record.msg)


def _registration(request: Request, storage: mountinfo.MountInfo) -> messages.Mount:
    return messages.Mount(
        source=text.from_bytes(request.source),
        mountpoint=text.from_bytes(request.mountpoint),
        fstype=storage.fstype,
        fsoptions=storage.fsoptions,
        backend=str(request.options.values["backend"]),
        options={name: text.from_bytes(os.fsencode(value)) for name, value in request.options.text.items()},
    )


def assemble(request: Request, root: int, fstype: str, session: LockdSession) -> Operations:
    """Put the parts of a mount together; *root* is a descriptor of the source, on a filesystem of type *fstype*."""
    values = request.options.values
    work = Work(fstype)
    found = source.identify(os.open(".", source.PATH_FLAGS | os.O_DIRECTORY, dir_fd=root))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    journal = Journal()
    nodes = NodeTable(root, found, open_limit=min(4096, limit // 4), close=work.close, journal=journal)
    if not isinstance(found.key, bytes):
        log.info("%s has no file handles: each file that the kernel knows of keeps a descriptor open", fstype)
    guard = Guard(nodes, work, Policy(values), session, request.mountpoint, values["key"] == "path", distrust)
    return Operations(Parts(nodes, work, guard, Handles(journal), Owners(values), Effects(journal)))


async def _serve(
    request: Request, operations: Operations, session: LockdSession, nursery: trio.Nursery, ready: Callable[[], None]
) -> None:
    mountpoint = text.from_bytes(request.mountpoint)
    async with _mounted(request, operations, nursery) as fd:
        found = mountinfo.at(request.mountpoint)
        if found is None:
            raise MountError(f"{text.from_bytes(request.mountpoint)} was unmounted while it was mounted")
        if request.options.values["data"] != "gated" and _can_bypass(request, operations):
            bypass(operations, fd, found.dev, nursery)
        elif operations.gates is not None:
            connection.read_ahead(found.dev)
        if operations.negotiated is not None:
            survival.begin_journal(request, operations, session.mount_id, found.dev)
            survival.provide_for_nameless(operations, session, nursery)
        connection.heed(operations, session)
        follow = partial(session.follow, mountpoint, obedience(operations), operations.guard.held)
        nursery.start_soon(survival.vital, operations, follow)
        nursery.start_soon(unmount_on_signal, request.mountpoint)
        nursery.start_soon(_announce, request, operations, session, fd, ready)
        await survival.vital(operations, answer)
    log.info("unmounted %s", mountpoint)


async def answer() -> None:
    """Answer the kernel until the mount has ended."""
    await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)


def obedience(operations: Operations) -> Callable[[messages.Order], None]:
    """Return what carries out lockd's orders."""

    def obey(order: messages.Order) -> None:
        lifetime.obey(order, operations)
        operations.effects.journal.flush()

    return obey


def _can_bypass(request: Request, operations: Operations) -> bool:
    """Say whether data can go past the daemon; if it cannot, tell, or refuse the mount where nothing else is wanted."""
    agreed = operations.negotiated
    if agreed is None or not agreed.passthrough:
        missing = kernel.probe() or "The kernel did not agree to passthrough."
        if request.options.values["data"] == "passthrough":
            raise MountError(f"no data=passthrough here: {missing}", hint="Use data=auto or data=gated.")
        log.info("all data goes through the mount daemon: %s", missing)
        return False
    return True


def bypass(operations: Operations, fd: int, dev: int, nursery: trio.Nursery) -> None:
    """Let data go past the daemon; *dev* is the device number of the mount, whose connection is *fd*."""
    journal = operations.effects.journal

    def opened(node: int, backing_id: int) -> None:
        journal.note(records.Backed(node, backing_id))

    def closed(backing_id: int) -> None:
        journal.note(records.Unbacked(backing_id))

    operations.backing = Backing(fd, enabled=True, opened=opened, closed=closed)
    operations.mappings = Mappings(
        operations.nodes, operations.handles, operations.guard, operations.backing, fd, dev
    )
    nursery.start_soon(survival.vital, operations, operations.mappings.run)


@asynccontextmanager
async def _mounted(request: Request, operations: Operations, nursery: trio.Nursery) -> AsyncIterator[int]:
    mode = os.fstat(operations.nodes.fd(operations.nodes.root)).st_mode
    fd = connection.attach(request.fsname, request.mountpoint, request.flags, mode, request.data)
    try:
        connection.begin(operations, fd, nursery)
    except BaseException:
        os.close(fd)
        mount.umount(request.mountpoint, mount.MNT_DETACH)
        raise
    try:
        yield fd
    except BaseException:
        # Not one that lockd knows: `survival.vital` has ended this process then, for the sake of its successor.
        # Nobody serves it any more: a mount that is left would only give errors.
        await _detach(request.mountpoint)
        raise
    finally:
        pyfuse3.close(unmount=False)


async def _detach(mountpoint: bytes) -> None:
    try:
        mount.umount(mountpoint, mount.MNT_DETACH)
    except OSError as error:
        log.error("cannot unmount %s: %s", text.from_bytes(mountpoint), error.strerror)


async def _announce(
    request: Request, operations: Operations, session: LockdSession, fd: int, ready: Callable[[], None]
) -> None:
    """Say that the mount serves: first to lockd, which can fence what is opened from then on."""
    await operations.started.wait()
    if operations.negotiated is None:
        connection.widen(request.mountpoint)
    data: messages.DataPath = "gated" if operations.backing is None else "passthrough"
    resumable = operations.effects.journal.begun
    step("mount.before-attachment")
    dev = await lifetime.attach(session, request.mountpoint, data, fd, resumable=resumable)
    step("mount.after-attachment")
    operations.attached = resumable
    log.info(
        "mounted %s on %s, backend %s, data %s",
        text.from_bytes(request.source), text.from_bytes(request.mountpoint), request.options.values["backend"], data,
    )  # fmt: skip
    ready()
    await survival.vital(operations, lifetime.detach_when_unmounted, session, request.mountpoint, dev)


async def unmount_on_signal(mountpoint: bytes, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """On SIGTERM, unmount; a mount that is in use stays, since to end would fail every write on it."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            name = signal.Signals(number).name
            try:
                await trio.to_thread.run_sync(mount.umount, mountpoint)
            except OSError as error:
                log.warning("%s: %s stays mounted: %s", name, text.from_bytes(mountpoint), error.strerror)
