"""One host's path to a directory on shared storage, whose I/O stalls, fails, tears or is delayed: a FUSE server.

``python faulty_server.py DIRECTORY MOUNTPOINT`` mounts it, says "ready", and serves until it is unmounted.  Each line
of its input says from then on how the path is: ``fine``, ``stall``, ``stall SECONDS`` (calls fail after that time, as
those of a path that gives up), ``fail``, ``full`` (a file server that says so when a file is closed), ``tear`` (of what is written only the first sectors are, and the call fails) or
``delay SECONDS``; what was under way when it was ``fine`` again is done.  It answers each with a line.

The page cache of this path keeps what is written to it until it is flushed, as that of a network filesystem does, and
knows nothing of what others do to the directory.  Inode numbers are those of the directory's filesystem.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import pyfuse3
import trio

T = TypeVar("T")
SECTOR = 512


class Path:
    """How the path is, for whoever makes a call on it."""

    def __init__(self) -> None:
        self.how = "fine"
        self._seconds = 0.0
        self._changed = trio.Event()

    def become(self, how: str, seconds: float) -> None:
        """Be so from now on."""
        self.how, self._seconds = how, seconds
        self._changed.set()
        self._changed = trio.Event()

    async def call(self, work: Callable[[], T], torn: Callable[[], object] | None = None) -> T:
        """Do a call as the path lets it; *torn* does the first part of a write."""
        gives_up = self._seconds if self.how == "stall" and self._seconds else float("inf")
        with trio.move_on_after(gives_up):
            while self.how == "stall":
                await self._changed.wait()
        if self.how == "stall" or self.how == "fail":
            raise pyfuse3.FUSEError(errno.EIO)
        if self.how == "tear" and torn is not None:
            await trio.to_thread.run_sync(torn)
            raise pyfuse3.FUSEError(errno.EIO)
        if self.how == "delay":
            await trio.sleep(self._seconds)
        try:
            return await trio.to_thread.run_sync(work)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None


class View(pyfuse3.Operations):
    """The directory by that path."""

    supports_dot_lookup = False
    enable_writeback_cache = True

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.path = Path()
        self._fds = {pyfuse3.ROOT_INODE: os.open(directory, os.O_PATH | os.O_DIRECTORY)}
        self._listings: dict[int, list[str]] = {}

    def _at(self, inode: int) -> str:
        return f"/proc/self/fd/{self._fds[inode]}"

    def _entry(self, fd: int, inode: int) -> pyfuse3.EntryAttributes:
        info, entry = os.stat(fd), pyfuse3.EntryAttributes()
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(info, name))
        entry.st_ino, entry.st_blksize, entry.st_blocks = inode, 4096, info.st_blocks
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _found(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._fds[parent])
        inode = os.stat(fd).st_ino
        if inode in self._fds:
            os.close(fd)
        return self._entry(self._fds.setdefault(inode, fd), inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        return await self.path.call(lambda: self._found(parent_inode, name))

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return await self.path.call(lambda: self._entry(self._fds[inode], inode))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        def work() -> pyfuse3.EntryAttributes:
            if fields.update_size:
                os.truncate(self._at(inode), attr.st_size)
            if fields.update_mode:
                os.chmod(self._at(inode), stat.S_IMODE(attr.st_mode))
            return self._entry(self._fds[inode], inode)

        return await self.path.call(work)

    async def forget(self, inode_list: Any) -> None:
        pass  # there are few, and a descriptor each until the end does no harm

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        wanted = os.O_RDWR if flags & os.O_ACCMODE else os.O_RDONLY  # the cache reads what it writes a part of
        return pyfuse3.FileInfo(fh=await self.path.call(lambda: os.open(self._at(inode), wanted)))

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        def work() -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | flags & os.O_EXCL, mode, dir_fd=self._fds[parent_inode])
            return pyfuse3.FileInfo(fh=fd), self._found(parent_inode, name)

        return await self.path.call(work)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        def work() -> pyfuse3.EntryAttributes:
            os.mkdir(name, mode, dir_fd=self._fds[parent_inode])
            return self._found(parent_inode, name)

        return await self.path.call(work)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self.path.call(lambda: os.unlink(name, dir_fd=self._fds[parent_inode]))

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        def work() -> pyfuse3.EntryAttributes:
            os.link(self._at(inode), new_name, dst_dir_fd=self._fds[new_parent_inode], follow_symlinks=True)
            return self._entry(self._fds[inode], inode)

        return await self.path.call(work)

    async def rename(self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: Any) -> None:
        old, new = self._fds[parent_inode_old], self._fds[parent_inode_new]
        await self.path.call(lambda: os.rename(name_old, name_new, src_dir_fd=old, dst_dir_fd=new))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self.path.call(lambda: os.pread(fh, size, off))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self.path.call(lambda: os.pwrite(fh, buf, off), lambda: os.pwrite(fh, buf[: len(buf) // 2 // SECTOR * SECTOR], off))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.path.call(lambda: os.fdatasync(fh))

    async def flush(self, fh: int) -> None:
        if self.path.how == "full":
            raise pyfuse3.FUSEError(errno.ENOSPC)

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        def work() -> pyfuse3.StatvfsData:
            there, found = os.statvfs(self._fds[pyfuse3.ROOT_INODE]), pyfuse3.StatvfsData()
            for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"):
                setattr(found, name, getattr(there, name))
            return found

        return await self.path.call(work)

    async def opendir(self, inode: int, ctx: Any) -> int:
        self._listings[inode] = await self.path.call(lambda: sorted(os.listdir(self._at(inode))))
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for number, name in enumerate(self._listings[fh][start_id:], start_id + 1):
            try:
                entry = self._found(fh, os.fsencode(name))
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                return


async def main(directory: str, mountpoint: str) -> None:
    """Serve."""
    view = View(directory)
    pyfuse3.init(view, mountpoint, {"fsname=faulty", "allow_other", "default_permissions"})
    print("ready", flush=True)

    async def obey() -> None:
        async for line in trio.wrap_file(sys.stdin):
            how, *seconds = line.split()
            view.path.become(how, float(seconds[0]) if seconds else 0.0)
            print(how, flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey)
        await pyfuse3.main()
        pyfuse3.close(unmount=False)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
