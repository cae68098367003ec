"""Leases on a volume: two hosts on one loop device, and the real sanlock on what they have made."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.cli import make, places, survey
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.format import rindex
from lockfs_paxos_lease.format.fresh import fresh_rindex
from lockfs_paxos_lease.format.size import MIB, Geometry
from lockfs_paxos_lease.san.index import Index
from lockfs_paxos_lease.san.volume import LeaseVolume
from lockfs_paxos_lease.sanlock.daemon import Daemon
from lockfs_paxos_lease.sanlock.wire import Disk, Lockspace, Rentry, Rindex
from t3_backends import sanlock_daemon
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Mode
from lockfs.errors import LockUnavailable, MountError

LEASES = 12


@pytest.fixture
def device(leaves_nothing: None, tmp_path: Path) -> Iterator[str]:
    """A block device with room for that many leases, and a bit."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate((3 + LEASES) * MIB + MIB // 2)
    name = subprocess.run(["losetup", "-f", "--show", backing], check=True, capture_output=True, text=True).stdout.strip()
    yield name
    subprocess.run(["losetup", "-d", name], check=True)


def formatted(device: str, timing: Timing, max_leases: int = 64) -> None:
    wanted = make.Making(
        places.parse(device), Geometry(), b"SAN", timing.delta_version, timing.lease_version, timing.stored
    )
    make.volume(wanted, max_leases)


