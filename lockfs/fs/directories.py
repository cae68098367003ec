"""Operations on open directories: opendir, readdir, fsyncdir, releasedir."""

from __future__ import annotations

import os

import pyfuse3
from pyfuse3 import ReaddirToken, RequestContext

from lockfs.fs import source
from lockfs.fs.base import Base, replies
from lockfs.fs.handles import DirectoryHandle
from lockfs.fs.source import HIDDEN, Found
from lockfs.fs.work import DAEMON
from lockfs.linux.files import proc_path

_LISTED_AT_ONCE = 1 << 18
"""Directories of more bytes than this are listed in a thread: the event loop would feel it."""
_BATCH = 128
"""Entries that are looked up in one call to remote storage."""


class DirectoryOperations(Base):
    """Handlers for open directories."""

    @replies
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """Open a directory."""
        effect = self.effects.begin()
        if effect.resent and (number := self.handles.directory_opened_by(effect.unique)) is not None:
            return number
        node = self.nodes.get(inode)
        with self.nodes.borrow(node) as fd:
            directory = await self.work.short(ctx, os.open, proc_path(fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        number = self.handles.add_directory(DirectoryHandle(node, directory, unique=effect.unique))
        if self.nameless is not None and node.pinned and node is not self.nodes.root:
            await self.nameless.opened(node, directory)
        return number

    @replies
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """List entries with their attributes.  An offset is a position in the listing that was taken at the first
        read.
        """
        handle = self.handles.directory(fh)
        if start_id == 0:
            handle.names = await self._list(handle)
            self.handles.listed(fh)
        at = start_id
        while at < len(handle.names):
            batch = handle.names[at : at + (_BATCH if self.work.remote else 1)]
            found = await self.work.short(DAEMON, _find_all, handle.fd, batch)
            try:
                for name in batch:
                    if not self._reply(handle, name, found.pop(name, None), at + 1, token):
                        return
                    at += 1
            finally:
                for rest in found.values():
                    rest.close()

    def _reply(
        self, handle: DirectoryHandle, name: bytes, found: Found | None, next_id: int, token: ReaddirToken
    ) -> bool:
        if name in (b".", b".."):
            entry = pyfuse3.EntryAttributes()
            node = handle.node if name == b"." else handle.node.parent or handle.node
            entry.st_ino = node.id
            entry.st_mode = 0o040755
            return pyfuse3.readdir_reply(token, name, entry, next_id)
        if found is None:
            return True  # removed since it was listed
        entry = self.enter(found, handle.node, name)
        if pyfuse3.readdir_reply(token, name, entry, next_id):
            return True
        self.nodes.forget(entry.st_ino, 1)
        return False

    async def _list(self, handle: DirectoryHandle) -> list[bytes]:
        if self.work.remote or os.fstat(handle.fd).st_size > _LISTED_AT_ONCE:
            listed = await self.work.data(os.listdir, handle.fd)
        else:
            listed = os.listdir(handle.fd)
        names = [b".", b"..", *map(os.fsencode, listed)]
        if handle.node is self.nodes.root and HIDDEN in names:
            names.remove(HIDDEN)
        return names

    @replies
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the directory's entries durable."""
        fd = self.handles.directory(fh).fd
        await self.work.sync(os.fdatasync if datasync else os.fsync, fd)

    @replies
    async def releasedir(self, fh: int) -> None:
        """Close a directory."""
        fd = self.handles.take_directory(fh).fd
        if fd >= 0:
            os.close(fd)


def _find_all(directory: int, names: list[bytes]) -> dict[bytes, Found]:
    """Look up names in order; those that have gone are left out."""
    found: dict[bytes, Found] = {}
    try:
        for name in names:
            if name in (b".", b".."):
                continue
            try:
                found[name] = source.find(directory, name)
            except FileNotFoundError:
                pass
    except BaseException:
        for each in found.values():
            each.close()
        raise
    return found
