"""A sanlock host, written from the description of its algorithms, with its weaknesses; shares nothing with the engine
but the names of the actions by which the simulator is asked for I/O.

Its own ways, which those of lockfs must get along with: a block that fails is zeroed, a ballot begun again erases what was
proposed before, blocks with a bad checksum are skipped, nothing waits for writes that were given up, its VMs are killed some
time after its lease has run out, and a watchdog stands behind that.  Seeds in which such a host was stopped without a
watchdog, or its writes landed after their time-out, ended in two holders among sanlock hosts alone; so the world spares it
both.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from random import Random
from typing import Any

import google_crc32c
from lockfs_paxos_lease.engine.actions import Area, DiskError, Read, Sleep, Write

from sim.checker import Checker, Session
from sim.station import SPACE, Counts, Habits
from sim.world import HOSTS, SECTOR, SECTORS, Machine, World

WATCHDOG = 60
GRACE = 40
HEAD = 200
NO_LIMIT = float("inf")
_LEADER = struct.Struct("<IIIIQQQQQ48s48sQQIHHQQQ")
_FIELDS = (
    "magic", "version", "flags", "sector_size", "num_hosts", "max_hosts", "owner_id", "owner_generation", "lver",
    "space", "resource", "timestamp", "unused1", "checksum", "unused2", "io_timeout", "write_id", "write_generation",
    "write_timestamp",
)  # fmt: skip
_BLOCK = struct.Struct("<6Q")


class Failed(Exception):
    """An acquire ended with a code of sanlock's; `leader` is what it saw last."""

    def __init__(self, code: int, leader: Record | None = None) -> None:
        super().__init__(str(code))
        self.code = code
        self.leader = leader


class Record:
    """A leader record."""

    magic: int
    flags: int
    num_hosts: int
    max_hosts: int
    owner_id: int
    owner_generation: int
    lver: int
    resource: bytes
    timestamp: int
    io_timeout: int
    write_id: int
    write_generation: int
    write_timestamp: int

    def __init__(self, data: bytes) -> None:
        self.__dict__.update(zip(_FIELDS, _LEADER.unpack_from(data), strict=True))
        self.raw = data[:HEAD]

    def changed(self, **fields: object) -> Record:
        """Return another one."""
        values = {name: self.__dict__[name] for name in _FIELDS} | fields
        data = bytearray(_LEADER.pack(*values.values()))
        struct.pack_into("<I", data, 168, _sum(bytes(data[:168])))
        return Record(bytes(data))

    def sector(self) -> bytes:
        """Return a whole sector."""
        return self.raw.ljust(SECTOR, b"\0")


def _sum(data: bytes) -> int:
    return int(0xFFFFFFFF ^ google_crc32c.extend(1, data))


def _sector(block: tuple[int, ...], flags: int, shared: int = 0, generation: int = 0) -> bytes:
    data = _BLOCK.pack(*block)
    data += struct.pack("<II", _sum(data), flags)
    return (data.ljust(128, b"\0") + struct.pack("<I4xQ", shared, generation)).ljust(SECTOR, b"\0")


