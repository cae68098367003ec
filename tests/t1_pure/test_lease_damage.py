"""The engine of paxos-lease: what is wrong on the disk, and each I/O that goes wrong, grants nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lockfs_paxos_lease.engine.actions import Area, DiskError, IOFailed, IOTimeout, Write
from lockfs_paxos_lease.engine.errors import BadArea, Held, StorageTrouble
from lockfs_paxos_lease.engine.lease import Mode
from lockfs_paxos_lease.format import dblock
from lockfs_paxos_lease.format.dblock import encode_host_sector
from lockfs_paxos_lease.format.size import Geometry
from sim.bench import Bench, Failure
from t1_pure.lease_bench import EX, SH, block, leader, put_leader

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
    member = bench.joined(1)
    lease = bench.lease(member)
    bench.joined(2)
    bench.run(member.look())
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
    bench.run(alpha.look())  # what fails in that is in `test_lease_census`
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
