"""The engine of paxos-lease, operation by operation: what is read and written, who gets what, and when."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from lockfs_paxos_lease.engine import requests
from lockfs_paxos_lease.engine.actions import Area, DiskError, IOFailed, IOTimeout, Read, Write
from lockfs_paxos_lease.engine.errors import BadArea, Clash, EngineError, Held, Lost, StorageTrouble
from lockfs_paxos_lease.engine.hosts import State
from lockfs_paxos_lease.engine.lease import Lease, Mode
from lockfs_paxos_lease.engine.membership import CLAIM
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import dblock, delta, request
from lockfs_paxos_lease.format.dblock import ModeBlock, decode_host_sector, encode_host_sector
from lockfs_paxos_lease.format.leader import Leader, validate_paxos
from lockfs_paxos_lease.format.size import ALL, Geometry
from sim.bench import RESOURCE, SPACE, Bench, Failure

EX, SH = Mode.EXCLUSIVE, Mode.SHARED
TIMINGS = {"sanlock": Timing.sanlock(1), "own": Timing.own(16)}


@pytest.fixture(params=TIMINGS)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(TIMINGS[request.param])


def leader(bench: Bench) -> Leader:
    return Leader.decode(bytes(bench.areas[Area.LEASE][:512]))


def block(bench: Bench, host_id: int) -> tuple[dblock.Dblock, ModeBlock]:
    start = bench.geometry.host_offset(host_id)
    return decode_host_sector(bytes(bench.areas[Area.LEASE][start : start + bench.geometry.sector]))


def put_leader(bench: Bench, record: Leader) -> None:
    bench.areas[Area.LEASE][:200] = record.encode()


def record(bench: Bench, host_id: int) -> Leader:
    start = bench.geometry.delta_offset(host_id)
    return Leader.decode(bytes(bench.areas[Area.LOCKSPACE][start : start + 512]))


def put_record(bench: Bench, host_id: int, leader: Leader) -> None:
    start = bench.geometry.delta_offset(host_id)
    bench.areas[Area.LOCKSPACE][start : start + 512] = delta.encode(leader, b"", 512)


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
    assert bench.shape == "RWRWRW"
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


# Joining.


def test_a_host_gets_its_host_id_back_at_once(bench: Bench) -> None:
    bench.joined(1, "alpha")
    before = bench.now
    again = bench.membership("alpha")
    bench.run(again.join(1))
    assert again.generation == 2
    assert bench.now - before <= bench.timing.short_delay(bench.timing.stored) + 0.001


def test_a_predecessor_that_may_still_write_is_waited_for(bench: Bench) -> None:
    bench.joined(1, "alpha")
    before = bench.now
    bench.run(bench.membership("alpha").join(1, predecessor_gone=False))
    assert bench.now - before > bench.timing.dead_after(bench.timing.stored)


def test_a_host_id_that_lives_is_a_clash(bench: Bench) -> None:
    alpha = bench.joined(1, "alpha")

    def renew() -> None:
        put_record(bench, 1, replace(record(bench, 1), timestamp=bench.timing.stamp(bench.now)))

    bench.meanwhile = renew
    with pytest.raises(Clash, match="alpha"):
        bench.run(bench.membership("beta").join(1))
    assert alpha.joined


def test_of_two_that_claim_a_free_host_id_one_gets_it(bench: Bench) -> None:
    beta = bench.membership("beta")
    claim = beta.join(1)

    def other_claim() -> None:
        bench.meanwhile = None
        start = bench.geometry.delta_offset(1)
        theirs = replace(record(bench, 1), resource_name=b"alpha")
        bench.areas[Area.LOCKSPACE][start : start + 512] = delta.encode(theirs, b"", 512)

    bench.meanwhile = other_claim
    with pytest.raises(Clash, match="alpha"):
        bench.run(claim)
    assert not beta.joined


def test_a_slow_claim_waits_until_whoever_it_overran_has_found_out() -> None:
    """And does not stand still meanwhile: others would take it over."""
    bench = Bench(Timing.own(16))
    beta = bench.membership("beta")
    operation = beta.join(1)
    action = next(operation)
    while not isinstance(action, Write):
        action = operation.send(bench.do(action))
    bench.now += bench.timing.short_delay(0) * 0.9
    began, changes = bench.now, []
    try:
        while True:
            if isinstance(action, Write):
                changes.append(bench.now)
            action = operation.send(bench.do(action))
    except StopIteration:
        pass
    assert bench.now - began >= bench.timing.long_delay(0)
    assert max(after - before for before, after in itertools.pairwise([*changes, bench.now])) <= bench.timing.renewal
    assert beta.joined


@pytest.mark.parametrize("how", ["claim", "late", "old"])
def test_a_record_under_our_name_that_may_cover_another_host(how: str) -> None:
    """Found by the simulator: a claim or renewal of ours lands late over the record of a host that has it by now."""
    bench = Bench(Timing.own(16))
    alpha = bench.joined(1, "alpha")
    again = bench.membership("alpha")
    if how == "claim":
        again = bench.membership("alpha")
        put_record(bench, 1, replace(record(bench, 1), unused1=CLAIM))
    elif how == "late":
        again = alpha.successor()
        put_record(bench, 1, replace(record(bench, 1), timestamp=bench.timing.stamp(bench.now) + 1))
    else:
        bench.now += bench.timing.margin
    before = bench.now
    bench.run(again.join(1, same_boot=True))
    assert bench.now - before > bench.timing.dead_after(0)


def test_a_successor_in_the_same_process_is_fast_where_nothing_was_written_since(bench: Bench) -> None:
    alpha = bench.joined(1, "alpha")
    bench.now += 100
    with pytest.raises(Lost):
        alpha.check()
    before, after = bench.now, alpha.successor()
    bench.run(after.join(1, same_boot=True))
    assert bench.now - before <= bench.timing.short_delay(bench.timing.stored)
    assert after.generation == 2


@pytest.mark.parametrize(("made", "used"), [("sanlock", "own"), ("own", "sanlock")])
def test_a_lockspace_with_another_timing_is_refused(made: str, used: str) -> None:
    bench = Bench(TIMINGS[made])
    with pytest.raises(BadArea, match="takeover") as bad:
        bench.run(bench.membership("alpha", TIMINGS[used]).join(1))
    assert bad.value.code == -224
    assert bench.shape == "r"
    lease = Bench(TIMINGS[made])
    mixed = lease.lease(lease.joined(1))
    put_leader(lease, replace(leader(lease), version=TIMINGS[used].lease_version))
    with pytest.raises(BadArea, match="takeover"):
        lease.run(mixed.acquire(EX))


def test_a_lockspace_with_another_takeover_time_is_refused() -> None:
    bench = Bench(Timing.own(16))
    with pytest.raises(BadArea, match="takeover=16, not with 10"):
        bench.run(bench.membership("alpha", Timing.own(10)).join(1))


def test_a_successor_resumes(bench: Bench) -> None:
    host = bench.joined(1)
    lease = bench.lease(host)
    bench.run(lease.acquire(EX))
    bench.now += bench.timing.fence * 0.8
    after = bench.membership("host-1")
    assert bench.run(after.resume(1, host.generation))
    assert (after.generation, after.host_id) == (1, 1)
    adopted = bench.lease(after)
    assert bench.run(adopted.adopt()) is EX
    assert adopted.version == 1
    bench.run(adopted.release())
    assert leader(bench).timestamp == 0


@pytest.mark.parametrize("why", ["late", "taken", "renamed", "left"])
def test_a_successor_that_must_not_resume(bench: Bench, why: str) -> None:
    host = bench.joined(1)
    name = "host-1"
    if why == "late":
        bench.now += bench.timing.fence + 1
    elif why == "taken":
        bench.joined(1)
    elif why == "renamed":
        name = "beta"
    else:
        bench.run(host.leave())
    after = bench.membership(name)
    assert not bench.run(after.resume(1, host.generation if why != "taken" else 1))
    assert not after.joined


def test_what_a_dead_lockd_left_half_done_is_not_adopted(bench: Bench) -> None:
    """Given up after each I/O of a shared acquire: the successor holds it shared, or nothing; never exclusively."""
    for ios in range(1, 10):
        bench.__post_init__()
        host = bench.joined(1)
        bench.run_to(bench.lease(host).acquire(SH), ios)
        after = bench.membership("host-1")
        assert bench.run(after.resume(1, host.generation))
        lease = bench.lease(after)
        assert bench.run(lease.adopt()) in (None, SH)
        assert "W" not in bench.shape, "whoever used it may not have been stopped yet"
        bench.run(lease.tidy())
        assert not lease.untidy
        other = bench.lease(bench.joined(2))
        bench.run(other.acquire(SH))


def test_an_exclusive_lease_that_others_share_is_not_adopted(bench: Bench) -> None:
    """lockd dies between the commit and its look at those who share."""
    sharer = bench.lease(bench.joined(2))
    bench.run(sharer.acquire(SH))
    host = bench.joined(1)
    bench.run_to(bench.lease(host).acquire(EX), 6)
    after = bench.membership("host-1")
    assert bench.run(after.resume(1, host.generation))
    lease = bench.lease(after)
    assert bench.run(lease.adopt()) is None
    assert leader(bench).timestamp != 0
    bench.run(lease.tidy())
    assert leader(bench).timestamp == 0


def test_a_late_note_of_a_sharer_takes_no_lease_from_who_was_granted_it(bench: Bench) -> None:
    """Found by the simulator: a fenced host's note lands while lockd is restarted on the host that has the lease."""
    sharer, host = bench.lease(bench.joined(2)), bench.joined(1)
    bench.run(sharer.acquire(SH))
    start = bench.geometry.host_offset(2)
    note = bytes(bench.areas[Area.LEASE][start : start + 512])
    bench.run(sharer.release())
    bench.run(bench.lease(host).acquire(EX))
    bench.areas[Area.LEASE][start : start + 512] = note
    after = bench.membership("host-1")
    assert bench.run(after.resume(1, host.generation))
    assert bench.run(bench.lease(after).adopt(EX)) is EX