class Reference(Machine):
    """See the module."""

    careful = False

    def __init__(
        self, world: World, number: int, rate: float, offset: float, io_timeout: int, habits: Habits, checker: Checker,
        counts: Counts,
    ) -> None:  # fmt: skip
        super().__init__(world, number, rate, offset)
        self.T = io_timeout
        self.habits = habits
        self.checker = checker
        self.counts = counts
        self.busy = True
        self.up = False
        self.dead = True
        self.generation = 0
        self.last_success = 0.0
        self.record = b""
        self.seen: dict[int, tuple[tuple[int, int, int], float, float, float, int]] = {}
        self.sessions: dict[str, Session] = {}
        checker.register(self, 8 * io_timeout + GRACE + 10, careful=False)

    def boot(self) -> None:
        """Start the daemon."""
        self.up = True
        self.world.start(self, self._daemon())

    def crash(self, downtime: float, fabric: float) -> None:
        """The host loses its power, or its watchdog resets it."""
        if not self.up:
            return
        self.up, self.dead = False, True
        self.world.note(f"sanlock host {self.number} loses its power for {downtime:.3f}")
        self.counts.crashes += 1
        self.world.power_off(self, fabric)
        self.checker.died(self)
        self.sessions = {}
        self.world.at(self.world.now + downtime, self._reboot, self.epoch)

    def _reboot(self, epoch: int) -> None:
        if epoch == self.epoch:
            self.offset = -self.world.now * self.rate + 5.0
            self.boot()

    # The delta lease.

    def _daemon(self) -> Generator[Any, Any, None]:
        while True:
            try:
                yield from self._join()
            except DiskError:
                yield Sleep(1.0)
                continue
            self.counts.joins += 1
            self.dead, self.seen = False, {}
            for resource in self.habits.resources:
                random = Random(self.world.random.getrandbits(32))
                self.world.start(self, self._client(resource, random, self.generation), lease=resource)
            yield from self._renew()
            # Recovery: VMs are killed, the stubborn ones late.
            self.dead = True
            self.counts.lost += 1
            end = self.last_success + 8 * self.T + GRACE * self.world.random.random()
            yield Sleep(max(end - self.clock(), 0.0))
            for session in self.sessions.values():
                self.checker.end(session)
            self.sessions = {}
            yield Sleep(2.0)

    def _join(self) -> Generator[Any, Any, None]:
        offset = (self.number - 1) * SECTOR
        found = Record((yield Read(Area.LOCKSPACE, offset, SECTOR, self.T)))
        now = int(self.clock()) or 1
        claim = found.changed(
            timestamp=now, io_timeout=self.T, owner_id=self.number, owner_generation=found.owner_generation + 1,
            resource=b"sanlock-%d" % self.number, write_id=0, write_generation=0, write_timestamp=0,
        )  # fmt: skip
        yield Write(Area.LOCKSPACE, offset, claim.sector(), self.T, NO_LIMIT)
        yield Sleep(2 * (found.io_timeout or self.T))
        if (yield Read(Area.LOCKSPACE, offset, SECTOR, self.T))[:HEAD] != claim.raw:
            raise DiskError("clash")
        self.record, self.generation, self.last_success = claim.raw, claim.owner_generation, now

    def _renew(self) -> Generator[Any, Any, None]:
        offset, sure = (self.number - 1) * SECTOR, True
        while self.clock() - self.last_success < 8 * self.T:
            if self.clock() - self.last_success < 2 * self.T:
                yield Sleep(1.0)
                continue
            yield Sleep(0.5)
            try:
                area = yield Read(Area.LOCKSPACE, 0, SECTORS * SECTOR, self.T)
                self._watch(area)
                there = Record(area[offset : offset + SECTOR])
                ours = Record(self.record)
                if there.raw != ours.raw if sure else (there.owner_generation != ours.owner_generation):
                    return
                now, sure = int(self.clock()), False
                renewed = ours.changed(timestamp=now)
                yield Write(Area.LOCKSPACE, offset, renewed.sector(), 8 * self.T + WATCHDOG, NO_LIMIT)
            except DiskError:
                continue
            self.record, self.last_success, sure = renewed.raw, now, True

    def _watch(self, area: bytes) -> None:
        now = self.clock()
        for host in range(1, HOSTS + 1):
            record = Record(area[(host - 1) * SECTOR : host * SECTOR])
            if not record.owner_id:
                continue
            what = (record.owner_id, record.owner_generation, record.timestamp)
            before = self.seen.get(host)
            if before is None:
                self.seen[host] = (what, now, now, now, record.io_timeout)
            elif before[0] != what:
                self.seen[host] = (what, before[1], now, now, record.io_timeout)
            else:
                self.seen[host] = (what, before[1], now, before[3], record.io_timeout)

    # Clients.

    def _client(self, resource: str, random: Random, generation: int) -> Generator[Any, Any, None]:
        while not self.dead and self.generation == generation:
            if not self.busy:
                yield Sleep(8.0 * self.T)
                continue
            yield Sleep(random.expovariate(1 / self.habits.think))
            shared = random.random() < self.habits.share
            lease = _Lease(self, resource, random, shared)
            try:
                token = yield from lease.acquire()
            except Failed:
                self.counts.refused += 1
                continue
            except DiskError:
                self.counts.trouble += 1
                continue
            if self.dead or self.generation != generation:
                return
            session = self.checker.grant(self, generation, resource, not shared, token)
            self.sessions[resource] = session
            until = self.world.now + random.expovariate(1 / self.habits.hold)
            while self.world.now < until and self.busy:
                yield Sleep(self.habits.write_every * (0.5 + random.random()))
                if self.sessions.get(resource) is not session:
                    return
                self.checker.data_issued(session)
                self.world.at(self.world.now + random.random(), self._landed, session)
            yield Sleep(1.1)
            if self.sessions.get(resource) is not session:
                return
            self.checker.end(session)
            del self.sessions[resource]
            if not self.dead:
                yield from lease.release()

    def _landed(self, session: Session) -> None:
        self.checker.data_landed(session, late=False)

    def holds_on(self, host: int, generation: int) -> bool:
        """Say whether a sharer lives."""
        if host not in self.seen:
            return True
        (_, there, timestamp), first, _, live, timeout = self.seen[host]
        del first
        if there < generation:
            return True  # sanlock judges it by the incarnation that it has seen: spared, see FOUND.md
        return bool(timestamp) and there == generation and self.clock() - live <= 8 * (timeout or self.T) + WATCHDOG


