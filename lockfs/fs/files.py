"""Operations on open files: create, open, read, write, flush, fsync, release."""

from __future__ import annotations

import errno
import os
import stat as st
from typing import cast

from pyfuse3 import EntryAttributes, FileInfo, RequestContext

from lockfs.fs import source
from lockfs.fs.base import replies
from lockfs.fs.guard import Hold
from lockfs.fs.handles import FileHandle
from lockfs.fs.nodes import Node
from lockfs.fs.source import Found
from lockfs.fs.work import DAEMON, Caller
from lockfs.fs.writing import WriteRights
from lockfs.linux import files
from lockfs.linux.files import proc_path
from lockfs.protocol.messages import Owner

_PASSED_ON = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
"""Flags of an open that the backing file is opened with.

Not O_APPEND: the kernel says where each write goes, and a descriptor that appends would not heed it.  Not O_DIRECT:
the kernel passes such requests on uncached, but their memory is not aligned here.
"""


class FileOperations(WriteRights):
    """Handlers for open files."""

    # Opening ---------------------------------------------------------------------------------------

    @replies
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; for writing, its image is taken first, and nothing is truncated before."""
        return await self._open(self.nodes.get(inode), flags, ctx)

    async def _open(self, node: Node, flags: int, ctx: RequestContext) -> FileInfo:
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        truncates = bool(flags & os.O_TRUNC)
        clears_suid = self.clears_suid()
        manager: Owner | None = None
        hold: Hold | None = None
        if writable or truncates:
            owner, is_manager = self.owners.of(ctx)
            if is_manager and not truncates and self.guard.policy.guarded(node.path()):
                manager = owner
            else:
                hold = await self.hold_to_write(node, owner, ctx)
        else:
            hold = await self.hold_to_read(node, ctx)
        try:
            fd = await self._open_backing(node, flags & _PASSED_ON, ctx)
            if clears_suid:
                await self.work.long(DAEMON, files.chown, fd, -1, -1)
            if truncates and not writable and hold is not None:
                # Only the truncation was a write.  Until it is given back, the hold keeps out writers of a pinned
                # image, too.
                reading = await self.hold_to_read(node, ctx)
                await self.guard.release(hold)
                hold = reading
        except BaseException:
            if hold is not None:
                await self.guard.release(hold)
            raise
        return self._new_handle(FileHandle(node, fd, writable, hold, manager))

    def _new_handle(self, handle: FileHandle) -> FileInfo:
        # What is cached of a file may be older than what another host has written since it was last open here.  A
        # manager's handle bypasses the cache, so that each write arrives, and is refused, by itself; nor can it be
        # mapped for writing.
        return FileInfo(fh=self.handles.add_file(handle), keep_cache=False, direct_io=handle.manager is not None)

    async def _open_backing(self, node: Node, flags: int, ctx: Caller) -> int:
        with self.nodes.borrow(node) as fd:
            path = proc_path(fd)
            if not self.work.remote and not flags & os.O_TRUNC:
                try:
                    # O_NONBLOCK: only another's lease on the file could make this wait.
                    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
                except BlockingIOError:
                    pass
            return await self.work.long(ctx, os.open, path, flags | os.O_CLOEXEC)

    @replies
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it, or open what somebody else has just made there."""
        parent = self.nodes.get(parent_inode)
        self.creatable(parent, name)
        with self.nodes.borrow(parent) as directory:
            try:
                fd, found = await self.work.long(ctx, _create, directory, name, mode, ctx.umask, flags & _PASSED_ON)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                return await self._open_existing(parent, directory, name, flags, ctx)
        entry = self.enter(found, parent, name)
        node = self.nodes.get(entry.st_ino)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        hold: Hold | None = None
        manager: Owner | None = None
        try:
            if writable:
                owner, is_manager = self.owners.of(ctx)
                if is_manager and self.guard.policy.guarded(node.path()):
                    manager = owner
                else:
                    hold = await self.hold_to_write(node, owner, ctx)
            else:
                hold = await self.hold_to_read(node, ctx)
        except BaseException:
            os.close(fd)
            self.nodes.forget(node.id, 1)
            raise
        return self._new_handle(FileHandle(node, fd, writable, hold, manager)), entry

    async def _open_existing(
        self, parent: Node, directory: int, name: bytes, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        found = await self.work.short(ctx, source.find, directory, name)
        if not st.S_ISREG(found.stat.st_mode):
            found.close()
            # Makes the kernel look the name up again and go on from what it is now.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        node = self.nodes.adopt(found, parent, name)
        try:
            info = await self._open(node, flags, ctx)
            with self.nodes.borrow(node) as fd:
                status = await self.work.short(ctx, os.fstat, fd)
        except BaseException:
            self.nodes.forget(node.id, 1)
            raise
        return info, self.attributes(node, status)

    # Data ------------------------------------------------------------------------------------------

    @replies
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read; at once if the storage's page cache has it all."""
        fd = self.handles.file(fh).fd
        data = _read_cached(fd, off, size)
        if data is not None:
            return data
        return await self.work.data(os.pread, fd, size, off)

    @replies
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write all of *buf*, or as much as the storage takes."""
        handle = self.handles.file(fh)
        clears_suid = self.clears_suid()
        await self.claim(handle)
        if clears_suid:
            await self.work.long(DAEMON, files.chown, handle.fd, -1, -1)
        written = _write_at_once(handle.fd, off, buf)
        if written == len(buf):
            return written
        return await self.work.data(_write_all, handle.fd, off, buf, written)

    @replies
    async def flush(self, fh: int) -> None:
        """Report errors of writing back, where a close does; elsewhere tell the kernel not to ask again."""
        if not self.work.remote:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fd = self.handles.file(fh).fd
        await self.work.sync(lambda: os.close(os.dup(fd)))

    @replies
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make what was written durable."""
        fd = self.handles.file(fh).fd
        await self.work.sync(os.fdatasync if datasync else os.fsync, fd)

    @replies
    async def release(self, fh: int) -> None:
        """Close a file, then give its image back: in this order, so that the next owner reads what was written."""
        await self.close_handle(self.handles.take_file(fh))

    async def close_handle(self, handle: FileHandle) -> None:
        """Close an open file and give its image back."""
        if self.work.remote:
            await self.work.sync(os.close, handle.fd)
        elif os.fstat(handle.fd).st_nlink == 0:
            self.work.close(handle.fd)
        else:
            os.close(handle.fd)
        if handle.hold is not None:
            await self.guard.release(handle.hold)


def _create(directory: int, name: bytes, mode: int, umask: int, flags: int) -> tuple[int, Found]:
    flags = flags & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, source.apply_umask(directory, mode, umask), dir_fd=directory)
    try:
        return fd, source.identify(os.open(proc_path(fd), os.O_PATH | os.O_CLOEXEC))
    except BaseException:
        os.close(fd)
        raise


def _read_cached(fd: int, offset: int, size: int) -> bytes | None:
    """Return what the page cache has, if it is all that a read would return; else None."""
    buffer = bytearray(size)
    try:
        got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:
        return None  # not cached, or not known to this filesystem; a real error comes again
    if got < size:
        if offset + got < os.fstat(fd).st_size:
            return None
        del buffer[got:]
    return cast(bytes, buffer)  # pyfuse3 takes any buffer


def _write_at_once(fd: int, offset: int, data: bytes) -> int:
    """Write what the storage takes without waiting; return how much it was."""
    try:
        return os.pwritev(fd, [data], offset, os.RWF_NOWAIT)
    except OSError:
        return 0


def _write_all(fd: int, offset: int, data: bytes, written: int) -> int:
    view = memoryview(data)
    while written < len(data):
        try:
            written += os.pwrite(fd, view[written:], offset + written)
        except OSError:
            if written:
                return written
            raise
    return written
