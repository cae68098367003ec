"""The leases that one share has in use on this host: for a grant, or while one is being taken.

Invariants:
* A lease serves one image of this host at a time, also where two images have the same name for it; so it is in use
  (`Holdings.in_use`, which all shares see) from before its area is opened until after it is closed, or hangs.
* What could not be given back on the disk stays known (`Holdings.left`), and is tidied up later.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable
from dataclasses import dataclass

import trio

from lockfs import text
from lockfs.backend import Grant, GrantLost, Mode
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.engine import lease as engine
from lockfs_paxos_lease.engine.errors import EngineError
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.errors import explained
from lockfs_paxos_lease.lockspace import Lockspace
from lockfs_paxos_lease.place import Place, hosts_of
from lockfs_paxos_lease.writeback import wait_for_write_back

TIDY_TIMEOUT = 8.0


@dataclass(slots=True, eq=False)
class Held:
    """One lease.  `lost`: its grant was told lost; `stopped`: and nobody can write under it any more; `fenced`: and
    nothing that was written under it can still get to the storage, as far as a watchdog is to see to that.

    `asked` is the last version for which somebody has asked us to let go of it.
    """

    name: str
    lease: engine.Lease
    area: AreaIO
    mode: Mode
    grant: Grant | None = None
    lost: bool = False
    stopped: bool = False
    fenced: bool = False
    asked: int = 0


class LeasesInUse:
    """See the module."""

    def __init__(self, place: Place, timing: Timing) -> None:
        self._place = place
        self._timing = timing
        self._random = random.SystemRandom()
        self._by_name: dict[str, Held] = {}
        self._by_image: dict[tuple[int, int], Held] = {}

    def all(self) -> list[Held]:
        """Return them all."""
        return list(self._by_name.values())

    def get(self, name: str) -> Held | None:
        """Return the use of a lease by name."""
        return self._by_name.get(name)

    def of(self, grant: Grant) -> Held | None:
        """Return the use that a grant is for; None if it is over."""
        held = self._by_image.get((grant.image.dev, grant.image.ino))
        return held if held is not None and held.grant is grant else None

    def granted(self, held: Held, grant: Grant) -> Grant:
        """Take note that a lease was got; return the grant."""
        held.grant, held.mode = grant, grant.mode
        self._by_image[grant.image.dev, grant.image.ino] = held
        return grant

    def lease(self, name: str, membership: Membership) -> engine.Lease:
        """Return a lease as the engine has it."""
        return engine.Lease(name.encode(), membership, self._random, hosts_of(self._timing, membership.geometry))

    async def begin(
        self, joined: Lockspace, name: str, membership: Membership, mode: Mode, opening: Awaitable[AreaIO]
    ) -> Held:
        """Begin to use a lease: nobody else on this host does from before its area is opened."""
        joined.holdings.in_use.add(name)
        try:
            area = await opening
        except BaseException:
            joined.holdings.in_use.discard(name)
            raise
        self._by_name[name] = Held(name, self.lease(name, membership), area, mode)
        return self._by_name[name]

    async def find(self, name: str) -> AreaIO:
        """Open the area of a lease.  Raises `GrantLost` if there is none."""
        area = await self._place.find(name)
        if area is None:
            raise GrantLost(f"the lease {name} is not there any more")
        return area

    async def end(self, joined: Lockspace | None, held: Held, *, given_back: bool) -> None:
        """End the use of a lease; *given_back*: on the disk, too, or it is not for us to do that."""
        await held.area.close()
        if held.grant is not None and self.of(held.grant) is held:
            del self._by_image[held.grant.image.dev, held.grant.image.ino]
        if self._by_name.pop(held.name, None) is None or joined is None:
            return
        if given_back:
            joined.holdings.left.discard(held.name)
            await joined.drop(held.name)
        else:
            joined.holdings.left.add(held.name)
        joined.holdings.in_use.discard(held.name)

    def stopped(self, joined: Lockspace, held: Held) -> None:
        """Nobody can write by a lost grant any more: with a watchdog, wait until what was written is on the storage."""
        if held.stopped or held.grant is None:
            return
        held.stopped = True
        if not joined.watchdog_path:
            held.fenced = True
            return

        def written() -> None:
            held.fenced = True
            joined.holdings.unwritten -= 1

        image = held.grant.image
        joined.holdings.unwritten += 1
        wait_for_write_back(image.fd, text.from_bytes(image.path), written)

    async def tidy(self, joined: Lockspace, held: Held) -> None:
        """Take back what may be on the disk and is not held; what the storage does not let us is done later."""
        if not held.lease.untidy:
            return
        with trio.move_on_after(TIDY_TIMEOUT):
            try:
                await joined.run(held.lease.tidy(), held.area)
            except EngineError:
                pass

    async def give_up(self, joined: Lockspace, held: Held) -> None:
        """End the use of a lease that was not got, or was; as much of it as may be on the disk is taken back."""
        with trio.CancelScope(shield=True):
            try:
                if held.lease.mode is not None:
                    await joined.run(held.lease.release(), held.area)
            except EngineError:
                pass
            await self.tidy(joined, held)
            # What could not be given back before may still be there, since nobody has got as far as to find out.
            left = held.lease.untidy or held.name in joined.holdings.left
            await self.end(joined, held, given_back=not left)

    async def give_back(self, joined: Lockspace, name: str) -> None:
        """Give back on the disk what this host has there, and nobody uses.  Raises `LockUnavailable`."""
        try:
            held = await self.begin(joined, name, joined.membership(), Mode.EXCLUSIVE, self.find(name))
        except GrantLost:
            joined.holdings.left.discard(name)
            await joined.drop(name)
            return
        try:
            with explained("give back a lease that nobody uses", held.area.where):
                if await joined.run(held.lease.adopt(), held.area) is not None:
                    await joined.run(held.lease.release(), held.area)
                await joined.run(held.lease.tidy(), held.area)
        finally:
            with trio.CancelScope(shield=True):
                await self.end(joined, held, given_back=held.lease.mode is None and not held.lease.untidy)
