"""The place of the leases where only the storage can say what it is: a directory, or a volume."""

from __future__ import annotations

import os
from collections.abc import Callable

from lockfs.errors import LockUnavailable
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.place import FILE_TIMEOUT, Place, Space


async def is_directory(lane: Lane, path: str) -> bool:
    """Say whether the leases are kept in a directory; the default place is one.  Raises `LockUnavailable`."""
    try:
        return not path or await lane.call(lambda: os.path.isdir(path), FILE_TIMEOUT)
    except Overdue as error:
        raise LockUnavailable(f"cannot look at {path}: {error}") from error


class ChosenPlace:
    """A `Place` that is *directory* or *volume*, whichever *path* is; one of them is called for, in `open`."""

    def __init__(self, path: str, directory: Callable[[], Place], volume: Callable[[], Place], where: str) -> None:
        self.where = where
        self._path = path
        self._directory = directory
        self._volume = volume
        self._lane = Lane(1)
        self._found: Place | None = None

    @property
    def below(self) -> Place:
        """The place that there is.  Raises `LockUnavailable` before that is known."""
        if self._found is None:
            raise LockUnavailable(f"the leases in {self.where} have not been found yet")
        return self._found

    async def open(self) -> Space:
        """Find the lockspace, or make it."""
        if self._found is None:
            found = self._directory() if await is_directory(self._lane, self._path) else self._volume()
            self._found = found
        return await self._found.open()

    async def lockspace(self) -> AreaIO:
        """Open the area of the lockspace; the caller closes it."""
        return await self.below.lockspace()

    async def find(self, name: str) -> AreaIO | None:
        """Open the area of a lease; None if there is none.  The caller closes it."""
        return await self.below.find(name)

    async def lease(self, name: str) -> AreaIO:
        """Return the area of a lease, not open yet; to open it makes it if there is none.  The caller closes it."""
        return await self.below.lease(name)

    def is_current(self, name: str, area: AreaIO) -> bool:
        """Say whether an area that was opened is still that of the lease."""
        return self.below.is_current(name, area)

    async def close(self) -> None:
        """Close what is open but for areas."""
        if self._found is not None:
            await self._found.close()
