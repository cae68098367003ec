"""One seed: what kind of cluster it is, what befalls it, for how long, and what came of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.dblock import NONE, Dblock, encode_host_sector
from lockfs_paxos_lease.format.fresh import fresh_lease, fresh_lockspace
from lockfs_paxos_lease.format.size import MIB

from sim.checker import Checker, Violation
from sim.reference import Reference
from sim.station import GEOMETRY, SPACE, Counts, Habits, Station
from sim.world import HOSTS, NEVER, SECTOR, Weather, World

DRIFT = 0.03
"""Clocks of hosts are that much too fast or too slow, at most."""
FABRIC = 0.6
"""Part of the margin that a write may be under way when its host is gone already."""


@dataclass
class Plan:
    """What a seed draws."""

    timing: Timing
    stations: int
    references: int
    resources: int
    faults: float
    """Mean seconds between two faults; 0: none."""
    duration: float
    weather: Weather
    late: bool
    """There may be writes that are late beyond all bounds."""
    num_hosts: int
    """What the leases are made for; hosts have any of these ids."""
    newcomers: int
    """So many of the stations join late."""
    history: bool
    """The leases are older than the lockspace."""


@dataclass
class Result:
    """What came of a seed.  `failure` is empty if all is well."""

    seed: int
    failure: str = ""
    seconds: float = 0.0
    """Virtual time."""
    hosts: int = 0
    took: float = 0.0
    """Real time."""
    steps: int = 0
    grants: int = 0
    takeovers: int = 0
    data: int = 0
    late: int = 0
    joins: int = 0
    resumes: int = 0
    lost: int = 0
    crashes: int = 0
    confirmed: int = 0
    refused: int = 0
    retired: int = 0
    probes: int = 0
    mixed: bool = False
    trace: list[str] = field(default_factory=list)


def plan(random: Random) -> Plan:
    """Draw a cluster."""
    kind = random.random()
    references = 0
    if kind < 0.55:
        timing = Timing.own(random.choice([4.0, 16.0, 16.0, 16.0, 30.0]))
    else:
        timing = Timing.sanlock(random.choice([1, 1, 2, 10]))
        references = random.choice([0, 0, 1, 1, 2])
    unit = timing.fence / 8
    weather = Weather(latency=random.choice([0.001, 0.004, 0.02]) * unit)
    weather.slow = random.choice([0.0, 0.01, 0.05])
    weather.slow_for = random.choice([0.5, 2.0]) * timing.io_timeout
    harsh = random.random() < 0.6
    if harsh:
        weather.read_error = random.choice([0.0, 0.01])
        weather.write_error = random.choice([0.0, 0.01, 0.03])
        weather.hiccup = random.choice([0.0, 0.005, 0.02])
        weather.hiccup_for = random.choice([0.5 * timing.fence, 1.5 * timing.dead_after(timing.stored)])
    late = harsh and not references and random.random() < 0.4
    stations = random.choice([1, 2, 2, 3]) if references else random.choice([2, 3, 3, 4, 5])
    wide = random.random() < 0.6
    newcomers = random.choice([1, 1, 2]) if wide else 0
    return Plan(
        timing, stations=stations + newcomers, num_hosts=HOSTS if wide else stations + references, newcomers=newcomers,
        history=wide and random.random() < 0.2, references=references, resources=random.choice([1, 1, 2]),
        faults=random.choice([0.0, 1.0, 3.0]) * timing.fence, duration=4 * timing.dead_after(timing.stored) * (
            0.5 if timing.is_sanlock else 1.0), weather=weather, late=late,
    )  # fmt: skip


class Scenario:
    """One seed, ready to run."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        random = Random(seed)
        self.seed = seed
        self.plan = plan(random)
        self.random = random
        self.world = World(random.getrandbits(48), self.plan.weather)
        self.world.trace = [] if trace else None
        self.checker = Checker(self.world)
        self.world.watcher = self.checker
        self.counts = Counts()
        self.margin = self.plan.timing.margin
        self.stations: list[Station] = []
        self.references: list[Reference] = []
        self.numbers = self._numbers()
        self._areas()
        self._hosts()

    def _numbers(self) -> list[int]:
        """Draw the host ids; newcomers come first, and have the highest."""
        numbers = list(range(1, self.plan.num_hosts + 1))
        self.random.shuffle(numbers)
        del numbers[self.plan.stations + self.plan.references :]
        if self.plan.newcomers:
            numbers.sort()
            numbers = numbers[-self.plan.newcomers :] + numbers[: -self.plan.newcomers]
        return numbers

    def _areas(self) -> None:
        timing = self.plan.timing
        area, first = fresh_lockspace(GEOMETRY, SPACE, timing.stored, timing.delta_version)
        self.world.areas["lockspace"] = bytearray(first + area[SECTOR:])
        self.resources = [f"image{number}" for number in range(self.plan.resources)]
        for resource in self.resources:
            lease = fresh_lease(GEOMETRY, SPACE, resource.encode(), self.plan.num_hosts, timing.lease_version)
            self.world.areas[resource] = bytearray(self._with_history(lease) if self.plan.history else lease)

    def _with_history(self, lease: bytes) -> bytes:
        """Return a lease that is older than its lockspace: a host that was never there since has a proposal in it."""
        ghost = self.random.choice(sorted(set(range(1, self.plan.num_hosts + 1)) - set(self.numbers)))
        number, old = GEOMETRY.max_hosts * self.random.randint(0, 3) + ghost, self.random.randint(1, 3)
        ahead = 1 if self.plan.references else self.random.randint(1, 6)  # sanlock waits for ever for those between
        block = Dblock(number, number, ghost, old, 1 + self.random.randrange(100), lver=ahead)
        sector, start = encode_host_sector(block, NONE, SECTOR), GEOMETRY.host_offset(ghost)
        return lease[:start] + sector + lease[start + SECTOR :]

    def _hosts(self) -> None:
        random, world, timing = self.random, self.world, self.plan.timing
        unit = timing.fence / 8
        self.habits = Habits(
            self.resources, think=random.choice([0.1, 0.5, 2.0]) * unit, hold=random.choice([0.2, 2.0, 8.0, 40.0]) * unit,
            write_every=0.25 * unit, share=random.choice([0.0, 0.2, 0.6]), convert=random.choice([0.0, 0.3, 1.0]),
            data_latency=0.01 * unit, data_slow_for=min(FABRIC * self.margin, 4 * unit),
        )  # fmt: skip
        self.habits.data_slow = random.choice([0.05, 0.5])
        self.habits.wait = random.choice([0.1, 0.7])
        if self.plan.late:
            self.habits.data_late, self.habits.data_late_for = 0.02, 3 * timing.dead_after(timing.stored)
        self.habits.look_cost = random.choice([0, MIB])
        weather = self.plan.weather
        if not (self.plan.faults or self.plan.references or weather.slow or weather.hiccup or weather.write_error):
            # Where no write comes late or fails: one that does could make a good leader of what was retired.
            self.habits.retire = 0.1 * (self.seed % 2)
        self.habits.num_hosts = random.choice([1, self.plan.num_hosts])
        for index, number in enumerate(self.numbers):
            rate, offset = 1 + DRIFT * (2 * random.random() - 1), random.random() * 1000
            if index < self.plan.stations:
                self.stations.append(
                    Station(world, number, rate, offset, timing, self.habits, self.checker, self.counts)
                )
            else:
                self.references.append(
                    Reference(world, number, rate, offset, timing.stored, self.habits, self.checker, self.counts)
                )
        for index, machine in enumerate([*self.stations, *self.references]):
            late = index < self.plan.newcomers
            world.at(random.random() * (0.9 * self.plan.duration if late else timing.renewal), machine.boot)

    def run(self) -> None:
        """Let it happen.  Raises `Violation`."""
        world, plan_ = self.world, self.plan
        if plan_.faults:
            world.at(self._next_fault(), self._fault)
        world.run(plan_.duration)
        self._calm()
        dead = plan_.timing.dead_after(plan_.timing.stored)
        world.run(plan_.duration + 1.3 * dead + self.margin + 2 * plan_.timing.fence)
        # One host first, alone: it must not depend on anybody else's tidying up.
        well = [station for station in self.stations if station.membership is not None]
        for group in well[:1], well[1:]:
            for station in group:
                station.probe(2 * dead)
            world.run_while(world.now + 4 * dead + 10, lambda: self.counts.probing > 0)
            if self.counts.stuck:
                raise Violation("; ".join(self.counts.stuck))

    def _calm(self) -> None:
        """Faults end; nobody wants anything any more."""
        world = self.world
        world.note("calm")
        world.stalled_until = 0.0
        world.weather.read_error = world.weather.write_error = world.weather.slow = world.weather.hiccup = 0.0
        self.habits.data_late = 0.0
        for machine in [*self.stations, *self.references]:
            machine.paused_until = min(machine.paused_until, world.now)
            machine.stalled_until = min(machine.stalled_until, world.now)
            machine.busy = False

    # Faults.

    def _next_fault(self) -> float:
        return self.world.now + self.random.expovariate(1 / self.plan.faults)

    def _fault(self) -> None:
        if self.world.now >= self.plan.duration:
            return
        faults: list[Callable[[Station], None]] = [self._pause, self._stall, self._storage, self._kill, self._crash]
        if self.references and self.random.random() < 0.2:
            self._reference_fault(self.random.choice(self.references))
        else:
            self.random.choice(faults)(self._victim())
        self.world.at(self._next_fault(), self._fault)

    def _victim(self) -> Station:
        """Return somebody, rather one who holds something."""
        holders = [station for station in self.stations if station.uses]
        return self.random.choice(holders if holders and self.random.random() < 0.5 else self.stations)

    def _pause(self, station: Station) -> None:
        dead = self.plan.timing.dead_after(self.plan.timing.stored)
        station.paused_until = self.world.now + self.random.choice([0.3, 2.0]) * dead * self.random.random()
        self.world.note(f"host {station.number} stops until {station.paused_until:.3f}")

    def _stall(self, station: Station) -> None:
        timing = self.plan.timing
        longest = 2.5 * timing.dead_after(timing.stored) if self.plan.late else 2.5 * timing.fence
        if self.references:
            longest = 2 * timing.io_timeout
        station.stalled_until = self.world.now + longest * self.random.random()
        self.world.note(f"host {station.number} has no path until {station.stalled_until:.3f}")

    def _storage(self, _: Station) -> None:
        longest = 2 * self.plan.timing.io_timeout if self.references else 1.2 * self.plan.timing.fence
        self.world.stalled_until = self.world.now + longest * self.random.random()
        self.world.note(f"the storage hangs until {self.world.stalled_until:.3f}")

    def _kill(self, station: Station) -> None:
        station.kill_lockd(1.2 * self.plan.timing.fence * self.random.random())

    def _crash(self, station: Station) -> None:
        fabric = FABRIC * min(self.margin, self.plan.timing.fence)
        downtime = fabric * 1.3 + self.random.random() * 1.5 * self.plan.timing.dead_after(self.plan.timing.stored)
        forever = self.random.random() < 0.15 and len(self.stations) > 1
        station.crash(NEVER if forever else downtime, fabric)
        if self.random.random() < 0.4:
            # An administrator sees that the host is off, and says so on another one.
            self.world.at(self.world.now + fabric * (1.1 + self.random.random()), self._confirm, station)

    def _confirm(self, dead: Station) -> None:
        others = [station for station in self.stations if station is not dead and station.membership is not None]
        if not dead.powered and others:  # a dead lockd is no dead host: its VMs go on
            self.random.choice(others).confirm_dead(dead.number)

    def _reference_fault(self, reference: Reference) -> None:
        fabric = self.plan.timing.io_timeout
        reference.crash(fabric + 10 + 100 * self.random.random(), fabric)


def simulate(seed: int, *, trace: bool = False) -> Result:
    """Run a seed."""
    collects = gc.isenabled()
    gc.disable()  # next to nothing is to be found before the end, and much to be looked through
    try:
        return _simulate(seed, trace)
    finally:
        if collects:
            gc.enable()
        gc.collect()


def _simulate(seed: int, trace: bool) -> Result:
    began = time.perf_counter()
    scenario = Scenario(seed, trace=trace)
    failure = ""
    try:
        scenario.run()
    except Violation as violation:
        failure = str(violation)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        if trace:
            raise
    world, checker, counts = scenario.world, scenario.checker, scenario.counts
    hosts = len(scenario.stations) + len(scenario.references)
    return Result(
        seed, failure, world.now, hosts, time.perf_counter() - began, world.steps, checker.grants, checker.takeovers,
        checker.data, checker.late, counts.joins, counts.resumes, counts.lost, counts.crashes, counts.confirmed, counts.refused,
        counts.retired, counts.probes, bool(scenario.references), world.trace or [],
    )  # fmt: skip
