"""The requests that do not go by way of pyfuse3, as handlers of the same Operations object.

Those that open, since pyfuse3 cannot tell the kernel of a backing id; their handlers are as for pyfuse3:

    async def open(self, inode, flags, ctx) -> FileInfo
    async def create(self, parent_inode, name, mode, flags, ctx) -> tuple[FileInfo, EntryAttributes]

with an ``fh`` made by `lockfs.kernel.session.mint`.  And those that pyfuse3 does not know.  One whose handler is
missing is left to libfuse, which answers ENOSYS, and the kernel does without:

    async def fallocate(self, fh, mode, offset, length, ctx) -> None
    async def lseek(self, fh, offset, whence) -> int                    # SEEK_DATA and SEEK_HOLE only
    async def copy_file_range(self, fh_in, off_in, fh_out, off_out, length, flags) -> int

The most frequent ones may have handlers that never wait, in place of those that pyfuse3 would call:

    def getattr_at_once(self, inode) -> Attributes
    def lookup_at_once(self, parent_inode, name) -> Attributes

They are asked if the object says ``answers_at_once``; an answer then costs no task, and no turn of the event loop of
its own.

Where there is a method ``answered(unique)``, it is called when the kernel has taken the answer to one of these.

`fh` is the plain index of the handle, without backing id; `ctx` is a `Caller`.  A handler raises FUSEError; of
anything else the caller sees EIO, and the log the rest.  An answer to copy_file_range may be short; EOPNOTSUPP makes
the kernel copy through the page cache instead, as it has to be where the storage says EXDEV.  A caller that gets a
signal goes on waiting, as for a disk: nothing here is interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyfuse3
import trio

from lockfs.kernel import session, wire
from lockfs.kernel.wire import Attributes

log = logging.getLogger("lockfs.kernel")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request: as pyfuse3's RequestContext, which only pyfuse3 can make.  `pid` is a thread's."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came."""

    opcode: int
    unique: int
    node: int
    caller: Caller
    body: bytes


Serve = Callable[[Request], Awaitable[bytes]]
ServeAtOnce = Callable[[int, bytes], bytes]
"""Of the node and the body of a request."""