@asynccontextmanager
async def hosts(
    device: str, storage: Path, tmp_path: Path, takeover: str = "6", **options: str
) -> AsyncIterator[tuple[Station, Station]]:
    options = {"leases": device, "takeover": takeover, **options}
    async with (
        station("host-a", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as a,
        station("host-b", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as b,
    ):
        yield a, b


def volume(host: Station) -> LeaseVolume:
    found = host.backend._place.below.below  # type: ignore[attr-defined]
    assert isinstance(found, LeaseVolume)
    return found


def problems(device: str) -> list[str]:
    return [finding.what for _, finding in survey.take(places.areas(places.parse(device))).findings]


def leases(device: str) -> list[bytes]:
    header, index = next((area.offset, area.data) for area in places.areas(places.parse(device)) if area.offset == MIB)
    return [entry.name for _, entry in rindex.entries(index, rindex.Header.decode(index))] if header else []


async def test_two_hosts_make_and_use_leases_on_a_volume(device: str, storage: Path, tmp_path: Path) -> None:
    formatted(device, Timing.own(6))
    async with hosts(device, storage, tmp_path) as (a, b):
        grant = await a.acquire()
        with pytest.raises(Busy) as caught:
            await b.acquire()
        assert caught.value.holder == a.holder(Mode.EXCLUSIVE)
        await a.release(grant)
        await b.release(await b.acquire())
        # Both make leases at once, the same ones, too: each gets one place, whoever was faster.
        places_of: dict[str, set[int]] = {}

        async def create(host: Station, name: str) -> None:
            area = await volume(host).lease(name)
            places_of.setdefault(name, set()).add(area._start)
            await area.close()

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    for host in (a, b):
                        nursery.start_soon(create, host, f"both-{number}")
                        nursery.start_soon(create, host, f"{host.host}-{number % 2}")
        assert all(len(found) == 1 for found in places_of.values())
        assert len({next(iter(found)) for found in places_of.values()}) == len(places_of) == 8
        assert sorted(leases(device)) == sorted([*(name.encode() for name in places_of), leases(device)[0]])
        assert problems(device) == []
        # There is room for three more; then it is full, and says so; what is there stays usable.
        for number in range(LEASES - 9):
            await create(a, f"more-{number}")
        with pytest.raises(LockUnavailable, match="there is no room for one more lease"):
            await create(b, "too-much")
        await b.release(await b.acquire())
        # One that is deleted makes room; one that somebody has is not deleted.
        grant = await a.acquire()
        with pytest.raises(Exception, match="host"):
            await volume(b).delete(leases(device)[0].decode())
        await a.release(grant)
        assert await volume(b).delete("more-0")
        assert not await volume(b).delete("more-0")
        assert await volume(a).find("more-0") is None
        await create(a, "in-its-place")
        assert problems(device) == []


async def test_sanlock_reads_what_we_make_and_we_what_it_makes(
    device: str, storage: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    formatted(device, Timing.sanlock(1))
    run_dir = tmp_path_factory.mktemp("s") / "d"
    process = sanlock_daemon.Daemon("beta", run_dir)
    try:
        daemon, path = Daemon(str(run_dir)), device.encode()
        space = Lockspace(b"SAN", 1000, Disk(path))
        options = {"leases": device, "takeover": "sanlock", "io_timeout": "1"}
        async with station("host-a", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as a:
            await daemon.add_lockspace(space, 1)
            await (await volume(a).lease("ours")).close()
            index = Rindex(b"SAN", Disk(path, MIB))
            assert await daemon.lookup(index, Rentry(b"ours")) == Rentry(b"ours", 3 * MIB)
            assert (await daemon.read_resource(Disk(path, 3 * MIB))).name == b"ours"
            theirs = await daemon.create(index, b"theirs")
            assert theirs == 4 * MIB
            area = await volume(a).find("theirs")
            assert area is not None
            await area.close()
            await daemon.delete(index, b"ours")
            assert await volume(a).find("ours") is None
            assert problems(device) == []
            dumped = sanlock_daemon.direct("dump", f"{device}:0:{8 * MIB}", "-f", "1")
            assert "theirs" in dumped
            assert "rindex_lease" in dumped
            await daemon.remove_lockspace(space)
    finally:
        process.close()


async def test_a_sanlock_daemon_as_engine_on_a_volume(
    device: str, storage: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One host by its daemon, the other by itself, on one volume."""
    formatted(device, Timing.sanlock(1))
    run_dir = tmp_path_factory.mktemp("s") / "d"
    process = sanlock_daemon.Daemon("host-a", run_dir)
    monkeypatch.setenv("SANLOCK_RUN_DIR", str(run_dir))
    options = {"leases": device, "takeover": "sanlock", "io_timeout": "1"}
    try:
        async with (
            station("host-a", storage, "paxos-lease", {**options, "engine": "sanlock"}, run_dirs=tmp_path / "r") as a,
            station("host-b", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as b,
        ):
            for first, second in ((a, b), (b, a)):
                for name in (f"by-{first.host}", f"by-{second.host}"):
                    grant = await first.acquire(name=name)
                    with pytest.raises(Busy):
                        await second.acquire(name=name)
                    await first.release(grant)
            assert len(leases(device)) == 2
            assert problems(device) == []
    finally:
        process.close()


async def test_a_volume_that_is_not_made_is_refused_and_says_how(device: str, storage: Path, tmp_path: Path) -> None:
    with pytest.raises(MountError, match="is empty") as caught:
        async with hosts(device, storage, tmp_path):
            pass
    assert "lockfs lease format --index" in caught.value.hint
    formatted(device, Timing.own(16))
    with pytest.raises(MountError, match="used with takeover=16, not with 6"):
        async with hosts(device, storage, tmp_path):
            pass
    with pytest.raises(MountError, match="No such file"):
        async with hosts(str(tmp_path / "nothing"), storage, tmp_path):
            pass


def test_with_sanlock_no_lease_lies_where_sanlock_would_look_elsewhere() -> None:
    geometry = Geometry()
    header = rindex.Header.of(geometry, b"SAN", MIB, 0)
    index = Index(header, fresh_rindex(header))
    with_sanlock = list(index.free(Timing.sanlock(10).lease_version))
    assert len(with_sanlock) == 2048
    own = list(index.free(Timing.own(16).lease_version))
    assert len(own) == header.resources == 16000
    assert own[-1] == (15999, MIB + (2 + 15999) * MIB)


def test_an_entry_goes_into_its_sector_and_changes_nothing_else() -> None:
    header = rindex.Header.of(Geometry(4096, 2 * MIB), b"SAN", 2 * MIB, 200)
    data = fresh_rindex(header)
    for number in range(200):
        offset, sector = Index(header, data).sector_with(number, rindex.Entry(number + 1, b"%d" % number))
        data = data[:offset] + sector + data[offset + len(sector) :]
    index = Index(replace(header), data)
    assert [index.find(b"%d" % number) for number in range(200)] == list(range(1, 201))
    assert list(index.free(Timing.own(16).lease_version)) == []
