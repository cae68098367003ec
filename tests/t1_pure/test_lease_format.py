"""The records of leases, byte by byte.  The bytes expected here were read from areas that sanlock 3.8.5 wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lockfs_paxos_lease.format import delta, names, rindex, scan, version
from lockfs_paxos_lease.format.checksum import checksum
from lockfs_paxos_lease.format.dblock import (
    NEVER,
    NONE,
    RELEASED,
    SHARED,
    Dblock,
    ModeBlock,
    decode_host_sector,
    encode_host_sector,
)
from lockfs_paxos_lease.format.errors import BadRecord, Code
from lockfs_paxos_lease.format.fresh import cleared_lease, fresh_lease, fresh_lockspace, fresh_rindex
from lockfs_paxos_lease.format.leader import (
    CHECKED,
    DELTA_MAGIC,
    PAXOS_MAGIC,
    SIZE,
    Leader,
    validate_delta,
    validate_paxos,
)
from lockfs_paxos_lease.format.request import FORCE, Request
from lockfs_paxos_lease.format.size import ALL, MIB, Geometry

SMALL = Geometry(512, MIB)
U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
NAME = st.binary(max_size=names.SIZE).map(lambda name: name.rstrip(b"\0"))


def sparse(size: int, **at: bytes | str) -> bytes:
    """Return zeros with these bytes in them, each under its offset: ``x0038=b"LS"``, or as hexadecimal digits."""
    data = bytearray(size)
    for key, value in at.items():
        part = bytes.fromhex(value) if isinstance(value, str) else value
        offset = int(key[1:], 16)
        data[offset : offset + len(part)] = part
    return bytes(data)


# What sanlock writes ---------------------------------------------------------------------------

ALPHA = sparse(
    512,
    x0000="10202112 04000300 10000000 00020000",
    x0018="0100000000000000 0100000000000000 0100000000000000",
    x0038=b"LS",
    x0068=b"alpha",
    x0098="ed0d",
    x00a8="b8b0a21a 0000 0100",
)


def test_a_delta_lease_as_sanlock_writes_it() -> None:
    record = Leader(
        DELTA_MAGIC, version.DELTA, SMALL.flag, 512, max_hosts=1, owner_id=1, owner_generation=1,
        space_name=b"LS", resource_name=b"alpha", timestamp=3565, io_timeout=1,
    )  # fmt: skip
    assert delta.encode(record, b"", 512) == ALPHA
    leader, bitmap = delta.decode(ALPHA)
    assert leader == record.sealed()
    assert delta.called(bitmap) == []
    validate_delta(leader, b"LS")


def test_a_delta_lease_with_an_event_as_sanlock_writes_it() -> None:
    bits = delta.bitmap_of([2])
    record = replace(Leader.decode(ALPHA), timestamp=0x0DEF, write_id=1, write_generation=17, write_timestamp=0x2222)
    expected = sparse(512, x0098="ef0d", x00a8="b5dd56fb", x00b0="01", x00b8="11", x00c0="2222", x0100="02")
    made = delta.encode(record, bits, 512)
    for offset in (0x98, 0xA8, 0xB0, 0xB8, 0xC0, 0x100):
        assert made[offset : offset + 2] == expected[offset : offset + 2]
    assert delta.called(bits) == [2]


def test_another_host_and_a_host_that_never_was() -> None:
    beta = replace(Leader.decode(ALPHA), owner_id=2, resource_name=b"beta")
    assert beta.encode()[0xA8:0xAC].hex() == "ccd7e131"
    area, sector = fresh_lockspace(SMALL, b"LS", io_timeout=1)
    assert sector[0xA8:0xAC].hex() == "c074f1b0"
    assert area[512:1024] == sector


RES1 = {
    "fresh": ({}, "4c7f21e0"),
    "owned by 1": (
        {"owner_id": 1, "owner_generation": 1, "lver": 1, "timestamp": 3566,
         "write_id": 1, "write_generation": 1, "write_timestamp": 3566}, "e8780ee8",
    ),
    "released": (
        {"owner_id": 1, "owner_generation": 1, "lver": 1, "write_id": 1, "write_generation": 1, "write_timestamp": 3566},
        "bc2ce44d",
    ),
    "owned by 2": (
        {"owner_id": 2, "owner_generation": 1, "lver": 2, "timestamp": 3566,
         "write_id": 2, "write_generation": 1, "write_timestamp": 3566}, "efa91aa1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("state", RES1)
def test_a_paxos_leader_as_sanlock_writes_it(state: str) -> None:
    fields, sum_ = RES1[state]
    fresh = Leader(PAXOS_MAGIC, version.PAXOS, 0x10, 512, 2000, 2000, space_name=b"LS", resource_name=b"RES1")
    made = replace(fresh, **fields).encode()  # type: ignore[arg-type]
    assert made[:0x20].hex() == "10201506040006001000000000020000d007000000000000d007000000000000"
    assert made[0x38:0x3A] == b"LS"
    assert made[0x68:0x6C] == b"RES1"
    assert made[0xA8:0xAC].hex() == sum_
    validate_paxos(Leader.decode(made), b"LS", b"RES1", 2000)


def test_host_sectors_as_sanlock_writes_them() -> None:
    one = sparse(
        512, x0000="01", x0008="01", x0010="01", x0018="01", x0020="ee0d", x0028="01", x0030="5beb8c61"
    )  # fmt: skip
    two = sparse(
        512, x0000="d207", x0008="d207", x0010="02", x0018="01", x0020="ee0d", x0028="02", x0030="ad406839"
    )  # fmt: skip
    first = Dblock(mbal=1, bal=1, inp=1, inp2=1, inp3=3566, lver=1)
    second = Dblock(mbal=2002, bal=2002, inp=2, inp2=1, inp3=3566, lver=2)
    assert encode_host_sector(first, NONE, 512) == one
    assert encode_host_sector(second, NONE, 512) == two
    assert decode_host_sector(one) == (first.sealed(), NONE)
    released = encode_host_sector(replace(first, flags=RELEASED), NONE, 512)
    assert [at for at in range(512) if released[at] != one[at]] == [0x34]
    shared = encode_host_sector(replace(first, flags=RELEASED), ModeBlock(SHARED, 1), 512)
    assert shared[0x80:0x90].hex() == "01000000000000000100000000000000"
    assert decode_host_sector(shared)[1].is_shared


def test_a_ballot_block_of_zeros() -> None:
    assert NEVER.is_valid
    assert decode_host_sector(bytes(512)) == (NEVER, NONE)
    written = Dblock().sealed()
    assert written.checksum == 0xCB5AD842
    assert written.is_valid
    assert not replace(written, checksum=1).is_valid
    # Only five of the fields make sanlock look at the checksum.
    assert replace(NEVER, inp2=1, inp3=1, flags=RELEASED).is_valid
    for field in ("mbal", "bal", "inp", "lver"):
        assert not replace(NEVER, **{field: 1}).is_valid  # type: ignore[arg-type]


def test_a_host_sector_with_garbage_in_it_means_the_same() -> None:
    dblock, mode = Dblock(7, 7, 7, 1, 99, 3, RELEASED), ModeBlock(SHARED, 5)
    sector = bytearray(encode_host_sector(dblock, mode, 512))
    for offset in (*range(56, 128), *range(132, 136), *range(144, 512)):
        sector[offset] = 0xA5
    assert decode_host_sector(bytes(sector)) == (dblock.sealed(), mode)


def test_a_request_as_sanlock_writes_it() -> None:
    assert Request(9, 0).encode(512) == sparse(512, x0="1120290801000100 0900000000000000")
    assert Request.decode(Request(9, FORCE).encode(4096)) == Request(9, FORCE)


def test_an_index_as_sanlock_writes_it() -> None:
    header = rindex.Header.of(SMALL, b"LS", MIB)
    entries = [rindex.Entry(3 * MIB, b"RES1"), rindex.Entry(4 * MIB, b"RES2")]
    area = bytearray(fresh_rindex(header))
    for number, entry in enumerate(entries):
        start = header.entry_offset(number)
        area[start : start + 64] = entry.encode()
    expected = sparse(
        MIB,
        x0000="18200401 02000100 01000000 00020000 00100000 00000000 0000100000000000",
        x0020=b"LS",
        x0200="0000300000000000",
        x0210=b"RES1",
        x0240="0000400000000000",
        x0250=b"RES2",
    )
    assert bytes(area) == expected
    read = rindex.Header.decode(expected)
    assert read == header
    read.validate(b"LS", MIB)
    assert list(rindex.entries(expected, read)) == list(enumerate(entries))
    assert rindex.first_free(expected, read) == 2
    assert [read.resource_offset(number) for number in (0, 1, 2048)] == [3 * MIB, 4 * MIB, 2051 * MIB]


def test_a_deleted_lease_as_sanlock_writes_it() -> None:
    made = cleared_lease(SMALL, b"LS", b"RES2", now=0x0DF1)
    assert made[0:4].hex() == "16202811"
    assert made[0xA8:0xAC].hex() == "913b9353"
    assert made[0xC0:0xC2].hex() == "f10d"
    with pytest.raises(BadRecord, match="deleted") as caught:
        validate_paxos(Leader.decode(made), b"LS", b"RES2")
    assert caught.value.code is Code.LEADER_MAGIC


# Round trips -----------------------------------------------------------------------------------


@given(
    st.builds(
        Leader, U32, U32, U32, U32, U64, U64, U64, U64, U64, NAME, NAME, U64, U64, st.just(0), U16, U16, U64, U64, U64
    )
)
def test_every_leader_comes_back(leader: Leader) -> None:
    made = leader.encode()
    assert len(made) == SIZE
    assert Leader.decode(made) == leader.sealed()
    assert Leader.decode(memoryview(made.ljust(4096, b"\1"))) == leader.sealed()


@given(st.binary(min_size=SIZE, max_size=SIZE))
def test_any_bytes_are_decoded_and_come_back_with_a_checksum_that_is_right(data: bytes) -> None:
    again = Leader.decode(data).encode()
    assert again[:CHECKED] == data[:CHECKED]
    assert again[CHECKED + 4 :] == data[CHECKED + 4 :]
    assert int.from_bytes(again[CHECKED : CHECKED + 4], "little") == checksum(data[:CHECKED])


@given(st.builds(Dblock, U64, U64, U64, U64, U64, U64, U32), st.builds(ModeBlock, U32, U64))
def test_every_host_sector_comes_back(dblock: Dblock, mode: ModeBlock) -> None:
    read = decode_host_sector(encode_host_sector(dblock, mode, 4096))
    assert read == (dblock.sealed(), mode)
    assert read[0].is_valid


@given(st.sets(st.integers(1, 2000)))
def test_every_bitmap_comes_back(hosts: set[int]) -> None:
    bitmap = delta.bitmap_of(hosts)
    assert delta.called(bitmap) == sorted(hosts)
    assert {host for host in range(1, 2001) if delta.is_called(bitmap, host)} == hosts


@given(st.builds(rindex.Entry, U64, NAME, U32, U32))
def test_every_index_entry_comes_back(entry: rindex.Entry) -> None:
    assert rindex.Entry.decode(entry.encode()) == entry


@pytest.mark.parametrize("geometry", ALL, ids=str)
def test_new_areas_fill_what_they_have(geometry: Geometry) -> None:
    area, sector = fresh_lockspace(geometry, b"space", 1)
    assert (len(area), len(sector)) == (geometry.align, geometry.sector)
    for host_id in (2, geometry.max_hosts):
        start = geometry.delta_offset(host_id)
        validate_delta(Leader.decode(area[start : start + geometry.sector]), b"space")
    with pytest.raises(BadRecord) as caught:
        validate_delta(Leader.decode(area), b"space")
    assert caught.value.code is Code.LEADER_MAGIC
    assert not any(area[geometry.delta_offset(geometry.max_hosts + 1) :])
    lease = fresh_lease(geometry, b"space", b"name", 16)
    leader = Leader.decode(lease)
    validate_paxos(leader, b"space", b"name", 16)
    assert (leader.geometry, leader.num_hosts, leader.max_hosts) == (geometry, 16, geometry.max_hosts)
    assert list(scan.used(lease, geometry.sector)) == [0, 1]
    Request.decode(lease[geometry.sector :]).validate()


def test_how_much_a_ballot_reads() -> None:
    assert [SMALL.ballot_bytes(count) for count in (1, 2, 6, 7, 2000)] == [2048, 2048, 4096, 8192, MIB]
    assert [geometry.ballot_bytes(geometry.max_hosts) for geometry in ALL] == [geometry.align for geometry in ALL]


def test_leases_without_a_size_flag_go_by_their_sector_size() -> None:
    assert Geometry.of_flags(0x01, 512) == Geometry(512, MIB)
    assert Geometry.of_flags(0x00, 4096) == Geometry(4096, 8 * MIB)
    assert Geometry.of_flags(0x20, 4096) == Geometry(4096, 2 * MIB)
    for flags, sector, code in (
        (0x10, 1024, Code.LEADER_SECTOR_SIZE),
        (0x20, 512, Code.SIZES),
        (0x30, 4096, Code.SIZES),
    ):
        with pytest.raises(BadRecord) as caught:
            Geometry.of_flags(flags, sector)
        assert caught.value.code is code


# What is refused, in sanlock's order -----------------------------------------------------------

GOOD = Leader(PAXOS_MAGIC, version.PAXOS, 0x10, 512, 8, 2000, space_name=b"LS", resource_name=b"RES").sealed()
WRONG_PAXOS = [
    (Code.LEADER_MAGIC, {"magic": DELTA_MAGIC}),
    (Code.LEADER_VERSION, {"version": 0x00070004}),
    (Code.LEADER_LOCKSPACE, {"space_name": b"LS2"}),
    (Code.LEADER_RESOURCE, {"resource_name": b"RE"}),
    (Code.LEADER_NUM_HOSTS, {"num_hosts": 7}),
    (Code.LEADER_CHECKSUM, {"checksum": 1}),
]
WRONG_DELTA = [case for case in WRONG_PAXOS if case[0] not in (Code.LEADER_RESOURCE, Code.LEADER_NUM_HOSTS)]


@pytest.mark.parametrize("first", range(len(WRONG_PAXOS)))
def test_the_first_thing_wrong_with_a_paxos_leader_decides(first: int) -> None:
    leader = GOOD
    for _, change in WRONG_PAXOS[first:]:
        leader = replace(leader, **change)  # type: ignore[arg-type]
    with pytest.raises(BadRecord) as caught:
        validate_paxos(leader, b"LS", b"RES", 8)
    assert caught.value.code is WRONG_PAXOS[first][0]


@pytest.mark.parametrize("first", range(len(WRONG_DELTA)))
def test_the_first_thing_wrong_with_a_delta_leader_decides(first: int) -> None:
    leader = replace(GOOD, magic=DELTA_MAGIC, version=version.DELTA)
    for _, change in WRONG_DELTA[first:]:
        leader = replace(leader, **{**change, **({"magic": PAXOS_MAGIC} if "magic" in change else {})})  # type: ignore[arg-type]
    with pytest.raises(BadRecord) as caught:
        validate_delta(leader, b"LS")
    assert caught.value.code is WRONG_DELTA[first][0]


def test_every_byte_that_the_checksum_covers_is_guarded() -> None:
    good = GOOD.encode()
    for offset in range(CHECKED + 4):
        for bit in range(8):
            data = bytearray(good)
            data[offset] ^= 1 << bit
            try:
                validate_paxos(Leader.decode(bytes(data)), b"LS", b"RES", 8)
            except BadRecord:
                continue
            pytest.fail(f"bit {bit} of byte {offset} may be wrong")


def test_names_are_compared_up_to_a_zero() -> None:
    assert names.same(b"LS\0garbage", b"LS")
    assert not names.same(b"LS", b"LSX")
    assert names.same(b"x" * 48, b"x" * 48 + b"y")
    with pytest.raises(ValueError, match="room for 48"):
        replace(GOOD, space_name=b"x" * 49).encode()


def test_requests_and_indices_that_are_none() -> None:
    with pytest.raises(BadRecord) as caught:
        Request.decode(bytes(512)).validate()
    assert caught.value.code is Code.REQUEST_MAGIC
    with pytest.raises(BadRecord) as caught:
        replace(Request(), version=0x00020001).validate()
    assert caught.value.code is Code.REQUEST_VERSION
    header = rindex.Header.of(SMALL, b"LS", MIB)
    for wrong, space, offset, code in (
        (replace(header, magic=1), b"LS", MIB, Code.RINDEX_MAGIC),
        (replace(header, version=0x00020002), b"LS", MIB, Code.RINDEX_VERSION),
        (header, b"other", MIB, Code.RINDEX_LOCKSPACE),
        (header, b"LS", 2 * MIB, Code.RINDEX_OFFSET),
    ):
        with pytest.raises(BadRecord) as caught:
            wrong.validate(space, offset)
        assert caught.value.code is code


# A timing of lockfs's own ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (version.DELTA, version.own(16), "takeover=sanlock, not with 16"),
        (version.own(16), version.DELTA, "takeover=16, not with sanlock's timing"),
        (version.own(16), version.own(4), "takeover=16, not with 4"),
        (0x00040001, version.DELTA, "version is 4.1, not 3"),
    ],
)
def test_another_timing_is_refused_with_the_code_for_versions(found: int, wanted: int, message: str) -> None:
    leader = replace(GOOD, magic=DELTA_MAGIC, version=found).sealed()
    with pytest.raises(BadRecord, match=message) as caught:
        validate_delta(leader, b"LS", wanted=wanted)
    assert caught.value.code is Code.LEADER_VERSION


def test_minor_versions_of_sanlock_do_not_matter_and_those_of_lockfs_do() -> None:
    validate_delta(replace(GOOD, magic=DELTA_MAGIC, version=0x00030001).sealed(), b"LS")
    word = version.own(4.5)
    validate_delta(replace(GOOD, magic=DELTA_MAGIC, version=word).sealed(), b"LS", wanted=word)
    assert version.takeover_of(word) == 4.5
    assert version.takeover_of(version.PAXOS) is None
    for takeover in (0, 7000):
        with pytest.raises(ValueError, match="seconds"):
            version.own(takeover)


# Scanning --------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 2047)), st.integers(0, 511))
def test_the_sectors_that_are_used(sectors: set[int], at: int) -> None:
    area = bytearray(MIB)
    for sector in sectors:
        area[sector * 512 + at] = 1
    assert list(scan.used(bytes(area), 512)) == sorted(sectors)


@given(st.lists(st.tuples(st.integers(1, 300), st.dictionaries(st.integers(0, 299), st.integers(0, 2))), max_size=5))
def test_what_has_changed_since_the_last_look(looks: list[tuple[int, dict[int, int]]]) -> None:
    """Looks of all lengths, which cross the borders of the pieces that are compared at once."""
    memory, known = scan.Memory(512), [0] * 300
    for sectors, values in looks:
        there = [values.get(number, known[number]) for number in range(sectors)]
        area = b"".join(bytes([value]).rjust(512, b"\0") for value in there)
        assert memory.take(area) == [number for number in range(sectors) if there[number] != known[number]]
        known[:sectors] = there


@given(st.sets(st.integers(0, 299)), st.integers(0, 300), st.integers(0, 300), st.sets(st.integers(0, 299)))
def test_the_last_sector_that_is_another(others: set[int], first: int, end: int, odd: set[int]) -> None:
    area = b"".join(bytes([number in others or 2 * (number in odd)]).rjust(512, b"\0") for number in range(300))
    found = scan.last(area, bytes(512), first, end, lambda number: number in others)
    assert found == max((number for number in others if first <= number < end), default=-1)
