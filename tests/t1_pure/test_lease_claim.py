"""Which host id a host claims, and how long it waits for that: the rules of `claim`, on a bench without time of its own."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace
from typing import TypeVar

import pytest
import trio
from lockfs_paxos_lease.claim import Claim
from lockfs_paxos_lease.engine.actions import Area, IOTimeout, Operation
from lockfs_paxos_lease.engine.errors import StorageTrouble
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import delta
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.place import Space
from lockfs_paxos_lease.state import State
from sim.bench import SPACE, Bench, Failure

DIGITS = "0123456789abcdef"
ALPHA = f"{DIGITS}.alpha"
T = TypeVar("T")


@pytest.fixture
def bench() -> Bench:
    return Bench(Timing.own(16))


def claim_of(bench: Bench) -> Claim:
    async def run(operation: Operation[T]) -> T:
        await trio.lowlevel.checkpoint()
        return bench.run(operation)

    def begin(operation: Operation[T]) -> Awaitable[T]:
        return run(operation)

    space = Space(SPACE, bench.geometry, (0, 0, 0))
    return Claim(space, bench.timing, bench.clock, DIGITS, ALPHA.encode(), 0, begin)


async def made(bench: Bench, claim: Claim, *, idle: bool) -> tuple[Membership, float]:
    before = bench.now
    membership = await claim.make(idle=lambda: idle)
    return membership, bench.now - before


def put_record(bench: Bench, host_id: int, **changes: object) -> None:
    start = bench.geometry.delta_offset(host_id)
    there = Leader.decode(bytes(bench.areas[Area.LOCKSPACE][start : start + 512]))
    changed = replace(there, **changes).sealed()  # type: ignore[arg-type]
    bench.areas[Area.LOCKSPACE][start : start + 512] = delta.encode(changed, b"", 512)


async def test_an_idle_host_does_not_trust_its_name_in_a_record_of_this_boot(bench: Bench) -> None:
    """A late renewal of the lockd before may cover the record of a host that has the host id by now."""
    old = bench.joined(1, ALPHA)
    bench.now += bench.timing.dead_after(0)
    put_record(bench, 1, timestamp=bench.timing.stamp(old.last_success + bench.timing.fence - 0.1))
    state = State(SPACE.hex(), "boot", 1, 1, ALPHA.encode(), old.last_success)
    claim = claim_of(bench)
    assert await claim.resume(state) is None
    membership, took = await made(bench, claim, idle=True)
    assert took > bench.timing.dead_after(0)
    assert (membership.host_id, membership.generation) == (1, 2)


async def test_an_idle_host_trusts_a_record_that_the_lockd_before_has_noted(bench: Bench) -> None:
    """Its write had ended, so nobody can have been there since."""
    old = bench.joined(1, ALPHA)
    bench.now += 10 * bench.timing.dead_after(0)
    state = State(SPACE.hex(), "boot", 1, 1, ALPHA.encode(), old.last_success)
    for idle in False, True:
        claim = claim_of(bench)
        assert await claim.resume(state) is None
        if not idle:
            before = dict(bench.areas), bench.now
            bench.areas = {area: bytearray(data) for area, data in bench.areas.items()}
        membership, took = await made(bench, claim, idle=idle)
        assert (took < bench.timing.fence) is idle
        assert (membership.host_id, membership.generation) == (1, 2)
        if not idle:
            bench.areas, bench.now = before


async def test_after_an_earlier_boot_the_host_id_is_taken_at_once(bench: Bench) -> None:
    bench.joined(1, ALPHA)
    bench.now = 5.0
    membership, took = await made(bench, claim_of(bench), idle=True)
    assert took < bench.timing.fence
    assert (membership.host_id, membership.generation) == (1, 2)


@pytest.mark.parametrize("idle", [True, False])
async def test_a_process_that_has_lost_its_lease_knows_the_record(bench: Bench, idle: bool) -> None:
    """At once where nothing is left of what it held, after the delay of everybody else where something is."""
    claim = claim_of(bench)
    first, _ = await made(bench, claim, idle=True)
    bench.run(first.renew())
    bench.now += 10 * bench.timing.fence
    again, took = await made(bench, claim, idle=idle)
    assert (again.host_id, again.generation) == (1, 2)
    assert (took < bench.timing.fence) is idle


async def test_a_process_that_finds_another_record_than_it_wrote_waits(bench: Bench) -> None:
    claim = claim_of(bench)
    first, _ = await made(bench, claim, idle=True)
    bench.run(first.renew())
    bench.now += 1
    put_record(bench, 1, timestamp=bench.timing.stamp(bench.now))
    bench.now += bench.timing.fence
    _, took = await made(bench, claim, idle=True)
    assert took > bench.timing.dead_after(0)


async def test_a_claim_that_failed_is_not_trusted_by_the_next_one(bench: Bench) -> None:
    """It may have landed over the claim of a host that was faster."""
    claim = claim_of(bench)
    bench.failure = Failure(1, IOTimeout("late"), lands=True)
    with pytest.raises(StorageTrouble):
        await claim.make(idle=lambda: True)
    bench.failure = None
    _, took = await made(bench, claim, idle=True)
    assert took > bench.timing.dead_after(0)
