"""A mount daemon that takes over the connection of one that died: from the journal, and from lockd.

The order matters.  lockd gets to know it first (`LockdSession.resume`), so that there are never two.  Then everything
is as it was, at last the new journal.  Then lockd's orders can be heeded, and only then, when lockd has been told that
nobody else is to, is the first request read.  What the one before has had in its hands is asked for once more.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial

import pyfuse3
import trio

from lockfs import options, text
from lockfs.backend import Mode
from lockfs.errors import LockfsError
from lockfs.fs import connection, daemon, doubt, lifetime, survival
from lockfs.fs.daemon import MAX_TASKS, Request
from lockfs.fs.handles import DirectoryHandle, FileHandle
from lockfs.fs.journal import records
from lockfs.fs.journal.state import JournalError, State, replay
from lockfs.fs.nodes import Node
from lockfs.fs.operations import Operations
from lockfs.fs.session import LockdSession
from lockfs.fs.survival import Heir
from lockfs.kernel import device
from lockfs.linux.files import proc_path
from lockfs.protocol.messages import Claimed
from lockfs.protocol.start import journal_path
from lockfs.steps import step

log = logging.getLogger("lockfs.fs")

REOPENED_AT_ONCE = 64
SETTLED = 1.0
"""Seconds after which the requests that the kernel has sent again have been dealt with."""


class _Opener:
    """Whoever opened a file before: nothing is known of the process any more."""

    pid = 0

    def __init__(self, opened: records.Opened) -> None:
        self.uid, self.gid = opened.uid, opened.gid


async def take_over(heir: Heir) -> None:
    """Take a mount over, and serve it until it is unmounted.

    Raises `LockfsError`; then lockd tries again, or gives up.
    """
    daemon.set_up_process()
    state = _read(journal_path(heir.run_dir, heir.mount_id))
    request = _request(state, heir.run_dir)
    step("resume.before-registration")
    wait = float(str(request.options.values["wait"]))
    session = await LockdSession.resume(
        heir.run_dir, heir.mount_id, heir.token, wait, heir.source_fd, heir.fuse_fd
    )
    step("resume.after-registration")
    try:
        async with trio.open_nursery() as nursery:
            operations = daemon.assemble(request, heir.source_fd, state.begin.fstype, session)
            await _resume(heir, request, state, operations, session, nursery)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await session.end()


def _read(path: str) -> State:
    try:
        with open(path, "rb") as file:
            return replay(file.read())
    except OSError as error:
        raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error


def _request(state: State, run_dir: str) -> Request:
    said = state.begin.request
    return Request(
        source=text.to_bytes(said["source"]),
        mountpoint=text.to_bytes(said["mountpoint"]),
        fsname=text.to_bytes(said["fsname"]),
        flags=(),
        data=(),
        options=options.parse(said["options"]),
        run_dir=run_dir,
    )


async def _resume(
    heir: Heir, request: Request, state: State, operations: Operations, session: LockdSession, nursery: trio.Nursery
) -> None:
    shown = text.from_bytes(request.mountpoint)
    connection.resume(operations, heir.fuse_fd, nursery, state.begin.init)
    connection.heed(operations, session)
    if state.begin.data == "passthrough":
        daemon.bypass(operations, heir.fuse_fd, state.begin.dev, nursery)
    kept = await session.inheritance.fetch()
    await _restore(operations, state, kept)
    survival.begin_journal(request, operations, heir.mount_id, state.begin.dev)
    survival.provide_for_nameless(operations, session, nursery, kept)
    if operations.backing is not None:
        ahead = range(state.last_backing_id + 1, state.last_backing_id + 1 + MAX_TASKS)
        operations.backing.close_unused((*state.abandoned, *ahead))
    unsafe = {(each.dev, each.ino) for each in await session.inheritance.claim(_claims(operations))}
    operations.lose(unsafe, "it was lost while the mount had no daemon")
    obey = daemon.obedience(operations)
    operations.attached = True
    await nursery.start(partial(_follow, operations, session, shown, obey))
    # Before it is known that we serve: a signal that comes then is for the mount.
    await nursery.start(daemon.unmount_on_signal, request.mountpoint)
    step("resume.before-take-over")
    operations.fence(set(await session.take_over()))
    operations.effects.journal.flush()
    step("resume.after-take-over")
    device.notify_resend(heir.fuse_fd)
    step("resume.after-resend")
    log.info("took over %s, with %d open files", shown, len(operations.handles))
    nursery.start_soon(_reclaim, operations, session)
    nursery.start_soon(_sift, operations, heir.fuse_fd)
    nursery.start_soon(survival.vital, operations, doubt.resolve, operations, session, heir.fuse_fd)
    nursery.start_soon(
        survival.vital, operations, lifetime.detach_when_unmounted, session, request.mountpoint, state.begin.dev
    )
    await survival.vital(operations, daemon.answer)
    log.info("unmounted %s", shown)
    await operations.close()
    pyfuse3.close(unmount=False)


async def _follow(
    operations: Operations,
    session: LockdSession,
    shown: str,
    obey: lifetime.Obey,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    follow = partial(session.follow, task_status=task_status)
    await survival.vital(operations, follow, shown, obey, operations.guard.held)


async def _reclaim(operations: Operations, session: LockdSession) -> None:
    """Get the descriptors in which locks live: with them the locks outlive lockd, too."""
    try:
        await operations.guard.reclaim(lambda image: session.inheritance.reclaim(image))
    except LockfsError as error:
        log.warning("locks that were taken over depend on lockd alone: %s", error)


async def _sift(operations: Operations, fuse_fd: int) -> None:
    if operations.nameless is not None:
        await trio.sleep(SETTLED)
        await operations.nameless.sift(partial(device.notify_inval_inode, fuse_fd))


def _claims(operations: Operations) -> list[Claimed]:
    handles = [*operations.handles.files(), *operations.handles.lingering()]
    return list({
        Claimed(handle.node.dev, handle.node.ino, handle.hold.mode.value, handle.hold.owner.key): None
        for handle in handles
        if handle.hold is not None
    })  # fmt: skip


async def _restore(operations: Operations, state: State, kept: Mapping[int, int]) -> None:
    operations.nodes.restore(state, kept)
    operations.effects.restore(state)
    operations.handles.restore(state)
    counts: Counter[int] = Counter()
    limiter = trio.CapacityLimiter(REOPENED_AT_ONCE)
    async with trio.open_nursery() as nursery:
        for opened in (*state.files.values(), *state.lingering.values()):
            node = operations.nodes.find(opened.node)
            if node is None:
                continue  # the kernel has forgotten it, so it is open nowhere
            closed = opened.serial in state.lingering
            handle = _handle(operations, node, opened)
            operations.handles.restore_file(0 if closed else opened.number, handle)
            if closed:
                continue
            if opened.counted:
                counts[opened.node] += 1
            if operations.work.remote:
                nursery.start_soon(_reopen_remote, operations, handle, opened, limiter)
            else:
                _reopen(operations, handle)
    for directory in state.directories.values():
        _restore_directory(operations, directory, state.listings.get(directory.number, []))
    if operations.backing is not None:
        operations.backing.restore(counts, state.backed, state.last_backing_id)
    if operations.mappings is not None:
        operations.mappings.restore()


def _handle(operations: Operations, node: Node, opened: records.Opened) -> FileHandle:
    hold = opened.hold
    return FileHandle(
        node, -1, opened.writable, opened.uncached,
        hold=None if hold is None else operations.guard.restore(node, Mode(hold.mode), hold.owner),
        manager=opened.manager, counted=opened.counted, mappable=opened.mappable, flags=opened.flags, uid=opened.uid,
        gid=opened.gid, unique=opened.unique, serial=opened.serial, answered=opened.answered, inherited=True,
    )  # fmt: skip


def _reopen(operations: Operations, handle: FileHandle) -> None:
    try:
        with operations.nodes.borrow(handle.node) as fd:
            handle.fd = os.open(proc_path(fd), handle.flags | os.O_CLOEXEC)
    except OSError as error:
        _gone(handle, error)
        return
    if handle.uncached:
        handle.direct = operations.open_direct(handle.fd, handle.flags)
    operations.open_gate(handle)


async def _reopen_remote(
    operations: Operations, handle: FileHandle, opened: records.Opened, limiter: trio.CapacityLimiter
) -> None:
    async with limiter:
        try:
            with operations.nodes.borrow(handle.node) as fd:
                flags = handle.flags | os.O_CLOEXEC
                handle.fd = await operations.work.long(_Opener(opened), os.open, proc_path(fd), flags)
        except OSError as error:
            _gone(handle, error)
            return
        if handle.uncached:
            call = operations.open_direct
            handle.direct = await operations.work.long(_Opener(opened), call, handle.fd, handle.flags)
        operations.open_gate(handle)


def _gone(handle: FileHandle, error: OSError) -> None:
    log.error("%s cannot be opened again: %s; what is open of it gives errors", _shown(handle.node), error.strerror)


def _restore_directory(operations: Operations, opened: records.OpenedDirectory, names: list[bytes]) -> None:
    node = operations.nodes.find(opened.node)
    if node is None:
        return
    fd = -1
    try:
        with operations.nodes.borrow(node) as path_fd:
            fd = os.open(proc_path(path_fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        log.info("%s cannot be opened again: %s", _shown(node), error.strerror)
    operations.handles.restore_directory(opened.number, DirectoryHandle(node, fd, names, opened.unique))


def _shown(node: Node) -> str:
    return text.from_bytes(node.path())
