"""The requests that pyfuse3 does not know, as handlers of the same Operations object.

A handler is an async method; one that is missing is left to libfuse, which answers ENOSYS, and the kernel does
without:

    async def fallocate(self, fh, mode, offset, length, ctx) -> None
    async def lseek(self, fh, offset, whence) -> int                    # SEEK_DATA and SEEK_HOLE only
    async def copy_file_range(self, fh_in, off_in, fh_out, off_out, length, flags) -> int

`fh` is the plain index of the handle, without backing id.  A handler raises FUSEError; of anything else the caller
sees EIO.  An answer to copy_file_range may be short; EOPNOTSUPP makes the kernel copy through the page cache instead,
as it has to be where the storage says EXDEV.  A caller that gets a signal goes on waiting, as for a disk: nothing
here is interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, cast

import pyfuse3
import trio

from lockfs.kernel import wire

log = logging.getLogger("lockfs.kernel")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request: as pyfuse3's RequestContext, which only pyfuse3 can make.  `pid` is a thread's."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


class Fallocate(Protocol):
    """The handler of fallocate(2)."""

    async def __call__(self, fh: int, mode: int, offset: int, length: int, ctx: Caller) -> None: ...


class Lseek(Protocol):
    """The handler of lseek(2) with SEEK_DATA and SEEK_HOLE."""

    async def __call__(self, fh: int, offset: int, whence: int) -> int: ...


class CopyFileRange(Protocol):
    """The handler of copy_file_range(2)."""

    async def __call__(self, fh_in: int, off_in: int, fh_out: int, off_out: int, length: int, flags: int) -> int: ...


Serve = Callable[[bytes, Caller], Awaitable[bytes]]


class Requests:
    """Serves these requests of one session in a nursery, which must end before the session is closed."""

    def __init__(self, operations: object, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._serve: dict[int, Serve] = {}
        if fallocate := getattr(operations, "fallocate", None):
            self._serve[wire.FALLOCATE] = _fallocate(cast(Fallocate, fallocate))
        if lseek := getattr(operations, "lseek", None):
            self._serve[wire.LSEEK] = _lseek(cast(Lseek, lseek))
        if copy := getattr(operations, "copy_file_range", None):
            handler = cast(CopyFileRange, copy)
            self._serve[wire.COPY_FILE_RANGE] = _copy(handler, wire.MAX_COPY, wire.write_out)
            self._serve[wire.COPY_FILE_RANGE_64] = _copy(handler, (1 << 63) - 1, wire.offset_out)

    @property
    def opcodes(self) -> int:
        """The opcodes that are served, as a bit mask."""
        return sum(1 << opcode for opcode in self._serve)

    def take(self, opcode: int, unique: int, node: int, uid: int, gid: int, pid: int, body: bytes) -> None:
        """Take a request from the extension.  What this raises makes the extension answer EIO."""
        name = f"fuse opcode {opcode}, node {node}"
        self._nursery.start_soon(self._answer, opcode, unique, body, Caller(uid, gid, pid), name=name)

    async def _answer(self, opcode: int, unique: int, body: bytes, caller: Caller) -> None:
        error, data = errno.EIO, b""
        try:
            data = await self._serve[opcode](body, caller)
            error = 0
        except pyfuse3.FUSEError as refusal:
            error = refusal.errno
        except Exception:
            log.exception("the handler of FUSE opcode %d failed", opcode)
        finally:
            # Also when it is cancelled: a request without an answer leaves its caller unkillable.
            _reply(unique, error, data)


def _reply(unique: int, error: int, data: bytes) -> None:
    from lockfs.kernel import _shim

    try:
        _shim.reply(unique, error, data)
    except OSError as failure:
        # ENOENT: the connection has dropped the request; ENODEV: there is no connection any more.
        if failure.errno not in (errno.ENOENT, errno.ENODEV):
            log.error("cannot answer request %d: %s", unique, failure.strerror)


def _fallocate(handler: Fallocate) -> Serve:
    async def serve(body: bytes, caller: Caller) -> bytes:
        request = wire.parse_fallocate(body)
        await handler(request.fh, request.mode, request.offset, request.length, caller)
        return b""

    return serve


def _lseek(handler: Lseek) -> Serve:
    async def serve(body: bytes, _caller: Caller) -> bytes:
        request = wire.parse_lseek(body)
        if request.whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return wire.offset_out(await handler(request.fh, request.offset, request.whence))

    return serve


def _copy(handler: CopyFileRange, limit: int, reply: Callable[[int], bytes]) -> Serve:
    async def serve(body: bytes, _caller: Caller) -> bytes:
        request = wire.parse_copy_file_range(body)
        length = min(request.length, limit)
        copied = await handler(request.fh_in, request.off_in, request.fh_out, request.off_out, length, request.flags)
        if not 0 <= copied <= length:
            raise ValueError(f"copy_file_range says that it copied {copied} of {length} bytes")
        return reply(copied)

    return serve
