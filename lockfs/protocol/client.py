"""How the mount daemon and the commands talk to lockd.

Each call has a connection to itself while it lasts, from a pool; so a call that waits for a lock holds up
no other, and a call that is cancelled closes its connection, on which lockd undoes what the caller will
never hear of.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import msgspec
import trio

from lockfs.errors import LockfsError, LockUnavailable, SystemError_
from lockfs.protocol import hung, messages, varlink
from lockfs.protocol.errors import HeldError, InvalidCall, LockdGone, NotHeld, UnknownMount, from_wire
from lockfs.protocol.start import SOCKET, ensure_lockd, short_path
from lockfs.protocol.wire import Wire, close_all

CALLS = 256
"""Calls at once; opens beyond that wait their turn here, and not in lockd's memory."""
RELEASES = 32
"""Releases at once, counted apart: the acquires that take up `CALLS` may be waiting for just these."""
KEPT = 32
"""Idle connections that are kept for the next call."""

CONNECT_PAUSE = 0.005
"""Seconds before the next try to connect where lockd has more callers than it can accept at once."""

T = TypeVar("T", bound=msgspec.Struct)
log = logging.getLogger(__name__)


async def end_hung(run_dir: str) -> None:
    """Kill a lockd that does not answer."""
    try:
        pid = await trio.to_thread.run_sync(hung.end, run_dir)
    except OSError as error:
        log.error("lockd does not answer, and cannot be killed: %s", error.strerror)
        return
    if pid:
        log.error("lockd (process %d) has not answered for %g s: it is killed, and another one started", pid, hung.HANG)


