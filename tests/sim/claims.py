"""Many hosts that want one host id: at most one may ever believe that it has it.

The same world and storage as in `scenario`, but the hosts only join, renew and leave, each under a name of its own, and
all of them want host id 1.  The rule is checked here, from what each host believes and its clock: nobody is joined and
valid while another one is.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from random import Random
from typing import Any

from lockfs_paxos_lease.engine.actions import Sleep
from lockfs_paxos_lease.engine.errors import Clash, EngineError, Lost
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.fresh import fresh_lockspace

from sim.checker import Violation
from sim.scenario import DRIFT, Result
from sim.station import GEOMETRY, SPACE
from sim.world import SECTOR, Machine, Weather, World

ENDS = 0.3
"""How often a process does not go on after a membership, but another one begins in its place."""


class Claimant(Machine):
    """A host that wants the host id."""

    def __init__(self, world: World, number: int, rate: float, timing: Timing, everybody: list[Claimant]) -> None:
        super().__init__(world, number, rate, offset=100.0 * number)
        self.timing = timing
        self.everybody = everybody
        self.membership: Membership | None = None
        self.joined = 0
        self.clashes = 0
        self.noted: tuple[int, float] | None = None
        """What its processes note down for each other: generation, and last good renewal."""

    def believes(self) -> bool:
        """Say whether this host thinks that it has the host id, now."""
        membership = self.membership
        return membership is not None and membership.why_lost is None and self.clock() < membership.valid_until

    def live(self) -> Generator[Any, Any, None]:
        """Join, renew for a while, leave or just stop, and again."""
        random = Random(self.world.random.getrandbits(32))
        membership = self._fresh()
        while True:
            try:
                yield from membership.join(1, same_boot=True, noted=self.noted)
            except Clash:
                self.clashes += 1
            except EngineError:
                pass
            else:
                self.membership = membership
                self.joined += 1
                self.world.note(f"claimant {self.number} has it in generation {membership.generation}")
                self._alone()
                yield from self._stay(membership, random)
                self.membership = None
            if random.random() < ENDS:
                yield from self._end()
                membership = self._fresh()
            else:
                membership = membership.successor()
            yield Sleep(random.random() * self.timing.fence)

    def _fresh(self) -> Membership:
        return Membership(SPACE, GEOMETRY, self.timing, b"claimant-%d" % self.number, self.clock)

    def _end(self) -> Generator[Any, Any, None]:
        """Wait until the process is wholly gone, with its last write; then another one may begin."""
        while (ends := self.world.quiet_at(self)) > self.world.now:
            yield Sleep((ends - self.world.now) * self.rate + 1e-6)

    def _stay(self, membership: Membership, random: Random) -> Generator[Any, Any, None]:
        end = self.clock() + random.random() * 4 * self.timing.fence
        while self.clock() < end:
            yield Sleep(max(membership.next_renewal - self.clock(), 0.0))
            try:
                yield from membership.renew()
                self.noted = (membership.generation, membership.last_success)
            except Lost as lost:
                self.world.note(f"claimant {self.number} lost it: {lost}")
                return
            except EngineError:
                yield Sleep(self.timing.retry)
            self._alone()
        if random.random() < 0.5:
            # What it held was released before, so it believes nothing from here on.
            self.membership = None
            try:
                yield from membership.leave()
            except EngineError:
                pass

    def _alone(self) -> None:
        if self.believes():
            others = [other.number for other in self.everybody if other is not self and other.believes()]
            if others:
                raise Violation(f"at {self.world.now:.3f}: claimants {self.number} and {others} have host id 1")


def simulate_claims(seed: int, *, trace: bool = False) -> Result:
    """Run a seed."""
    began = time.perf_counter()
    random = Random(seed)
    timing = Timing.own(random.choice([4.0, 16.0]))
    unit = timing.fence / 8
    weather = Weather(
        latency=random.choice([0.001, 0.05, 0.2]) * unit, slow=random.choice([0.0, 0.1, 0.4]),
        slow_for=random.choice([0.5, 1.0, 8.0]) * timing.io_timeout, hiccup=random.choice([0.0, 0.05, 0.2]),
        hiccup_for=random.choice([0.3, 1.5]) * timing.fence, write_error=random.choice([0.0, 0.05]),
    )  # fmt: skip
    world = World(random.getrandbits(48), weather)
    world.trace = [] if trace else None
    area, first = fresh_lockspace(GEOMETRY, SPACE, timing.stored, timing.delta_version)
    world.areas["lockspace"] = bytearray(first + area[SECTOR:])
    everybody: list[Claimant] = []
    for number in range(1, random.choice([2, 3, 5]) + 1):
        claimant = Claimant(world, number, 1 + DRIFT * (2 * random.random() - 1), timing, everybody)
        everybody.append(claimant)
        world.start(claimant, claimant.live())
    failure = ""
    try:
        world.run(30 * timing.fence)
    except Violation as violation:
        failure = str(violation)
    return Result(
        seed, failure, world.now, len(everybody), time.perf_counter() - began, world.steps,
        joins=sum(claimant.joined for claimant in everybody), refused=sum(claimant.clashes for claimant in everybody),
        trace=world.trace or [],
    )  # fmt: skip
