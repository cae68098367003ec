"""The engine of paxos-lease: its times, how much it reads and writes, and what hosts ask of each other."""

from __future__ import annotations

import itertools

import pytest
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.actions import Area, Read
from lockfs_paxos_lease.engine.errors import BadArea, EngineError, Held
from lockfs_paxos_lease.engine.hosts import State
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import dblock, request
from lockfs_paxos_lease.format.leader import validate_paxos
from lockfs_paxos_lease.format.size import ALL, Geometry
from sim.bench import RESOURCE, SPACE, Bench
from t1_pure.lease_bench import EX, SH, block, leader, record

# Timing.


def test_the_times_of_sanlock() -> None:
    for t, renewal, fence, dead in (1, 2, 8, 68), (10, 20, 80, 140):
        timing = Timing.sanlock(t)
        assert (timing.renewal, timing.fence, timing.dead_after(t), timing.short_delay(t)) == (renewal, fence, dead, 2 * t)
        assert timing.dead_after(20) == 220, "another host is judged by its own io_timeout"
        assert timing.stamp(12.9) == 12


def test_own_times_keep_their_promise() -> None:
    for seconds in 2, 10, 16, 60:
        timing = Timing.own(seconds)
        assert timing.renewal + timing.dead_after(0) + timing.poll < seconds
        assert timing.fence * 1.03 + timing.margin / 2 < timing.dead_after(0) / 1.03
        assert timing.short_delay(10) * 2 <= max(1, seconds / 16)
        assert Timing.own(seconds).delta_version == timing.lease_version != Timing.own(seconds + 1).delta_version


@pytest.mark.parametrize("bad", [0, 1.9, 7000])
def test_a_takeover_time_that_cannot_be(bad: float) -> None:
    with pytest.raises(ValueError):
        Timing.own(bad)


# How much I/O.


def test_ios_of_a_membership(bench: Bench) -> None:
    host = bench.membership("alpha")
    bench.run(host.join(1))
    assert bench.shape == "rwr"
    assert host.generation == 1
    bench.run(host.renew())
    assert bench.shape == "rw"
    bench.run(host.leave())
    assert bench.shape == "w"
    assert record(bench, 1).timestamp == 0


def test_ios_of_leases(bench: Bench) -> None:
    lease = bench.lease(bench.joined(1))
    other = bench.lease(bench.joined(2))
    assert bench.run(lease.acquire(EX)) == 1
    assert bench.shape == "rRWRWRW", "a look at who there is, since the one before has been too long ago"
    with pytest.raises(Held) as held:
        bench.run(other.acquire(EX))
    assert held.value.host_id == 1
    assert bench.shape == "Rr"
    bench.run(lease.convert(SH))
    assert bench.shape == "WRW"
    assert leader(bench).timestamp == 0
    bench.run(lease.convert(EX))
    assert bench.shape == "RWRWRWW"
    bench.run(lease.release())
    assert bench.shape == "WRW"
    bench.run(lease.acquire(SH))
    assert bench.shape == "RWRWRWWRW"
    bench.run(other.acquire(SH))
    assert bench.shape == "RWRWRWWRW"
    with pytest.raises(Held) as held:
        bench.run(lease.convert(EX))
    assert held.value.code == -11
    assert lease.mode is SH
    bench.run(other.release())
    assert bench.shape == "W"
    with pytest.raises(Held) as held:
        bench.run(other.acquire(EX))
    assert bench.shape == "RWRWRWRWRW"
    assert block(bench, 1)[1].is_shared


def test_a_lease_for_few_hosts_is_read_in_small_pieces() -> None:
    bench = Bench(num_hosts=6)
    lease = bench.lease(bench.joined(1))
    bench.run(lease.acquire(EX))
    assert [action.length for action in bench.ios if isinstance(action, Read)] == [4096] * 3


@pytest.mark.parametrize("geometry", ALL, ids=str)
def test_all_sizes(geometry: Geometry) -> None:
    bench = Bench(geometry=geometry)
    first, second = bench.lease(bench.joined(1)), bench.lease(bench.joined(geometry.max_hosts))
    bench.run(first.acquire(EX))
    with pytest.raises(Held):
        bench.run(second.acquire(SH))
    bench.run(first.release())
    assert bench.run(second.acquire(SH)) == 2
    assert block(bench, geometry.max_hosts)[1].is_shared
    with pytest.raises(Held):
        bench.run(first.acquire(EX))


def test_the_watch_reads_as_far_as_hosts_are_known_and_now_and_then_all() -> None:
    bench = Bench(Timing.own(16))
    alpha = bench.joined(1)
    lengths = []
    for _ in range(6):
        bench.now += 1
        bench.run(alpha.renew())
        lengths += [action.length for action in bench.ios if isinstance(action, Read)]
    assert lengths[0] == 4096
    assert max(lengths) >= bench.geometry.max_hosts * 512
    assert alpha.hosts.state(700, bench.now) is State.FREE
    far = bench.joined(700)
    for _ in range(5):
        bench.now += 1
        bench.run(far.renew())
        bench.run(alpha.renew())
    assert alpha.hosts.state(700, bench.now) is State.LIVE


