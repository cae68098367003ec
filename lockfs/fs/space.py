"""Operations on the space of open files, which come by the kernel module: fallocate, lseek, copy_file_range."""

from __future__ import annotations

import errno
import os

from lockfs.fs.base import replies
from lockfs.fs.work import Caller
from lockfs.fs.writing import WriteRights
from lockfs.linux import files

COPIED_AT_ONCE = 1 << 30
"""A copy is answered in parts of this many bytes, so that its caller can be stopped in between."""


class SpaceOperations(WriteRights):
    """Handlers of `lockfs.kernel.extra`."""

    @replies
    async def fallocate(self, fh: int, mode: int, offset: int, length: int, ctx: Caller) -> None:
        """Allocate, free or zero space: a write like any other."""
        handle = self.handles.file(fh)
        await self.claim(handle)
        await self.work.long(ctx, files.fallocate, handle.fd, mode, offset, length)

    @replies
    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Find the next data, or the next hole."""
        if offset >= 1 << 63:  # a negative one, as the caller gave it
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return await self.work.data(os.lseek, self.handles.file(fh).fd, offset, whence)

    @replies
    async def copy_file_range(
        self, fh_in: int, off_in: int, fh_out: int, off_out: int, length: int, _flags: int
    ) -> int:
        """Copy inside the storage; what it cannot do the kernel does with reads and writes."""
        effect = self.effects.begin()
        if effect.done is not None:
            return effect.done.value
        source, target = self.handles.file(fh_in), self.handles.file(fh_out)
        await self.claim(target)
        length = min(length, COPIED_AT_ONCE)
        try:
            copied = await self.work.data(os.copy_file_range, source.fd, target.fd, length, off_in, off_out)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from None
            raise
        effect.finish(value=copied)
        return copied
