"""`lockfs lease check` finds every byte that is not what it was, but for those of which nobody can tell.

Each byte of each record that is in use is changed in turn, once as a whole and once in its lowest bit.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from lockfs_paxos_lease.check import index, lease, lockspace
from lockfs_paxos_lease.check.finding import Level, Remedy
from lockfs_paxos_lease.format import delta, rindex, version
from lockfs_paxos_lease.format.dblock import NONE, RELEASED, SHARED, Dblock, ModeBlock, encode_host_sector
from lockfs_paxos_lease.format.fresh import cleared_lease, fresh_lease, fresh_lockspace, fresh_rindex
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import ALL, MIB, Geometry

SMALL = Geometry(4096, MIB)
PLAIN = Geometry()
SPACE, NAME = b"LS", b"image"
GENERATIONS = {1: 1, 2: 1}


def put(area: bytes, offset: int, data: bytes) -> bytes:
    return area[:offset] + data + area[offset + len(data) :]


def a_lockspace(geometry: Geometry = SMALL, word: int = version.DELTA) -> bytes:
    """Hosts 1 and 2 are in it, host 2 calls host 1."""
    area, first = fresh_lockspace(geometry, SPACE, 10, word)
    area = put(area, 0, first)
    for host_id, name, calls in ((1, b"alpha", ()), (2, b"beta", (1,))):
        record = replace(
            Leader.decode(first), owner_id=host_id, owner_generation=1, resource_name=name, timestamp=3565
        )
        sector = delta.encode(record, delta.bitmap_of(calls), geometry.sector)
        area = put(area, geometry.delta_offset(host_id), sector)
    return area


def a_lease(geometry: Geometry = PLAIN, *, shared: bool = False, word: int = version.PAXOS) -> bytes:
    """Host 2 has had it as version 1; host 1 has it since as version 2, or shares it."""
    area = fresh_lease(geometry, SPACE, NAME, version=word)
    ballot = geometry.max_hosts + 1
    blocks = {
        2: (Dblock(2, 2, 2, 1, 3500, 1, RELEASED), NONE),
        1: (
            Dblock(ballot, ballot, 1, 1, 3566, 2, RELEASED if shared else 0),
            ModeBlock(SHARED, 1) if shared else NONE,
        ),
    }
    leader = replace(
        Leader.decode(area), owner_id=1, owner_generation=1, lver=2, timestamp=0 if shared else 3566,
        write_id=1, write_generation=1, write_timestamp=3566,
    )  # fmt: skip
    area = put(area, 0, leader.encode())
    for host_id, block in blocks.items():
        area = put(area, geometry.host_offset(host_id), encode_host_sector(*block, geometry.sector))
    return area


def space_of(area: bytes, geometry: Geometry = SMALL) -> Leader:
    return lockspace.consensus(lockspace.records(area, geometry))


@functools.cache
def common(geometry: Geometry) -> Leader:
    return space_of(a_lockspace(geometry), geometry)


def check_lease(area: bytes, geometry: Geometry = PLAIN) -> list[object]:
    return list(lease.check(area, geometry, common(geometry), GENERATIONS))


CHANGES = {"all": 0xFF, "low": 0x01}


def flipped(area: bytes, at: int, how: str) -> bytes:
    return put(area, at, bytes([area[at] ^ CHANGES[how]]))


def missed(area: bytes, places: range, check: object, how: str, start: int = 0) -> set[int]:
    """Return the bytes of *places*, counted from *start*, whose change is not found."""
    return {at for at in places if not check(flipped(area, start + at, how))}  # type: ignore[operator]


# What nobody can tell, and why that gives nobody a lock that he should not have:
EVENT = set(range(176, 200))
"""An event of a host: any number makes sense, and none is about locks."""
CALLS = set(range(256, 288))
"""Whom a host calls: who is called for nothing looks, and finds nothing.  (Bits of 250 hosts; more do not exist.)"""
WHEN = set(range(192, 200))
"""When a leader was written: for people."""
GARBAGE = set(range(56, 128)) | {132, 133, 134, 135}
"""Where sanlock itself leaves garbage."""


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("host_id", [2, 250], ids=["used", "free"])
def test_every_byte_of_a_host_record(host_id: int, how: str) -> None:
    area = a_lockspace()
    start = SMALL.delta_offset(host_id)
    found = missed(area, range(288), lambda data: lockspace.check(data, SMALL), how, start)
    assert found <= EVENT | CALLS
    # Beyond the record and its bitmap a sample: the whole sector is checked at once.
    assert not missed(area, range(512, 4096, 997), lambda data: lockspace.check(data, SMALL), how, start)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("shared", [False, True], ids=["held", "shared"])
def test_every_byte_of_a_leader_record(shared: bool, how: str) -> None:
    assert missed(a_lease(shared=shared), range(512), check_lease, how) <= WHEN


@pytest.mark.parametrize("how", CHANGES)
def test_every_byte_of_a_request_record(how: str) -> None:
    assert not missed(a_lease(), range(20), check_lease, how, PLAIN.sector) - {8}
    # That the next version is asked for, without saying how, asks for nothing; the one after that is in the way.
    assert check_lease(put(a_lease(), PLAIN.sector + 8, b"\x04"))


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("shared", [False, True], ids=["held", "shared"])
@pytest.mark.parametrize("host_id", [1, 2])
def test_every_byte_of_a_hosts_block(host_id: int, shared: bool, how: str) -> None:
    start = PLAIN.host_offset(host_id)
    cannot_tell = set(GARBAGE)
    if host_id == 2 or shared:
        # Who is not the owner any more has let go, or lost the ballot; who shares has given back its own, or not yet.
        cannot_tell.add(52)
    assert missed(a_lease(shared=shared), range(144), check_lease, how, start) <= cannot_tell


@pytest.mark.parametrize("how", CHANGES)
def test_every_byte_of_a_block_that_was_never_written(how: str) -> None:
    start = PLAIN.host_offset(3)
    found = missed(a_lease(), range(144), check_lease, how, start)
    assert found <= GARBAGE | ({52} if how == "low" else set())


def an_index() -> tuple[bytes, dict[int, Leader]]:
    header = rindex.Header.of(PLAIN, SPACE, MIB, 8)
    area = fresh_rindex(header)
    leaders = {2 * MIB: Leader.decode(fresh_lease(PLAIN, SPACE, rindex.LEASE_NAME))}
    for number, name in enumerate((b"one", b"two")):
        offset = header.resource_offset(number)
        area = put(area, header.entry_offset(number), rindex.Entry(offset, name).encode())
        leaders[offset] = Leader.decode(fresh_lease(PLAIN, SPACE, name))
    return area, leaders


@pytest.mark.parametrize("how", CHANGES)
def test_every_byte_of_an_index(how: str) -> None:
    area, leaders = an_index()

    def check(data: bytes) -> list[object]:
        return list(index.check(data, MIB, PLAIN, leaders, common(PLAIN)))

    assert check(area) == []
    entries = range(PLAIN.sector, PLAIN.sector + 2 * rindex.ENTRY_SIZE)
    # How many leases there may be can be any number that there is room for.
    assert missed(area, range(PLAIN.sector), check, how) <= {16, 17}
    assert not missed(area, entries, check, how)
    # In a free entry flags mean nothing.
    free = range(entries.stop, entries.stop + rindex.ENTRY_SIZE)
    assert missed(area, free, check, how) == set(range(free.start + 8, free.start + 16))


@pytest.mark.parametrize("geometry", ALL, ids=str)
def test_what_is_right_is_found_to_be(geometry: Geometry) -> None:
    assert lockspace.check(a_lockspace(geometry), geometry) == []
    for area in (
        fresh_lease(geometry, SPACE, NAME),
        cleared_lease(geometry, SPACE, NAME, 4711),
        a_lease(geometry),
        a_lease(geometry, shared=True),
    ):
        assert lease.check(area, geometry, common(geometry), GENERATIONS) == []
        assert lease.check(area, geometry) == []


def test_a_lockspace_with_a_timing_of_its_own() -> None:
    word = version.own(16)
    area = a_lockspace(PLAIN, word)
    assert lockspace.check(area, PLAIN) == []
    space = space_of(area, PLAIN)
    assert lease.check(a_lease(word=word), PLAIN, space, GENERATIONS) == []
    (finding,) = [each for each in lease.check(a_lease(), PLAIN, space) if each.level is Level.ERROR]
    assert finding.what == "it is used with takeover=sanlock, not with 16"


def test_a_lease_of_another_lockspace() -> None:
    (finding,) = lease.check(a_lease(), PLAIN, replace(common(PLAIN), space_name=b"OTHER"))
    assert finding.code == -226


def test_an_old_leader_record_is_found() -> None:
    """As a storage leaves it that has lost a write: the ballots know of a later version."""
    area = put(a_lease(), 0, fresh_lease(PLAIN, SPACE, NAME)[:200])
    assert [finding.host_id for finding in lease.check(area, PLAIN) if finding.level is Level.ERROR] == [1]


def test_hosts_may_agree_on_another_io_timeout_than_the_maker_of_the_lockspace() -> None:
    area = a_lockspace()
    for host_id in (1, 2):
        area = put(area, SMALL.delta_offset(host_id) + 174, b"\x01")
    assert lockspace.check(area, SMALL) == []
    record = replace(Leader.decode(area), owner_id=3, resource_name=b"gamma", io_timeout=10)
    area = put(area, SMALL.delta_offset(3), delta.encode(record, b"", SMALL.sector))
    (finding,) = lockspace.check(area, SMALL)
    assert (finding.level, finding.host_id) == (Level.WARNING, 3)


def test_cloned_machines_are_found() -> None:
    area = a_lockspace()
    record, bitmap = lockspace.records(area, SMALL)[0]
    twin = replace(record, owner_id=7)
    area = put(area, SMALL.delta_offset(7), delta.encode(twin, bitmap, SMALL.sector))
    (finding,) = lockspace.check(area, SMALL)
    assert (finding.level, finding.host_id) == (Level.WARNING, 7)


def test_what_can_be_mended_is_told() -> None:
    for at, remedy in (
        (0, Remedy.NONE),
        (PLAIN.sector, Remedy.REQUEST),
        (PLAIN.host_offset(2), Remedy.BALLOT),
    ):
        errors = [each for each in lease.check(flipped(a_lease(), at, "all"), PLAIN) if each.level is Level.ERROR]
        assert remedy in [each.remedy for each in errors]
    (finding,) = lockspace.check(flipped(a_lockspace(), SMALL.delta_offset(2) + 152, "all"), SMALL)
    assert finding.remedy is Remedy.HOST
