"""The engine of paxos-lease: host ids, who gets them and when; renewals; and who is dead."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from lockfs_paxos_lease.engine.actions import Area, IOFailed, Write
from lockfs_paxos_lease.engine.errors import BadArea, Clash, Held, Lost, StorageTrouble
from lockfs_paxos_lease.engine.hosts import State
from lockfs_paxos_lease.engine.membership import CLAIM
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import delta
from sim.bench import Bench, Failure
from t1_pure.lease_bench import EX, SH, TIMINGS, leader, put_leader, put_record, record

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