# Renewing.


def test_the_own_lease_counts_from_before_the_renewal(bench: Bench) -> None:
    host = bench.joined(1)
    bench.now = host.next_renewal
    operation, action = host.renew(), None
    action = next(operation)
    while not isinstance(action, Write):
        action = operation.send(bench.do(action))
    before = bench.now
    bench.now += 1
    with pytest.raises(StopIteration):
        operation.send(bench.do(action))
    assert host.valid_until == before + bench.timing.fence


def test_a_renewal_that_ends_after_l_revives_nothing(bench: Bench) -> None:
    host = bench.joined(1)
    operation = host.renew()
    action = next(operation)
    while not isinstance(action, Write):
        action = operation.send(bench.do(action))
    result = bench.do(action)
    bench.now = host.valid_until
    with pytest.raises(Lost):
        operation.send(result)
    bench.now -= 1
    with pytest.raises(Lost):
        host.check()


@pytest.mark.parametrize(
    ("change", "code"),
    [({"owner_generation": 9}, -260), ({"resource_name": b"beta"}, -260), ({"timestamp": 99}, -261), ({"magic": 1}, -223),
     ({"space_name": b"X"}, -226)],
)  # fmt: skip
def test_a_record_that_was_overwritten(change: dict[str, object], code: int) -> None:
    bench = Bench()
    host = bench.joined(1)
    put_record(bench, 1, replace(record(bench, 1), **change))  # type: ignore[arg-type]
    with pytest.raises(Lost) as lost:
        bench.run(host.renew())
    assert lost.value.code == code
    with pytest.raises(Lost):
        host.check()


