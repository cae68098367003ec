"""This host in one lockspace: joins, renews, watches the time, joins anew after a loss.  Shared by all that use it.

Invariants:
* Grants are told lost `Timing.fence` seconds after the last good renewal began, less the time that a fence takes,
  whatever hangs: the watch over the time does no I/O.
* No write begins, where data goes through the mount daemon, from that time before the fence on: it waits, as long as
  the lease may still be renewed.
* A new incarnation begins as if somebody still went by the old one (others' delay is kept) unless all that was granted
  under the old one has been given back, which lockd does only when nobody can write any more.
* One process on a host has the host id: `state.StateFile.lock`.
* What the last lockd was granted is known to be lost when its lease, by what it has written down, has run out, whether
  the storage answers or not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

import trio

from lockfs.backend import Image
from lockfs.errors import LockfsError, LockUnavailable, MountError
from lockfs.linux.deadline import Deadline
from lockfs_paxos_lease import driver, identity, watchdog
from lockfs_paxos_lease.claim import Claim
from lockfs_paxos_lease.disk.area import AreaIO
from lockfs_paxos_lease.disk.call import Steps
from lockfs_paxos_lease.engine.actions import Area, Clock
from lockfs_paxos_lease.engine.errors import BadArea, Clash, EngineError, Lost, StorageTrouble
from lockfs_paxos_lease.engine.membership import Membership, Renewal
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.holdings import Holdings
from lockfs_paxos_lease.place import Place, Space
from lockfs_paxos_lease.state import State
from lockfs_paxos_lease.watchdog import Watchdog

FENCE_LEAD = 1.0
"""Seconds before L at which grants are told lost: time for the fence."""
FENCE_LEAD_SHARE = 8
"""With a short lease less: this part of it."""
WATCH = 0.25
"""Seconds between two looks at the clock: trio's own stands still while the host is suspended."""
START_PATIENCE = 7.0
"""Seconds that a mount waits for the end of a join that the rules delay; it then goes on in the background."""
HEIR_SHARE = 2
"""Where leases of the last lockd are noted as held, no longer than this part of the time for which they are still good:
by then lockd must know who goes by them."""
LEAVE_PATIENCE = 5.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class Member(Protocol):
    """Who has grants in a lockspace."""

    def lose(self, reason: str) -> None:
        """Tell all grants lost."""

    async def asked(self, callers: Sequence[int]) -> None:
        """See what these hosts ask of the leases that are held here.  Raises nothing."""

    async def mend(self) -> None:
        """Give back what the storage did not let it give back before.  Raises nothing."""

    @property
    def at_stake(self) -> bool:
        """True while there is a lease in use that is not both lost and fenced."""


