"""What lies on the disk, against what the real sanlock writes there and reads from ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lockfs_paxos_lease.format import rindex, version
from lockfs_paxos_lease.format.dblock import NONE, RELEASED, SHARED, Dblock, ModeBlock, encode_host_sector
from lockfs_paxos_lease.format.delta import bitmap_of, encode
from lockfs_paxos_lease.format.fresh import cleared_lease, fresh_lease, fresh_lockspace, fresh_rindex
from lockfs_paxos_lease.format.leader import Leader
from lockfs_paxos_lease.format.size import ALL, MIB, Geometry
from t3_backends.sanlock_daemon import SanlockError, direct

SPACE, NAME = b"LS", b"RES"


@pytest.fixture(params=ALL, ids=lambda each: f"{each.sector}-{each.align // MIB}M")
def geometry(request: pytest.FixtureRequest) -> Geometry:
    """Sizes of sectors and areas."""
    made: Geometry = request.param
    return made


@pytest.fixture
def sizes(geometry: Geometry) -> list[str]:
    """The same for the command line of sanlock."""
    return ["-Z", str(geometry.sector), "-A", f"{geometry.align // MIB}M"]


@pytest.fixture
def path(storage: Path) -> Path:
    """A file of zeros with room for all areas."""
    file = storage / "leases"
    with file.open("wb") as made:
        made.truncate(40 * MIB)
    return file


def fields(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)


def test_a_new_lockspace_is_sanlocks(geometry: Geometry, sizes: list[str], path: Path) -> None:
    direct("init", "-s", f"LS:0:{path}:0", "-o", "3", *sizes)
    area, first = fresh_lockspace(geometry, SPACE, 3)
    assert path.read_bytes()[: geometry.align] == first + area[geometry.sector :]


def test_a_new_lease_is_sanlocks(geometry: Geometry, sizes: list[str], path: Path) -> None:
    direct("init", "-r", f"LS:RES:{path}:8M", *sizes)
    assert path.read_bytes()[8 * MIB : 8 * MIB + geometry.align] == fresh_lease(geometry, SPACE, NAME)
    direct("init", "-r", f"LS:RES:{path}:16M", *sizes, "-n", "16")
    assert path.read_bytes()[16 * MIB : 16 * MIB + geometry.align] == fresh_lease(geometry, SPACE, NAME, 16)


def test_a_new_index_is_sanlocks(geometry: Geometry, sizes: list[str], path: Path) -> None:
    direct("format", "-x", f"LS:{path}:8M", *sizes)
    written = path.read_bytes()
    header = rindex.Header.of(geometry, SPACE, 8 * MIB)
    assert written[8 * MIB : 8 * MIB + geometry.align] == fresh_rindex(header)
    start = header.lease_offset()
    lease = bytearray(written[start : start + geometry.align])
    # The tool leaves whatever was in memory in four bytes of padding.
    lease[geometry.sector + 20 : geometry.sector + 24] = bytes(4)
    assert bytes(lease) == fresh_lease(geometry, SPACE, rindex.LEASE_NAME)


def test_entries_of_an_index_are_sanlocks(geometry: Geometry, sizes: list[str], path: Path) -> None:
    direct("format", "-x", f"LS:{path}:8M", *sizes)
    for number in range(10):
        direct("update", "-x", f"LS:{path}:8M", "-e", f"name{number}:{(32 + number * 8) * MIB}")
    data = path.read_bytes()[8 * MIB : 8 * MIB + geometry.align]
    header = rindex.Header.decode(data)
    header.validate(SPACE, 8 * MIB)
    assert header.geometry == geometry
    found = {entry.name: entry.offset for _, entry in rindex.entries(data, header)}
    assert found == {f"name{number}".encode(): (32 + number * 8) * MIB for number in range(10)}


def test_sanlock_reads_ours(geometry: Geometry, path: Path) -> None:
    area, first = fresh_lockspace(geometry, SPACE, 3)
    host = replace(
        Leader.decode(first), owner_id=2, owner_generation=5, timestamp=77, resource_name=b"node2", io_timeout=1
    )
    sector = encode(host, bitmap_of([1, 9]), geometry.sector)
    lease = replace(
        Leader.decode(fresh_lease(geometry, SPACE, NAME)), owner_id=2, owner_generation=5, lver=3, timestamp=78,
        write_id=2, write_generation=5, write_timestamp=78,
    )  # fmt: skip
    block = Dblock(mbal=2002, bal=2002, inp=2, inp2=5, inp3=78, lver=3, flags=RELEASED)
    with path.open("r+b") as file:
        file.write(first + area[geometry.sector :])
        file.seek(geometry.delta_offset(2))
        file.write(sector)
        file.seek(8 * MIB)
        file.write(fresh_lease(geometry, SPACE, NAME))
        file.seek(8 * MIB)
        file.write(lease.encode())
        file.seek(8 * MIB + geometry.host_offset(2))
        file.write(encode_host_sector(block, NONE, geometry.sector))
        file.seek(8 * MIB + geometry.host_offset(3))
        file.write(encode_host_sector(Dblock(), ModeBlock(SHARED, 4), geometry.sector))
    seen = fields(direct("read_leader", "-s", f"LS:2:{path}:0"))
    assert (seen["read_leader"], seen["owner_generation"], seen["resource_name"]) == ("done 0", "5", "node2")
    seen = fields(direct("read_leader", "-r", f"LS:RES:{path}:8M"))
    assert (seen["read_leader"], seen["lver"], seen["owner_id"], seen["timestamp"]) == ("done 0", "3", "2", "78")
    assert seen["checksum"] == f"{lease.right_checksum():#x}"
    dump = direct("dump", f"{path}:0:{8 * MIB + geometry.align}", "-f", "2")
    words = [line.split() for line in dump.splitlines()]
    assert next(line[3:6] for line in words if "node2" in line) == ["0000000077", "0002", "0005"]
    assert any(line[0].startswith("dblock[0001]") for line in words), dump
    assert any(line[-3:] == ["0003", "0004", "SH"] for line in words), dump


def test_sanlock_sees_that_a_lease_was_deleted(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(cleared_lease(Geometry(), SPACE, NAME, now=99))
    with pytest.raises(SanlockError, match="read_leader done -223"):
        direct("read_leader", "-r", f"LS:RES:{path}:0")


def test_sanlock_refuses_a_lockspace_with_a_timing_of_our_own(path: Path) -> None:
    area, first = fresh_lockspace(Geometry(), SPACE, 3, version.own(16))
    with path.open("r+b") as file:
        file.write(first + area[512:])
        file.seek(8 * MIB)
        file.write(fresh_lease(Geometry(), SPACE, NAME, 250, version.own(16)))
    for what in (["-s", f"LS:1:{path}:0"], ["-r", f"LS:RES:{path}:8M"]):
        with pytest.raises(SanlockError, match="done -224"):
            direct("read_leader", *what)