class _Lease:
    """One attempt of a client at a lease."""

    def __init__(self, host: Reference, resource: str, random: Random, shared: bool) -> None:
        self.host = host
        self.name = resource.encode()
        self.random = random
        self.shared = shared
        self.me = host.number
        self.block: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
        self.leader: Record
        self.sharers: dict[int, int] = {}

    def acquire(self) -> Generator[Any, Any, int]:
        """Get it.  Raises `Failed`, `DiskError`."""
        for _ in range(9):
            try:
                yield from self._exclusive()
                break
            except Failed as failed:
                if not self.shared:
                    raise
                yield from self._zero()
                if failed.code not in (-243, -244, -245) or failed.leader is None or not failed.leader.flags & 1:
                    raise
                yield Sleep(self.random.random())
        else:
            raise Failed(-246)
        lver = self.leader.lver
        if self.shared:
            try:
                yield self._own(1, shared=True)
                yield from self._free()
            except DiskError:
                yield self._own(1)
                yield from self._free()
                raise
        else:
            yield from self._outlive()
        return lver

    def _exclusive(self) -> Generator[Any, Any, None]:
        host, me = self.host, self.me
        while True:
            area = yield Read(Area.LEASE, 0, SECTORS * SECTOR, host.T)
            cur = self._leader(area)
            blocks = self._blocks(area, cur)
            if any(block is None for block, _, _, _ in blocks.values()):
                raise Failed(-214)
            highest = max((block[0] for block, _, _, _ in blocks.values() if block), default=0)
            reuse = cur.timestamp == 0 or (cur.owner_id == me and cur.owner_generation <= host.generation)
            if not reuse and not (yield from self._owner_gone(cur)):
                continue
            stride = cur.max_hosts
            mbal = highest - highest % stride + stride + me if highest else me
            self.sharers = {}
            again = False
            while not again:
                if not reuse:
                    there = yield from self._read_leader()
                    if there.lver == cur.lver + 1:
                        if (there.owner_id, there.owner_generation) == (me, host.generation):
                            self.leader = there
                            return
                        raise Failed(-244, there)
                    if there.raw != cur.raw:
                        again = True
                        continue
                reuse = False
                if (yield from self._ballot(cur, mbal)):
                    yield from self._commit(cur)
                    return
                yield Sleep(self.random.random())
                mbal += stride

    def _ballot(self, cur: Record, mbal: int) -> Generator[Any, Any, bool]:
        host, me, lver = self.host, self.me, cur.lver + 1
        self.block = (mbal, 0, 0, 0, 0, lver)
        yield self._own(0)
        area = yield Read(Area.LEASE, 0, SECTORS * SECTOR, host.T)
        best: tuple[int, ...] | None = None
        blocks = self._blocks(area, cur)
        # sanlock notes sharers only up to the first higher ballot that it comes to: spared, see FOUND.md.
        self.sharers |= {q: generation for q, (block, _, shared, generation) in blocks.items() if block is not None and shared}
        for block, _, _, _ in blocks.values():
            if block is None or block[5] < lver:
                continue
            if block[5] > lver or block[0] > mbal:
                return False
            if block[2] and block[1] and (best is None or block[1] > best[1]):
                best = block
        value = best[2:5] if best else (me, host.generation, int(host.clock()) or 1)
        self.block = (mbal, mbal, *value, lver)
        try:
            yield self._own(0)
            area = yield Read(Area.LEASE, 0, SECTORS * SECTOR, host.T)
        except DiskError:
            yield from self._retract()
            raise
        for block, _, _, _ in self._blocks(area, cur).values():
            if block is not None and (block[5] > lver or (block[5] == lver and block[0] > mbal)):
                return False
        return True

    def _commit(self, cur: Record) -> Generator[Any, Any, None]:
        host = self.host
        _, _, owner, generation, timestamp, lver = self.block
        flags = cur.flags
        if owner == self.me:
            flags = flags | 1 if self.shared else flags & ~1
        self.leader = cur.changed(
            lver=lver, owner_id=owner, owner_generation=generation, timestamp=timestamp, flags=flags, write_id=self.me,
            write_generation=host.generation, write_timestamp=int(host.clock()),
        )  # fmt: skip
        try:
            yield Write(Area.LEASE, 0, self.leader.sector(), host.T, NO_LIMIT)
        except DiskError:
            yield from self._retract()
            raise
        if owner != self.me:
            raise Failed(-245, self.leader)

    def _owner_gone(self, cur: Record) -> Generator[Any, Any, bool]:
        """Return False if the leader changed.  Raises `Failed`."""
        host, owner = self.host, cur.owner_id
        since, stamp, fresh, timeout = host.clock(), 0, False, host.T
        if owner in host.seen:
            what, _, check, live, timeout = host.seen[owner]
            if what[:2] == (owner, cur.owner_generation):
                since, stamp, fresh = live, what[2], check == live
        while True:
            record = Record((yield Read(Area.LOCKSPACE, (owner - 1) * SECTOR, SECTOR, host.T)))
            if (
                not record.timestamp
                or record.owner_id != owner
                or record.owner_generation > cur.owner_generation
            ):  # fmt: skip
                return True
            if not stamp:
                stamp = record.timestamp
            else:
                if record.timestamp != stamp or fresh:
                    if cur.write_id != owner:
                        data = yield Read(Area.LEASE, (owner + 1) * SECTOR, SECTOR, host.T)
                        if data[52] & 1:
                            return True
                    raise Failed(-243, cur)
                if host.clock() - since > 8 * (timeout or host.T) + WATCHDOG:
                    return True
                if self.random.random() < 0.7:
                    raise Failed(-247, cur)
            yield Sleep(1.0)
            if (yield from self._read_leader()).raw != cur.raw:
                return False

    def _outlive(self) -> Generator[Any, Any, None]:
        alive = False
        for q in sorted(self.sharers):
            data = yield Read(Area.LEASE, (q + 1) * SECTOR, SECTOR, self.host.T)
            generation = struct.unpack_from("<Q", data, 136)[0]
            if not data[128] & 1 or not generation or q == self.me:
                continue
            if self.host.holds_on(q, generation):
                alive = True
            else:
                yield Write(Area.LEASE, (q + 1) * SECTOR, bytes(SECTOR), self.host.T, NO_LIMIT)
        if alive:
            yield from self.release()
            raise Failed(-11)

    def release(self) -> Generator[Any, Any, None]:
        """Give it back."""
        try:
            yield self._own(1)
        except DiskError:
            pass
        if not self.shared:
            yield from self._insist_free()

    def _insist_free(self) -> Generator[Any, Any, None]:
        while not self.host.dead:
            try:
                yield from self._free()
            except DiskError:
                yield Sleep(float(self.host.T))
            else:
                return

    def _free(self) -> Generator[Any, Any, None]:
        there = yield from self._read_leader()
        if there.write_id != self.me or there.lver != self.leader.lver or there.raw != self.leader.raw:
            return
        freed = self.leader.changed(
            timestamp=0, flags=self.leader.flags & ~1, write_id=self.me, write_generation=self.host.generation,
            write_timestamp=int(self.host.clock()),
        )  # fmt: skip
        yield Write(Area.LEASE, 0, freed.sector(), self.host.T, NO_LIMIT)

    def _zero(self) -> Generator[Any, Any, None]:
        self.block = (0, 0, 0, 0, 0, 0)
        yield self._own(1)

    def _retract(self) -> Generator[Any, Any, None]:
        while not self.host.dead:
            try:
                yield from self._zero()
                there = yield from self._read_leader()
                if (
                    there.write_id == self.me
                    and there.timestamp
                    and (there.owner_id, there.owner_generation) == (self.me, self.host.generation)
                ):  # fmt: skip
                    self.leader = there
                    yield from self._free()
            except DiskError:
                yield Sleep(float(self.host.T))
            else:
                return

    def _own(self, flags: int, *, shared: bool = False) -> Write:
        sector = _sector(self.block, flags, int(shared), self.host.generation if shared else 0)
        return Write(Area.LEASE, (self.me + 1) * SECTOR, sector, self.host.T, NO_LIMIT)

    def _read_leader(self) -> Generator[Any, Any, Record]:
        return self._leader((yield Read(Area.LEASE, 0, SECTOR, self.host.T)))

    def _leader(self, data: bytes) -> Record:
        record = Record(data)
        good = record.magic == 0x06152010 and _sum(data[:168]) == struct.unpack_from("<I", data, 168)[0]
        if not good or record.resource.rstrip(b"\0") != self.name or data[56:104].rstrip(b"\0") != SPACE:
            raise Failed(-229)
        return record

    def _blocks(self, area: bytes, cur: Record) -> dict[int, tuple[tuple[int, ...] | None, int, int, int]]:
        """Return block (None if its checksum is wrong), flags, shared flag and generation of each host."""
        found = {}
        for q in range(1, cur.num_hosts + 1):
            data = area[(q + 1) * SECTOR : (q + 2) * SECTOR]
            block: tuple[int, ...] | None = _BLOCK.unpack_from(data)
            checksum, flags = struct.unpack_from("<II", data, 48)
            assert block is not None
            never = not (checksum or block[0] or block[1] or block[2] or block[5])
            if not never and checksum != _sum(data[:48]):
                block = None
            found[q] = (block, flags, data[128] & 1, struct.unpack_from("<Q", data, 136)[0])
        return found
