"""One paxos lease, as this host sees it: acquire, release, convert, and tidy up after what failed.

Invariants:

* `mode` is not None exactly while this host holds the lease; then `version` is its fencing token, which grows with each
  change of hands.
* Nothing is written to the area before every earlier write of this process there has ended, and nothing after our own
  lease has run out.
* A lease is granted by a ballot that has settled *this* attempt's own wish, and by nothing else.  A value of ours from
  an earlier attempt may have been committed, and seen as released, by others in the meantime.
* The own block is never zeroed: what it proposed stays, marked RELEASED where it is not wanted any more.
* `untidy` is true while something of ours may be on the disk that we do not hold: after a failed or abandoned
  operation.  `tidy` puts that right; until then other hosts may find the lease taken by us.

One operation of a `Lease` at a time.  The value block that sanlock keeps behind the host sectors is never touched: with
most area sizes it lies in the next lease.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import replace
from random import Random

from lockfs_paxos_lease.engine.actions import Operation, Sleep
from lockfs_paxos_lease.engine.area import LeaseArea
from lockfs_paxos_lease.engine.attempt import Attempt, Seen
from lockfs_paxos_lease.engine.ballot import Ballot, Outrun, Value, next_mbal
from lockfs_paxos_lease.engine.blocks import Blocks, checked, host_blocks
from lockfs_paxos_lease.engine.errors import AGAIN, ALREADY, NOT_FOUND, EngineError, Held, Lost
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.own import Own
from lockfs_paxos_lease.engine.owner import await_end
from lockfs_paxos_lease.format.dblock import NEVER, NONE, RELEASED, SHARED, Dblock, ModeBlock
from lockfs_paxos_lease.format.errors import Code
from lockfs_paxos_lease.format.leader import SHORT_HOLD, Leader
from lockfs_paxos_lease.format.leader import SIZE as LEADER_SIZE

MAX_BALLOTS = 64
"""Ballots in one attempt.  Each was lost to another host, which then had a fair chance to finish its own."""
MAX_ROUNDS = 16
"""How often an attempt begins anew because the leader had changed under it."""
MAX_SETBACK = 1 << 32
"""Versions.  A leader that is further behind was not set back: the block is garbage, as old sanlocks may write it."""
SHARED_TRIES = 8
"""How often a shared acquire waits for a host that holds the lease only for the moment in which it notes itself
down."""


class Mode(enum.Enum):
    """How a lease is held."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Lease:
    """See the module.  *num_hosts*: a guess of how many host ids the lease is made for, which saves reading."""

    def __init__(self, name: bytes, membership: Membership, random: Random, num_hosts: int = 0) -> None:
        self.name = name
        self.membership = membership
        self.mode: Mode | None = None
        self.untidy = False
        self.area = LeaseArea(name, membership, num_hosts)
        self._random = random
        self._own = Own(self.area)
        self._last_time = 0

    @property
    def version(self) -> int:
        """The fencing token: the version of the lease that this host got.  Means something while it is held."""
        return self._own.leader.lver

    # Getting it.

    def acquire(self, mode: Mode, *, wait: bool = False, version: int = 0, num_hosts: int = 0) -> Operation[int]:
        """Take the lease and return its version.

        *wait*: for the death of an owner that does not renew any more, otherwise `Held` at once.  *version*: only if
        this is the version that it has.  *num_hosts*: from now on for host ids up to this one, if that is more.
        Raises `Held`, `Lost`, `BadArea`, `StorageTrouble`, `EngineError`.
        """
        if self.mode is not None:
            raise EngineError(-errno.EEXIST, "this host holds the lease already")
        self._own.mode = NONE
        attempt = yield from self._begin(mode is Mode.SHARED, wait, version, num_hosts)
        yield from self._win(attempt)
        if mode is Mode.SHARED:
            yield from self._share()
        elif attempt.shared:
            yield from self._outlive(attempt.shared)
        self.membership.check()
        self.mode, self.untidy = mode, False
        return self.version

    def convert(self, mode: Mode) -> Operation[int]:
        """Change the mode of a lease that is held, and return its version.

        To shared: nobody gets in between.  To exclusive: raises `Held` if another host shares it, and it stays shared.
        """
        if self.mode is None:
            raise EngineError(NOT_FOUND, "this host does not hold the lease")
        if self.mode is mode:
            raise EngineError(ALREADY, f"the lease is held {mode.value} already")
        self.membership.check()
        if mode is Mode.SHARED:
            yield from self.area.quiet()
            self.mode, self.untidy = mode, True  # from here on others may see it shared
            yield from self._share()
            self.untidy = False
            return self.version
        attempt = yield from self._begin(False, False, 0, 0)
        yield from self._win(attempt)
        if attempt.shared:
            yield from self._outlive(attempt.shared)
        yield from self._own.write(replace(self._own.block, flags=0), NONE)
        self.membership.check()
        self.mode, self.untidy = mode, False
        return self.version

    def _begin(self, short: bool, wait: bool, version: int, num_hosts: int) -> Operation[Attempt]:
        membership = self.membership
        membership.check()
        if self.untidy:
            yield from self.tidy()
        yield from self.area.quiet()
        wish = Value(membership.host_id, membership.generation, 0)
        return Attempt(wish, short, wait, version, num_hosts, {})

    def _win(self, attempt: Attempt) -> Operation[None]:
        """Become the owner.  On return the leader and our own block say so."""
        shared_tries = 0
        for _ in range(MAX_ROUNDS + SHARED_TRIES):
            cur, area = yield from self.area.read_used()
            if attempt.version and cur.lver != attempt.version:
                yield from self._withdraw(cur)
                what = f"the lease has version {cur.lver}, not {attempt.version}"
                raise EngineError(Code.ACQUIRE_LVER, what)
            seen = self._survey(area, cur, attempt)
            behind = seen.version > cur.lver + 1
            if behind:
                # Either we have read an old leader and new blocks, or the leader was set back.
                if (yield from self.area.read_leader()) != cur:
                    continue
                if seen.version > cur.lver + MAX_SETBACK:
                    what = f"a block has version {seen.version}, the leader record {cur.lver}"
                    raise EngineError(Code.DBLOCK_LVER, what)
            elif cur.timestamp and not self._is_own(cur):
                try:
                    if not (yield from await_end(self.area, cur, wait=attempt.wait)):
                        continue
                except Held:
                    yield from self._withdraw(cur)
                    if not attempt.short or not self._is_passing(cur) or shared_tries == SHARED_TRIES:
                        raise
                    shared_tries += 1
                    yield Sleep(self._random.uniform(0, self.area.timing.backoff))
                    continue
                seen.fresh = False
            if (yield from self._contend(cur, seen, attempt)):
                return
        yield from self._withdraw(cur)
        raise Held(Code.ACQUIRE_OTHER, "other hosts were faster each time", cur.owner_id, cur.owner_generation)

    def _survey(self, area: bytes, cur: Leader, attempt: Attempt) -> Seen:
        """Return what the blocks say; make our wish unlike any earlier one of ours."""
        membership = self.membership
        blocks = Blocks(membership.geometry, cur.num_hosts, membership.host_id, cur.lver + 1)
        for host_id, (_, mode) in blocks.look(area).items():
            if mode.is_shared and host_id != membership.host_id:
                attempt.shared[host_id] = mode.generation
        seen = Seen(area[:LEADER_SIZE], blocks, max(cur.lver + 1, blocks.version))
        times = [self._last_time, membership.timing.stamp(membership.clock()) - 1, blocks.time]
        if cur.owner_id == membership.host_id:
            times.append(cur.timestamp)
        if not attempt.wish.time:
            self._last_time = max(times) + 1
            attempt.wish = replace(attempt.wish, time=self._last_time)
        return seen

    def _is_own(self, cur: Leader) -> bool:
        """Say whether the owner is this host, in this or an earlier incarnation."""
        if cur.owner_id != self.membership.host_id:
            return False
        if cur.owner_generation > self.membership.generation:
            raise Lost(Code.RENEW_OWNER, f"host id {cur.owner_id} has a newer generation: another host took it over")
        return True

    def _is_passing(self, cur: Leader) -> bool:
        """Say whether an owner may be one that holds the lease for a moment only.

        The flag is not in records that a third host has written.
        """
        return bool(cur.flags & SHORT_HOLD) or cur.write_id != cur.owner_id

    def _contend(self, cur: Leader, seen: Seen, attempt: Attempt) -> Operation[bool]:
        """Run ballots for the version after *cur* until one settles.  Return whether the lease is ours.

        False also where the leader has changed: the attempt begins anew.
        """
        membership = self.membership
        me, stride = membership.host_id, cur.max_hosts
        own, _ = seen.blocks.counting.get(me, (NEVER, NONE))
        mbal = next_mbal(seen.blocks.mbal, me, stride)
        for _ in range(MAX_BALLOTS):
            if not seen.fresh:
                there = yield from self.area.read_leader()
                if there.lver == seen.version and _value(there) == attempt.wish:
                    self._own.leader = there  # somebody else has finished our ballot for us
                    membership.check()
                    return True
                if there != cur:
                    return False
            seen.fresh = False
            ballot = Ballot(
                membership.geometry, seen.leader, seen.blocks, me, cur.num_hosts, seen.version, mbal, attempt.wish,
                self._own.mode, shared=attempt.shared,
            )  # fmt: skip
            try:
                value = yield from self._run(ballot, own)
            except Outrun as ahead:
                yield Sleep(self._random.uniform(0, self.area.timing.backoff))
                if ahead.newer:
                    return False
                own = ballot.block
                mbal = next_mbal(max(mbal, ahead.mbal), me, stride)
                continue
            return (yield from self._commit(cur, seen.version, value, attempt))
        yield from self._withdraw(cur)
        what = "no ballot could be finished: another host does not let go"
        raise Held(Code.DBLOCK_MBAL, what, cur.owner_id, cur.owner_generation)

    def _run(self, ballot: Ballot, own: Dblock) -> Operation[Value]:
        """Run one ballot.  Raises `Outrun`, `BadArea`."""
        self.untidy = True
        sector = ballot.phase1(own)
        self._own.block = ballot.block
        yield from self.area.write_host(ballot.host_id, sector)
        sector = ballot.promised((yield from self.area.read_ballot(ballot.num_hosts)))
        self._own.block = ballot.block
        yield from self.area.write_host(ballot.host_id, sector)
        return ballot.settled((yield from self.area.read_ballot(ballot.num_hosts)))

    def _commit(self, cur: Leader, version: int, value: Value, attempt: Attempt) -> Operation[bool]:
        """Write what was settled into the leader.  Return whether that is our wish."""
        membership, timing = self.membership, self.area.timing
        ours = value == attempt.wish
        not_after = membership.valid_until
        if not ours:
            # Whom we make the owner may have been made that by others already, and have given it back: then the leader
            # has moved on, and to write it would set it back.
            not_after = membership.clock() + timing.io_timeout
            if (yield from self.area.read_leader()) != cur:
                return False
        flags = cur.flags
        if value.host_id == membership.host_id:
            flags = flags | SHORT_HOLD if attempt.short else flags & ~SHORT_HOLD
        self._own.leader = replace(
            cur, lver=version, owner_id=value.host_id, owner_generation=value.generation, timestamp=value.time,
            flags=flags, num_hosts=min(max(cur.num_hosts, attempt.num_hosts), cur.max_hosts),
            write_id=membership.host_id, write_generation=membership.generation,
            write_timestamp=timing.stamp(membership.clock()),
        ).sealed()  # fmt: skip
        yield from self.area.write_leader(self._own.leader, not_after)
        membership.check()
        return ours

    def _withdraw(self, cur: Leader) -> Operation[None]:
        """Before giving up: mark a proposal of ours that might still be adopted as released."""
        if self._own.block.lver > cur.lver and self.untidy:
            yield from self._own.write(replace(self._own.block, flags=RELEASED), self._own.mode)
        self.untidy = False

    # Sharing it.

    def _share(self) -> Operation[None]:
        """Note ourselves down as a sharer, then free the leader."""
        mode = ModeBlock(SHARED, self.membership.generation)
        yield from self._own.write(replace(self._own.block, flags=RELEASED), mode)
        if code := (yield from self._own.free_leader()):
            raise EngineError(code, "another host has taken the lease over")

    def _outlive(self, shared: dict[int, int]) -> Operation[None]:
        """Make sure that nobody shares the lease any more; clear the notes of dead sharers.

        Otherwise gives the lease back, or what was shared before stays so, and raises `Held`.
        """
        hosts = self.membership.hosts
        for host_id in sorted(shared):
            block, mode = yield from self.area.read_host(host_id)
            if not mode.is_shared or not mode.generation:
                continue
            if hosts.holds_on(host_id, mode.generation):
                yield from self._own.write(replace(self._own.block, flags=RELEASED), self._own.mode)
                yield from self._own.free_leader()
                self.untidy = False
                raise Held(AGAIN, f"it is shared by host id {host_id}", host_id, mode.generation)
            checked(block, host_id, self.membership.geometry)
            # Its ballot block stays: whoever comes next in this version must see it.
            yield from self.area.write_blocks(host_id, block, NONE)

    # Giving it back.

    def release(self) -> Operation[int]:
        """Give the lease back.  Return 0, or sanlock's code if the leader was found to be somebody else's.

        Raises `StorageTrouble`: it is not held any more, but other hosts see it held until `tidy` succeeds.
        Where our own lease has run out nothing is written.
        """
        mode, self.mode = self.mode, None
        if mode is None:
            raise EngineError(NOT_FOUND, "this host does not hold the lease")
        self.untidy, self._own.mode = True, NONE
        try:
            self.membership.check()
        except Lost:
            self.untidy = False
            return 0
        yield from self.area.quiet()
        yield from self._own.write(replace(self._own.block, flags=RELEASED), NONE)
        result = 0
        if mode is Mode.EXCLUSIVE:
            result = yield from self._own.free_leader()
        self.untidy = False
        return result

    def retire(self) -> Operation[None]:
        """Have nobody get the lease any more, ourselves included: before its place on the storage is given up.

        It is held exclusively.  Whoever finds it so raises `BadArea`, also those who began to want it long before.
        Raises `Lost`, `StorageTrouble`: then it may be retired or not, and is not held.
        """
        if self.mode is not Mode.EXCLUSIVE:
            raise EngineError(NOT_FOUND, "this host does not hold the lease exclusively")
        yield from self.area.quiet()
        self.mode = None
        yield from self._own.clear_leader()

    def tidy(self) -> Operation[None]:
        """Take back what a failed or abandoned operation may have left on the disk.

        What is held stays held.  Raises `StorageTrouble`: try again later; `BadArea`.
        """
        if not self.untidy:
            return
        try:
            self.membership.check()
        except Lost:
            self.untidy = False
            return
        yield from self.area.quiet()
        membership = self.membership
        mode = ModeBlock(SHARED, membership.generation) if self.mode is Mode.SHARED else NONE
        yield from self._own.write(replace(self._own.block, flags=RELEASED), mode)
        yield from self._own.take_back()
        self.untidy = False

    def adopt(self, granted: Mode | None = None) -> Operation[Mode | None]:
        """Take up what a predecessor of this very incarnation held, and return it: after `Membership.resume`.

        *granted* is what the predecessor is known to have told its user.  Without that knowledge, an exclusive lease is
        taken up only where nobody is noted as sharing it: the predecessor may have died before it looked for those.
        Writes nothing: if `untidy` is true then, stop whoever still uses what is not held any more, and `tidy`.
        """
        yield from self.area.quiet()
        leader, area = yield from self.area.read_all()
        membership = self.membership
        own, mode, shared = NEVER, NONE, False
        for host_id, block, noted in host_blocks(area, membership.geometry, leader.num_hosts):
            if host_id == membership.host_id:
                own, mode = block, noted
            else:
                shared = shared or noted.is_shared
        self._own.leader, self._own.block = leader, own
        owner = bool(leader.timestamp) and self._own.is_named_by(leader)
        sure = granted is Mode.EXCLUSIVE or not shared
        if mode.is_shared and mode.generation == membership.generation:
            self.mode, self._own.mode, self.untidy = Mode.SHARED, mode, owner
        elif owner and not own.is_released and sure and not leader.flags & SHORT_HOLD:
            self.mode = Mode.EXCLUSIVE
        else:
            pending = own.lver > leader.lver and own.bal and not own.is_released
            self.untidy = bool(owner or pending)
        return self.mode


def _value(leader: Leader) -> Value:
    """Return the value that a leader record has committed."""
    return Value(leader.owner_id, leader.owner_generation, leader.timestamp)
