"""One connection to lockd: calls come in, one at a time is served, answers go out.

Invariants:
* A peer that is neither root nor lockd's own user gets nothing.
* What is not understood is refused and ends the connection; it is logged, and changes nothing.
* Every descriptor that comes in is handed on to the table or closed.
* A call that waits is cancelled when its caller hangs up; what it got for a caller that is gone is given
  back.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager

import msgspec
import trio

import lockfs
from lockfs.errors import LockfsError
from lockfs.linux.closer import Closer
from lockfs.lockd.service import Answer, Client, Descriptors, Service
from lockfs.protocol import errors, interface, messages, varlink
from lockfs.protocol.wire import Wire

Stream = AbstractContextManager[AsyncIterator[msgspec.Struct]]
log = logging.getLogger(__name__)


class Connection:
    """Serves one client until it hangs up.  *closer* closes the descriptors that nobody took."""

    def __init__(self, sock: trio.socket.SocketType, service: Service, closer: Closer) -> None:
        self._wire = Wire(sock)
        self._service = service
        self._closer = closer
        pid, uid = _peer(sock)
        self.client = Client(pid, uid)
        self._waiting: trio.CancelScope | None = None
        self._hung_up = False

    async def serve(self) -> None:
        """Serve until the end of the connection, and close it.  Never raises but when it is cancelled."""
        send, receive = trio.open_memory_channel[tuple[bytes, list[int]]](0)
        try:
            if self.client.uid not in (0, os.geteuid()):
                log.warning("refused a connection of user %d (process %d)", self.client.uid, self.client.pid)
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, send)
                async for message, fds in receive:
                    await self._serve_message(message, fds)
                nursery.cancel_scope.cancel()
        except* varlink.ProtocolError as group:
            await self._refuse(_first(group))
        except* OSError as group:
            log.debug("the connection of process %d broke: %s", self.client.pid, _first(group))
        except* Exception:
            log.exception("a call of process %d failed in an unexpected way", self.client.pid)
        finally:
            receive.close()
            self._wire.close()

    async def _read(self, send: trio.MemorySendChannel[tuple[bytes, list[int]]]) -> None:
        """Hand messages on; notice the end of the connection also while a call is served."""
        with send:
            try:
                while (received := await self._wire.receive()) is not None:
                    try:
                        await send.send(received)
                    except BaseException:
                        self._closer.close(received[1])
                        raise
            finally:
                self._hung_up = True
                if self._waiting is not None:
                    self._waiting.cancel()

    async def _refuse(self, error: Exception) -> None:
        log.warning("refused a call of process %d and hung up: %s", self.client.pid, error)
        reply = varlink.encode_error(varlink.INVALID_PARAMETER, {"parameter": str(error)})
        with trio.move_on_after(1):
            try:
                await self._wire.send(reply)
            except OSError:
                pass

    async def _serve_message(self, message: bytes, fds: list[int]) -> None:
        descriptors = Descriptors(fds)
        try:
            call = varlink.decode_call(message)
            name, _, method = call.method.rpartition(".")
            if name == varlink.SERVICE:
                await self._serve_description(call, method)
            elif name != messages.INTERFACE:
                await self._error(call, varlink.INTERFACE_NOT_FOUND, {"interface": name})
            elif method not in messages.METHODS:
                await self._error(call, varlink.METHOD_NOT_FOUND, {"method": call.method})
            else:
                request = varlink.decode_parameters(call.parameters, messages.METHODS[method][0])
                await self._serve_call(call, request, descriptors)
        finally:
            self._closer.close(descriptors.left.values())

    async def _serve_call(self, call: varlink.Call, request: msgspec.Struct, descriptors: Descriptors) -> None:
        if isinstance(request, messages.Watch):
            first: msgspec.Struct = messages.Event("watching", 0.0)
            await self._serve_stream(call, first, lambda: self._service.watch(self._drop_watcher))
            return
        if isinstance(request, messages.Orders):
            first = messages.Order(0, "listening")
            await self._serve_stream(call, first, lambda: self._service.orders(self.client, request))
            return
        try:
            if isinstance(request, messages.Acquire):
                answer = await self._until_hung_up(request, descriptors)
                if answer is None:
                    return
            else:
                answer = await self._service.call(self.client, request, descriptors)
        except varlink.ProtocolError:
            raise
        except LockfsError as error:
            await self._error(call, *errors.to_wire(error))
            return
        try:
            await self._reply(call, answer.parameters, answer.fds)
        except BaseException:
            if answer.undo is not None:
                await _undo(answer.undo)
            raise

    async def _until_hung_up(self, request: msgspec.Struct, descriptors: Descriptors) -> Answer | None:
        """Serve a call that may wait.  Return None if its caller has hung up before it got anything."""
        answer: Answer | None = None
        with trio.CancelScope() as self._waiting:
            if not self._hung_up:
                answer = await self._service.call(self.client, request, descriptors)
        self._waiting = None
        return answer

    async def _serve_stream(self, call: varlink.Call, first: msgspec.Struct, begin: Callable[[], Stream]) -> None:
        if not call.more:
            await self._error(call, varlink.EXPECTED_MORE, {})
            return
        try:
            context = begin()
        except LockfsError as error:
            await self._error(call, *errors.to_wire(error))
            return
        with trio.CancelScope() as self._waiting, context as stream:
            await self._reply(call, first, continues=True)
            async for message in stream:
                await self._reply(call, message, continues=True)
        # There is no way to say in the middle of a stream that the rest is missing, but to end it.
        self._wire.socket.shutdown(socket.SHUT_RDWR)

    def _drop_watcher(self) -> None:
        log.info("process %d watches too slowly and is dropped", self.client.pid)
        if self._waiting is not None:
            self._waiting.cancel()

    async def _serve_description(self, call: varlink.Call, method: str) -> None:
        if method == "GetInfo":
            info = {
                "vendor": "lockfs",
                "product": "lockd",
                "version": lockfs.__version__,
                "url": "",
                "interfaces": [varlink.SERVICE, messages.INTERFACE],
            }
            await self._reply(call, info)
        elif method == "GetInterfaceDescription":
            wanted = varlink.decode_parameters(call.parameters, interface.Wanted).interface
            found = interface.description(wanted)
            if found is None:
                await self._error(call, varlink.INTERFACE_NOT_FOUND, {"interface": wanted})
            else:
                await self._reply(call, {"description": found})
        else:
            await self._error(call, varlink.METHOD_NOT_FOUND, {"method": call.method})

    async def _reply(
        self, call: varlink.Call, parameters: object, fds: Sequence[int] = (), *, continues: bool = False
    ) -> None:
        if not call.oneway:
            await self._wire.send(varlink.encode_reply(parameters, continues=continues), fds)

    async def _error(self, call: varlink.Call, name: str, parameters: object) -> None:
        if not call.oneway:
            await self._wire.send(varlink.encode_error(name, parameters))


async def _undo(undo: Callable[[], Awaitable[None]]) -> None:
    with trio.CancelScope(shield=True):
        try:
            await undo()
        except errors.NotHeld:
            pass  # the mount is gone, and with it what it held


def _peer(sock: trio.socket.SocketType) -> tuple[int, int]:
    credentials = struct.Struct("iII")  # struct ucred: pid, uid, gid
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    pid, uid, _ = credentials.unpack(raw)
    return pid, uid


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
