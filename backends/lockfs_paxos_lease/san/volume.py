"""Leases on a block device, or in one large file: `Place` with an index.

Invariants:
* The index is changed only by who holds the lease that guards it, after reading it under that lease.
* A lease is written whole before an entry names it, and cleared after its entry is gone: an entry never names nothing.
* What an entry says is only where to look: whoever takes a lease checks its name, on the storage.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol, TypeVar

import trio

from lockfs import text
from lockfs.errors import LockUnavailable, MountError
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.call import Steps, call
from lockfs_paxos_lease.disk.file import Storage
from lockfs_paxos_lease.disk.lane import Lane, Overdue
from lockfs_paxos_lease.engine.actions import Area, Clock, DiskError, Operation, read
from lockfs_paxos_lease.engine.errors import EngineError, Held
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.errors import explained
from lockfs_paxos_lease.format import names, rindex
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.fresh import cleared_lease, fresh_lease
from lockfs_paxos_lease.format.leader import PAXOS_MAGIC, Leader
from lockfs_paxos_lease.place import FILE_TIMEOUT, LEASE_THREADS, LOCKSPACE_THREADS, Space, hosts_of
from lockfs_paxos_lease.san.index import Index, is_used

GUARD_PATIENCE = 6.0
"""Seconds to wait for another host that changes the index, which takes it some I/Os."""
GUARD_PAUSE = 0.05
_PAGE = 4096

T = TypeVar("T")


class Joined(Protocol):
    """This host in the lockspace of the volume."""

    def membership(self) -> Membership:
        """Return the membership under which something may be granted now.  Raises `LockUnavailable`."""

    async def run(self, operation: Operation[T], lease: AreaIO | None = None) -> T:
        """Run an operation of the engine."""


class LeaseVolume:
    """See the module.  *joined* returns this host in the lockspace; it is called only after `open`."""

    def __init__(self, storage: Storage, clock: Clock, timing: Timing, path: str, joined: Callable[[], Joined]) -> None:
        self.where = path
        self._storage = storage
        self._clock = clock
        self._timing = timing
        self._joined = joined
        self._lane = Lane(LEASE_THREADS)
        self._lockspace_lane = Lane(LOCKSPACE_THREADS)
        self._path = path
        self._size = 0
        self._space: Space | None = None
        self._places: dict[str, int] = {}
        self._random = random.SystemRandom()

    async def open(self) -> Space:
        """Find the lockspace and the index.  Raises `MountError`, `LockUnavailable`; makes nothing."""
        try:
            space = await self._lane.call(self._open, FILE_TIMEOUT)
            self._space = space
            await self._read_index()
        except Overdue as error:
            raise LockUnavailable(f"cannot open the volume {self.where}: {error}") from error
        except OSError as error:
            hint = "leases= names a directory, or a volume that was made with: lockfs lease format --index"
            raise MountError(f"no leases can be kept on {self.where}: {error.strerror}", hint=hint) from error
        return space

    @property
    def device(self) -> str:
        """Its path without symbolic links, once it is open."""
        return self._path

    def _open(self) -> Space:
        # By its own name: those of devices by id or label are symbolic links.
        self._path = os.path.realpath(self._path)
        info = os.stat(self._path)
        self._size = _size_of(self._path)
        file = self._storage.open(self._path)
        try:
            first = file.read(0, _PAGE)
        finally:
            file.close()
        if not any(first):
            raise MountError(
                f"{self.where} is empty: there is no lockspace on it",
                hint=f"Make one, once, on one host: lockfs lease format --index --lockspace NAME {self.where}",
            )
        device = stat.S_ISBLK(info.st_mode)
        key = (info.st_rdev, 0, 0) if device else (info.st_dev, info.st_ino, 0)
        return Space.of(first, key, self._timing, self.where)

    async def lockspace(self) -> AreaIO:
        """Open the area of the lockspace."""
        return await self._area(0, "lockspace", self._lockspace_lane)

    async def find(self, name: str) -> AreaIO | None:
        """Open the area of a lease; None if there is none."""
        offset = await self.offset_of(name)
        return None if offset is None else await self._area(offset, name)

    async def offset_of(self, name: str) -> int | None:
        """Return where a lease begins; None if there is none."""
        offset = self._places.get(name)
        if offset is not None and await self._is_lease(offset, name):
            return offset
        offset = (await self._read_index()).find(name.encode())
        if offset is None:
            self._places.pop(name, None)
        else:
            self._places[name] = offset
        return offset

    async def lease(self, name: str) -> AreaIO:
        """Return the area of a lease, not open yet; make it if there is none."""
        offset = await self.offset_of(name)
        if offset is None:
            async with self._guard() as index:
                offset = index.find(name.encode())
                if offset is None:
                    offset = await self._make(index, name)
            self._places[name] = offset
        return self._closed_area(offset, name, self._lane)

    async def delete(self, name: str) -> bool:
        """Remove a lease that nobody has; return False if there is none.  Raises `LockUnavailable`, `Held`."""
        area = await self.find(name)
        if area is None:
            return False
        joined = self._joined()
        membership = joined.membership()
        lease = Lease(name.encode(), membership, self._random)
        cleared = False
        try:
            with explained(f"delete the lease {name}", self.where):
                # Who has the lease keeps it from being deleted, and nobody gets it while it is.
                await joined.run(lease.acquire(Mode.EXCLUSIVE), area)
            async with self._guard() as index:
                number = index.number_of(name.encode())
                if number is not None:
                    await self._write_entry(index, number, rindex.Entry(), membership)
            await self._write(area, 0, self._cleared(name), membership)
            cleared = True
        finally:
            self._places.pop(name, None)
            with trio.CancelScope(shield=True):
                if lease.mode is not None and not cleared:
                    await self._let_go(joined, lease, area)
                elif lease.untidy:
                    await self._tidy(joined, lease, area)
                await area.close()
        return True

    def _cleared(self, name: str) -> bytes:
        space, now = self._known_space, self._timing.stamp(self._clock())
        hosts = hosts_of(self._timing, space.geometry)
        return cleared_lease(space.geometry, space.name, name.encode(), now, hosts, self._timing.lease_version)

    def is_current(self, name: str, area: AreaIO) -> bool:
        """Say yes: a lease that was deleted says so itself, and none is deleted while it is in use."""
        return True

    async def close(self) -> None:
        """Nothing stays open but areas."""
        self._places.clear()

    # The index -------------------------------------------------------------------------------

    async def _read_index(self) -> Index:
        space = self._known_space
        area = await self._area(space.geometry.align, "index")
        try:
            with self._explained("read the index"):
                data = await area.read(0, space.geometry.align, self._timing.io_timeout)
                return Index.decode(data, space.name, space.geometry.align)
        finally:
            await area.close()

    @asynccontextmanager
    async def _guard(self) -> AsyncIterator[Index]:
        """Hold the lease that guards the index; yield the index as it is then."""
        joined, space = self._joined(), self._known_space
        membership = joined.membership()
        # Among all that use the volume in this process: to the storage they are one host.
        async with _gates.setdefault(space.key, trio.Lock()):
            area = await self._area(2 * space.geometry.align, "lease of the index")
            lease = Lease(rindex.LEASE_NAME, membership, self._random)
            try:
                with explained("change the index", self.where):
                    await self._take(joined, lease, area)
                try:
                    yield await self._read_index()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._let_go(joined, lease, area)
            finally:
                with trio.CancelScope(shield=True):
                    await area.close()

    async def _take(self, joined: Joined, lease: Lease, area: AreaIO) -> None:
        until = trio.current_time() + GUARD_PATIENCE
        while True:
            try:
                await joined.run(lease.acquire(Mode.EXCLUSIVE), area)
                return
            except Held as error:
                if trio.current_time() > until:
                    raise LockUnavailable(
                        f"host id {error.host_id} has been changing the index of {self.where} for {GUARD_PATIENCE:g} s"
                    ) from error
            finally:
                if lease.untidy:
                    with trio.CancelScope(shield=True):
                        await self._tidy(joined, lease, area)
            await trio.sleep(GUARD_PAUSE * (1 + self._random.random()))

    async def _let_go(self, joined: Joined, lease: Lease, area: AreaIO) -> None:
        try:
            with explained("let go of a lease", self.where):
                await joined.run(lease.release(), area)
        finally:
            if lease.untidy:
                await self._tidy(joined, lease, area)

    async def _tidy(self, joined: Joined, lease: Lease, area: AreaIO) -> None:
        """What the storage does not let us take back is left to run out."""
        with trio.move_on_after(FILE_TIMEOUT):
            try:
                await joined.run(lease.tidy(), area)
            except EngineError:
                pass

    async def _make(self, index: Index, name: str) -> int:
        """Make a lease in the first place that is free, and return where.  The caller has the guard."""
        space, membership = self._known_space, self._joined().membership()
        hosts = hosts_of(self._timing, space.geometry)
        fresh = fresh_lease(space.geometry, space.name, name.encode(), hosts, self._timing.lease_version)
        for number, offset in index.free(self._timing.lease_version):
            if offset + space.geometry.align > self._size:
                break
            area = await self._area(offset, name)
            try:
                with self._explained("read a free place"):
                    there = await area.read(0, space.geometry.align, self._timing.io_timeout)
                if is_used(there, space.geometry):
                    continue
                await self._write(area, 0, fresh, membership)
            finally:
                await area.close()
            await self._write_entry(index, number, rindex.Entry(offset, name.encode()), membership)
            return offset
        raise LockUnavailable(
            f"there is no room for one more lease on {self.where}",
            hint="Remove leases that are not needed any more, or make a larger volume.",
        )

    async def _write_entry(self, index: Index, number: int, entry: rindex.Entry, membership: Membership) -> None:
        offset, sector = index.sector_with(number, entry)
        area = await self._area(self._known_space.geometry.align, "index")
        try:
            await self._write(area, offset, sector, membership)
        finally:
            await area.close()

    async def _write(self, area: AreaIO, offset: int, data: bytes, membership: Membership) -> None:
        with self._explained("write"):
            await area.write(offset, data, self._timing.io_timeout, membership.valid_until)

    async def _is_lease(self, offset: int, name: str) -> bool:
        area = self._closed_area(offset, name, self._lane)

        def look() -> Steps[bytes]:
            yield from call(area.open_now, FILE_TIMEOUT, area.lane)
            sector = yield from read(Area.LEASE, 0, _PAGE, self._timing.io_timeout)
            yield from call(area.close_now, FILE_TIMEOUT, area.lane)
            return sector

        try:
            with self._explained("read a lease"):
                leader = Leader.decode(await driver.run(look(), {Area.LEASE: area}))
        except OSError as error:
            raise LockUnavailable(f"cannot open {self.where}: {error.strerror}") from error
        except Overdue as error:
            raise LockUnavailable(f"cannot open {area.where}: {error}") from error
        finally:
            with trio.CancelScope(shield=True):
                await area.close()
        return leader.magic == PAXOS_MAGIC and names.same(leader.resource_name, name.encode())

    # Parts -----------------------------------------------------------------------------------

    @property
    def _known_space(self) -> Space:
        if self._space is None:
            raise LockUnavailable(f"the volume {self.where} is not open")
        return self._space

    async def _area(self, offset: int, what: str, lane: Lane | None = None) -> AreaIO:
        area = self._closed_area(offset, what, lane or self._lane)
        try:
            await area.open(FILE_TIMEOUT)
        except BaseException as error:
            area.give_up()
            if isinstance(error, OSError):
                raise LockUnavailable(f"cannot open {self.where}: {error.strerror}") from error
            if isinstance(error, DiskError):
                raise LockUnavailable(str(error)) from error
            raise
        return area

    def _closed_area(self, offset: int, what: str, lane: Lane) -> AreaIO:
        where = f"{self.where}:{offset} ({text.from_bytes(what.encode())})"
        return AreaIO(partial(self._storage.open, self._path), lane, self._clock, where, offset)

    def _explained(self, what: str) -> _Explained:
        return _Explained(f"cannot {what} of {self.where}")


class _Explained:
    """Raise what the storage raises, and what is wrong on it, as `LockUnavailable`."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadRecord):
            raise LockUnavailable(f"{self._what}: {error.what}", hint="Look with: lockfs lease check") from error
        if isinstance(error, DiskError):
            raise LockUnavailable(f"{self._what}: {error}") from error


def _size_of(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


_gates: dict[tuple[int, int, int], trio.Lock] = {}
