"""Operations on an inode's attributes: getattr, setattr, extended attributes, statfs."""

from __future__ import annotations

import errno
import os
import re
import stat as st
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar

import msgspec
import pyfuse3
from pyfuse3 import EntryAttributes, RequestContext, SetattrFields, StatvfsData

from lockfs.errors import LockUnavailable
from lockfs.fs.base import replies, replies_at_once
from lockfs.fs.nodes import Node
from lockfs.fs.writing import WriteRights
from lockfs.kernel import session
from lockfs.kernel.session import Current
from lockfs.kernel.wire import Attributes
from lockfs.linux import files
from lockfs.linux.files import proc_path

OWN_XATTRS = (b"user.lockfs.",)
"""Names that are lockfs's own, which nobody may set, but for `LEASE_XATTR`."""
HOLDER_XATTR = b"user.lockfs.holder"
"""Who holds an image; lockfs answers it."""
LEASE_XATTR = b"user.lockfs.lease"
"""How the lease of an image is called; it lies on the storage, and backends that have leases go by it."""
_LEASE_NAME = re.compile(rb"(?!\.)[!-.0-9;-\[\]-~]{1,47}")
"""What can be a name: with another one nobody could open the image, nor take the name away here."""

SETXATTR = 21
_SETTING: ContextVar[Current | None] = ContextVar("setting", default=None)
"""The request to set an attribute for which pyfuse3 has asked in this task whether the attribute is there."""

GUARDED_XATTRS = (b"security.", b"system.posix_acl_")
"""Attributes that decide who may reach an image: changed only while no other host runs it."""


