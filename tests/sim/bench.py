"""One operation of the engine at a time, on areas in memory: for unit tests.  Counts I/Os, and fails those it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from lockfs_paxos_lease.engine.actions import (
    Action,
    Area,
    DiskError,
    IOTimeout,
    NotIssued,
    Operation,
    Read,
    Settle,
    Sleep,
    Write,
)
from lockfs_paxos_lease.engine.lease import Lease
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.fresh import fresh_lease, fresh_lockspace
from lockfs_paxos_lease.format.size import Geometry

T = TypeVar("T")
SPACE = b"LS"
RESOURCE = b"RES1"


@dataclass
class Failure:
    """I/O number `step` (from 0) of an operation ends with `error`; if it is a write, it lands before, or not."""

    step: int
    error: DiskError
    lands: bool


@dataclass
class Bench:
    """A lockspace, one lease, and a clock that stands still but for sleeps.

    `meanwhile` is called at each sleep, after the time has passed: what other hosts do.
    """

    timing: Timing = field(default_factory=lambda: Timing.sanlock(1))
    geometry: Geometry = field(default_factory=Geometry)
    num_hosts: int = 0
    now: float = 1000.0
    log: list[Action] = field(default_factory=list)
    failure: Failure | None = None
    meanwhile: Callable[[], None] | None = None
    unsettled: bool = False

    def __post_init__(self) -> None:
        timing = self.timing
        area, first = fresh_lockspace(self.geometry, SPACE, timing.stored, timing.delta_version)
        lease = fresh_lease(self.geometry, SPACE, RESOURCE, self.num_hosts, timing.lease_version)
        self.areas = {Area.LOCKSPACE: bytearray(area), Area.LEASE: bytearray(lease)}
        self.areas[Area.LOCKSPACE][: len(first)] = first

    def clock(self) -> float:
        """The clock of all hosts."""
        return self.now

    def membership(self, name: str, timing: Timing | None = None) -> Membership:
        """Return a new incarnation of a host that has not joined."""
        return Membership(SPACE, self.geometry, timing or self.timing, name.encode(), self.clock)

    def joined(self, host_id: int, name: str = "") -> Membership:
        """Return a host that has joined and looked once."""
        membership = self.membership(name or f"host-{host_id}")
        self.run(membership.join(host_id))
        self.run(membership.renew())
        return membership

    def lease(self, membership: Membership) -> Lease:
        """Return the lease as a host sees it."""
        return Lease(RESOURCE, membership, Random(membership.host_id), self.num_hosts)

    def run(self, operation: Operation[T]) -> T:
        """Run an operation to its end; its I/Os are in `ios` then."""
        self.log = []
        try:
            action = next(operation)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        return self.go_on(operation, action)

    def go_on(self, operation: Operation[T], action: Action) -> T:
        """Run an operation to its end that has come to *action*."""
        try:
            while True:
                try:
                    result = self.do(action)
                except DiskError as error:
                    action = operation.throw(error)
                else:
                    action = operation.send(result)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def run_to(self, operation: Operation[T], ios: int) -> None:
        """Run an operation until its *ios* first I/Os are done, then give it up."""
        self.log = []
        action = next(operation)
        while True:
            result = self.do(action)
            if len(self.ios) >= ios:
                break
            action = operation.send(result)
        operation.close()

    @property
    def ios(self) -> list[Read | Write]:
        """The I/Os of the last operation."""
        return [action for action in self.log if isinstance(action, Read | Write)]

    @property
    def shape(self) -> str:
        """The I/Os of the last operation, as letters: R and W on the lease, r and w on the lockspace."""
        letters = ["R" if isinstance(action, Read) else "W" for action in self.ios]
        lease = [action.area is Area.LEASE for action in self.ios]
        return "".join(letter if on else letter.lower() for letter, on in zip(letters, lease, strict=True))

    def do(self, action: Action) -> bytes | None:
        """Do one action of an operation."""
        step = len(self.ios)
        self.log.append(action)
        if isinstance(action, Sleep):
            self.now += action.seconds
            if self.meanwhile is not None:
                self.meanwhile()
            return None
        if isinstance(action, Settle):
            if self.unsettled:
                raise IOTimeout("settle")
            return None
        area = self.areas[action.area]
        failure = self.failure if self.failure is not None and self.failure.step == step else None
        if isinstance(action, Write):
            if self.now > action.not_after:
                raise NotIssued("write")
            if failure is None or failure.lands:
                area[action.offset : action.offset + len(action.data)] = action.data
        if failure is not None:
            self.failure = None
            raise failure.error
        return bytes(area[action.offset : action.offset + action.length]) if isinstance(action, Read) else None