class Requests:
    """Serves these requests of one session in a nursery, which must end before the session is closed."""

    def __init__(self, operations: object, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._answered: Callable[[int], None] = getattr(operations, "answered", _nobody_cares)
        self._serve: dict[int, Serve] = {}
        for handler, opcodes in _SERVED.items():
            if method := getattr(operations, handler, None):
                self._serve |= {opcode: partial(serve, method) for opcode, serve in opcodes.items()}
        self._at_once: dict[int, ServeAtOnce] = {}
        if getattr(operations, "answers_at_once", False):
            for handler, (opcode, serve_at_once) in _SERVED_AT_ONCE.items():
                if method := getattr(operations, handler, None):
                    self._at_once[opcode] = partial(serve_at_once, method)

    @property
    def opcodes(self) -> int:
        """The opcodes that are served, as a bit mask."""
        return sum(1 << opcode for opcode in (*self._serve, *self._at_once))

    def take(self, opcode: int, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes) -> None:
        """Take a request from the extension.  What this raises makes the extension answer EIO."""
        if (serve := self._at_once.get(opcode)) is not None:
            _answer_at_once(serve, opcode, unique, node, body)
            return
        request = Request(opcode, unique, node, Caller(uid, gid, pid), body)
        self._nursery.start_soon(self._answer, request, name=f"fuse opcode {opcode}, node {node}")

    async def _answer(self, request: Request) -> None:
        session.handed_over.set(session.Current(request.opcode, request.unique, False))
        error, data = errno.EIO, b""
        try:
            data = await self._serve[request.opcode](request)
            error = 0
        except pyfuse3.FUSEError as refusal:
            error = refusal.errno
        except Exception:
            log.exception("the handler of FUSE opcode %d failed", request.opcode)
        finally:
            # Also when it is cancelled: a request without an answer leaves its caller unkillable.
            if _reply(request.unique, error, data):
                self._answered(request.unique)


def _answer_at_once(serve: ServeAtOnce, opcode: int, unique: int, node: int, body: bytes) -> None:
    error, data = errno.EIO, b""
    try:
        data = serve(node, body)
        error = 0
    except pyfuse3.FUSEError as refusal:
        error = refusal.errno
    except Exception:
        log.exception("the handler of FUSE opcode %d failed", opcode)
    _reply(unique, error, data)


def _nobody_cares(_unique: int) -> None:
    pass


def _reply(unique: int, error: int, data: bytes) -> bool:
    """Answer a request; return whether the kernel has taken the answer."""
    from lockfs.kernel import _shim

    try:
        _shim.reply(unique, error, data)
    except OSError as failure:
        # ENOENT: the connection has dropped the request; ENODEV: there is no connection any more.
        if failure.errno not in (errno.ENOENT, errno.ENODEV):
            log.error("cannot answer request %d: %s", unique, failure.strerror)
        return False
    return True


Handler = Callable[..., Awaitable[Any]]


async def _open(handler: Handler, request: Request) -> bytes:
    asked = wire.parse_open(request.body)
    session.handed_over.set(session.Current(request.opcode, request.unique, asked.kill_suidgid))
    return _opened(await handler(request.node, asked.flags, request.caller))


async def _create(handler: Handler, request: Request) -> bytes:
    asked = wire.parse_create(request.body)
    session.handed_over.set(session.Current(request.opcode, request.unique, asked.kill_suidgid))
    caller = replace(request.caller, umask=asked.umask)
    info, entry = await handler(request.node, asked.name, asked.mode, asked.flags, caller)
    return _entered(entry) + _opened(info)


def _opened(info: pyfuse3.FileInfo) -> bytes:
    index, backing_id = session.split(info.fh)
    return wire.open_out(
        index, backing_id, direct_io=info.direct_io, keep_cache=info.keep_cache, nonseekable=info.nonseekable
    )


def _entered(entry: pyfuse3.EntryAttributes) -> bytes:
    return wire.entry_out(
        Attributes(
            entry.st_ino, entry.generation, entry.entry_timeout, entry.attr_timeout, entry.st_size, entry.st_blocks,
            entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns, entry.st_mode, entry.st_nlink, entry.st_uid,
            entry.st_gid, entry.st_rdev, entry.st_blksize,
        )
    )  # fmt: skip


def _getattr(handler: Callable[[int], Attributes], node: int, _body: bytes) -> bytes:
    return wire.attr_out(handler(node))


def _lookup(handler: Callable[[int, bytes], Attributes], node: int, body: bytes) -> bytes:
    return wire.entry_out(handler(node, body.partition(b"\0")[0]))


async def _fallocate(handler: Handler, request: Request) -> bytes:
    asked = wire.parse_fallocate(request.body)
    await handler(asked.fh, asked.mode, asked.offset, asked.length, request.caller)
    return b""


async def _lseek(handler: Handler, request: Request) -> bytes:
    asked = wire.parse_lseek(request.body)
    if asked.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise pyfuse3.FUSEError(errno.EINVAL)
    return wire.offset_out(await handler(asked.fh, asked.offset, asked.whence))


async def _copy(handler: Handler, request: Request) -> bytes:
    return wire.write_out(await _copied(handler, request, wire.MAX_COPY))


async def _copy_64(handler: Handler, request: Request) -> bytes:
    return wire.offset_out(await _copied(handler, request, (1 << 63) - 1))


async def _copied(handler: Handler, request: Request, limit: int) -> int:
    asked = wire.parse_copy_file_range(request.body)
    length = min(asked.length, limit)
    copied: int = await handler(asked.fh_in, asked.off_in, asked.fh_out, asked.off_out, length, asked.flags)
    if not 0 <= copied <= length:
        raise ValueError(f"copy_file_range says that it copied {copied} of {length} bytes")
    return copied


_SERVED: dict[str, dict[int, Callable[[Handler, Request], Awaitable[bytes]]]] = {
    "open": {wire.OPEN: _open},
    "create": {wire.CREATE: _create},
    "fallocate": {wire.FALLOCATE: _fallocate},
    "lseek": {wire.LSEEK: _lseek},
    "copy_file_range": {wire.COPY_FILE_RANGE: _copy, wire.COPY_FILE_RANGE_64: _copy_64},
}
"""For each handler the opcodes that it serves."""

_SERVED_AT_ONCE: dict[str, tuple[int, Callable[..., bytes]]] = {
    "getattr_at_once": (wire.GETATTR, _getattr),
    "lookup_at_once": (wire.LOOKUP, _lookup),
}
