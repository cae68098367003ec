"""The other end of /dev/fuse, played by a test: a socket pair, on which each request is what the scenario says.

`scenarios_of_init` and `scenarios_of_requests` say what it says; `scenarios.py` runs them.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import shim

shim.load()

import pyfuse3  # noqa: E402
import trio  # noqa: E402
import trio.testing  # noqa: E402

from lockfs.kernel import _shim, session, wire  # noqa: E402
from lockfs.kernel.extra import Requests  # noqa: E402

SO_SNDBUFFORCE = 32
IN, OUT = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
LOOKUP, SETATTR, OPEN, WRITE, INIT, OPENDIR, CREATE, INTERRUPT = 1, 4, 14, 16, 26, 27, 35, 36
FALLOCATE, LSEEK, COPY, COPY_64 = 43, 46, 47, 53
OLD = 0x3FFFFFFB  # all that a kernel without INIT_EXT may offer
NEW = OLD | wire.INIT_EXT | wire.PASSTHROUGH
DIRECT_IO, KEEP_CACHE, NONSEEKABLE, PASSTHROUGH = 1, 2, 4, 1 << 7


@dataclass
class Reply:
    unique: int
    error: int
    body: bytes


class Operations(pyfuse3.Operations):
    """Answers as `on` says: by the name of the handler, a result or something to await with the handler's arguments."""

    def __init__(self) -> None:
        self.on: dict[str, Any] = {}
        self.current: list[session.Current] = []
        self.entry = pyfuse3.EntryAttributes()

    async def _do(self, name: str, *args: object) -> Any:
        self.current.append(session.current())
        found = self.on[name]
        return await found(*args) if callable(found) else found

    async def open(self, inode, flags, ctx):
        return await self._do("open", inode, flags, ctx)

    async def opendir(self, inode, ctx):
        return await self._do("opendir", inode, ctx)

    async def create(self, parent_inode, name, mode, flags, ctx):
        return await self._do("create", parent_inode, name, mode, flags, ctx), self.entry

    async def lookup(self, parent_inode, name, ctx):
        return self.entry

    async def setattr(self, inode, attr, fields, fh, ctx):
        return await self._do("setattr", inode, attr, fields, fh, ctx)

    async def getattr(self, inode, ctx):
        return await self._do("getattr", inode, ctx)

    async def write(self, fh, off, buf):
        return await self._do("write", fh, off, buf)

    async def fallocate(self, fh, mode, offset, length, ctx):
        return await self._do("fallocate", fh, mode, offset, length, ctx)

    async def lseek(self, fh, offset, whence):
        return await self._do("lseek", fh, offset, whence)

    async def copy_file_range(self, fh_in, off_in, fh_out, off_out, length, flags):
        return await self._do("copy_file_range", fh_in, off_in, fh_out, off_out, length, flags)


class Kernel:
    """One connection: sends requests, reads replies."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 16 << 20)
        self.fuse_fd = theirs.detach()
        self.socket = ours
        self.operations = Operations()
        self.nursery: trio.Nursery
        self.agreed: session.Negotiated
        self.answer_to_init: Reply
        self._unique = 0

    def post(self, opcode: int, body: bytes = b"", unique: int | None = None, node: int = 5) -> int:
        """Send a request; return its unique."""
        if unique is None:
            self._unique += 2
            unique = self._unique
        header = IN.pack(IN.size + len(body), opcode, unique, node, 1000, 1001, 1002, 0, 0)
        self.socket.send(header + body)
        return unique

    def post_init(self, flags: int = NEW, major: int = 7, minor: int = 45) -> int:
        body = struct.pack("=IIIII", major, minor, 1 << 17, flags & 0xFFFFFFFF, flags >> 32)
        return self.post(INIT, body + bytes(44), node=0)

    def begin(self, settings: session.Settings | None = None, resume: bytes = b"") -> session.Negotiated:
        self.requests = Requests(self.operations, self.nursery)
        self.agreed = session.begin(self.operations, self.fuse_fd, self.requests, settings, resume)
        return self.agreed

    def read_now(self) -> Reply | None:
        """Return what has been answered; None if nothing has."""
        try:
            message = self.socket.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        length, error, unique = OUT.unpack_from(message)
        assert length == len(message)
        return Reply(unique, -error if unique else error, message[OUT.size :])

    async def read(self) -> Reply:
        """Wait for the next reply."""
        with trio.fail_after(10):
            while (reply := self.read_now()) is None:
                await trio.lowlevel.wait_readable(self.socket)
            return reply

    async def ask(self, opcode: int, body: bytes = b"", unique: int | None = None, node: int = 5) -> Reply:
        """Send a request and wait for its answer, which must be the next that comes."""
        unique = self.post(opcode, body, unique, node)
        reply = await self.read()
        assert reply.unique == unique
        return reply

    async def settle(self) -> None:
        """Wait until the daemon has dealt with all that was sent: requests are read one by one, in order."""
        unique = self.post(99)
        reply = await self.read()
        assert (reply.unique, reply.error) == (unique, errno.ENOSYS)


SCENARIOS: dict[str, tuple[Callable[[Kernel], Awaitable[None]], bool]] = {}


def scenario(function: Callable[[Kernel], Awaitable[None]]) -> Callable[[Kernel], Awaitable[None]]:
    """Register a scenario that is played with a session that serves."""
    SCENARIOS[function.__name__] = (function, True)
    return function


def before_session(function: Callable[[Kernel], Awaitable[None]]) -> Callable[[Kernel], Awaitable[None]]:
    """Register a scenario that begins the session, if any, itself."""
    SCENARIOS[function.__name__] = (function, False)
    return function


def open_out(body: bytes) -> tuple[int, int, int]:
    found: tuple[int, int, int] = struct.unpack("=QIi", body[-16:])
    return found


def fallocate_body(fh: int = 1) -> bytes:
    return struct.pack("=QQQII", fh, 2, 3, 4, 0)


async def serve_while(k: Kernel, play: Callable[[Kernel], Awaitable[None]]) -> None:
    """Run pyfuse3's main loop while a scenario is played."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.testing.wait_all_tasks_blocked()
        await play(k)
        pyfuse3.terminate()
        nursery.cancel_scope.cancel()


class Log(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


LOG = Log()


async def play(name: str) -> None:
    """Play one scenario."""
    scenario, with_session = SCENARIOS[name]
    k = Kernel()
    with trio.fail_after(30):
        async with trio.open_nursery() as k.nursery:
            if with_session:
                k.post_init()
                k.begin()
                k.answer_to_init = await k.read()
                await serve_while(k, scenario)
            else:
                await scenario(k)
            k.nursery.cancel_scope.cancel()
    if _shim.session() is not None:
        pyfuse3.close(unmount=False)
    elif k.fuse_fd >= 0:
        os.close(k.fuse_fd)
    k.socket.close()
