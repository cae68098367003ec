"""Removing the leases of images that are not there any more, while hosts are at work.

A lease is removed by a host that has it: a member of the lockspace for as long as that takes, with a host id of its
own, which gets each lease exclusively as for an image, so that nobody holds or shares it.  Then, in this order:

1. The leader record is marked as deleted, by the rules of any write under a lease.  From here on nobody gets the
   lease by this file, also not who has opened it before or is in the middle of a ballot.  This is for good: nothing
   ever makes such a record a good one again.
2. The file is removed, if it still is the one that was marked, and within a few seconds.  Who has opened it sees the
   mark, or that the name leads elsewhere, and looks for the lease by name again; who looks by name makes a new one.

What may go wrong: that the removal is carried out much later than it was asked for, when the name leads to a new file.
So nobody else removes a marked file before `ABANDONED` has passed; a prune that was cut short in between leaves one,
the image of which (there is none) could not be opened until then.  Whether the image is there is looked at for what is
worth to be removed, and no lock depends on it.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TypeVar

import trio

from lockfs.errors import LockfsError, LockUnavailable
from lockfs_paxos_lease import driver
from lockfs_paxos_lease.claim import Claim
from lockfs_paxos_lease.directory import LOCKSPACE, SUFFIX, LeaseDirectory
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.file import Storage
from lockfs_paxos_lease.engine.actions import Area, Operation
from lockfs_paxos_lease.engine.errors import BadArea, EngineError, Held, StorageTrouble
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import DEFAULT_IO_TIMEOUT, Timing
from lockfs_paxos_lease.errors import explained
from lockfs_paxos_lease.format import version
from lockfs_paxos_lease.format.leader import CLEARED_MAGIC, Leader
from lockfs_paxos_lease.identity import NAME_BYTES
from lockfs_paxos_lease.place import FILE_TIMEOUT, hosts_of

ABANDONED = 3600.0
"""Seconds after which a file that is marked as deleted was left by a prune that has ended."""
JOINS = 5
"""Attempts to join: a claim that the storage was slow with is not written."""
_HIDDEN = b".lockfs"

T = TypeVar("T")


@dataclass(slots=True)
class Pruned:
    """What became of the leases that are not needed: names; `problems` has texts."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def unneeded(source: bytes, leases: str) -> list[str]:
    """Return the leases in a directory that are called by an inode which *source* does not have.  Raises OSError."""
    found = {
        int(digits, 16): name
        for file in os.listdir(leases)
        if (name := file.removesuffix(SUFFIX)) != file and (digits := name.removeprefix("i-")) != name
        and digits and not set(digits) - set("0123456789abcdef")
    }  # fmt: skip
    for inode in _inodes(source):
        found.pop(inode, None)
    return sorted(found.values())


def _inodes(top: bytes) -> Iterator[int]:
    """Yield the inode numbers of all files below a directory, but for our own."""
    directories = [top]
    while directories:
        directory = directories.pop()
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if directory != top or entry.name != _HIDDEN:
                        directories.append(entry.path)
                else:
                    yield entry.inode()


def timing_of(leases: str) -> Timing:
    """Return the timing that a lockspace goes by.  Raises OSError, ValueError."""
    with open(os.path.join(leases, LOCKSPACE), "rb") as file:
        leader = Leader.decode(file.read(512))
    own = version.takeover_of(leader.version)
    return Timing.sanlock(leader.timeout or DEFAULT_IO_TIMEOUT) if own is None else Timing.own(own)


class Pruner:
    """A member of the lockspace in the directory *leases*, for the time that it takes."""

    def __init__(self, storage: Storage, leases: str, timing: Timing) -> None:
        self._directory = LeaseDirectory(storage, driver.boottime, timing, -1, "", leases)
        self._leases = leases
        self._timing = timing
        self._random = SystemRandom()
        self._areas: dict[Area, AreaIO] = {}

    async def prune(self, names: list[str], told: Callable[[str], None]) -> Pruned:
        """Remove leases that nobody has.  *told* is called with each that is removed.  Raises `LockfsError`."""
        pruned = Pruned()
        space = await self._directory.open()
        try:
            self._areas[Area.LOCKSPACE] = await self._directory.lockspace()
            digits = secrets.token_hex(8)
            name = f"{digits}.prune on {socket.gethostname()}".encode()[:NAME_BYTES]
            claim = Claim(space, self._timing, driver.boottime, digits, name, 0, self._run)
            with explained("be a member of the lockspace", self._leases):
                member = await self._join(claim)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew, member)
                    for each in names:
                        await self._prune_one(member, each, pruned, told)
                    nursery.cancel_scope.cancel()
                await self._run(member.leave())
        finally:
            with trio.CancelScope(shield=True):
                for area in self._areas.values():
                    await area.close()
                await self._directory.close()
        return pruned

    async def _join(self, claim: Claim) -> Membership:
        """Join, and look at the others."""
        attempt = 1
        while True:
            try:
                member = await claim.make(idle=lambda: True)
                await self._run(member.renew())
                return member
            except StorageTrouble:
                if attempt == JOINS:
                    raise
                attempt += 1
                await trio.sleep(self._timing.retry)

    async def _renew(self, member: Membership) -> None:
        """Renew until the lease is lost; then every write is refused."""
        while True:
            await trio.sleep(max(0.0, member.next_renewal - driver.boottime()))
            try:
                await self._run(member.renew())
            except StorageTrouble:
                await trio.sleep(self._timing.retry)
            except EngineError:
                return

    async def _prune_one(self, member: Membership, name: str, pruned: Pruned, told: Callable[[str], None]) -> None:
        try:
            area = await self._directory.find(name)
            if area is None:
                return
            try:
                removed = await self._remove(member, name, area)
            finally:
                await area.close()
        except Held:
            pruned.in_use.append(name)
        except (EngineError, LockfsError, OSError) as error:
            why = error.message if isinstance(error, EngineError | LockfsError) else str(error)
            pruned.problems.append(f"{name}: {why}")
        else:
            if removed:
                pruned.removed.append(name)
                told(name)

    async def _remove(self, member: Membership, name: str, area: AreaIO) -> bool:
        lease = Lease(name.encode(), member, self._random, hosts_of(self._timing, member.geometry))
        try:
            await self._run(lease.acquire(Mode.EXCLUSIVE), area)
        except BadArea:
            return await self._remove_abandoned(member, name, area)
        except EngineError:
            if lease.untidy:
                await self._run(lease.tidy(), area)
            raise
        until = driver.boottime() + FILE_TIMEOUT
        await self._run(lease.retire(), area)
        return await self._directory.remove(name, area, until)

    async def _remove_abandoned(self, member: Membership, name: str, area: AreaIO) -> bool:
        """Remove what a prune that was cut short has left; what is damaged otherwise stays."""
        leader = Leader.decode(await area.read(0, member.geometry.sector, FILE_TIMEOUT))
        if leader.magic != CLEARED_MAGIC or leader.checksum != leader.right_checksum():
            raise LockUnavailable("it is damaged: see `lockfs lease check`")
        if await self._directory.age(name) < ABANDONED:
            raise LockUnavailable(f"it is being removed by somebody, or has been, less than {ABANDONED / 60:g} min ago")
        return await self._directory.remove(name, area, driver.boottime() + FILE_TIMEOUT)

    async def _run(self, operation: Operation[T], lease: AreaIO | None = None) -> T:
        areas = self._areas if lease is None else {**self._areas, Area.LEASE: lease}
        return await driver.run(operation, areas)
