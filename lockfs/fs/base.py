"""What the operations of all themes share: the parts of a mount, and how an error becomes the caller's errno."""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat as st
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

log = logging.getLogger("lockfs.fs")

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Base")

HELD_SECONDS = 1
"""Seconds for which the kernel may trust attributes of an image that this mount holds exclusively.

Otherwise it is 0: another mount may change a file at any time, and ``lseek(SEEK_END)`` must tell the truth.
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
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except LockfsError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.effects.journal.flush()

    return wrapper


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

    def attributes(self, node: Node, stat: os.stat_result) -> pyfuse3.EntryAttributes:
        """Return the attributes of *node* in the form of pyfuse3, and say how long the kernel may trust them."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.id
        entry.st_mode = stat.st_mode
        entry.st_nlink = stat.st_nlink
        entry.st_uid = stat.st_uid
        entry.st_gid = stat.st_gid
        entry.st_rdev = stat.st_rdev
        entry.st_size = stat.st_size
        entry.st_blksize = stat.st_blksize
        entry.st_blocks = stat.st_blocks
        entry.st_atime_ns = stat.st_atime_ns
        entry.st_mtime_ns = stat.st_mtime_ns
        entry.st_ctime_ns = stat.st_ctime_ns
        entry.entry_timeout = 0
        entry.attr_timeout = HELD_SECONDS if self.guard.exclusive(node) else 0
        return entry

    def changed_type(self, inode: int) -> pyfuse3.EntryAttributes:
        """Return attributes that make the kernel declare the inode of a file bad: all I/O on it fails from then on."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = st.S_IFSOCK
        entry.attr_timeout = 0
        return entry

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
