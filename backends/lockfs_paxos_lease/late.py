"""The place of the leases for a lockd whose predecessor held some of them: it may come up before the storage answers.

Whoever goes by these leases must be fenced when they run out, also where nothing can be read.  So which lockspace a
share uses is written down in the run directory, and a successor that finds leases noted there begins with what it
knows.  Nothing is granted before the lockspace was reached and found to be that one.

Invariant: without leases that are noted as held in this boot, `open` raises what the storage raises.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable

import msgspec
import trio

from lockfs.errors import LockfsError, LockUnavailable, MountError
from lockfs_paxos_lease import identity
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.errors import BadRecord
from lockfs_paxos_lease.format.size import Geometry
from lockfs_paxos_lease.place import Place, Space
from lockfs_paxos_lease.state import PLACE, StateFile

PATIENCE = 1.0
"""Seconds for the storage to answer a successor of who held leases; their time runs, and then they must be fenced."""

log = logging.getLogger(__name__)


class Note(msgspec.Struct, frozen=True):
    """The lockspace that a share used in one boot.  `timing` is the version word of its records."""

    boot: str
    space: str
    sector: int
    align: int
    key: tuple[int, int, int]
    timing: int


class Memory:
    """Which lockspace a share uses, with the option *leases*.  Methods do I/O in memory, and raise OSError."""

    def __init__(self, run_dir: str, source: bytes, leases: str, timing: Timing) -> None:
        self._run_dir = run_dir
        self._timing = timing
        digest = hashlib.sha256(source + b"\0" + leases.encode(errors="surrogateescape")).hexdigest()[:32]
        self._path = os.path.join(run_dir, PLACE, f"{digest}.share")

    def save(self, space: Space) -> None:
        """Write it down, in one step."""
        geometry = space.geometry
        note = Note(
            identity.boot_id(), space.name.hex(), geometry.sector, geometry.align, space.key, self._timing.delta_version
        )
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with open(f"{self._path}.new", "wb") as file:
            file.write(msgspec.json.encode(note))
        os.rename(f"{self._path}.new", self._path)

    def load(self) -> Space | None:
        """Return it if leases in it are noted as held in this boot, else None."""
        try:
            with open(self._path, "rb") as file:
                note = msgspec.json.decode(file.read(), type=Note)
            space = Space(bytes.fromhex(note.space), Geometry(note.sector, note.align), note.key)
            if (note.boot, note.timing) != (identity.boot_id(), self._timing.delta_version):
                return None
            return space if StateFile(self._run_dir, space.name).held() else None
        except (FileNotFoundError, ValueError, BadRecord):
            return None


class LatePlace:
    """See the module: a `Place`, with the real one `below`.

    When that is open *reached* is called, each time that it is needed, until it raises nothing.
    """

    def __init__(self, place: Place, memory: Memory, reached: Callable[[], Awaitable[None]]) -> None:
        self.where = place.where
        self.below = place
        self._memory = memory
        self._tell_reached = reached
        self._reached = False
        self._gate = trio.Lock()
        self._known: Space | None = None

    async def open(self) -> Space:
        """Find the lockspace, or make it; or return the one that is known, and go on to look for it when it is used."""
        try:
            known = await trio.to_thread.run_sync(self._memory.load)
            if known is None:
                return await self._reach()
            try:
                with trio.move_on_after(PATIENCE):
                    return await self._reach()
                why = f"it has not answered for {PATIENCE:g} s"
            except LockfsError as error:
                why = error.message
        except OSError as error:
            raise MountError(f"cannot keep the state of this host's leases: {error}") from error
        if self._reached and self._known is not None:
            return self._known
        log.warning("%s: leases in it were held here, and the storage does not let us look: %s", self.where, why)
        self._known = known
        return known

    async def _reach(self) -> Space:
        """Open the place.  Raises `MountError`, `LockUnavailable`, OSError."""
        async with self._gate:
            if self._reached and self._known is not None:
                return self._known
            found = await self.below.open()
            known = self._known
            if known is not None and (found.name, found.geometry) != (known.name, known.geometry):
                await self.below.close()
                raise LockUnavailable(
                    f"{self.where} has another lockspace than before", hint="Unmount the share, and mount it again."
                )
            try:
                await self._tell_reached()
            except LockfsError:
                await self.below.close()
                raise
            self._known, self._reached = known or found, True
            await trio.to_thread.run_sync(self._memory.save, self._known)
            return self._known

    async def _reach_in_use(self) -> None:
        if self._reached:
            return
        try:
            await self._reach()
        except (MountError, OSError) as error:
            raise LockUnavailable(f"cannot reach the leases in {self.where}: {error}") from error

    async def lockspace(self) -> AreaIO:
        """Open the area of the lockspace; the caller closes it."""
        await self._reach_in_use()
        return await self.below.lockspace()

    async def find(self, name: str) -> AreaIO | None:
        """Open the area of a lease; None if there is none.  The caller closes it."""
        await self._reach_in_use()
        return await self.below.find(name)

    async def lease(self, name: str) -> AreaIO:
        """Return the area of a lease, not open yet; to open it makes it if there is none.  The caller closes it."""
        await self._reach_in_use()
        return await self.below.lease(name)

    def is_current(self, name: str, area: AreaIO) -> bool:
        """Say whether an area that was opened is still that of the lease."""
        return self.below.is_current(name, area)

    async def close(self) -> None:
        """Close what is open but for areas."""
        await self.below.close()
