"""Operations on open files: read, write, flush, fsync, release.

Reads, writes and syncs come here only where the kernel module is missing, or leaves them to us (`lockfs.kernel.gates`).
"""

from __future__ import annotations

import errno
import os
from typing import cast

from lockfs import text
from lockfs.fs.base import log, replies
from lockfs.fs.handles import FileHandle
from lockfs.fs.journal.effects import Effect
from lockfs.fs.work import DAEMON
from lockfs.fs.writing import WriteRights
from lockfs.linux import files
from lockfs.linux.files import proc_path


class FileOperations(WriteRights):
    """Handlers for open files."""

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
        effect = self.effects.begin()
        if effect.done is not None:
            return effect.done.value
        await self.claim(handle)
        if clears_suid:
            await self.work.long(DAEMON, files.chown, handle.fd, -1, -1)
        if handle.flags & os.O_APPEND:
            return await self._append(handle, off, buf, effect)
        # In a thread in any case: on a filesystem that is frozen even a write that is not to wait does.
        written = await self.work.data(_write_all, handle.fd, off, buf, handle.uncached)
        effect.finish(value=written)
        return written

    async def _append(self, handle: FileHandle, off: int, buf: bytes, effect: Effect) -> int:
        """Write to a file that can only be appended to, where the place of a write does not count."""
        if effect.intended is not None:
            with self.nodes.borrow(handle.node) as fd:
                if await self.work.data(_read, fd, off, len(buf)) == buf:
                    return len(buf)
        with effect.intend(size=off):
            written = await self.work.data(_write_all, handle.fd, off, buf, handle.uncached)
        effect.finish(value=written)
        return written

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
        handle = self.handles.file(fh)
        if handle.inherited and handle.hold is not None:
            # The descriptors of the lock are older than this daemon: they tell of errors before its time.
            handle.inherited = False
            for kept in handle.hold.kept:
                await self.work.sync(os.fsync, kept)
        await self.work.sync(os.fdatasync if datasync else os.fsync, handle.fd)

    @replies
    async def release(self, fh: int) -> None:
        """Close a file, then give its image back: in this order, so that the next owner reads what was written."""
        await self.close_handle(self.handles.take_file(fh))

    async def close_handle(self, handle: FileHandle) -> None:
        """Close an open file and give its image back, as soon as nobody can write to it any more."""
        mappings = self.mappings if handle.hold is not None and handle.mappable else None
        self.handles.note_closed(handle, lingers=mappings is not None)
        if self.gates is None or self.gates.remove(handle.number):
            await self._close(handle)
        if handle.counted and self.backing is not None:
            self.backing.close(handle.node.id)
        if handle.hold is None:
            return
        if mappings is not None:
            mappings.closed(handle, handle.hold)
        else:
            await self.guard.release(handle.hold)

    async def _close(self, handle: FileHandle) -> None:
        if handle.fd < 0:
            return  # it was gone already when this daemon took over
        fds = [handle.fd] if handle.direct < 0 else [handle.direct, handle.fd]
        removed = not self.work.remote and os.fstat(handle.fd).st_nlink == 0
        for fd in fds:
            try:
                if self.work.remote:
                    await self.work.sync(os.close, fd)
                elif removed:
                    self.work.close(fd)
                else:
                    os.close(fd)
            except OSError as error:
                # Whoever had it open has heard of it at its own close, if it looked, and hears nothing of this one; and
                # the image is to be given back all the same.
                path = text.from_bytes(handle.node.path())
                log.warning("%s: what was written may not be on the storage: close: %s", path, error.strerror)


def _read(path_fd: int, offset: int, size: int) -> bytes:
    fd = os.open(proc_path(path_fd), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


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


def _write_all(fd: int, offset: int, data: bytes, uncached: bool) -> int:
    written, view = 0, memoryview(data)
    flags = os.RWF_DSYNC if uncached else 0
    while written < len(data):
        try:
            written += os.pwritev(fd, [view[written:]], offset + written, flags)
        except OSError:
            if written:
                return written
            raise
    return written
