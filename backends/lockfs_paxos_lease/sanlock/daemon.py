"""A running sanlock daemon, for everything that is not about the leases of one process.

A connection for each command: the daemon closes it after some of them, and a long one keeps no other waiting.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lockfs.linux import procfs
from lockfs_paxos_lease.sanlock import wire
from lockfs_paxos_lease.sanlock.errors import SanlockError
from lockfs_paxos_lease.sanlock.link import Link
from lockfs_paxos_lease.sanlock.wire import Command, Header, Host, Lockspace, Rentry, Request, Resource, Rindex, State

_ASYNC = 1
_IF_UNUSED = 2
_NEXT_LVER = 1
_USED_BY_ORPHANS = 4
_DAEMON_STATE = 1
_PEER = struct.Struct("=3i")
_NOT_JOINED = -2
_IN_PROGRESS = -115


class Daemon:
    """The daemon of a run directory.  Methods raise `DaemonGone`, and `SanlockError` if the daemon refuses."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    async def version(self) -> int:
        """Return the daemon's version: 0x03080500 is 3.8.5."""
        return (await self._call(Command.VERSION))[0].data2

    async def name(self) -> bytes:
        """Return what the daemon calls its host, in the records that it writes."""
        async with self._link() as link:
            states = await link.call_for_states(Command.STATUS, b"", data=_DAEMON_STATE)
        return states[0].name if states else b""

    async def ids(self) -> tuple[int, int]:
        """Return user and group of the daemon, which has to be able to open the leases.  Raises OSError."""
        async with self._link() as link:
            data = link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        # What the socket says of user and group is as of when the daemon began to listen, as root.
        pid, _, _ = _PEER.unpack(data)
        status = dict(line.partition(b":")[::2] for line in procfs.contents(f"/proc/{pid}/status").splitlines())
        uid, gid = (int(status[key].split()[1]) for key in (b"Uid", b"Gid"))
        return uid, gid

    async def until_gone(self) -> None:
        """Return when the daemon has ended."""
        async with self._link() as link:
            await trio.lowlevel.wait_readable(link.socket)

    # Lockspaces --------------------------------------------------------------------------------

    async def write_lockspace(self, lockspace: Lockspace, io_timeout: int = 0) -> None:
        """Make a fresh lockspace, whatever there was.  *io_timeout* in seconds, 0 for the daemon's own."""
        await self._call(Command.WRITE_LOCKSPACE, lockspace.encode(), data2=io_timeout)

    async def read_lockspace(self, disk: wire.Disk) -> tuple[Lockspace, int]:
        """Return the lockspace that lies there, and the io_timeout of its maker in seconds."""
        async with self._link() as link:
            header, body = await link.call(Command.READ_LOCKSPACE, Lockspace(b"", 1, disk).encode())
            return link.decoded(Lockspace.decode, body), header.data2

    async def add_lockspace(self, lockspace: Lockspace, io_timeout: int = 0, *, wait: bool = True) -> None:
        """Join a lockspace, which takes two io_timeouts and more; without *wait* it goes on by itself."""
        await self._call(Command.ADD_LOCKSPACE, lockspace.encode(), flags=0 if wait else _ASYNC, data=io_timeout)

    async def remove_lockspace(self, lockspace: Lockspace, *, wait: bool = True, if_unused: bool = False) -> None:
        """Leave a lockspace.  Whoever has leases of it is killed, unless *if_unused* refuses that (-16)."""
        flags = (0 if wait else _ASYNC) | (_IF_UNUSED if if_unused else 0)
        await self._call(Command.REM_LOCKSPACE, lockspace.encode(), flags=flags)

    async def joined(self, lockspace: Lockspace, *, wait: bool = False) -> bool | None:
        """Say whether this host is in a lockspace; None while it is joining or leaving."""
        try:
            await self._call(Command.INQ_LOCKSPACE, lockspace.encode(), flags=1 if wait else 0)
        except SanlockError as error:
            if error.code not in (_NOT_JOINED, _IN_PROGRESS):
                raise
            return None if error.code == _IN_PROGRESS else False
        return True

    async def lockspaces(self) -> list[Lockspace]:
        """Return the lockspaces that the daemon knows, those that are being joined or left too."""
        async with self._link() as link:
            _, body = await link.call(Command.GET_LOCKSPACES)
            records = link.decoded(lambda data: wire.records(wire.LOCKSPACE_BYTES, data), body)
            return [link.decoded(Lockspace.decode, each) for each in records]

    async def hosts(self, lockspace: bytes, host_id: int = 0) -> list[Host]:
        """Return what the daemon thinks of the hosts of a lockspace, or of one.  -11 before it has looked once."""
        async with self._link() as link:
            _, body = await link.call(Command.GET_HOSTS, Lockspace(lockspace, host_id).encode())
            return _hosts(link, body)

    async def host_status(self, lockspace: bytes) -> list[State]:
        """Return a record for each host of a lockspace, with its name as ``owner_name``."""
        async with self._link() as link:
            return await link.call_for_states(Command.HOST_STATUS, Lockspace(lockspace).encode())

    async def keep_for_orphans(self, lockspace: bytes) -> None:
        """Have leases without a process count as used: the lockspace is not given up while there are any."""
        await self._call(Command.SET_CONFIG, Lockspace(lockspace).encode(), data=_USED_BY_ORPHANS)

    # Leases ------------------------------------------------------------------------------------

    async def write_resource(self, resource: Resource, *, clear: bool = False) -> None:
        """Make a fresh lease, whatever there was; or with *clear* mark it as none."""
        body = resource.encode()
        await self._call(Command.WRITE_RESOURCE, body, flags=1 if clear else 0, data=resource.num_hosts)

    async def read_resource(self, disk: wire.Disk) -> Resource:
        """Return the lease that lies there."""
        async with self._link() as link:
            _, body = await link.call(Command.READ_RESOURCE, Resource(b"", b"", disk).encode())
            return link.decoded(Resource.decode, body[: wire.RESOURCE_BYTES])

    async def owners(self, resource: Resource) -> tuple[Resource, list[Host]]:
        """Return the lease as it is on the storage, and who has it: one host, or those that share it."""
        async with self._link() as link:
            _, body = await link.call(Command.READ_RESOURCE_OWNERS, resource.encode())
            found = link.decoded(Resource.decode, body[: wire.RESOURCE_BYTES])
            return found, _hosts(link, body[wire.RESOURCE_BYTES :])

    async def request(self, resource: Resource, how: Request) -> None:
        """Ask the holder of a lease to let go; its host sees that when it next looks at the lockspace."""
        await self._call(Command.REQUEST, resource.encode(), flags=_NEXT_LVER, data=how)

    # The index of a volume ---------------------------------------------------------------------

    async def format_rindex(self, rindex: Rindex) -> None:
        """Make an empty index of leases, and the lease that guards it behind."""
        await self._call(Command.FORMAT_RINDEX, rindex.encode())

    async def lookup(self, rindex: Rindex, entry: Rentry) -> Rentry:
        """Return the entry with that name, or the first free one for an empty name and offset 0.  -2 if none has it."""
        return await self._entry(Command.LOOKUP_RINDEX, rindex, entry, 0)

    async def create(self, rindex: Rindex, name: bytes, num_hosts: int = 0) -> int:
        """Make a lease in the first free place, and return its offset.

        The daemon does not look whether there is one of that name.
        """
        return (await self._entry(Command.CREATE_RESOURCE, rindex, Rentry(name), num_hosts)).offset

    async def delete(self, rindex: Rindex, name: bytes) -> None:
        """Remove a lease from the index and the storage.  -2 if there is none of that name."""
        await self._entry(Command.DELETE_RESOURCE, rindex, Rentry(name), 0)

    async def _entry(self, command: Command, rindex: Rindex, entry: Rentry, data2: int) -> Rentry:
        async with self._link() as link:
            _, body = await link.call(command, rindex.encode() + entry.encode(), data2=data2)
            return link.decoded(Rentry.decode, body)

    async def _call(
        self, command: Command, body: bytes = b"", *, flags: int = 0, data: int = 0, data2: int = 0
    ) -> tuple[Header, bytes]:
        async with self._link() as link:
            return await link.call(command, body, flags=flags, data=data, data2=data2)

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[Link]:
        link = await Link.open(self.directory)
        try:
            yield link
        finally:
            link.close()


def _hosts(link: Link, body: bytes) -> list[Host]:
    return [
        link.decoded(Host.decode, each) for each in link.decoded(lambda data: wire.records(wire.HOST_BYTES, data), body)
    ]
