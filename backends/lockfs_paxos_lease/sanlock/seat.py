"""This host's place in a lockspace, by way of a sanlock daemon: joined, and joined anew when the daemon has left it.

Invariants:
* `lose` is called when the daemon is about to give the lockspace up, or has ended: it is the second way, beside the
  program that the daemon runs for each lease, in which that is noticed.
* The lockspace is left only if this process has joined it, and never while anybody on this host has leases of it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import trio

from lockfs.errors import LockUnavailable, MountError
from lockfs_paxos_lease.format import names
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.errors import SanlockError
from lockfs_paxos_lease.sanlock.wire import Lockspace

START_PATIENCE = 7.0
"""Seconds that a mount waits for the end of a join, which may take minutes; it then goes on in the background."""
LOOK = 1.0
"""Seconds between two looks at the lockspace, as often as the daemon itself looks."""
AGAIN = 2.0
"""Seconds between two attempts to join."""
ATTEMPTS = 8
"""Free host ids that are tried: each failure means that another host was faster by a moment."""
_ADDING, _REMOVING = 1, 2
_EXISTS, _IN_PROGRESS = -17, -115

log = logging.getLogger(__name__)


Survey: TypeAlias = Callable[[], Awaitable[Mapping[int, Leader]]]
"""Returns the records of all host ids of the lockspace, as they are on the storage."""


class Seat:
    """See the module.  *lockspace* has the host id to have, 0 for any; *lose* tells all that is held lost."""

    def __init__(
        self, daemon: Daemon, lockspace: Lockspace, io_timeout: int, survey: Survey, lose: Callable[[str], None]
    ) -> None:
        self.host_id = 0
        self._daemon = daemon
        self._lockspace = lockspace
        self._io_timeout = io_timeout
        self._survey = survey
        self._lose = lose
        self._why = "this host has not joined the lockspace yet"
        self._mine = False
        self._settled = trio.Event()
        self._failed: SanlockError | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    async def start(self) -> None:
        """Join.  Raises `MountError` if that cannot be; where it takes long, it goes on in the background."""
        trio.lowlevel.spawn_system_task(self._live, name="lockspace of sanlock")
        try:
            with trio.move_on_after(START_PATIENCE):
                await self._settled.wait()
        except BaseException:
            # Whoever mounts has given up: nobody is left who would end it.
            await self.stop()
            raise
        if self._failed is not None:
            error = self._failed
            await self.stop()
            raise MountError(
                f"sanlock does not join the lockspace {names.shown(self._lockspace.name)}: {error.message}",
                hint="Its log says more: sanlock client log_dump. With host_id=auto each host takes a free id.",
            )
        if not self.host_id:
            log.warning("sanlock is still joining %s; nothing can be locked before", names.shown(self._lockspace.name))

    async def stop(self) -> None:
        """Leave, if nobody needs it."""
        with trio.CancelScope(shield=True):
            self._scope.cancel()
            await self._ended.wait()
            joined, self.host_id = self.host_id, 0
            if joined and self._mine:
                try:
                    lockspace = Lockspace(self._lockspace.name, joined, self._lockspace.disk)
                    await self._daemon.remove_lockspace(lockspace, wait=False, if_unused=True)
                except LockUnavailable as error:
                    log.info("sanlock stays in %s: %s", names.shown(self._lockspace.name), error.message)

    def check(self) -> int:
        """Return the host id under which something may be granted now.  Raises `LockUnavailable`."""
        if not self.host_id:
            raise LockUnavailable(f"sanlock is not in {names.shown(self._lockspace.name)}: {self._why}")
        return self.host_id

    async def _live(self) -> None:
        """Be in the lockspace for ever.  As a system task it must not raise."""
        try:
            with self._scope:
                while True:
                    try:
                        await self._watch()
                    except* LockUnavailable as group:
                        self._fail(_first(group))
                    except* Exception:
                        log.exception("watching over the lockspace failed")
                        self._leave("watching over the lockspace failed in an unexpected way")
                    self._settled.set()
                    await trio.sleep(AGAIN)
        finally:
            self._ended.set()

    def _fail(self, error: Exception) -> None:
        self._leave(error.message if isinstance(error, LockUnavailable) else str(error))
        if isinstance(error, SanlockError) and not self._settled.is_set():
            self._failed = error

    def _leave(self, reason: str) -> None:
        if self.host_id:
            log.error("%s: %s", names.shown(self._lockspace.name), reason)
        self.host_id, self._why = 0, reason
        self._lose(reason)

    async def _watch(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_again_and_again)
            await self._daemon.until_gone()
            nursery.cancel_scope.cancel()
        self._leave("the sanlock daemon has ended")

    async def _look_again_and_again(self) -> None:
        while True:
            await self._look()
            await trio.sleep(LOOK)

    async def _look(self) -> None:
        there = next((each for each in await self._daemon.lockspaces() if each.name == self._lockspace.name), None)
        if there is None:
            if self.host_id:
                self._leave("sanlock has left the lockspace")
            await self._join()
        elif there.flags & _REMOVING:
            self._leave("sanlock is leaving the lockspace: it could not renew this host's lease, or was told to")
        elif there.flags & _ADDING:
            self._why = "sanlock is joining it"
        elif self._lockspace.host_id not in (0, there.host_id):
            self._leave(f"sanlock is in it as host {there.host_id}, not {self._lockspace.host_id}")
        elif not self.host_id:
            self.host_id = there.host_id
            self._settled.set()
            log.info("sanlock is in %s as host id %d", names.shown(self._lockspace.name), self.host_id)

    async def _join(self) -> None:
        refused: SanlockError | None = None
        for host_id in await self._candidates():
            lockspace = Lockspace(self._lockspace.name, host_id, self._lockspace.disk)
            try:
                await self._daemon.add_lockspace(lockspace, self._io_timeout)
            except SanlockError as error:
                if error.code in (_EXISTS, _IN_PROGRESS):
                    return
                if error.code != Code.HOST_ID_BUSY:
                    raise
                refused = error
                continue
            self._mine = True
            return
        raise refused or SanlockError("add_lockspace", Code.HOST_ID)

    async def _candidates(self) -> list[int]:
        """Return host ids to try: the one that is wanted; or that which bears this host's name, and then free ones."""
        if self._lockspace.host_id:
            return [self._lockspace.host_id]
        records = await self._survey()
        name = await self._daemon.name()
        own = [host_id for host_id, record in records.items() if name and record.resource_name == name]
        free = [host_id for host_id, record in records.items() if not record.timestamp and host_id not in own]
        # Not one that another host has given back for now, as long as there are others.
        free.sort(key=lambda host_id: bool(records[host_id].owner_generation))
        return (own + free)[:ATTEMPTS]


def _first(group: BaseExceptionGroup[LockUnavailable]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, Exception) else LockUnavailable(str(error))
