"""How far a lease is read, and when it is read as a whole: `engine.census`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lockfs_paxos_lease.engine import census
from lockfs_paxos_lease.engine.actions import Action, Area, IOTimeout, Operation, Read
from lockfs_paxos_lease.engine.census import Census
from lockfs_paxos_lease.engine.lease import Lease
from lockfs_paxos_lease.engine.membership import Membership
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format.dblock import NONE, Dblock, encode_host_sector
from lockfs_paxos_lease.format.fresh import fresh_lease
from lockfs_paxos_lease.format.size import MIB
from sim.bench import RESOURCE, SPACE, Bench, Failure
from t1_pure.lease_bench import EX, block, leader, put_leader, put_record, record

WHOLE = MIB
SHORT = 4096
"""Leader, request, and the blocks of six hosts."""


def _reads(bench: Bench, area: Area = Area.LEASE) -> list[int]:
    return [action.length for action in bench.ios if isinstance(action, Read) and action.area is area]


def _used(bench: Bench, member: Membership) -> Lease:
    """Return a lease that a host has had before, so that it has read it as a whole; just now nobody has looked."""
    lease = bench.lease(member)
    bench.run(lease.acquire(EX))
    bench.run(lease.release())
    bench.now += 2
    return lease


@pytest.fixture
def bench() -> Bench:
    return Bench(Timing.sanlock(10))


def test_a_lease_is_read_once_as_a_whole_and_then_as_far_as_there_are_hosts(bench: Bench) -> None:
    member, other = bench.joined(1), bench.joined(4)
    lease = bench.lease(member)
    bench.run(lease.acquire(EX))
    assert _reads(bench) == [WHOLE, SHORT, SHORT]
    assert _reads(bench, Area.LOCKSPACE) == [MIB]
    bench.run(lease.release())
    bench.run(lease.acquire(EX))
    assert _reads(bench) == [SHORT] * 3
    assert not _reads(bench, Area.LOCKSPACE), "the look is young enough"
    bench.run(lease.release())
    bench.run(bench.lease(member).acquire(EX))
    assert _reads(bench) == [SHORT] * 3, "what is known of a lease is known to all who use it"
    assert other.census.highest == 4


def test_a_renewal_is_a_look_and_a_look_is_good_for_a_moment_only(bench: Bench) -> None:
    member = bench.joined(1)
    lease = _used(bench, member)
    bench.run(member.renew())
    for passed, looks in (1.3, []), (0.1, [MIB]):
        bench.now += passed
        bench.run(lease.acquire(EX))
        assert _reads(bench, Area.LOCKSPACE) == looks
        bench.run(lease.release())


@pytest.mark.parametrize("host_id", [7, 1999, 2000])
def test_a_host_that_has_come_is_seen(bench: Bench, host_id: int) -> None:
    member = bench.joined(1)
    lease = _used(bench, member)
    theirs = bench.lease(bench.joined(host_id))
    bench.run(theirs.acquire(EX))
    bench.run(theirs.release())
    assert bench.run(lease.acquire(EX)) == 3
    assert member.census.highest == host_id
    assert block(bench, 1)[0].mbal > block(bench, host_id)[0].mbal
    for length in _reads(bench):
        assert length > bench.geometry.host_offset(host_id)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_read_that_ends_too_late_is_made_again_as_a_whole(bench: Bench, step: int) -> None:
    """Whatever is read then, and only that; later ones are whole at once."""
    lease = _used(bench, bench.joined(1))

    def late(operation: Operation[int]) -> Operation[int]:
        result, number = None, 0
        while True:
            try:
                action: Action = operation.send(result)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            result = yield action
            if not isinstance(action, Read) or action.area is Area.LEASE:
                number += 1
            if number == step + 1:  # the first is to settle
                bench.now += 1.5

    bench.run(late(lease.acquire(EX)))
    reads = {1: [SHORT, WHOLE, WHOLE, WHOLE], 3: [SHORT, SHORT, WHOLE, WHOLE], 5: [SHORT, SHORT, SHORT, WHOLE]}
    assert _reads(bench) == reads[step]


def test_what_is_not_kept_of_a_lease_is_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    member = bench.joined(1)
    lease = _used(bench, member)
    monkeypatch.setattr(census, "LEASES", 1)
    member.census.note(b"another", leader(bench), bytes(MIB))
    bench.run(lease.acquire(EX))
    assert _reads(bench) == [WHOLE, SHORT, SHORT]


def test_a_look_that_fails_shortens_nothing(bench: Bench) -> None:
    lease = _used(bench, bench.joined(1))
    bench.failure = Failure(0, IOTimeout("no answer"), lands=False)
    bench.run(lease.acquire(EX))
    assert _reads(bench, Area.LOCKSPACE) == [MIB]
    assert _reads(bench) == [WHOLE] * 3


def test_a_lease_that_is_older_than_the_lockspace_is_read_as_far_as_it_was_in_use(bench: Bench) -> None:
    start = bench.geometry.host_offset(900)
    ghost = encode_host_sector(Dblock(4900, 4900, 900, 3, 7, lver=1), NONE, 512)
    bench.areas[Area.LEASE][start : start + 512] = ghost
    member = bench.joined(1)
    lease = bench.lease(member)
    bench.run(lease.acquire(EX))
    assert leader(bench).lver == 2, "what was proposed there is settled first"
    bench.run(lease.release())
    bench.run(lease.acquire(EX))
    assert _reads(bench) == [-(-(start + 512) // 4096) * 4096] * 3


def test_another_lease_in_the_place_of_one_is_read_as_a_whole(bench: Bench) -> None:
    lease = _used(bench, bench.joined(1))
    bench.areas[Area.LEASE][:] = fresh_lease(bench.geometry, SPACE, RESOURCE)
    bench.run(lease.acquire(EX))
    assert _reads(bench)[:2] == [SHORT, WHOLE]


def test_a_lease_that_is_for_more_hosts_by_now_is_read_as_a_whole() -> None:
    bench = Bench(Timing.sanlock(10), num_hosts=1000)
    lease = _used(bench, bench.joined(1))
    put_leader(bench, replace(leader(bench), num_hosts=2000))
    bench.run(lease.acquire(EX))
    assert _reads(bench) == [SHORT, WHOLE // 2, WHOLE, SHORT, SHORT]


def test_the_lease_for_few_hosts_is_not_worth_a_look() -> None:
    bench = Bench(Timing.own(16), num_hosts=250)
    lease = _used(bench, bench.joined(1))
    bench.run(lease.acquire(EX))
    assert not _reads(bench, Area.LOCKSPACE)
    assert _reads(bench) == [128 * 1024] * 3


@pytest.mark.parametrize("how", ["left", "torn", "named"])
def test_a_record_counts_as_used_where_it_is_not_as_it_was_made(bench: Bench, how: str) -> None:
    member, gone = bench.joined(1), bench.joined(300)
    if how == "left":
        bench.run(gone.leave())
    elif how == "torn":
        bench.areas[Area.LOCKSPACE][299 * 512 + 100] ^= 1
    else:
        fresh = record(bench, 299)
        put_record(bench, 300, replace(fresh, resource_name=b"somebody"))
    bench.run(member.look())
    assert member.census.highest == 300
    after = member.successor()
    assert after.census.highest == 0
    assert not after.census.is_current(bench.now)


def test_what_a_look_at_a_part_says(bench: Bench) -> None:
    bench.joined(3)
    watch = Census(SPACE, bench.geometry, bench.timing)
    area = bytes(bench.areas[Area.LOCKSPACE])
    watch.take(area[: 8 * 512], 1000.0)
    assert watch.highest == 3
    assert not watch.is_current(1000.0)
    watch.take(area, 1000.0)
    assert watch.is_current(1001.3)
    watch.take(area, 999.0)
    assert watch.is_current(1001.3), "looks may overtake each other"
    assert not watch.is_current(1001.4)
    half = bytearray(area)
    half[1999 * 512] ^= 1
    watch.take(bytes(half), 1001.0)
    assert watch.highest == 2000, "a damaged record"
    watch.take(area, 1002.0)
    assert watch.highest == 2000, "it never falls"


def test_nobody_is_quicker_than_what_is_relied_on() -> None:
    for timing in Timing.sanlock(1), Timing.sanlock(10), Timing.own(2), Timing.own(16):
        for stored in range(512):
            assert timing.short_delay(stored) >= timing.quickest > 0
