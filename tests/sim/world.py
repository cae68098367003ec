"""Virtual time, the virtual storage, and the driver that runs operations of the engine on both.

A sector is atomic; a larger read may see some sectors earlier than others, a larger write may land in parts.  What a
write does is decided when it is issued: when it lands, if at all, and when its end is known.  A host that is paused
runs none of its code, but what it has issued goes on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from lockfs_paxos_lease.engine import actions

SECTOR = 512
SECTORS = 32
"""Sectors of each area."""
HOSTS = SECTORS - 2
"""The highest host id."""
NEVER = float("inf")


class Watcher(Protocol):
    """Who sees what is written to the storage."""

    def issued(self, area: str, machine: Machine) -> None:
        """A host issues a write."""

    def landed(self, area: str, sector: int, data: bytes, machine: Machine, issued: float) -> None:
        """A sector has changed hands."""


@dataclass
class Weather:
    """How the storage behaves: seconds and probabilities."""

    latency: float = 0.003
    slow: float = 0.02
    """Probability of an I/O that takes up to `slow_for`."""
    slow_for: float = 1.0
    read_error: float = 0.0
    write_error: float = 0.0
    hiccup: float = 0.0
    """Probability that the host stops for up to `hiccup_for` between deciding on a write and issuing it."""
    hiccup_for: float = 1.0


class Machine:
    """What the world knows of a host: a clock of its own, and whether it runs."""

    careful = True
    """It copes with stops between deciding on a write and issuing it, and with writes that land after their time-out.
    sanlock has a watchdog for the former and assumes that the latter does not happen."""

    def __init__(self, world: World, number: int, rate: float, offset: float) -> None:
        self.world = world
        self.number = number
        self.rate = rate
        self.offset = offset
        self.epoch = 0
        """Grows when the daemon dies; what belonged to it then never happens."""
        self.paused_until = 0.0
        self.stalled_until = 0.0
        """Until then the host's path to the storage is down: its I/O waits."""
        self.pending: dict[str, list[Pending]] = {}

    def clock(self) -> float:
        """Return the host's boot-time clock."""
        return self.offset + self.world.now * self.rate


@dataclass(eq=False, slots=True)
class Pending:
    """A write under way."""

    ends: float
    dropped: bool = False


@dataclass(eq=False, slots=True)
class Task:
    """An operation, or a program of several, on one machine; `lease` is the area that `Area.LEASE` means."""

    machine: Machine
    program: Generator[Any, Any, Any]
    lease: str
    epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.epoch = self.machine.epoch