class Lockspace:
    """See the module.  *wanted* is the host id to have, 0 for any."""

    def __init__(
        self, place: Place, space: Space, timing: Timing, clock: Clock, host: str, run_dir: str, wanted: int,
        watchdog_path: str,
    ) -> None:  # fmt: skip
        self.space = space
        self.timing = timing
        self.wanted = wanted
        self.members: list[Member] = []
        self.area: AreaIO | None = None
        self.renewal = Renewal()
        self.deadline = Deadline.create()
        self._place = place
        self._clock = clock
        self._digits = identity.machine_digits(run_dir, host)
        self._name = identity.name(self._digits, host)
        self._membership: Membership | None = None
        self._why = "this host has not joined the lockspace yet"
        self.holdings = Holdings(run_dir, space.name)
        self.watchdog_path = watchdog_path
        self._watchdog: Watchdog | None = None
        self._was_member = False
        self._warned = 0.0
        self._broken = False
        self._inherits_until = math.inf
        self._joined = trio.Event()
        self._failed: EngineError | None = None
        self._claim = Claim(space, timing, clock, self._digits, self._name, wanted, self.run)
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    # Its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join.  Raises `MountError` if that cannot be; where the rules delay it, it goes on in the background.

        So it does, too, whatever the trouble, where leases of the last lockd are noted as held: without a lockd for
        their mounts nobody would fence these.
        """
        await trio.to_thread.run_sync(self._begin)
        try:
            state, held = await self.holdings.before()
            heir, patience = bool(held), START_PATIENCE
            if heir:
                self._inherit(state)
                good = 0.0 if self._broken else max(0.0, self._inherits_until - self._clock())
                patience = min(patience, good / HEIR_SHARE)
            else:
                self.area = await self._place.lockspace()
        except BaseException:
            self.holdings.end()
            self.deadline.close()
            raise
        # Nobody gives a backend a nursery, and this must go on between its calls.
        trio.lowlevel.spawn_system_task(self._live, name=f"lockspace {self._place.where}")
        try:
            with trio.move_on_after(patience):
                await self._joined.wait()
        except BaseException:
            await self.stop()
            raise
        if self._failed is not None and not isinstance(self._failed, StorageTrouble) and not heir:
            error = self._failed
            await self.stop()
            raise MountError(f"cannot join the lockspace in {self._place.where}: {error.message}", hint=_hint(error))
        if self._membership is None:
            log.warning(
                "%s: still joining; nothing can be locked before that is done: %s", self._place.where, self._why
            )

    def _begin(self) -> None:
        self._watchdog = watchdog.on(self.watchdog_path, self.timing)
        try:
            if self.holdings.begin():
                return
        except OSError as error:
            raise MountError(f"cannot keep the state of this host's leases: {error}") from error
        raise MountError(
            f"another process on this host uses the lockspace in {self._place.where}",
            hint="See whether another lockd runs with the same run directory, or is ending and hangs in the storage.",
        )

    async def stop(self) -> None:
        """Leave, and end."""
        with trio.CancelScope(shield=True):
            self._scope.cancel()
            await self._ended.wait()
            membership, self._membership = self._membership, None
            self._why = "this host has left the lockspace"
            if membership is not None and not self.holdings.in_use:
                await self._leave(membership)
            if self.area is not None:
                await self.area.close()
            self.holdings.end()
            self.deadline.close()

    async def _leave(self, membership: Membership) -> None:
        try:
            with trio.fail_after(LEAVE_PATIENCE):
                await self.run(membership.leave())
            self.holdings.forget()
        except (EngineError, trio.TooSlowError) as error:
            log.warning("%s: the host id could not be given back: %s", self._place.where, error)

    async def _live(self) -> None:
        """Be a member for ever.  As a system task it must not raise."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._look_at_watchdog)
                    await self._be_a_member_for_ever()
        finally:
            self._ended.set()

    async def _be_a_member_for_ever(self) -> None:
        while True:
            try:
                await self._be_a_member()
            except Exception:
                log.exception("%s: keeping the lease of this host failed", self._place.where)
                self._membership, self._broken = None, True
                self._lose_all("keeping the lease of this host failed in an unexpected way")
                await trio.sleep(self.timing.renewal)

    async def _be_a_member(self) -> None:
        try:
            membership = await self._join()
        except EngineError as error:
            self._failed = error
            self._joined.set()
            if self._why != error.message:
                self._why = error.message
                level = logging.INFO if isinstance(error, StorageTrouble) else logging.ERROR
                log.log(level, "%s: cannot join the lockspace: %s", self._place.where, error.message)
            await trio.sleep(self.timing.retry if isinstance(error, StorageTrouble) else self.timing.renewal)
            return
        self._membership, self._failed = membership, None
        self._move_deadline(membership)
        self._joined.set()
        log.info(
            "%s: joined as host id %d, generation %d", self._place.where, membership.host_id, membership.generation
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, membership)
            await self._renew(membership, nursery)
            nursery.cancel_scope.cancel()
        self._membership, self._broken = None, True
        self._lose_all(self._why)

    async def _join(self) -> Membership:
        claim, membership = self._claim, None
        if self._was_member:
            idle = self.holdings.is_idle
        else:
            state, held = await self.holdings.before()
            idle = partial(bool, state is not None and not held)
            self._inherit(state)
            await self._open_area()
            if state is not None:
                membership = await claim.resume(state)
            if membership is None:
                self._broken = True
                self.deadline.set(0, 0)
            self.holdings.left = held if membership is not None else set()
        if membership is None:
            membership = await claim.make(idle=idle)
        elif self.holdings.left and self._watchdog is not None:
            self._on_watchdog(self._watchdog.arm)
        # At once: until then the record is marked as a claim, which not even a successor of ours trusts.  And the look
        # at the others that comes with it is what tells the living from the dead.
        self.renewal = await self.run(membership.renew())
        await self.holdings.save(membership)
        self._was_member = True
        self._broken = False
        return membership

    def _inherit(self, state: State | None) -> None:
        """Take note until when what the last lockd was granted is good, whatever the storage will say."""
        if state is None or self._broken:
            self._broken = True
            return
        self._inherits_until = state.renewed + self.timing.fence - self._lead
        self.deadline.set(self._inherits_until - self._lead, self._inherits_until)

    async def _open_area(self) -> None:
        if self.area is not None:
            return
        try:
            self.area = await self._place.lockspace()
        except (LockfsError, OSError) as error:
            what = error.message if isinstance(error, LockfsError) else str(error)
            raise StorageTrouble(Code.LEADER_READ, f"the lockspace could not be opened: {what}") from error

    async def _renew(self, membership: Membership, nursery: trio.Nursery) -> None:
        """Renew until the membership is lost."""
        failing = False
        while True:
            await trio.sleep(max(0.0, membership.next_renewal - self._clock()) if not failing else self.timing.retry)
            try:
                self.renewal = await self.run(membership.renew())
            except Lost as error:
                self._why = error.message
                return
            except (StorageTrouble, BadArea) as error:
                self._warn(membership, error.message)
                failing = True
                continue
            self._move_deadline(membership)
            if self._watchdog is not None and not self.holdings.unwritten:
                self._on_watchdog(partial(self._watchdog.renewed, self._clock() - membership.last_success))
            try:
                await self.holdings.save(membership)
            except StorageTrouble as error:
                log.warning("%s", error.message)
            if failing:
                log.info("%s: the lease of this host is renewed again", self._place.where)
            failing = False
            self._tell_if_slow()
            if self.renewal.callers:
                for member in self.members:
                    nursery.start_soon(member.asked, self.renewal.callers)
            if self.holdings.left - self.holdings.in_use and self.members:
                nursery.start_soon(self.members[0].mend)

    def _tell_if_slow(self) -> None:
        took, limit = self.renewal.read_seconds + self.renewal.write_seconds, self.timing.io_timeout
        if took > limit / 2:
            log.warning(
                "%s: the storage is slow: renewing this host's lease took %.1f s, and one call may take %.1f s",
                self._place.where, took, limit,
            )  # fmt: skip

    def _warn(self, membership: Membership, why: str) -> None:
        """Warn once that a renewal is late."""
        if self._warned != membership.last_success:
            self._warned = membership.last_success
            left = membership.valid_until - self._lead - self._clock()
            log.warning(
                "%s: the lease of this host could not be renewed (%s); in %.1f s all that it holds is fenced",
                self._place.where, why, max(left, 0.0),
            )  # fmt: skip

    async def _watch(self, membership: Membership) -> None:
        told = 0.0
        while True:
            left = membership.valid_until - self._lead - self._clock()
            if left <= 0 and told != membership.last_success:
                told = membership.last_success
                age = self._clock() - told
                self._lose_all(f"this host's lease was not renewed for {age:.1f} s: the storage does not answer")
            elif left < (self.timing.fence - self._lead) / 2:
                self._warn(membership, "the storage has not answered yet")
            await trio.sleep(min(max(left, self.timing.poll / 4), WATCH))

    async def _look_at_watchdog(self) -> None:
        while True:
            if self._watchdog is not None:
                holding = bool(self.holdings.in_use or self.holdings.left)
                at_stake = self.holdings.unanswered or any(member.at_stake for member in self.members)
                self._on_watchdog(partial(self._watchdog.look, holding=holding, at_stake=at_stake))
            await trio.sleep(WATCH)

    def _on_watchdog(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            log.error("the watchdog %s fails: %s", self.watchdog_path, error.strerror)

    @property
    def _lead(self) -> float:
        return min(FENCE_LEAD, self.timing.fence / FENCE_LEAD_SHARE)

    def _move_deadline(self, membership: Membership) -> None:
        lost = membership.valid_until - self._lead
        self.deadline.set(lost - self._lead, lost)

    def _lose_all(self, reason: str) -> None:
        self.deadline.set(0, 0)
        if self.holdings.in_use:
            log.error("%s: what this host holds is to be fenced: %s", self._place.where, reason)
        for member in self.members:
            member.lose(reason)

    @property
    def broken(self) -> bool:
        """True if what the last lockd of this boot was granted is lost for certain."""
        if self._membership is not None:
            return self._clock() >= self._membership.valid_until - self._lead
        return self._broken or self._clock() >= self._inherits_until

    async def decided(self) -> None:
        """Wait until what the last lockd was granted can be looked at, or is lost for certain."""
        while self._membership is None and not self.broken and not self._ended.is_set():  # noqa: ASYNC110
            await trio.sleep(WATCH)

    # What members do -------------------------------------------------------------------------

    def membership(self) -> Membership:
        """Return the membership under which something may be granted now.  Raises `LockUnavailable`."""
        membership = self._membership
        if membership is None:
            raise LockUnavailable(f"this host has no valid lease in {self._place.where}: {self._why}")
        if self._clock() >= membership.valid_until - self._lead:
            raise LockUnavailable(f"this host's lease in {self._place.where} could not be renewed")
        return membership

    async def run(self, operation: Steps[T], lease: AreaIO | None = None) -> T:
        """Run an operation of the engine on the lockspace, and on a lease, which may have calls between."""
        if self.area is None:
            raise LockUnavailable(f"the lockspace in {self._place.where} is not open")
        areas = {Area.LOCKSPACE: self.area}
        if lease is not None:
            areas[Area.LEASE] = lease
        return await driver.run(operation, areas, lease.lane if lease is not None else None)

    async def note(self, name: str, image: Image) -> None:
        """Write down that a lease is about to be taken, and arm the watchdog.  Raises `StorageTrouble`."""
        await self.holdings.note(name, image, self._arm)

    def _arm(self) -> None:
        if self._watchdog is not None:
            self._watchdog.arm()

    async def drop(self, name: str) -> None:
        """Write down that a lease was given back."""
        try:
            await self.holdings.drop(name)
        except StorageTrouble as error:
            log.warning("%s", error.message)


def _hint(error: EngineError) -> str:
    if isinstance(error, Clash):
        return "Give each host an id of its own with host_id=, or leave it to host_id=auto."
    return "Look with: lockfs lease check"
