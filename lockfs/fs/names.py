"""Operations on names: lookup, creation of anything but open files, removal, rename, links."""

from __future__ import annotations

import errno
import os
import stat as st
from collections.abc import Callable, Sequence

from pyfuse3 import EntryAttributes, RequestContext

from lockfs.fs import source
from lockfs.fs.base import Base, Parts, replies, replies_at_once
from lockfs.fs.guard import Hold
from lockfs.fs.journal.effects import Effect
from lockfs.fs.nodes import Node
from lockfs.fs.source import Found, apply_umask
from lockfs.kernel.wire import Attributes
from lockfs.linux import files
from lockfs.protocol.messages import Owner

_RETRIES = 64
"""How often a name may lead to yet another file, while its lock is being taken, before the call is refused."""


class NameOperations(Base):
    """Handlers for requests that name a directory entry.

    `doubtful` are nodes of which is being found out whether the kernel knows them: it must not hear of them.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.doubtful: set[int] = set()

    @replies
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; ``.`` and ``..`` come from file servers that look for a lost inode."""
        parent = self.nodes.get(parent_inode)
        if name in (b".", b".."):
            node = self._dots(parent, name)
            with self.nodes.borrow(node) as fd:
                status = await self.work.short(ctx, os.fstat, fd)
            self.nodes.count(node)
            return self.attributes(node, status)
        self.visible(parent, name)
        with self.nodes.borrow(parent) as directory:
            found = await self.work.short(ctx, source.find, directory, name)
        return self.enter(found, parent, name)

    @replies_at_once
    def lookup_at_once(self, parent_inode: int, name: bytes) -> Attributes:
        """Do as `lookup`, on storage that answers at once."""
        parent = self.nodes.get(parent_inode)
        if name in (b".", b".."):
            node = self._dots(parent, name)
            stat = os.fstat(self.nodes.fd(node))
            self.nodes.count(node)
        else:
            self.visible(parent, name)
            found = source.find(self.nodes.fd(parent), name)
            stat = found.stat
            node = self.nodes.adopt(found, parent, name)
        return self.known(node, stat)

    def _dots(self, parent: Node, name: bytes) -> Node:
        if name == b"." and parent.id in self.doubtful:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return parent if name == b"." or parent.parent is None else parent.parent

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take back lookups."""
        for number, lookups in inode_list:
            self.nodes.forget(number, lookups)

    @replies
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """Read a symbolic link; it is the caller's kernel that follows it."""
        with self.nodes.borrow(self.nodes.get(inode)) as fd:
            return await self.work.short(ctx, _readlink, fd)

    # Creation --------------------------------------------------------------------------------------

    @replies
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """Make a file, device, fifo or socket.  A regular file is made without a lock: nobody has written it yet."""
        return await self._make(
            parent_inode,
            name,
            ctx,
            lambda directory: os.mknod(name, apply_umask(directory, mode, ctx.umask), rdev, dir_fd=directory),
            lambda found: st.S_IFMT(found.stat.st_mode) == (st.S_IFMT(mode) or st.S_IFREG),
        )

    @replies
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory."""
        return await self._make(
            parent_inode,
            name,
            ctx,
            lambda directory: os.mkdir(name, apply_umask(directory, mode, ctx.umask), dir_fd=directory),
            lambda found: st.S_ISDIR(found.stat.st_mode),
        )

    @replies
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """Make a symbolic link."""
        return await self._make(
            parent_inode,
            name,
            ctx,
            lambda directory: os.symlink(target, name, dir_fd=directory),
            lambda found: st.S_ISLNK(found.stat.st_mode) and _readlink(found.fd) == target,
        )

    async def _make(
        self,
        parent_inode: int,
        name: bytes,
        ctx: RequestContext,
        make: Callable[[int], None],
        is_it: Callable[[Found], bool],
    ) -> EntryAttributes:
        """Make something, once: *is_it* says whether what is there is what an earlier daemon made of this request."""
        effect = self.effects.begin()
        if effect.done is not None:
            return await self._made(effect.done.node, ctx)
        parent = self.nodes.get(parent_inode)
        self.creatable(parent, name)

        def make_and_find(directory: int) -> Found:
            make(directory)
            return source.find(directory, name)

        with self.nodes.borrow(parent) as directory:
            found = await self._made_before(effect, directory, name, ctx, is_it)
            if found is None:
                with effect.intend():
                    found = await self.work.long(ctx, make_and_find, directory)
        entry = self.enter(found, parent, name)
        effect.finish(node=entry.st_ino)
        return entry

    async def _made(self, number: int, ctx: RequestContext) -> EntryAttributes:
        """Answer once more what was made, and counted, by the daemon before."""
        node = self.nodes.get(number)
        with self.nodes.borrow(node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
        return self.attributes(node, status)

    async def _made_before(
        self, effect: Effect, directory: int, name: bytes, ctx: RequestContext, is_it: Callable[[Found], bool]
    ) -> Found | None:
        """Return what the daemon before has made there, None if nothing is there.  Raises FileExistsError."""
        if not await self.work.short(ctx, source.exists, directory, name):
            return None
        if effect.intended is not None:
            found = await self.work.short(ctx, source.find, directory, name)
            if is_it(found):
                return found
            found.close()
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    @replies
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Give a file one more name; its lock, which goes by inode, is the same under both."""
        effect = self.effects.begin()
        if effect.done is not None:
            return await self._made(effect.done.node, ctx)
        node, parent = self.nodes.get(inode), self.nodes.get(new_parent_inode)
        self.creatable(parent, new_name)

        def link_and_find(fd: int, directory: int) -> Found:
            files.link(fd, directory, new_name)
            return source.find(directory, new_name)

        with self.nodes.borrow(node) as fd, self.nodes.borrow(parent) as directory:
            made = await self._made_before(effect, directory, new_name, ctx, lambda found: found.key == node.key)
            if made is None:
                with effect.intend():
                    made = await self.work.long(ctx, link_and_find, fd, directory)
        entry = self.enter(made, parent, new_name)
        effect.finish(node=entry.st_ino)
        return entry

    # Removal and rename ----------------------------------------------------------------------------

    @replies
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name of a file, if its image may be taken for that."""
        effect = self.effects.begin()
        if effect.done is not None:
            return
        parent = self.nodes.get(parent_inode)
        self.visible(parent, name)
        owner, _manager = self.owners.of(ctx)
        with self.nodes.borrow(parent) as directory:
            if await self._removed_before(effect, directory, name, ctx):
                return
            held = await self._take([(parent, directory, name)], 0, owner, ctx)
            try:
                await self.losing_name(held.found(0))
                with effect.intend(identity=held.identity(0)):
                    await self.work.long(ctx, lambda: os.unlink(name, dir_fd=directory))
                await self.lost_name(held.found(0))
                effect.finish()
            finally:
                await held.give_back()

    @replies
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        effect = self.effects.begin()
        if effect.done is not None:
            return
        parent = self.nodes.get(parent_inode)
        self.visible(parent, name)
        with self.nodes.borrow(parent) as directory:
            if await self._removed_before(effect, directory, name, ctx):
                return
            found = await self.work.short(ctx, source.find, directory, name)
            try:
                await self.losing_name(found)
                with effect.intend(identity=(found.stat.st_dev, found.stat.st_ino)):
                    await self.work.long(ctx, lambda: os.rmdir(name, dir_fd=directory))
                await self.lost_name(found)
                effect.finish()
            finally:
                found.close()

    async def _removed_before(self, effect: Effect, directory: int, name: bytes, ctx: RequestContext) -> bool:
        """Tell whether the daemon before has removed a name, whatever it leads to by now."""
        if effect.intended is None:
            return False
        return await self.work.short(ctx, source.leads_to, directory, name) != effect.intended.identity

    @replies
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename, if the images that would lose a name may be taken for that."""
        effect = self.effects.begin()
        if effect.done is not None:
            return
        old_parent, new_parent = self.nodes.get(parent_inode_old), self.nodes.get(parent_inode_new)
        self.visible(old_parent, name_old)
        self.creatable(new_parent, name_new)
        owner, _manager = self.owners.of(ctx)
        with self.nodes.borrow(old_parent) as old, self.nodes.borrow(new_parent) as new:
            if await self._renamed_before(effect, old, name_old, new, name_new, ctx):
                found = await self.work.short(ctx, source.find, new, name_new)
                self.nodes.moved(found.key, new_parent, name_new)
                found.close()
                return
            places = [(old_parent, old, name_old), (new_parent, new, name_new)]
            if flags & files.RENAME_NOREPLACE:
                places.pop()
            held = await self._take(places, 2 if flags & files.RENAME_EXCHANGE else 1, owner, ctx)
            try:
                if replaces := not flags & files.RENAME_EXCHANGE:
                    await self.losing_name(held.found(1))
                with effect.intend(identity=held.identity(0), other=held.identity(1)):
                    await self.work.long(ctx, files.rename, old, name_old, new, name_new, flags)
                held.renamed(old_parent, name_old, new_parent, name_new, flags)
                if replaces:
                    await self.lost_name(held.found(1))
                effect.finish()
            finally:
                await held.give_back()

    async def _renamed_before(
        self, effect: Effect, old: int, name_old: bytes, new: int, name_new: bytes, ctx: RequestContext
    ) -> bool:
        """Tell whether the daemon before has done a rename, or an exchange of two names."""
        if effect.intended is None:
            return False
        before = await self.work.short(ctx, source.leads_to, old, name_old)
        after = await self.work.short(ctx, source.leads_to, new, name_new)
        return after == effect.intended.identity != before

    async def _take(
        self, places: Sequence[tuple[Node, int, bytes]], moving: int, owner: Owner, ctx: RequestContext
    ) -> _Taken:
        """Find what the names lead to and take the images among it, until the names are seen to lead there still.

        The first *moving* of them get another name, the others none.
        """
        for _attempt in range(_RETRIES):
            taken = _Taken(self)
            try:
                for number, (parent, directory, name) in enumerate(places):
                    await taken.add(parent, directory, name, owner, ctx, moves=number < moving)
                if await self.work.short(ctx, taken.unchanged):
                    return taken
            except BaseException:
                await taken.give_back()
                raise
            await taken.give_back()
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