class AttributeOperations(WriteRights):
    """Handlers for attributes."""

    @replies
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """Read the attributes."""
        if self.nodes.is_fenced(inode):
            return self.entry(changed_type(inode))
        node = self.nodes.get(inode)
        with self.nodes.borrow(node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
        return self.attributes(node, status)

    @replies_at_once
    def getattr_at_once(self, inode: int) -> Attributes:
        """Do as `getattr`, on storage that answers at once."""
        if self.nodes.is_fenced(inode):
            return changed_type(inode)
        node = self.nodes.get(inode)
        return self.known(node, os.fstat(self.nodes.fd(node)))

    @replies
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Change size, owner, mode and times, in the order in which none undoes another."""
        if self.nodes.is_fenced(inode):
            # A successor may be asked before the kernel has been made to declare the inode bad.
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        node = self.nodes.get(inode)
        clears_suid = self.clears_suid()
        effect = self.effects.begin()
        if fields.update_size and effect.done is None:
            await self.truncate(node, attr.st_size, fh, ctx)
            effect.finish()
        with self.nodes.borrow(node) as fd:
            # A chown that changes nothing arrives as a request for nothing.  It is one, too, to clear the set-id bits.
            nothing = not (fields.update_size or fields.update_atime or fields.update_mtime)
            if fields.update_uid or fields.update_gid or fields.update_mode or nothing or clears_suid:
                uid = attr.st_uid if fields.update_uid else -1
                gid = attr.st_gid if fields.update_gid else -1
                mode = st.S_IMODE(attr.st_mode) if fields.update_mode else None
                status = await self.work.short(ctx, os.fstat, fd)
                if nothing:
                    self._check_for_nothing(node, status, ctx)
                if st.S_ISREG(status.st_mode) and _changes(status, uid, gid, mode):
                    await self.guard.check_elsewhere(node, ctx)
                await self.work.long(ctx, _set_owner_and_mode, fd, uid, gid, mode)
            if fields.update_atime or fields.update_mtime:
                atime = attr.st_atime_ns if fields.update_atime else None
                mtime = attr.st_mtime_ns if fields.update_mtime else None
                # It waits while the filesystem is frozen.
                await self.work.long(ctx, files.utimens, fd, atime, mtime)
            status = await self.work.short(ctx, os.fstat, fd)
        return self.attributes(node, status)

    def _check_for_nothing(self, node: Node, status: os.stat_result, ctx: RequestContext) -> None:
        """Raise OSError(EPERM) if the caller may not clear the set-id bits.

        A write past the daemon and a chown that changes nothing look alike.  The one may be anybody's who has the file
        open for writing, the other the owner's only.
        """
        clears = status.st_mode & (st.S_ISUID | st.S_ISGID) and not st.S_ISDIR(status.st_mode)
        if clears and ctx.uid not in (0, status.st_uid) and not self.handles.is_written(node):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    # Extended attributes ---------------------------------------------------------------------------

    @replies
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """Read an extended attribute; who holds an image is one."""
        if self.effects.journal.begun and (current := session.current()).opcode == SETXATTR:
            # pyfuse3 looks whether one is there that has to be made.
            _SETTING.set(current)
            effect = self.effects.begin(current)
            if effect.done is not None or effect.intended is not None:
                raise OSError(pyfuse3.ENOATTR, os.strerror(pyfuse3.ENOATTR))
        node = self.nodes.get(inode)
        if name == HOLDER_XATTR:
            return await self._holder(node, ctx)
        with self.nodes.borrow(node) as fd:
            return await self.work.short(ctx, lambda: os.getxattr(proc_path(fd), name))

    async def _holder(self, node: Node, ctx: RequestContext) -> bytes:
        with self.nodes.borrow(node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
        if not st.S_ISREG(status.st_mode) or not self.guard.policy.guarded(node.path()):
            raise OSError(pyfuse3.ENOATTR, os.strerror(pyfuse3.ENOATTR))
        image = self.guard.describe(node).path
        try:
            holders = await self.guard.holders(node, ctx)
        except LockUnavailable as error:
            answer: dict[str, object] = {"state": "unknown", "holders": [], "image": image, "reason": str(error)}
        else:
            answer = {"state": "held" if holders else "free", "holders": holders, "image": image}
        return msgspec.json.encode(answer)

    @replies
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        effect = self.effects.begin(_SETTING.get())
        _SETTING.set(None)
        if effect.done is not None:
            return
        node = self.nodes.get(inode)
        _not_own(name)
        if name == LEASE_XATTR and not _LEASE_NAME.fullmatch(value):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await self._check_guarded(node, name, value, ctx)
        async with self._naming(node, name, ctx):
            with self.nodes.borrow(node) as fd, effect.intend():
                # An ACL clears the set-group-id bit, unless its owner is in the group or may set it.
                run = self.work.as_seen if name.startswith(b"system.posix_acl_") else self.work.long
                await run(ctx, lambda: os.setxattr(proc_path(fd), name, value))
        effect.finish()

    @replies
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        effect = self.effects.begin()
        if effect.done is not None:
            return
        node = self.nodes.get(inode)
        _not_own(name)
        with self.nodes.borrow(node) as fd:
            # It cannot be read to see whether it is there: some that are not valid can be removed all the same.
            there = name in map(os.fsencode, await self.work.short(ctx, os.listxattr, proc_path(fd)))
        if there or effect.intended is None:
            await self._check_guarded(node, name, None, ctx)
            async with self._naming(node, name, ctx):
                with self.nodes.borrow(node) as fd, effect.intend() if there else nullcontext():
                    await self.work.long(ctx, lambda: os.removexattr(proc_path(fd), name))
        effect.finish()

    @asynccontextmanager
    async def _naming(self, node: Node, name: bytes, ctx: RequestContext) -> AsyncIterator[None]:
        """Where the attribute names a lease, have nobody hold the image meanwhile, not even the caller.

        Who holds it under the old name would not exclude those who take it under the new one.
        """
        if name != LEASE_XATTR:
            yield
            return
        with self.nodes.borrow(node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
        hold = None
        if st.S_ISREG(status.st_mode) and self.guard.policy.guarded(node.path()):
            owner, _manager = self.owners.of(ctx)
            nobody = msgspec.structs.replace(owner, key=f"{owner.key}/names")
            hold = await self.guard.hold_for_call(node, nobody, ctx)
        try:
            yield
        finally:
            if hold is not None:
                await self.guard.release(hold)

    async def _check_guarded(self, node: Node, name: bytes, value: bytes | None, ctx: RequestContext) -> None:
        if not name.startswith(GUARDED_XATTRS):
            return
        with self.nodes.borrow(node) as fd:
            status = await self.work.short(ctx, os.fstat, fd)
            if not st.S_ISREG(status.st_mode):
                return
            try:
                changes = await self.work.short(ctx, lambda: os.getxattr(proc_path(fd), name)) != value
            except OSError as error:
                # What is there but cannot be read, as file capabilities that are not valid, changes in any case.
                changes = error.errno != pyfuse3.ENOATTR or value is not None
        if changes:
            await self.guard.check_elsewhere(node, ctx)

    @replies
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """List the extended attributes; lockfs's own are not among them, so that no copy tries to set them."""
        with self.nodes.borrow(self.nodes.get(inode)) as fd:
            names = await self.work.short(ctx, os.listxattr, proc_path(fd))
        hidden = OWN_XATTRS if ctx.uid == 0 else (*OWN_XATTRS, b"trusted.")
        return [encoded for name in names if not (encoded := os.fsencode(name)).startswith(hidden)]

    @replies
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Report the storage's space."""
        with self.nodes.borrow(self.nodes.root) as fd:
            found = await self.work.short(ctx, os.fstatvfs, fd)
        data = StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(found, name))
        data.f_namemax = found.f_namemax
        return data


def changed_type(inode: int) -> Attributes:
    """Return attributes that make the kernel declare the inode of a file bad: all I/O on it fails from then on."""
    return Attributes(inode, 0, 0, 0, 0, 0, 0, 0, 0, st.S_IFSOCK, 0, 0, 0, 0, 0)


def _changes(status: os.stat_result, uid: int, gid: int, mode: int | None) -> bool:
    return (
        uid not in (-1, status.st_uid)
        or gid not in (-1, status.st_gid)
        or mode not in (None, st.S_IMODE(status.st_mode))
    )


def _set_owner_and_mode(fd: int, uid: int, gid: int, mode: int | None) -> None:
    if uid != -1 or gid != -1 or mode is None:
        files.chown(fd, uid, gid)
    # After the owner: a change of owner clears the set-id bits.
    if mode is not None:
        os.chmod(proc_path(fd), mode)


def _not_own(name: bytes) -> None:
    if name.startswith(OWN_XATTRS) and name != LEASE_XATTR:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