def test_the_worked_example() -> None:
    bench = Bench()
    first, second = bench.lease(bench.joined(1)), bench.lease(bench.joined(2))
    bench.run(first.acquire(EX))
    assert (leader(bench).lver, leader(bench).owner_id, leader(bench).write_id) == (1, 1, 1)
    assert block(bench, 1)[0].mbal == 1
    bench.run(first.release())
    assert (leader(bench).lver, leader(bench).owner_id, leader(bench).timestamp) == (1, 1, 0)
    assert block(bench, 1)[0].flags == dblock.RELEASED
    bench.run(second.acquire(EX))
    assert block(bench, 2)[0].mbal == 2002
    assert leader(bench).lver == 2


def test_a_version_that_is_not_there() -> None:
    bench = Bench()
    lease = bench.lease(bench.joined(1))
    with pytest.raises(EngineError, match="-240"):
        bench.run(lease.acquire(EX, version=7))
    assert bench.shape == "R"


# Requests.


def test_requests(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)
    lease, theirs = bench.lease(alpha), bench.lease(beta)
    assert not bench.run(requests.make(theirs.area, request.GRACEFUL)), "nobody has it"
    assert bench.shape == "R"
    bench.run(lease.acquire(EX))
    assert bench.run(requests.pending(lease)) is None
    assert bench.run(requests.make(theirs.area, request.GRACEFUL))
    assert bench.shape == "RRW"
    bench.now += 1
    bench.run(beta.renew())
    assert bench.run(alpha.renew()).callers
    asked = bench.run(requests.pending(lease))
    assert asked is not None
    assert (asked.lver, asked.force_mode) == (2, request.GRACEFUL)
    with pytest.raises(EngineError, match="-272"):
        bench.run(requests.make(theirs.area, request.FORCE, 1))
    bench.run(requests.make(theirs.area, request.FORCE, 5))
    with pytest.raises(EngineError, match="-273"):
        bench.run(requests.make(theirs.area, request.FORCE, 4))
    bench.run(requests.make(theirs.area, 0, 0))
    assert bench.run(requests.pending(lease)) is None


def test_nobody_is_asked_to_let_go_of_what_is_shared(bench: Bench) -> None:
    lease, theirs = bench.lease(bench.joined(1)), bench.lease(bench.joined(2))
    bench.run(lease.acquire(EX))
    bench.run(requests.make(theirs.area, request.FORCE))
    assert bench.run(requests.pending(lease)) is not None
    bench.run(lease.convert(SH))
    assert bench.run(requests.pending(lease)) is None


def test_a_lease_that_is_retired_is_nobodys_any_more(bench: Bench) -> None:
    """Nor that of a host that was in the middle of a ballot for it."""
    for steps in itertools.count(1):
        fresh = Bench(bench.timing)
        lease, early = fresh.lease(fresh.joined(1)), fresh.lease(fresh.joined(2))
        under_way = early.acquire(EX)
        action = next(under_way)
        try:
            for _ in range(steps):
                action = under_way.send(fresh.do(action))
        except StopIteration:
            break
        try:
            fresh.run(lease.acquire(EX))
            fresh.run(lease.retire())
        except Held:
            continue  # the early one has come so far that it is the owner
        before = bytes(fresh.areas[Area.LEASE][:200])
        with pytest.raises((BadArea, Held)):
            fresh.go_on(under_way, action)
        assert bytes(fresh.areas[Area.LEASE][:200]) == before, "it is deleted for good"
        for again in early, lease:
            with pytest.raises(BadArea, match="deleted"):
                fresh.run(again.acquire(EX))
    assert steps > 4


@pytest.mark.parametrize("mode", [SH, None])
def test_what_is_not_held_exclusively_is_not_retired(bench: Bench, mode: Mode | None) -> None:
    lease = bench.lease(bench.joined(1))
    if mode is not None:
        bench.run(lease.acquire(mode))
    with pytest.raises(EngineError, match="exclusively"):
        bench.run(lease.retire())


def test_who_has_it(bench: Bench) -> None:
    alpha, beta = bench.joined(1, "alpha"), bench.joined(2, "beta")
    bench.run(alpha.renew())
    lease, theirs = bench.lease(alpha), bench.lease(beta)
    assert bench.run(requests.inspect(theirs.area))[1] == []
    bench.run(lease.acquire(EX))
    assert [(one.host_id, one.shared, one.name) for one in bench.run(requests.inspect(theirs.area))[1]] == [(1, False, b"alpha")]
    bench.run(lease.convert(SH))
    bench.run(theirs.acquire(SH))
    assert [(one.host_id, one.shared, one.name) for one in bench.run(requests.inspect(lease.area))[1]] == [
        (1, True, b"alpha"), (2, True, b"beta"),
    ]  # fmt: skip
    validate_paxos(leader(bench), SPACE, RESOURCE, 1, wanted=bench.timing.lease_version)


def test_more_hosts_may_use_a_lease() -> None:
    bench = Bench(num_hosts=2)
    with pytest.raises(BadArea, match="-228"):
        bench.run(bench.lease(bench.joined(3)).acquire(EX))
    lease = bench.lease(bench.joined(1))
    bench.run(lease.acquire(EX, num_hosts=10))
    bench.run(lease.release())
    late: Lease = bench.lease(bench.joined(3))
    assert bench.run(late.acquire(EX)) == 2
    assert leader(bench).num_hosts == 10
