"""Where the leases of a share lie, in terms that a sanlock daemon understands: a path, and an offset.

The daemon opens what it is told by path, as itself: so files that we make are given to it, and nothing may lie below
the mountpoint, which would lead it back into the mount.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import trio

from lockfs import text
from lockfs.errors import LockUnavailable, MountError
from lockfs_paxos_lease.check.lockspace import records
from lockfs_paxos_lease.directory import LeaseDirectory
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import DiskError
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.place import FILE_TIMEOUT, Place, Space
from lockfs_paxos_lease.san.volume import GUARD_PATIENCE, LeaseVolume
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.errors import SanlockError
from lockfs_paxos_lease.sanlock.wire import Disk, Rindex

AGAIN = 0.1
"""Seconds before the next attempt to change an index that another host changes."""
_CHANGING = frozenset((-16, Code.ACQUIRE_ID_LIVE, Code.ACQUIRE_OWNED, Code.ACQUIRE_OTHER))


class DaemonPlace(Protocol):
    """Methods raise `LockUnavailable`, `open` also `MountError`."""

    where: str

    async def open(self) -> Space:
        """Find the lockspace."""

    async def lockspace(self) -> Disk:
        """Return where the lockspace is, which the daemon can open."""

    async def survey(self) -> Mapping[int, Leader]:
        """Return the records of all host ids."""

    async def find(self, name: str) -> Disk | None:
        """Return where a lease is; None if there is none."""

    async def find_or_create(self, name: str) -> Disk:
        """Return where a lease is, and make it if there is none."""

    async def close(self) -> None:
        """Close what is open."""


class InDirectory:
    """Leases in a directory."""

    def __init__(self, directory: LeaseDirectory, daemon: Daemon, lane: Lane) -> None:
        self.where = directory.where
        self._directory = directory
        self._daemon = daemon
        self._lane = lane
        self._space: Space | None = None
        self._ids = (0, 0)

    async def open(self) -> Space:
        """Find the lockspace, or make it."""
        self._ids = await self._daemon.ids()
        self._space = await self._directory.open()
        return self._space

    async def lockspace(self) -> Disk:
        """Return the file of the lockspace."""
        return await self._given(self._directory.lockspace_file)

    async def survey(self) -> Mapping[int, Leader]:
        """Return the records of all host ids."""
        return await _survey(self._directory, self._space)

    async def find(self, name: str) -> Disk | None:
        """Return the file of a lease."""
        area = await self._directory.find(name)
        if area is None:
            return None
        await area.close()
        return await self._given(self._directory.lease_file(name))

    async def find_or_create(self, name: str) -> Disk:
        """Return the file of a lease, made if it was not there."""
        await self._directory.make(name)
        return await self._given(self._directory.lease_file(name))

    async def close(self) -> None:
        """Close the directory."""
        await self._directory.close()

    async def _given(self, name: str) -> Disk:
        """Let the daemon, which need not be root, open a file that we have made."""
        path = os.fsencode(f"{self.where}/{name}")

        def work() -> Disk:
            info = os.stat(path)
            if (info.st_uid, info.st_gid) != self._ids and self._ids[0]:
                os.chown(path, *self._ids)
            return Disk(os.path.realpath(path))

        try:
            return await self._lane.call(work, FILE_TIMEOUT)
        except (OSError, Overdue) as error:
            raise LockUnavailable(f"cannot give {self.where}/{name} to the sanlock daemon: {error}") from error


class OnVolume:
    """Leases on a volume.  The daemon makes them; where they are is read here, for beyond 2 GiB it does that wrong."""

    def __init__(self, volume: LeaseVolume, daemon: Daemon) -> None:
        self.where = volume.where
        self._volume = volume
        self._daemon = daemon
        self._space: Space | None = None
        self._path = b""

    async def open(self) -> Space:
        """Find the lockspace."""
        await self._daemon.version()
        self._space = await self._volume.open()
        self._path = os.fsencode(self._volume.device)
        return self._space

    async def lockspace(self) -> Disk:
        """Return the start of the volume."""
        return Disk(self._path)

    async def survey(self) -> Mapping[int, Leader]:
        """Return the records of all host ids."""
        return await _survey(self._volume, self._space)

    async def find(self, name: str) -> Disk | None:
        """Look a lease up in the index."""
        offset = await self._volume.offset_of(name)
        return None if offset is None else Disk(self._path, offset)

    async def find_or_create(self, name: str) -> Disk:
        """Look a lease up, and have the daemon make it if it is not there.

        The daemon does not look whether it is.  If two hosts make it at once there are two, of which all use the first.
        """
        until = trio.current_time() + GUARD_PATIENCE
        while (found := await self.find(name)) is None:
            try:
                await self._daemon.create(self._index(), name.encode())
            except SanlockError as error:
                if error.code not in _CHANGING or trio.current_time() > until:
                    raise
                await trio.sleep(AGAIN)
        return found

    async def close(self) -> None:
        """Forget what was looked up."""
        await self._volume.close()

    def _index(self) -> Rindex:
        if self._space is None:
            raise LockUnavailable(f"the volume {self.where} is not open")
        return Rindex(self._space.name, Disk(self._path, self._space.geometry.align))


def check_reachable(place: DaemonPlace, mountpoint: bytes) -> None:
    """Raise `MountError` if the daemon would be led back into the mount."""
    where, top = os.path.realpath(os.fsencode(place.where)), os.path.realpath(mountpoint)
    if where == top or where.startswith(top.rstrip(b"/") + b"/"):
        raise MountError(
            f"sanlock cannot reach the leases in {place.where}: {text.from_bytes(top)} hides them",
            hint="Set leases= to a directory that is not below the mountpoint, such as another mount of the share.",
        )


async def _survey(place: Place, space: Space | None) -> Mapping[int, Leader]:
    if space is None:
        raise LockUnavailable(f"{place.where} is not open")
    area = await place.lockspace()
    try:
        data = await area.read(0, space.geometry.align, FILE_TIMEOUT)
    except DiskError as error:
        raise LockUnavailable(f"cannot read the lockspace: {error}") from error
    finally:
        await area.close()
    return {number + 1: record for number, (record, _) in enumerate(records(data, space.geometry))}
