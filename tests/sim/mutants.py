"""Deliberate bugs of the engine, each a change of one place in its source, which the simulator must catch.

A mutant is put into the running code: the function is compiled again from its source with one text in it replaced, and
keeps its identity.  A text that is not there exactly once means that the engine has changed and the mutant must, too.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

from lockfs_paxos_lease.engine import area, ballot, census, lease, membership, own, owner


@dataclass(frozen=True)
class Mutant:
    """One bug: in `function`, `old` becomes `new`.  `seed` is the first that caught it when it was last looked for."""

    function: Callable[..., Any]
    old: str
    new: str
    seed: int
    what: str
    claims: bool = False
    """It shows where many hosts want one host id."""

    def apply(self) -> CodeType:
        """Put the bug in.  Return what was there before."""
        function = self.function
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"{function.__qualname__} has {self.old!r} {source.count(self.old)} times")
        names: dict[str, Any] = {}
        mutated = compile(
            source.replace(self.old, self.new), f"<mutant of {function.__qualname__}>", "exec",
            __future__.annotations.compiler_flag,
        )  # fmt: skip
        exec(mutated, function.__globals__, names)
        before: CodeType = function.__code__  # type: ignore[attr-defined]
        function.__code__ = names[function.__name__].__code__  # type: ignore[attr-defined]
        return before

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the bug in for a while."""
        before = self.apply()
        try:
            yield
        finally:
            self.function.__code__ = before  # type: ignore[attr-defined]


MUTANTS = {
    "skip-reread": Mutant(
        owner.await_end, "(record.timestamp != stamp or fresh)", "fresh", 57,
        "who waits for the death of an owner does not look whether its record changes again",
    ),
    "forget-generation": Mutant(
        membership.Membership.join, "found.owner_generation + 1", "max(found.owner_generation, 1)", 9,
        "a new incarnation is not told from the one before",
    ),
    "renew-after-l": Mutant(
        membership.Membership.check, "self.clock() >= self.valid_until", "False", 2,
        "a lease that has run out is renewed, and used",
    ),
    "count-from-after": Mutant(
        membership.Membership._write_renewal, "False, now", "False, self.clock()", 107,
        "the own lease counts from after the write that renewed it",
    ),
    "zero-own-block": Mutant(
        lease.Lease.release, "replace(self._own.block, flags=RELEASED)", "Dblock(flags=RELEASED)", 0,
        "who gives a lease back zeroes its ballot block",
    ),
    "ignore-released": Mutant(
        owner._gave_back, "block.is_released and", "False and", 1,
        "a lease that its owner has given back in its own block only stays taken",
    ),
    "early-takeover": Mutant(
        owner.await_end, "began - since > area.timing.dead_after(stored)", "began - since > area.timing.live_for(stored)", 30,
        "a host is dead one margin early",
    ),
    "skip-phase-2-read": Mutant(
        lease.Lease._run, "return ballot.settled((yield from self.area.read_ballot(ballot.num_hosts)))",
        "return Value.of(ballot.block)", 7,
        "a ballot is settled without a look at the others after phase 2",
    ),
    "no-deadline": Mutant(
        area.LeaseArea._write, "until = min(not_after, self.membership.valid_until)", "until = float('inf')", 12,
        "a lease is written although the own one has run out between the decision and the write",
    ),
    "ignore-sharers": Mutant(
        lease.Lease._outlive, "if hosts.holds_on(host_id, mode.generation):", "if False:", 1,
        "an exclusive acquire does not care for who shares",
    ),
    "commit-stranger": Mutant(
        lease.Lease._commit, "ours = value == attempt.wish", "ours = True", 4,
        "a ballot that settles somebody else's value counts as won",
    ),
    "erase-proposal": Mutant(
        ballot.Ballot.phase1, "if earlier.lver == self.lver and earlier.bal and earlier.inp:", "if False:", 3197,
        "a ballot that is begun again erases what the host proposed before, as sanlock does",
    ),
    "choose-own-wish": Mutant(
        ballot.Ballot.promised, "value = Value.of(best) if best.bal else self.wish", "value = self.wish", 7,
        "a ballot proposes its own wish although somebody has proposed another one",
    ),
    "ignore-higher-ballots": Mutant(
        ballot.Ballot._blocks, "if block.mbal > self.mbal:", "if False:", 0,
        "a ballot goes on although somebody has begun a higher one",
    ),
    "no-settling": Mutant(
        area.LeaseArea.quiet, "yield Settle(Area.LEASE, self.timing.io_timeout)", "yield from ()", 29,
        "new writes are sent while an earlier one, given up, may still land",
    ),
    "trust-leader": Mutant(
        lease.Lease._win, "behind = seen.version > cur.lver + 1", "behind, seen.version = False, cur.lver + 1", 30,
        "a leader that a late write has set back is believed",
    ),
    "retire-nothing": Mutant(
        own.Own.clear_leader, "magic=CLEARED_MAGIC", "lver=self.leader.lver", 1,
        "who retires a lease only gives it back",
    ),
    "share-without-note": Mutant(
        lease.Lease._share, "replace(self._own.block, flags=RELEASED), mode)", "replace(self._own.block, flags=RELEASED), NONE)", 1,
        "a shared hold is not noted on the disk",
    ),
    "bound-without-horizon": Mutant(
        census.Census.is_current, "now - self._began < self._timing.quickest * 2 / 3", "self._began > _LONG_AGO", 7,
        "leases are read as far as host ids were in use once, however long ago that was",
    ),
    "no-whole-read": Mutant(
        census.Census.is_known, "return name in self._extents", "return True", 30,
        "leases are read as far as host ids are in use in the lockspace, though they may be older than it is",
    ),
    "believe-own-name": Mutant(
        membership.Membership.join, "self._is_ours(found, same_boot, noted)", "found.resource_name == self.name", 1641,
        "any record under our name counts as a predecessor's, a claim that came late as well", claims=True,
    ),
    "believe-noted-generation": Mutant(
        membership.Membership._is_ours, "(noted[0], self.timing.stamp(noted[1]))", "(noted[0], found.timestamp)", 2961,
        "of what the process before has noted, only the generation counts: its last write may have come late", claims=True,
    ),
    "slow-claim": Mutant(
        membership.Membership.join, "self.clock() - began > short / 2", "False", 3,
        "a claim that took long is believed as soon as one that did not", claims=True,
    ),
    "no-second-look": Mutant(
        membership.Membership._stand, "if there != claim:", "if False:", 0,
        "a claim is not looked at again", claims=True,
    ),
    "no-long-delay": Mutant(
        membership.Membership._stands_still, "if began - since > delay:", "if True:", 0,
        "a host id is taken although its record has not stood still for long", claims=True,
    ),
}  # fmt: skip
