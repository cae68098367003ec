"""Operations that open files: open and create.

Whoever is to write gets the image first, and nothing is changed before.
"""

from __future__ import annotations

import errno
import os
import stat as st
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext

from lockfs.fs import source
from lockfs.fs.base import distrust, replies
from lockfs.fs.guard import Hold
from lockfs.fs.handles import FileHandle
from lockfs.fs.nodes import Node
from lockfs.fs.source import Found
from lockfs.fs.work import DAEMON, Caller
from lockfs.fs.writing import WriteRights
from lockfs.kernel import session
from lockfs.kernel.backing import Backing
from lockfs.linux import files
from lockfs.linux.files import proc_path
from lockfs.protocol.messages import Owner

_PASSED_ON = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
"""Flags of an open that the daemon's descriptor of the file gets.

Not O_APPEND: the kernel says where each write goes, and a descriptor that appends would not heed it.  Not O_DIRECT: not
all that is asked for is aligned; what is has a descriptor of its own.
"""


@dataclass(slots=True)
class _Right:
    """What an open may do: `hold` is the image, None if none is needed; `manager` takes it at its first write."""

    hold: Hold | None = None
    manager: Owner | None = None


class OpenOperations(WriteRights):
    """Handlers that open."""

    _one_at_a_time: trio.Lock

    @replies
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        effect = self.effects.begin()
        if effect.resent and (opened := self.handles.opened_by(effect.unique)) is not None:
            return self._info(*opened)
        return await self._open(self.nodes.get(inode), flags, ctx, effect.unique)

    async def _open(self, node: Node, flags: int, ctx: RequestContext, unique: int) -> FileInfo:
        # Without the kernel module a truncation by an open does not say so.
        clears_suid = self.clears_suid() or bool(self.negotiated is None and flags & os.O_TRUNC and ctx.uid)
        right = await self._right_to_open(node, flags, ctx)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._give_up, right)
            fd, passed_on = await self._open_backing(node, flags, ctx)
            undo.callback(os.close, fd)
            if clears_suid:
                await self.work.long(DAEMON, files.chown, fd, -1, -1)
            if flags & os.O_TRUNC and flags & os.O_ACCMODE == os.O_RDONLY:
                await self._only_read_on(right, node, ctx)
            info = await self._new_handle(node, fd, passed_on, bool(flags & os.O_DIRECT), right, ctx, unique)
            undo.pop_all()
        if self.gates is not None and not session.split(info.fh)[1]:
            distrust(node)
        return info

    async def _right_to_open(self, node: Node, flags: int, ctx: RequestContext) -> _Right:
        truncates = flags & os.O_TRUNC
        if flags & os.O_ACCMODE == os.O_RDONLY and not truncates:
            return _Right(await self.hold_to_read(node, ctx))
        owner, is_manager = self.owners.of(ctx)
        if is_manager and not truncates and self.guard.policy.guarded(node.path()):
            return _Right(manager=owner)
        return _Right(await self.hold_to_write(node, owner, ctx))

    async def _only_read_on(self, right: _Right, node: Node, ctx: RequestContext) -> None:
        """After a truncation by a read-only open: it was the only write, so a pinned image is held as by a reader."""
        if right.hold is not None:
            # In this order: until it is given back, the hold keeps other writers out.
            writing, right.hold = right.hold, await self.hold_to_read(node, ctx)
            await self.guard.release(writing)

    async def _give_up(self, right: _Right) -> None:
        if right.hold is not None:
            await self.guard.release(right.hold)

    async def _open_backing(self, node: Node, flags: int, ctx: Caller) -> tuple[int, int]:
        """Return a descriptor of the file, and the flags with which it was opened."""
        with self.nodes.borrow(node) as fd:
            path = proc_path(fd)
            passed_on = flags & _PASSED_ON | os.O_CLOEXEC
            try:
                if not self.work.remote and not flags & os.O_TRUNC:
                    try:
                        # O_NONBLOCK: only another's lease on the file could make this wait.
                        return os.open(path, passed_on | os.O_NONBLOCK), passed_on
                    except BlockingIOError:
                        pass
                return await self.work.long(ctx, os.open, path, passed_on), passed_on
            except PermissionError as error:
                if error.errno != errno.EPERM or not flags & os.O_APPEND:
                    raise
                # A file that can only be appended to: a descriptor of it that appends does what is asked for.
                passed_on |= os.O_APPEND
                return await self.work.long(ctx, os.open, path, passed_on), passed_on

    async def _new_handle(
        self, node: Node, fd: int, flags: int, uncached: bool, right: _Right, ctx: Caller, unique: int
    ) -> FileInfo:
        """Give the kernel its handle; on failure nothing is left but *fd* and *right*, which may have got a hold."""
        direct = await self.work.short(ctx, self.open_direct, fd, flags) if uncached else -1
        try:
            backing_id = await self._bypass(node, fd, right, ctx)
        except BaseException:
            if direct >= 0:
                os.close(direct)
            raise
        handle = FileHandle(
            node, fd, flags & os.O_ACCMODE != os.O_RDONLY, uncached, direct, hold=right.hold, manager=right.manager,
            counted=self.backing is not None, mappable=bool(backing_id) and flags & os.O_ACCMODE == os.O_RDWR,
            flags=flags & ~os.O_TRUNC, uid=ctx.uid, gid=ctx.gid, unique=unique,
        )  # fmt: skip
        if handle.mappable and handle.hold is not None and self.mappings is not None:
            self.mappings.opened(node, handle.hold)
        number = self.handles.add_file(handle)
        self.open_gate(handle)
        if self.nameless is not None and node.pinned:
            await self.nameless.opened(node, fd)
        return self._info(number, handle)

    def _info(self, number: int, handle: FileHandle) -> FileInfo:
        backing_id = 0 if self.backing is None else self.backing.id_of(handle.node.id)
        # What is cached of a file may be older than what another host has written since it was last open here.  A
        # manager's handle bypasses the cache, so that each write arrives, and is refused, by itself; nor can it be
        # mapped for writing.
        return FileInfo(
            fh=session.mint(number, backing_id), keep_cache=False, direct_io=handle.manager is not None
        )

    async def _bypass(self, node: Node, fd: int, right: _Right, ctx: Caller) -> int:
        """Return the backing id with which the file's data bypasses the daemon; 0 if it does not."""
        if self.backing is None:
            return 0
        wanted = right.manager is None
        if self.work.remote:
            # A file server looks at who makes the call that follows; two of them would make two ids for one file.
            async with self._one_at_a_time:
                backing_id = await self.work.long(ctx, lambda: _backing_id(self.backing, node.id, fd, wanted))
        else:
            backing_id = _backing_id(self.backing, node.id, fd, wanted)
        if backing_id and right.manager is not None:
            # The kernel takes no mix of the two ways to data, so that a manager's writes would bypass the guard here.
            try:
                joined = self.guard.join(node)
                right.hold = joined or await self.hold_to_write(node, right.manager, ctx)
                right.manager = None
            except BaseException:
                self.backing.close(node.id)
                raise
        return backing_id

    @replies
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it, or open what somebody else has just made there."""
        effect = self.effects.begin()
        if effect.resent and (opened := self.handles.opened_by(effect.unique)) is not None:
            return await self._created_before(*opened, ctx)
        parent = self.nodes.get(parent_inode)
        self.creatable(parent, name)
        with self.nodes.borrow(parent) as directory:
            try:
                if await self.work.short(ctx, source.exists, directory, name):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                with effect.intend():
                    fd, found = await self.work.long(
                        ctx, _create, directory, name, mode, ctx.umask, flags & _PASSED_ON
                    )
            except FileExistsError:
                if flags & os.O_EXCL and effect.intended is None:
                    raise
                exclusive = bool(flags & os.O_EXCL)
                return await self._open_existing(parent, directory, name, flags, ctx, effect.unique, exclusive)
        entry = self.enter(found, parent, name)
        node = self.nodes.get(entry.st_ino)
        async with AsyncExitStack() as undo:
            undo.callback(self.nodes.forget, node.id, 1)
            undo.callback(os.close, fd)
            right = await self._right_to_open(node, flags & ~os.O_TRUNC, ctx)
            undo.push_async_callback(self._give_up, right)
            uncached = bool(flags & os.O_DIRECT)
            info = await self._new_handle(node, fd, flags & _PASSED_ON, uncached, right, ctx, effect.unique)
            undo.pop_all()
        effect.finish()
        return info, entry

    async def _created_before(
        self, number: int, handle: FileHandle, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        with self.nodes.borrow(handle.node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
        return self._info(number, handle), self.attributes(handle.node, status)

    async def _open_existing(
        self,
        parent: Node,
        directory: int,
        name: bytes,
        flags: int,
        ctx: RequestContext,
        unique: int,
        exclusive: bool,
    ) -> tuple[FileInfo, EntryAttributes]:
        """Open what is there; with *exclusive* it has to be what the daemon before has made of the same request."""
        found = await self.work.short(ctx, source.find, directory, name)
        if exclusive and not (st.S_ISREG(found.stat.st_mode) and (found.stat.st_size, found.stat.st_nlink) == (0, 1)):
            found.close()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if not st.S_ISREG(found.stat.st_mode):
            found.close()
            # Makes the kernel look the name up again and go on from what it is now.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        node = self.nodes.adopt(found, parent, name)
        try:
            info = await self._open(node, flags, ctx, unique)
            with self.nodes.borrow(node) as fd:
                status = await self.work.short(ctx, os.fstat, fd)
        except BaseException:
            self.nodes.forget(node.id, 1)
            raise
        return info, self.attributes(node, status)


def _backing_id(backing: Backing | None, node: int, fd: int, wanted: bool) -> int:
    return 0 if backing is None else backing.open(node, fd, wanted=wanted)


def _create(directory: int, name: bytes, mode: int, umask: int, flags: int) -> tuple[int, Found]:
    flags = flags & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, source.apply_umask(directory, mode, umask), dir_fd=directory)
    try:
        return fd, source.identify(os.open(proc_path(fd), os.O_PATH | os.O_CLOEXEC))
    except BaseException:
        os.close(fd)
        raise
