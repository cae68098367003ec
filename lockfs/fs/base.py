"""What the operations of all themes share: the parts of a mount, and how an error becomes the caller's errno."""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3

from lockfs.errors import LockfsError
from lockfs.fs.guard import Guard
from lockfs.fs.handles import Handles
from lockfs.fs.journal.effects import Effects
from lockfs.fs.nameless import Nameless
from lockfs.fs.nodes import Node, NodeTable
from lockfs.fs.owners import Owners
from lockfs.fs.source import HIDDEN, Found
from lockfs.fs.work import Work
from lockfs.kernel import session
from lockfs.kernel.session import Negotiated
from lockfs.kernel.wire import Attributes

log = logging.getLogger("lockfs.fs")

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Base")

HELD_SECONDS = 1
"""Seconds for which the kernel may trust attributes of an image that this mount holds exclusively.

Otherwise it is 0: another mount may change a file at any time, and ``lseek(SEEK_END)`` must tell the truth; but for
`READ_SECONDS`.
"""
READ_SECONDS = 0.01
"""The same for an image that is open for reading only, through the daemon, while it has not changed for a second.

Else each read would have to ask whether what is cached is current.  An open starts anew (`distrust`): who opens an
image sees all that was written before.
"""


@dataclass(slots=True)
class Parts:
    """The parts of one mount."""

    nodes: NodeTable
    work: Work
    guard: Guard
    handles: Handles
    owners: Owners
    effects: Effects


def replies(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Make a handler raise nothing but FUSEError, with the errno that the caller is to see; and have the journal
    written before the reply.
    """

    @functools.wraps(handler)
    async def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as error:
            raise _for_caller(error, handler.__name__) from None
        finally:
            self.effects.journal.flush()

    return wrapper


def replies_at_once(handler: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Do as `replies` with a handler that never waits."""

    @functools.wraps(handler)
    def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(self, *args, **kwargs)
        except Exception as error:
            raise _for_caller(error, handler.__name__) from None
        finally:
            self.effects.journal.flush()

    return wrapper


def _for_caller(error: Exception, handler: str) -> Exception:
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, OSError):
        return pyfuse3.FUSEError(error.errno or errno.EIO)
    if isinstance(error, LockfsError):
        return pyfuse3.FUSEError(error.errno)
    log.error("%s failed", handler, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def distrust(node: Node) -> None:
    """Make the kernel ask again for the attributes of a file that others may have changed, or may change now."""
    try:
        pyfuse3.invalidate_inode(node.id, attr_only=True)
    except OSError as error:
        if error.errno != errno.ENOENT:  # it had forgotten the file
            log.warning("cannot invalidate inode %d: %s", node.id, error)


class Base(pyfuse3.Operations):
    """The parts, and helpers of more than one theme.

    `negotiated` is what the kernel agreed to, set before the first request comes; None without the kernel module.
    `nameless` is there if this daemon may have a successor.
    """

    negotiated: Negotiated | None = None
    nameless: Nameless | None = None

    def __init__(self, parts: Parts) -> None:
        self.nodes = parts.nodes
        self.work = parts.work
        self.guard = parts.guard
        self.handles = parts.handles
        self.owners = parts.owners
        self.effects = parts.effects

    def known(self, node: Node, stat: os.stat_result) -> Attributes:
        """Return the attributes of *node*, and for how long the kernel may trust them."""
        trust = HELD_SECONDS if self.guard.exclusive(node) else 0
        return Attributes(
            node.id, 0, 0, trust, stat.st_size, stat.st_blocks, stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns,
            stat.st_mode, stat.st_nlink, stat.st_uid, stat.st_gid, stat.st_rdev, stat.st_blksize,
        )  # fmt: skip

    def attributes(self, node: Node, stat: os.stat_result) -> pyfuse3.EntryAttributes:
        """Return the same in the form of pyfuse3."""
        return self.entry(self.known(node, stat))

    @staticmethod
    def entry(known: Attributes) -> pyfuse3.EntryAttributes:
        """Return attributes in the form of pyfuse3."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = known.node
        entry.st_mode = known.mode
        entry.st_nlink = known.nlink
        entry.st_uid = known.uid
        entry.st_gid = known.gid
        entry.st_rdev = known.rdev
        entry.st_size = known.size
        entry.st_blksize = known.blksize
        entry.st_blocks = known.blocks
        entry.st_atime_ns = known.atime_ns
        entry.st_mtime_ns = known.mtime_ns
        entry.st_ctime_ns = known.ctime_ns
        entry.entry_timeout = known.entry_timeout
        entry.attr_timeout = known.attr_timeout
        return entry

    @property
    def answers_at_once(self) -> bool:
        """Say whether calls that `Work` names short may run on the event loop (see `lockfs.kernel.extra`)."""
        return not self.work.remote

    def enter(self, found: Found, parent: Node, name: bytes) -> pyfuse3.EntryAttributes:
        """Give what was found to the kernel: its node, counted once more, and its attributes.  Takes the descriptor."""
        stat = found.stat
        return self.attributes(self.nodes.adopt(found, parent, name), stat)

    async def losing_name(self, found: Found | None) -> None:
        """Prepare for what is open to lose a name, maybe its last one."""
        if self.nameless is not None and found is not None:
            await self.nameless.losing(found)

    async def lost_name(self, found: Found | None) -> None:
        """Keep what lost a name reachable, without one if need be, while the kernel knows it; takes the descriptor."""
        if found is None:
            return
        if self.nameless is not None:
            await self.nameless.lost(found)
        self.nodes.pin(found)

    def clears_suid(self) -> bool:
        """Tell whether the request that a handler was called for is to clear set-id bits; before the first await."""
        return self.negotiated is not None and self.negotiated.kill_suidgid and session.current().kill_suidgid

    def visible(self, parent: Node, name: bytes) -> None:
        """Raise OSError(ENOENT) for lockfs's own directory."""
        if name == HIDDEN and parent is self.nodes.root:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def creatable(self, parent: Node, name: bytes) -> None:
        """Raise OSError(EPERM) if *name* in *parent* is lockfs's own directory."""
        if name == HIDDEN and parent is self.nodes.root:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