class World:
    """See the module."""

    def __init__(self, seed: int, weather: Weather) -> None:
        self.random = Random(seed)
        self.weather = weather
        self.now = 0.0
        self.areas: dict[str, bytearray] = {}
        self.watcher: Watcher | None = None
        self.trace: list[str] | None = None
        self.stalled_until = 0.0
        """Until then the storage answers nobody."""
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    # Time.

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen at a time."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, what, args))

    def run(self, until: float) -> None:
        """Let everything happen up to a time."""
        heap, pop, steps = self._heap, heapq.heappop, 0
        try:
            while heap and heap[0][0] <= until:
                self.now, _, what, args = pop(heap)
                steps += 1
                what(*args)
        finally:
            self.steps += steps
        self.now = until

    def run_while(self, until: float, wanted: Callable[[], bool]) -> None:
        """Let things happen as long as *wanted* says so, up to a time."""
        while self._heap and self._heap[0][0] <= until and wanted():
            self.run(self._heap[0][0])

    def note(self, text: str) -> None:
        """Write a line into the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{self.now:10.3f}  {text}")

    # Programs.

    def start(self, machine: Machine, program: Generator[Any, Any, Any], lease: str = "") -> Task:
        """Run a program from now on."""
        task = Task(machine, program, lease)
        self.at(self.now, self._resume, task, None, None)
        return task

    def _resume(self, task: Task, result: Any, error: Exception | None) -> None:
        machine = task.machine
        if task.epoch != machine.epoch:
            return
        if machine.paused_until > self.now:
            self.at(machine.paused_until, self._resume, task, result, error)
            return
        try:
            action = task.program.throw(error) if error is not None else task.program.send(result)
        except StopIteration:
            return
        kind = type(action)
        if kind is actions.Sleep:
            self.at(self.now + max(action.seconds, 0.0) / machine.rate, self._resume, task, None, None)
        elif kind is actions.Read:
            self._read(task, action)
        elif kind is actions.Write:
            weather = self.weather
            if weather.hiccup and machine.careful and self.random.random() < weather.hiccup:
                machine.paused_until = max(machine.paused_until, self.now + self.random.random() * weather.hiccup_for)
                self.note(f"host {machine.number} stops until {machine.paused_until:.3f}, before a write")
                self.at(machine.paused_until, self._write, task, action)
            else:
                self._write(task, action)
        else:
            self._settle(task, action)

    # The storage.

    def _area(self, task: Task, area: actions.Area) -> str:
        return "lockspace" if area is actions.Area.LOCKSPACE else task.lease

    def _latency(self, machine: Machine) -> float:
        weather, random = self.weather, self.random
        latency = weather.latency * (0.3 + 1.4 * random.random())
        if random.random() < weather.slow:
            latency += weather.slow_for * random.random()
        held = max(machine.stalled_until, self.stalled_until) - self.now
        return latency + held if held > 0 else latency

    def _read(self, task: Task, action: actions.Read) -> None:
        latency, timeout = self._latency(task.machine), action.timeout / task.machine.rate
        if latency > timeout:
            self.at(self.now + timeout, self._resume, task, None, actions.IOTimeout("read"))
            return
        if self.weather.read_error and self.random.random() < self.weather.read_error:
            self.at(self.now + latency, self._resume, task, None, actions.IOFailed("read"))
            return
        first = self.now + latency * self.random.random()
        self.at(first, self._sample, task, action, self.now + latency)

    def _sample(self, task: Task, action: actions.Read, ends: float) -> None:
        area = self.areas[self._area(task, action.area)]
        start, length = action.offset, action.length
        if length <= SECTOR:
            self.at(ends, self._resume, task, bytes(area[start : start + length]), None)
            return
        # What of the area is seen now, and what later, is a matter of luck.
        cut = start + SECTOR * self.random.randrange(length // SECTOR + 1)
        head = bytes(area[start:cut])
        self.at(self.now + (ends - self.now) * self.random.random(), self._sample_rest, task, action, ends, cut, head)

    def _sample_rest(self, task: Task, action: actions.Read, ends: float, cut: int, head: bytes) -> None:
        area = self.areas[self._area(task, action.area)]
        data = head + bytes(area[cut : action.offset + action.length])
        self.at(ends, self._resume, task, data, None)

    def _write(self, task: Task, action: actions.Write) -> None:
        machine = task.machine
        if task.epoch != machine.epoch:
            return
        if machine.paused_until > self.now:
            self.at(machine.paused_until, self._write, task, action)
            return
        if machine.clock() > action.not_after:
            self.note(f"host {machine.number} does not write: too late")
            self.at(self.now, self._resume, task, None, actions.NotIssued("write"))
            return
        area = self._area(task, action.area)
        if self.watcher is not None:
            self.watcher.issued(area, machine)
        latency, timeout = self._latency(machine), action.timeout / machine.rate
        ends = self.now + latency
        failed = bool(self.weather.write_error) and self.random.random() < self.weather.write_error
        within = latency if machine.careful else min(latency, timeout)
        failed_for_good = (failed or latency > within) and self.random.random() < 0.5
        pending = Pending(ends)
        machine.pending.setdefault(area, []).append(pending)
        if not failed_for_good:
            for part in range(0, len(action.data), SECTOR):
                sector, data = (action.offset + part) // SECTOR, action.data[part : part + SECTOR]
                lands = self.now + within * (0.2 + 0.8 * self.random.random())
                self.at(lands, self._land, area, sector, data, machine, self.now, pending)
        self.at(ends, self._ended, machine, area, pending)
        if latency > timeout:
            self.at(self.now + timeout, self._resume, task, None, actions.IOTimeout("write"))
        else:
            self.at(ends, self._resume, task, None, actions.IOFailed("write") if failed else None)

    def _land(self, area: str, sector: int, data: bytes, machine: Machine, issued: float, pending: Pending) -> None:
        if pending.dropped:
            return
        self.areas[area][sector * SECTOR : (sector + 1) * SECTOR] = data
        if self.watcher is not None:
            self.watcher.landed(area, sector, data, machine, issued)

    def _ended(self, machine: Machine, area: str, pending: Pending) -> None:
        waiting = machine.pending.get(area, [])
        if pending in waiting:
            waiting.remove(pending)

    def _settle(self, task: Task, action: actions.Settle) -> None:
        waiting = task.machine.pending.get(self._area(task, action.area), [])
        ends = max((pending.ends for pending in waiting), default=self.now)
        limit = self.now + action.timeout / task.machine.rate
        if ends > limit:
            self.at(limit, self._resume, task, None, actions.IOTimeout("settle"))
        else:
            self.at(ends, self._resume, task, None, None)

    # What befalls a machine.

    def quiet_at(self, machine: Machine) -> float:
        """Return when the last write that the machine has under way will have ended."""
        return max((pending.ends for waiting in machine.pending.values() for pending in waiting), default=self.now)

    def power_off(self, machine: Machine, fabric: float) -> None:
        """Stop a machine.  What waits in it is lost; what is on its way already lands within *fabric* seconds."""
        machine.epoch += 1
        for waiting in machine.pending.values():
            for pending in waiting:
                if pending.ends > self.now + fabric:
                    pending.dropped = True
            waiting.clear()