def test_after_a_renewal_of_unknown_outcome_only_the_owner_counts(bench: Bench) -> None:
    for lands in True, False:
        host = bench.joined(1)
        bench.now += 1
        bench.failure = Failure(1, IOFailed("write"), lands)
        with pytest.raises(StorageTrouble):
            bench.run(host.renew())
        bench.now += 1
        bench.run(host.renew())
        bench.run(host.renew())


def test_a_renewal_waits_for_the_end_of_an_earlier_one(bench: Bench) -> None:
    host = bench.joined(1)
    bench.unsettled = True
    with pytest.raises(StorageTrouble):
        bench.run(host.renew())
    assert bench.shape == ""


def test_calls_and_events(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)
    alpha.set_event(2, beta.generation, 17, 0x2222)
    bench.now += 1
    bench.run(alpha.renew())
    seen = bench.run(beta.renew())
    assert seen.callers == [1]
    assert [(event.host_id, event.event, event.data) for event in seen.events] == [(1, 17, 0x2222)]
    bench.now += 1
    assert not bench.run(beta.renew()).callers
    for _ in range(8):
        bench.now += bench.timing.io_timeout
        bench.run(alpha.renew())
        bench.run(beta.renew())
    start = bench.geometry.delta_offset(1)
    assert bench.areas[Area.LOCKSPACE][start + 256 : start + 512] == bytes(256)


