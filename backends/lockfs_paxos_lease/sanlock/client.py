"""A process that has leases in the daemon: one registered connection, for as long as it has them.

The daemon takes the end of the connection for the death of the process, and gives back the leases that it had.  The
connection stays open as long as anybody has a descriptor of it, whoever made it, and any of them may go on with it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import trio

from lockfs_paxos_lease.sanlock import wire
from lockfs_paxos_lease.sanlock.link import Link
from lockfs_paxos_lease.sanlock.wire import SELF, AcquireFlag, Command, Resource

_NOT_KILL = 2
_RELEASE_ALL = 1
NONE = AcquireFlag(0)


class Client:
    """See the module.  Methods raise `DaemonGone`, and `SanlockError` if the daemon refuses."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    async def register(cls, directory: str) -> Client:
        """Connect, and let the connection stand for this process."""
        link = await Link.open(directory)
        try:
            await link.send(Command.REGISTER)
        except BaseException:
            link.close()
            raise
        return cls(link)

    @classmethod
    def of(cls, fd: int) -> Client:
        """Go on with a connection of which *fd* is a descriptor; that stays the caller's.  Raises OSError.

        To the daemon it stands for the process that made it.
        """
        made = socket.socket(fileno=os.dup(fd))
        made.setblocking(False)
        return cls(Link(trio.socket.from_stdlib_socket(made)))

    def fileno(self) -> int:
        """Return the descriptor, -1 if it is closed."""
        return self._link.socket.fileno()

    def close(self) -> None:
        """Close this process's descriptor."""
        self._link.close()

    async def set_killpath(self, program: bytes, arguments: Sequence[bytes]) -> None:
        """Have *program* run once, instead of SIGTERM, when the leases of this connection have to go."""
        await self._link.call(Command.KILLPATH, wire.killpath_body(program, arguments), data2=SELF)

    async def restrict_kill(self) -> None:
        """Have the daemon never send SIGKILL to this process, but SIGTERM."""
        await self._link.call(Command.RESTRICT, flags=_NOT_KILL)

    async def acquire(self, resources: Sequence[Resource], flags: AcquireFlag = NONE) -> None:
        """Take all of these leases, or none."""
        body = wire.acquire_body(resources)
        await self._link.call(Command.ACQUIRE, body, flags=flags, data=len(resources), data2=SELF)

    async def convert(self, resource: Resource, flags: AcquireFlag = NONE) -> None:
        """Change the mode of a lease that is held to that of *resource*."""
        await self._link.call(Command.CONVERT, resource.encode(disks=False), flags=flags, data2=SELF)

    async def release(self, resources: Sequence[Resource] = ()) -> None:
        """Give these leases back; all of them, if none is named."""
        body = b"".join(each.encode(disks=False) for each in resources)
        flags = 0 if resources else _RELEASE_ALL
        await self._link.call(Command.RELEASE, body, flags=flags, data=len(resources), data2=SELF)

    async def inquire(self) -> list[wire.Held]:
        """Return the leases that this connection has."""
        _, body = await self._link.call(Command.INQUIRE, data2=SELF)
        return self._link.decoded(wire.held, body)
