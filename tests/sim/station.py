"""A lockfs host in the simulator: its lockd with the production engine, its VMs, and what may befall both.

A VM writes as long as its session is open and the host's lease is valid: the gate that fencing is.  It goes on when lockd
is killed, until the lease runs out.  Whoever gives a lease back waits for its own writes to land first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lockfs_paxos_lease.engine.actions import Sleep
from lockfs_paxos_lease.engine.errors import BadArea, Clash, EngineError, Held, Lost, StorageTrouble
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing

from sim.checker import Checker, Session
from sim.geometry import Small
from sim.world import Machine, World

SPACE = b"simulated"
GEOMETRY = Small()


@dataclass
class Habits:
    """What the VMs of a cluster do: seconds and probabilities."""

    resources: list[str]
    num_hosts: int = 1
    """What hosts guess leases are made for."""
    think: float = 1.0
    hold: float = 3.0
    write_every: float = 0.25
    share: float = 0.25
    convert: float = 0.2
    wait: float = 0.3
    retire: float = 0.0
    """Probability that a lease is retired instead of given back."""
    look_cost: int = 0
    """`Census.look_cost`: 0 has hosts look at the lockspace where that shortens any read."""
    data_latency: float = 0.01
    data_slow: float = 0.05
    data_slow_for: float = 1.0
    """Data may be under way for that long: somewhat less than the margin."""
    data_late: float = 0.0
    """Probability of a write that is late beyond all bounds."""
    data_late_for: float = 0.0


@dataclass(eq=False)
class Use:
    """A session, as its host sees it: the VM that writes, and when the last of its writes will have landed."""

    session: Session
    lands: float = 0.0
    wanted_until: float = 0.0
    closing: bool = False


@dataclass
class Counts:
    """What happened, for statistics and for tests that a simulation does something."""

    joins: int = 0
    resumes: int = 0
    lost: int = 0
    crashes: int = 0
    confirmed: int = 0
    refused: int = 0
    trouble: int = 0
    retired: int = 0
    probes: int = 0
    probing: int = 0
    """Probes that go on."""
    stuck: list[str] = field(default_factory=list)


class Station(Machine):
    """See the module."""

    def __init__(
        self, world: World, number: int, rate: float, offset: float, timing: Timing, habits: Habits, checker: Checker,
        counts: Counts,
    ) -> None:  # fmt: skip
        super().__init__(world, number, rate, offset)
        self.timing = timing
        self.habits = habits
        self.checker = checker
        self.counts = counts
        self.name = b"station-%d" % number
        self.membership: Membership | None = None
        self.uses: dict[str, Use] = {}
        self.leases: dict[str, Lease] = {}
        self.up = False
        """lockd runs."""
        self.powered = True
        self.ran_before = False
        """lockd has run before in this boot."""
        self.busy = True
        """False: take nothing any more, and give everything back."""
        self._saved: tuple[int, int, float] | None = None
        """What a lockd leaves behind for its successor: host id, generation, and when the lease runs out."""
        self._noted: tuple[int, float] | None = None
        """What it leaves behind for a successor that comes too late: generation, and its last good renewal."""
        self._drained = 0.0
        """When the last write of all fenced sessions will have landed."""
        checker.register(self, timing.fence, careful=True)

    # lockd.

    def boot(self) -> None:
        """Start lockd."""
        self.up = True
        self.world.start(self, self._lockd())
        self.ran_before = True

    def _new_membership(self) -> Membership:
        return Membership(SPACE, GEOMETRY, self.timing, self.name, self.clock)

    def _lockd(self) -> Generator[Any, Any, None]:
        resumed = False
        membership = self._new_membership()
        if self._saved is not None:
            host_id, generation, _ = self._saved
            try:
                resumed = yield from membership.resume(host_id, generation)
            except EngineError:
                resumed = False
            if resumed:
                self.counts.resumes += 1
                self._begin(membership, adopt=True)
            else:
                self._fence("could not resume")
                membership = self._new_membership()
        while True:
            if not resumed:
                yield from self._join(membership)
            resumed = False
            membership = yield from self._renew_on()

    def _join(self, membership: Membership) -> Generator[Any, Any, None]:
        while True:
            gone = self.world.now >= self._drained
            try:
                yield from membership.join(
                    self.number, predecessor_gone=gone, same_boot=self.ran_before, noted=self._noted
                )
            except (Clash, StorageTrouble, BadArea, Lost) as error:
                self.world.note(f"host {self.number} does not join: {error}")
                membership = membership.successor()
                yield Sleep(self.timing.renewal)
                continue
            self.counts.joins += 1
            self.world.note(f"host {self.number} joined in generation {membership.generation}")
            self._begin(membership, adopt=False)
            return

    def _begin(self, membership: Membership, *, adopt: bool) -> None:
        self.membership = membership
        membership.census.look_cost = self.habits.look_cost
        self.leases = {}
        self._save()
        for resource in self.habits.resources:
            random = Random(self.world.random.getrandbits(32))
            lease = Lease(resource.encode(), membership, random, self.habits.num_hosts)
            self.leases[resource] = lease
            self.world.start(self, self._worker(resource, lease, random, adopt), lease=resource)

    def _save(self) -> None:
        if self.membership is not None and self.membership.joined:
            self._saved = (self.membership.host_id, self.membership.generation, self.membership.valid_until)
            self._noted = (self.membership.generation, self.membership.last_success)

    def _renew_on(self) -> Generator[Any, Any, Membership]:
        membership = self.membership
        assert membership is not None
        while True:
            try:
                yield from membership.renew()
                self._save()
                yield Sleep(max(membership.next_renewal - self.clock(), 0.0))
            except StorageTrouble:
                self.counts.trouble += 1
                yield Sleep(self.timing.retry)
            except Lost as lost:
                self.world.note(f"host {self.number} lost its lease: {lost}")
                self.counts.lost += 1
                self._fence("lost")
                self.membership = None
                return membership.successor()

    def _fence(self, why: str) -> None:
        """End all sessions; what their VMs have written already may still be under way."""
        for use in self.uses.values():
            self.checker.end(use.session)
            self._drained = max(self._drained, use.lands)
        if self.uses:
            self.world.note(f"host {self.number} fences: {why}")
        self.uses = {}
        self._saved = None
        self.leases = {}

    # Users of one resource.

    def _worker(self, resource: str, lease: Lease, random: Random, adopt: bool) -> Generator[Any, Any, None]:
        try:
            if adopt:
                yield from self._take_up(resource, lease, random)
            while self.leases.get(resource) is lease and resource not in self.checker.retired:
                if self.busy:
                    yield Sleep(random.expovariate(1 / self.habits.think))
                    yield from self._use(resource, lease, random)
                else:
                    yield Sleep(self.timing.fence)
        except Lost:
            return

    def _insist(self, lease: Lease, what: Callable[[], Generator[Any, Any, Any]]) -> Generator[Any, Any, None]:
        """Do it, and tidy up until it is done."""
        again = what
        while True:
            try:
                yield from again()
                if not lease.untidy:
                    return
            except (StorageTrouble, BadArea):
                self.counts.trouble += 1
            if lease.name.decode() in self.checker.retired:
                return
            if lease.untidy:
                again = lease.tidy
            elif lease.mode is None and what == lease.release:
                return
            yield Sleep(self.timing.retry)

    def _take_up(self, resource: str, lease: Lease, random: Random) -> Generator[Any, Any, None]:
        """After a restart of lockd: match what the disk says with what VMs still use."""
        use = self.uses.get(resource)
        known = None if use is None else Mode.EXCLUSIVE if use.session.exclusive else Mode.SHARED
        while True:
            try:
                yield from lease.adopt(known)
                break
            except (StorageTrouble, BadArea):
                self.counts.trouble += 1
                yield Sleep(self.timing.retry)
        use = self.uses.get(resource)
        if use is not None and lease.mode is None:
            self.world.note(f"host {self.number} does not get {resource} back")
            self.checker.end(use.session)
            del self.uses[resource]
            yield from self._drain(use)
        if lease.untidy:
            yield from self._insist(lease, lease.tidy)
        if use is not None and lease.mode is not None:
            if not use.session.exclusive and lease.mode is Mode.EXCLUSIVE and lease.version > use.session.token:
                self.checker.change(use.session, True, lease.version)
            yield from self._hold(resource, lease, random)
        elif lease.mode is not None:
            yield from self._insist(lease, lease.release)

    def _drain(self, use: Use) -> Generator[Any, Any, None]:
        """Wait for what a VM has written to land."""
        while use.lands > self.world.now:
            yield Sleep((use.lands - self.world.now) * self.rate + 1e-6)

    def _use(self, resource: str, lease: Lease, random: Random) -> Generator[Any, Any, None]:
        habits = self.habits
        mode = Mode.SHARED if random.random() < habits.share else Mode.EXCLUSIVE
        try:
            token = yield from lease.acquire(mode, wait=random.random() < habits.wait)
        except Held:
            self.counts.refused += 1
        except (StorageTrouble, BadArea, EngineError) as error:
            if isinstance(error, Lost):
                raise
            self.counts.trouble += 1
        else:
            if self.leases.get(resource) is not lease:
                return
            self._open(resource, mode, token, random)
            yield from self._hold(resource, lease, random)
            return
        if lease.untidy:
            yield from self._insist(lease, lease.tidy)

    def _open(self, resource: str, mode: Mode, token: int, random: Random) -> None:
        assert self.membership is not None
        exclusive = mode is Mode.EXCLUSIVE
        self.world.note(f"host {self.number} is granted {resource} {mode.value} token {token}")
        session = self.checker.grant(self, self.membership.generation, resource, exclusive, token)
        use = Use(session, wanted_until=self.world.now + random.expovariate(1 / self.habits.hold))
        self.uses[resource] = use
        self.world.at(self.world.now, self._vm, use)

    def _hold(self, resource: str, lease: Lease, random: Random) -> Generator[Any, Any, None]:
        use = self.uses.get(resource)
        while use is not None and self.busy and self.world.now < use.wanted_until:
            yield Sleep(min(self.habits.write_every * 2, use.wanted_until - self.world.now))
            if self.uses.get(resource) is not use:
                return
            if random.random() < self.habits.convert * 0.2:
                yield from self._convert(lease, use)
        if use is None or self.uses.get(resource) is not use:
            return
        use.closing = True
        yield from self._drain(use)
        if self.uses.get(resource) is not use:
            return
        if self.habits.retire and lease.mode is Mode.EXCLUSIVE and random.random() < self.habits.retire:
            yield from self._retire(resource, lease, use)
            return
        self.checker.end(use.session)
        del self.uses[resource]
        self.world.note(f"host {self.number} gives {resource} back")
        yield from self._insist(lease, lease.release)

    def _retire(self, resource: str, lease: Lease, use: Use) -> Generator[Any, Any, None]:
        """Have nobody get it any more; where the storage is well, that succeeds."""
        self.world.note(f"host {self.number} retires {resource}")
        yield from lease.retire()
        if self.uses.get(resource) is use:
            self.checker.retire(use.session)
            self.counts.retired += 1
            del self.uses[resource]

    def _convert(self, lease: Lease, use: Use) -> Generator[Any, Any, None]:
        mode = Mode.EXCLUSIVE if lease.mode is Mode.SHARED else Mode.SHARED
        if mode is Mode.SHARED:
            self.checker.change(use.session, False, use.session.token)
        self.world.note(f"host {self.number} converts {use.session.resource} to {mode.value}")
        try:
            token = yield from lease.convert(mode)
        except Held:
            self.counts.refused += 1
        except StorageTrouble:
            self.counts.trouble += 1
        else:
            if mode is Mode.EXCLUSIVE and use.session.open:
                self.checker.change(use.session, True, token)
        if lease.untidy:
            yield from self._insist(lease, lease.tidy)

    # The VMs.

    def _valid(self) -> bool:
        if self.membership is None:
            return self._saved is not None and self.clock() < self._saved[2]
        try:
            self.membership.check()
        except Lost:
            return False
        return True

    def _vm(self, use: Use) -> None:
        """A VM writes, and will again."""
        world, habits = self.world, self.habits
        if use.closing or not use.session.open or self.uses.get(use.session.resource) is not use:
            return
        if self.paused_until > world.now:
            world.at(self.paused_until, self._vm, use)
            return
        if self._valid():
            self.checker.data_issued(use.session)
            random = world.random
            late = random.random() < habits.data_late
            takes = habits.data_latency * random.random()
            if late:
                takes = habits.data_late_for * random.random()
            elif random.random() < habits.data_slow:
                takes += habits.data_slow_for * random.random()
            if not late:
                use.lands = max(use.lands, world.now + takes)
            world.at(world.now + takes, self._landed, use.session, late)
        world.at(world.now + habits.write_every * (0.5 + world.random.random()), self._vm, use)

    def _landed(self, session: Session, late: bool) -> None:
        self.checker.data_landed(session, late=late)

    # What befalls them.

    def kill_lockd(self, downtime: float) -> None:
        """lockd dies and is started again, once its last I/O has ended.  VMs go on."""
        if not self.up:
            return
        self.up = False
        self.world.note(f"host {self.number}: lockd is killed")
        self.counts.crashes += 1
        self.epoch += 1
        self.membership, self.leases = None, {}
        self.world.at(max(self.world.now + downtime, self.world.quiet_at(self)), self._restart, self.epoch)

    def crash(self, downtime: float, fabric: float) -> None:
        """The host loses its power, and comes back (or, after an infinite time, does not) in a new boot."""
        if not self.up:
            return
        self.up = self.powered = False
        world = self.world
        world.note(f"host {self.number} loses its power for {downtime:.3f}")
        self.counts.crashes += 1
        world.power_off(self, fabric)
        self.checker.died(self)
        self.uses, self.leases, self.membership, self._saved, self._noted, self._drained = {}, {}, None, None, None, 0.0
        if downtime != float("inf"):
            world.at(world.now + downtime, self._reboot, self.epoch)

    def _reboot(self, epoch: int) -> None:
        self.powered, self.ran_before = True, False
        self.offset = -self.world.now * self.rate + 5.0 * self.world.random.random()
        self._restart(epoch)

    def _restart(self, epoch: int) -> None:
        if epoch == self.epoch:
            self.boot()

    def confirm_dead(self, number: int) -> None:
        """An administrator says that a host is dead."""
        if self.membership is not None:
            self.world.start(self, self._confirm_dead(self.membership, number))

    def _confirm_dead(self, membership: Membership, number: int) -> Generator[Any, Any, None]:
        try:
            yield from membership.confirm_dead(number)
        except EngineError as error:
            self.world.note(f"host {self.number} does not believe that host {number} is dead: {error}")
        else:
            self.counts.confirmed += 1
            self.world.note(f"host {self.number} takes host {number} for dead")

    # At the end.

    def probe(self, patience: float) -> None:
        """Everybody is well and holds nothing: each resource must be there for the asking."""
        for resource in self.habits.resources:
            self.counts.probing += 1
            self.world.start(self, self._probe(resource, self.world.now + patience), lease=resource)

    def _probe(self, resource: str, until: float) -> Generator[Any, Any, None]:
        reason = "not joined"
        while self.world.now < until:
            lease = self.leases.get(resource)
            if lease is not None and self.membership is not None:
                try:
                    token = yield from lease.acquire(Mode.EXCLUSIVE, wait=True)
                    self.checker.end(self.checker.grant(self, self.membership.generation, resource, True, token))
                    yield from lease.release()
                except Held as held:
                    reason = str(held)
                    if held.host_id in self.checker.books and not self.checker.books[held.host_id].careful:
                        break  # sanlock leaves such leases behind; its next acquire gets them
                except EngineError as error:
                    reason = str(error)
                    if isinstance(error, BadArea) and resource in self.checker.retired:
                        break
                else:
                    self.counts.probes += 1
                    self.counts.probing -= 1
                    return
            yield Sleep(self.timing.renewal * self.world.random.random())
        else:
            self.counts.stuck.append(f"host {self.number} cannot get {resource}: {reason}")
        self.counts.probing -= 1