# Who is dead.


def test_takeover_comes_after_the_margin_and_not_before(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)
    first, second = bench.lease(alpha), bench.lease(beta)
    bench.run(first.acquire(EX))
    dead_at = beta.hosts.slot(1).last_live + bench.timing.dead_after(bench.timing.stored)  # type: ignore[union-attr]
    while bench.now <= dead_at:
        with pytest.raises(Held):
            bench.run(second.acquire(EX))
        bench.now += bench.timing.renewal / 2
        bench.run(beta.renew())
    assert bench.now - dead_at < bench.timing.renewal
    assert bench.run(second.acquire(EX)) == 2
    with pytest.raises(Lost):
        alpha.check()


def test_who_waits_gets_it_when_the_owner_is_dead(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.membership("host-2")
    first = bench.lease(alpha)
    bench.run(first.acquire(EX))
    bench.run(beta.join(2))
    lease, before = bench.lease(beta), bench.now
    renewals = itertools.count()

    def renew() -> None:
        if next(renewals) % 2:
            beta.last_success = bench.now  # somebody renews

    bench.meanwhile = renew
    bench.run(lease.acquire(EX, wait=True))
    assert 0 < bench.now - before - bench.timing.dead_after(bench.timing.stored) <= 2 * bench.timing.poll


def test_a_late_record_of_an_older_incarnation_frees_nothing(bench: Bench) -> None:
    """It says timestamp 0, as after leaving: sanlock takes that for the end of whoever owns the lease."""
    bench.run(bench.joined(1).leave())
    left = record(bench, 1)
    alpha, beta = bench.joined(1), bench.joined(2)
    bench.run(bench.lease(alpha).acquire(EX))
    put_record(bench, 1, left)
    with pytest.raises(Held):
        bench.run(bench.lease(beta).acquire(EX))


def test_leases_of_an_older_incarnation_are_free(bench: Bench) -> None:
    beta = bench.joined(2)
    bench.run(bench.lease(bench.joined(1)).acquire(EX))
    again = bench.joined(1)
    lease = bench.lease(again)
    assert bench.run(lease.acquire(EX)) == 2
    assert bench.shape == "RWRWRW"
    bench.joined(1)
    assert bench.run(bench.lease(beta).acquire(EX)) == 3


def test_states_of_hosts() -> None:
    bench = Bench(Timing.sanlock(1))
    alpha, beta = bench.joined(1), bench.joined(2)
    hosts = beta.hosts
    assert hosts.state(1, bench.now) is State.UNKNOWN
    bench.now += 1
    bench.run(alpha.renew())
    bench.run(beta.renew())
    assert hosts.state(1, bench.now) is State.LIVE
    assert hosts.state(1, bench.now + 8.1) is State.FAIL
    assert hosts.state(1, bench.now + 68.1) is State.DEAD
    assert hosts.state(3, bench.now) is State.FREE
    bench.run(alpha.leave())
    bench.now += 1
    bench.run(beta.renew())
    assert hosts.state(1, bench.now) is State.FREE


def test_a_sharer_that_came_back_after_the_last_look_is_not_judged_by_it(bench: Bench) -> None:
    """Found by the simulator: it was taken for dead, because its incarnation before was."""
    beta = bench.joined(2)
    bench.joined(1)
    bench.run(beta.renew())
    for _ in range(100):
        bench.now += bench.timing.renewal
        bench.run(beta.renew())
        if beta.hosts.state(1, bench.now) is State.DEAD:
            break
    sharer = bench.lease(bench.joined(1))
    bench.run(sharer.acquire(SH))
    with pytest.raises(Held, match="shared by host id 1"):
        bench.run(bench.lease(beta).acquire(EX))


def test_confirming_the_death_of_a_host(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)
    bench.run(bench.lease(alpha).acquire(EX))
    bench.now += bench.timing.renewal
    bench.run(beta.renew())
    bench.run(beta.confirm_dead(1))
    assert bench.now < bench.timing.dead_after(bench.timing.stored) + 1000
    assert beta.hosts.state(1, bench.now) is State.DEAD
    assert bench.run(bench.lease(beta).acquire(EX)) == 2


def test_a_host_that_renews_is_not_confirmed_dead(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)

    def renew() -> None:
        put_record(bench, 1, replace(record(bench, 1), timestamp=bench.timing.stamp(bench.now)))

    bench.meanwhile = renew
    with pytest.raises(Clash, match="it lives"):
        bench.run(beta.confirm_dead(1))
    assert alpha.joined
    assert beta.hosts.state(1, bench.now) is not State.DEAD


# What is on the disk.


def test_a_lease_given_back_in_the_own_block_only(bench: Bench) -> None:
    """Another host has written the owner into the leader, so the owner does not touch that."""
    alpha, beta = bench.joined(1), bench.joined(2)
    lease = bench.lease(alpha)
    bench.run(lease.acquire(EX))
    put_leader(bench, replace(leader(bench), write_id=2))
    bench.run(lease.release())
    assert leader(bench).timestamp != 0
    assert bench.run(bench.lease(beta).acquire(EX)) == 2


def test_a_leader_that_was_set_back_is_not_believed(bench: Bench) -> None:
    alpha, beta = bench.joined(1), bench.joined(2)
    lease, old = bench.lease(alpha), []
    for _ in range(4):
        bench.run(lease.acquire(EX))
        old.append(leader(bench))
        bench.run(lease.release())
    bench.run(lease.acquire(EX))
    put_leader(bench, replace(old[1], timestamp=0))
    other = bench.lease(beta)
    with pytest.raises(Held):
        bench.run(other.acquire(EX))
    assert leader(bench).owner_id == 1
    assert leader(bench).lver == 5
    put_leader(bench, replace(old[1], timestamp=0))
    bench.run(lease.release())
    assert (leader(bench).lver, leader(bench).timestamp) == (5, 0), "the holder puts it right"
    put_leader(bench, old[0])
    assert bench.run(other.acquire(EX)) >= 6


@pytest.mark.parametrize("host_id", [1, 2, 3])
def test_a_corrupt_block_grants_nothing(bench: Bench, host_id: int) -> None:
    lease = bench.lease(bench.joined(1))
    bench.joined(2)
    good = encode_host_sector(dblock.Dblock(mbal=2003, bal=2003, inp=3, inp2=1, inp3=4, lver=1), dblock.NONE, 512)
    start = bench.geometry.host_offset(host_id)
    bench.areas[Area.LEASE][start : start + 512] = good
    bench.areas[Area.LEASE][start + 1] ^= 1
    with pytest.raises(BadArea) as bad:
        bench.run(lease.acquire(EX))
    assert (bad.value.code, bad.value.offset) == (-214, start)
    assert bench.shape == "R"


@pytest.mark.parametrize("byte", [0, 6, 32, 48, 56, 104, 152, 168])
def test_a_corrupt_leader_grants_nothing(bench: Bench, byte: int) -> None:
    lease = bench.lease(bench.joined(1))
    bench.areas[Area.LEASE][byte] ^= 0xFF
    with pytest.raises(BadArea):
        bench.run(lease.acquire(EX))
    assert bench.shape == "R"


def test_sizes_of_other_lockspaces_are_refused() -> None:
    bench = Bench()
    lease = bench.lease(bench.joined(1))
    put_leader(bench, replace(leader(bench), sector_size=4096, flags=Geometry(4096, 8 << 20).flag))
    with pytest.raises(BadArea, match="sizes"):
        bench.run(lease.acquire(EX))


# What goes wrong.


def _all_ios(mode: Mode) -> int:
    return {EX: 6, SH: 9}[mode]


CASES = [(mode, step) for mode in (EX, SH) for step in range(_all_ios(mode))]


@pytest.mark.parametrize("error", [IOFailed("x"), IOTimeout("x"), None], ids=["error", "hang", "given-up"])
@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize(("mode", "step"), CASES, ids=[f"{mode.value}-{step}" for mode, step in CASES])
def test_each_io_of_an_acquire_goes_wrong(
    bench: Bench, mode: Mode, step: int, error: DiskError | None, lands: bool
) -> None:
    """Nothing is granted; after tidying up, another host gets it; the own block is not zeroed."""
    alpha, beta = bench.joined(1), bench.joined(2)
    lease = bench.lease(alpha)
    if error is None:
        bench.run_to(lease.acquire(mode), step + lands)
    else:
        bench.failure = Failure(step, error, lands)
        with pytest.raises(StorageTrouble):
            bench.run(lease.acquire(mode))
    assert lease.mode is None
    assert lease.untidy or step + lands <= 1, "after the first write something may be there"
    bench.run(lease.tidy())
    assert not lease.untidy
    own, shared = block(bench, 1)
    assert not shared.is_shared
    assert own == dblock.NEVER or own.mbal
    other = bench.lease(beta)
    assert bench.run(other.acquire(EX)) >= 1
    bench.run(other.release())
    bench.run(lease.acquire(EX))


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("what", ["release", "convert"])
def test_each_io_of_giving_back_goes_wrong(bench: Bench, what: str, step: int, lands: bool) -> None:
    lease, other = bench.lease(bench.joined(1)), bench.lease(bench.joined(2))
    bench.run(lease.acquire(EX))
    bench.failure = Failure(step, IOFailed("x"), lands)
    with pytest.raises(StorageTrouble):
        bench.run(lease.release() if what == "release" else lease.convert(SH))
    assert lease.untidy
    assert lease.mode is (None if what == "release" else SH)
    bench.run(lease.tidy())
    if what == "convert":
        with pytest.raises(Held):
            bench.run(other.acquire(EX))
        bench.run(other.acquire(SH))
        bench.run(lease.release())
    else:
        bench.run(other.acquire(EX))


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize("step", range(7))
def test_a_conversion_that_goes_wrong_stays_shared(bench: Bench, step: int, lands: bool) -> None:
    lease, other = bench.lease(bench.joined(1)), bench.lease(bench.joined(2))
    bench.run(lease.acquire(SH))
    bench.failure = Failure(step, IOFailed("x"), lands)
    with pytest.raises(StorageTrouble):
        bench.run(lease.convert(EX))
    assert lease.mode is SH
    bench.run(lease.tidy())
    with pytest.raises(Held):
        bench.run(other.acquire(EX))
    bench.run(other.acquire(SH))


def test_nothing_is_sent_before_an_earlier_write_has_ended(bench: Bench) -> None:
    lease = bench.lease(bench.joined(1))
    bench.unsettled = True
    with pytest.raises(StorageTrouble):
        bench.run(lease.acquire(EX))
    assert bench.shape == ""


def test_a_release_after_l_writes_nothing(bench: Bench) -> None:
    alpha = bench.joined(1)
    lease = bench.lease(alpha)
    bench.run(lease.acquire(EX))
    bench.now = alpha.valid_until
    bench.run(lease.release())
    assert bench.shape == ""
    assert leader(bench).timestamp != 0


def test_a_ballot_is_void_if_the_leader_has_changed(bench: Bench) -> None:
    """Found by the simulator: who was stopped before its first write, when others had been there meanwhile, and a sanlock
    had then zeroed the block that would have told.
    """
    alpha, beta = bench.joined(1), bench.joined(2)
    lease, other = bench.lease(alpha), bench.lease(beta)
    operation = lease.acquire(EX)
    action = next(operation)
    while not isinstance(action, Write):
        action = operation.send(bench.do(action))
    bench.run(other.acquire(EX))
    bench.run(other.release())
    start = bench.geometry.host_offset(2)
    zeroed = dblock.encode_host_sector(dblock.Dblock(flags=dblock.RELEASED), dblock.NONE, 512)
    bench.areas[Area.LEASE][start : start + 512] = zeroed
    got = None
    while got is None:
        try:
            action = operation.send(bench.do(action))
        except StopIteration as done:
            got = done.value
    assert got == leader(bench).lver == 2


def test_our_wish_from_an_earlier_attempt_is_not_a_grant(bench: Bench) -> None:
    """It failed after phase 2; another host has committed it since, and others saw it released."""
    alpha, beta = bench.joined(1), bench.joined(2)
    lease = bench.lease(alpha)
    bench.failure = Failure(5, IOFailed("x"), False)
    with pytest.raises(StorageTrouble):
        bench.run(lease.acquire(EX))
    bench.run(lease.tidy())
    other = bench.lease(beta)
    assert bench.run(other.acquire(EX)) == 2, "version 1 went to the wish that nobody has any more"
    assert leader(bench).owner_id == 2
    with pytest.raises(Held):
        bench.run(lease.acquire(EX))


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
