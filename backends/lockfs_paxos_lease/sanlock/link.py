"""One connection to a sanlock daemon: commands and answers.

Invariants:
* One command at a time: the daemon refuses a second one of a registered client.
* A command that was cancelled, or whose answer makes no sense, closes the connection: nobody knows what the next bytes
  would belong to.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from lockfs_paxos_lease.sanlock import wire
from lockfs_paxos_lease.sanlock.errors import DaemonGone, SanlockError
from lockfs_paxos_lease.sanlock.wire import Command, Header, ProtocolError

DEFAULT_RUN_DIR = "/run/sanlock"
SOCKET = "sanlock.sock"

T = TypeVar("T")


def run_dir() -> str:
    """Return the run directory of the daemon of this host, which ``SANLOCK_RUN_DIR`` can change."""
    return os.environ.get("SANLOCK_RUN_DIR") or DEFAULT_RUN_DIR


class Link:
    """A connection.  Its calls raise `DaemonGone`, and `SanlockError` if the daemon refuses."""

    def __init__(self, stream: trio.socket.SocketType) -> None:
        self.socket = stream
        self._lock = trio.Lock()

    @classmethod
    async def open(cls, directory: str) -> Link:
        """Connect to the daemon of a run directory."""
        made = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            await made.connect(os.path.join(directory, SOCKET))
        except OSError as error:
            made.close()
            raise DaemonGone(
                f"no sanlock daemon answers in {directory}: {error.strerror or error}",
                hint="It must run before lockfs is mounted with engine=sanlock: systemctl start sanlock",
            ) from error
        except BaseException:
            made.close()
            raise
        return cls(made)

    def close(self) -> None:
        """Close this process's descriptor."""
        self.socket.close()

    async def send(self, command: Command) -> None:
        """Send a command that the daemon does not answer."""
        async with self._lock, self._whole():
            await self._send(Header(command), b"")

    async def call(
        self, command: Command, body: bytes = b"", *, flags: int = 0, data: int = 0, data2: int = 0
    ) -> tuple[Header, bytes]:
        """Send a command, and return header and body of the answer."""
        async with self._lock, self._whole():
            await self._send(Header(command, flags, data=data, data2=data2), body)
            return await self._answer(command)

    async def call_for_states(self, command: Command, body: bytes, data: int = 0) -> list[wire.State]:
        """Send a command whose answer is a list that ends with the connection."""
        async with self._lock, self._whole():
            await self._send(Header(command, data=data), body)
            await self._answer(command)
            found = []
            while record := await self._receive(wire.STATE_BYTES, or_end=True):
                state = wire.State.decode(record)
                found.append(state.with_words(await self._receive(state.length)))
            return found

    def decoded(self, decode: Callable[[bytes], T], body: bytes) -> T:
        """Return what *decode* makes of the body of an answer."""
        try:
            return decode(body)
        except ProtocolError as error:
            self.close()
            raise _strange(error) from error

    @asynccontextmanager
    async def _whole(self) -> AsyncIterator[None]:
        """Close the connection unless all within is done to the end."""
        try:
            yield
        except SanlockError:
            raise
        except (OSError, trio.ClosedResourceError) as error:
            self.close()
            raise DaemonGone(f"the connection to the sanlock daemon broke: {error}") from error
        except ProtocolError as error:
            self.close()
            raise _strange(error) from error
        except BaseException:
            self.close()
            raise

    async def _answer(self, command: Command) -> tuple[Header, bytes]:
        header = Header.decode(await self._receive(wire.HEADER_BYTES))
        if not wire.HEADER_BYTES <= header.length <= wire.MAX_BODY or header.command != command:
            raise ProtocolError(f"an answer to command {header.command}, of {header.length} bytes")
        body = await self._receive(header.length - wire.HEADER_BYTES)
        if header.data < 0:
            raise SanlockError(command.name.lower(), header.data)
        return header, body

    async def _send(self, header: Header, body: bytes) -> None:
        left = memoryview(header.with_length(len(body)).encode() + body)
        while left:
            left = left[await self.socket.send(left) :]

    async def _receive(self, size: int, *, or_end: bool = False) -> bytes:
        data = b""
        while len(data) < size:
            part = await self.socket.recv(size - len(data))
            if not part:
                if or_end and not data:
                    return b""
                raise ProtocolError("it has closed the connection")
            data += part
        return data


def _strange(error: ProtocolError) -> DaemonGone:
    return DaemonGone(f"the sanlock daemon cannot be understood: {error}")