class _Taken:
    """What the names of one removal or rename lead to, with the images among it held."""

    def __init__(self, operations: NameOperations) -> None:
        self._operations = operations
        self._found: list[tuple[int, bytes, Found | None]] = []
        self._nodes: list[Node] = []
        self._holds: list[Hold] = []

    async def add(
        self, parent: Node, directory: int, name: bytes, owner: Owner, ctx: RequestContext, *, moves: bool
    ) -> None:
        """Find one name and hold the image there.  Raises as `Guard.hold`."""
        ops = self._operations
        try:
            found = await ops.work.short(ctx, source.find, directory, name)
        except FileNotFoundError:
            self._found.append((directory, name, None))
            return
        self._found.append((directory, name, found))
        path = parent.path() + b"/" + name if parent is not ops.nodes.root else name
        if not st.S_ISREG(found.stat.st_mode) or not ops.guard.policy.guarded(path):
            return
        # Counted like a lookup, and forgotten in `give_back`: another mount may have put there what the kernel has
        # not seen.
        node = ops.nodes.adopt(Found(os.dup(found.fd), found.stat, found.key), parent, name)
        self._nodes.append(node)
        hold = await ops.guard.hold_for_call(node, owner, ctx, moves=moves)
        if hold is not None:
            self._holds.append(hold)

    def unchanged(self) -> bool:
        """Tell whether every name still leads to what was found there."""
        return all(found is None or source.same(directory, name, found) for directory, name, found in self._found)

    def found(self, which: int) -> Found | None:
        """Return what a name leads to, None for nothing; it stays this object's."""
        return self._found[which][2] if which < len(self._found) else None

    def identity(self, which: int) -> tuple[int, int]:
        """Return device and inode number of what a name leads to, (0, 0) for nothing."""
        found = self.found(which)
        return (0, 0) if found is None else (found.stat.st_dev, found.stat.st_ino)

    def renamed(self, old_parent: Node, old: bytes, new_parent: Node, new: bytes, flags: int) -> None:
        """Bring the table up to date after a rename."""
        nodes = self._operations.nodes
        moved, other = self.found(0), self.found(1)
        if moved is not None:
            nodes.moved(moved.key, new_parent, new)
        if other is not None and flags & files.RENAME_EXCHANGE:
            nodes.moved(other.key, old_parent, old)

    async def give_back(self) -> None:
        """Release the holds and close the descriptors."""
        for hold in self._holds:
            await self._operations.guard.release(hold)
        for node in self._nodes:
            self._operations.nodes.forget(node.id, 1)
        for _directory, _name, found in self._found:
            if found is not None:
                found.close()


def _readlink(fd: int) -> bytes:
    return os.readlink(b"", dir_fd=fd)