class LockdClient:
    """A client of the lockd of one run directory.  Make one with `connect`, end it with `aclose`."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._idle: list[Wire] = []
        self._calls = trio.Semaphore(CALLS)
        self._releases = trio.Semaphore(RELEASES)
        self._life_line: Wire | None = None
        self._closed = False

    @classmethod
    async def connect(cls, run_dir: str, *, start: bool = False) -> LockdClient:
        """Connect to lockd and make sure that it answers; with *start*, start one if none runs, or it does not.

        Raises `LockUnavailable` if there is none, or if it was just leaving.
        """
        client = cls(run_dir)
        for _ in range(2 if start else 0):
            try:
                await trio.to_thread.run_sync(ensure_lockd, run_dir)
            except SystemError_:
                # One that was stopped while it started keeps its seat.
                await end_hung(run_dir)
                raise
            with trio.move_on_after(hung.HANG) as scope:
                try:
                    return await client._say_hello()
                except LockUnavailable:
                    continue
            if scope.cancelled_caught:
                await end_hung(run_dir)
        return await client._say_hello()

    async def _say_hello(self) -> LockdClient:
        # A connection to a lockd that leaves at this moment is accepted by the kernel, and never served.
        await self.call(messages.GetStatus(), messages.Status)
        return self

    async def register(self, request: messages.Register, source_fd: int) -> tuple[messages.Registered, list[int]]:
        """Register a mount, on a connection of its own that lasts as long as the mount: the life line.

        Return the reply and the descriptors that came with it.  Raises `MountError` if lockd refuses the mount.
        """
        return await self._begin_life(request, messages.Registered, [source_fd])

    async def resume(self, request: messages.Resume) -> tuple[messages.Resumed, list[int]]:
        """Register as the successor of a mount daemon, as `register`.  Raises `LockUnavailable`."""
        return await self._begin_life(request, messages.Resumed, [])

    async def _begin_life(
        self, request: msgspec.Struct, kind: type[T], source: Sequence[int]
    ) -> tuple[T, list[int]]:
        wire = await self._open()
        try:
            reply, fds = await _converse(wire, request, kind, source)
        except BaseException:
            wire.close()
            raise
        self._life_line = wire
        return reply, fds

    async def call(
        self, request: msgspec.Struct, reply: type[T], fds: Sequence[int] = ()
    ) -> tuple[T, list[int]]:
        """Make one call.  Return the reply and the descriptors that came with it, close-on-exec and the
        caller's to close.

        *fds* stay the caller's.  Raises `HeldError` (a `Busy`), `NotHeld`, `MountError`, `InvalidCall`, and
        `LockUnavailable` if lockd cannot say, `LockdGone` if it is gone or breaks off.
        """
        slots = self._releases if isinstance(request, messages.Release) else self._calls
        async with slots:
            wire = self._idle.pop() if self._idle else await self._open()
            try:
                answer = await _converse(wire, request, reply, fds)
            except (HeldError, NotHeld, UnknownMount, InvalidCall):
                self._keep(wire)
                raise
            except trio.Cancelled:
                if isinstance(request, messages.Acquire):
                    await self._take_back(wire, request)
                wire.close()
                raise
            except BaseException:
                wire.close()
                raise
            self._keep(wire)
            return answer

    async def _take_back(self, wire: Wire, request: messages.Acquire) -> None:
        """Make sure that an acquire which was cancelled has taken nothing.

        lockd ends the wait when we have nothing more to send.  It may have granted the lock before that,
        and its answer may be under way; so this waits for the answer, or for the end of the connection,
        which says that there is none.
        """
        with trio.CancelScope(shield=True):
            wire.end_sending()
            try:
                _, fds = await _receive(wire, messages.Acquired)
            except LockfsError:
                return
            close_all(fds)
            image, owner = request.image, request.owner
            release = messages.Release(request.mount_id, image.dev, image.ino, request.mode, owner.key)
            try:
                await self.call(release, messages.Released)
            except LockfsError as error:
                log.info("could not give back what a cancelled call had taken: %s", error)

    def _keep(self, wire: Wire) -> None:
        if len(self._idle) < KEPT and not self._closed:
            self._idle.append(wire)
        else:
            wire.close()

    async def _open(self) -> Wire:
        if self._closed:
            raise LockdGone("the client of lockd is closed")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            await self._connect(sock)
        except OSError as error:
            sock.close()
            raise LockdGone(f"lockd is not running in {self._run_dir} ({error.strerror})") from error
        except BaseException:
            sock.close()
            raise
        return Wire(trio.socket.from_stdlib_socket(sock))

    async def _connect(self, sock: socket.socket) -> None:
        while True:
            try:
                with short_path(self._run_dir, SOCKET) as address:
                    sock.connect(address)
            except BlockingIOError:
                # Too many others are waiting to be accepted; a Unix socket cannot wait for that by itself.
                await trio.sleep(CONNECT_PAUSE)
            else:
                return

    async def locks(self) -> list[messages.LockInfo]:
        """Return all locks that this host holds."""
        found: list[messages.LockInfo] = []
        after = ""
        while True:
            part, _ = await self.call(messages.ListLocks(after), messages.Locks)
            found += part.locks
            after = part.next
            if not after:
                return found

    async def lost(self) -> None:
        """Return when the life line has closed: lockd is gone, or has given this mount up.

        Needs a `register` before.
        """
        if self._life_line is None:
            raise RuntimeError("no mount is registered by this client")
        try:
            while await self._life_line.receive() is not None:
                pass
        except (OSError, varlink.ProtocolError):
            pass

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[messages.Event]]:
        """Within the context, iterate over what happens from then on; ends when lockd is gone."""
        async with self._stream(messages.Watch(), messages.Event) as (first, events):
            if first.kind != "watching":
                raise varlink.ProtocolError(f"lockd began a watch with '{first.kind}'")
            yield events

    @asynccontextmanager
    async def orders(self, mount_id: str) -> AsyncIterator[AsyncIterator[messages.Order]]:
        """Within the context, iterate over lockd's orders to the daemon of a mount; ends when lockd is gone."""
        async with self._stream(messages.Orders(mount_id), messages.Order) as (first, orders):
            if first.kind != "listening":
                raise varlink.ProtocolError(f"lockd began its orders with '{first.kind}'")
            yield orders

    @asynccontextmanager
    async def _stream(self, request: msgspec.Struct, kind: type[T]) -> AsyncIterator[tuple[T, AsyncIterator[T]]]:
        wire = await self._open()
        try:
            await _send(wire, request, (), more=True)
            first, _ = await _receive(wire, kind)
            async with aclosing(_each(wire, kind)) as rest:
                yield first, rest
        finally:
            wire.close()

    async def aclose(self) -> None:
        """Close all connections, the life line last: lockd then releases what is left of the mount."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
        if self._life_line is not None:
            self._life_line.close()
        await trio.lowlevel.checkpoint()


async def _each(wire: Wire, kind: type[T]) -> AsyncGenerator[T, None]:
    while True:
        try:
            message, fds = await _receive(wire, kind)
        except LockUnavailable:
            return
        close_all(fds)
        yield message


async def _converse(
    wire: Wire, request: msgspec.Struct, reply: type[T], fds: Sequence[int]
) -> tuple[T, list[int]]:
    await _send(wire, request, fds)
    return await _receive(wire, reply)


async def _send(wire: Wire, request: msgspec.Struct, fds: Sequence[int], *, more: bool = False) -> None:
    method = f"{messages.INTERFACE}.{type(request).__name__}"
    try:
        await wire.send(varlink.encode_call(method, request, more=more), fds)
    except OSError as error:
        raise LockdGone(f"lockd is gone ({error.strerror})") from error


async def _receive(wire: Wire, kind: type[T]) -> tuple[T, list[int]]:
    try:
        received = await wire.receive()
    except OSError as error:
        raise LockdGone(f"lockd is gone ({error.strerror})") from error
    if received is None:
        raise LockdGone("lockd closed the connection")
    message, fds = received
    try:
        reply = varlink.decode_reply(message)
        if reply.error:
            raise from_wire(reply.error, reply.parameters)
        return varlink.decode_parameters(reply.parameters, kind), fds
    except BaseException:
        close_all(fds)
        raise
