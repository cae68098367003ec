"""One end of a connection: whole messages in and out, with the descriptors that ride along.

Invariants:
* Descriptors ride with the first byte of the message they belong to, and such a message is not pipelined:
  the kernel delivers a stream of bytes, so only then is it certain to which message they belong.
* Every descriptor that arrives is handed to the caller of `receive` or closed.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable, Sequence

import trio

from lockfs.protocol.varlink import ProtocolError, Splitter

MAX_FDS = 250
"""Descriptors of one message.  The kernel takes 253 (SCM_MAX_FD); only a hand-over has more than three."""
CHUNK = 1 << 16


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; what close(2) reports about a file that nobody writes through them is of no use."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


class Wire:
    """A connected Unix socket as a pair of message streams.  One task may send while another receives."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.socket = sock
        self._splitter = Splitter()
        self._fds: list[int] = []

    async def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message.  After a cancellation or an error it may be half sent: close the connection."""
        sent = 0
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = await self.socket.sendmsg([message], rights, socket.MSG_NOSIGNAL)
        while sent < len(message):
            sent += await self.socket.send(memoryview(message)[sent:], socket.MSG_NOSIGNAL)

    async def receive(self) -> tuple[bytes, list[int]] | None:
        """Return the next message and its descriptors, which the caller owns; None at the end of the stream.

        Raises `ProtocolError` for what cannot be a message, OSError if the connection breaks.
        """
        while (message := self._splitter.take()) is None:
            data = await self._receive_chunk()
            if not data:
                if self._splitter.between_messages:
                    return None
                raise ConnectionResetError(errno.ECONNRESET, "the connection ended within a message")
            self._splitter.feed(data)
        fds, self._fds = self._fds, []
        return message, fds

    async def _receive_chunk(self) -> bytes:
        room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
        data, ancillary, flags, _ = await self.socket.recvmsg(CHUNK, room, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"a message came with more than {MAX_FDS} descriptors, or they found no room")
        if fds and (not self._splitter.between_messages or b"\0" in data[:-1]):
            raise ProtocolError("descriptors came with a message that was pipelined")
        return data

    def end_sending(self) -> None:
        """Tell the peer that nothing more comes; what it has to say can still be received."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has hung up already

    def close(self) -> None:
        """Close the connection and what nobody fetched."""
        close_all(self._fds)
        self._fds = []
        self.socket.close()
