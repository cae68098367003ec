"""``engine=sanlock``: two hosts, each with a sanlock daemon of its own, and with lockfs's own engine beside them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.given_names import libvirt_name
from t3_backends.sanlock_daemon import Daemon as SanlockDaemon
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Denied, Grant, GrantLost, Mode
from lockfs.errors import LockUnavailable, MountError

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED
OPTIONS = {"engine": "sanlock", "io_timeout": "1"}


@pytest.fixture
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SanlockDaemon]]:
    with ExitStack() as stack:
        made = {}
        for name in ("host-a", "host-b"):
            made[name] = SanlockDaemon(name, tmp_path_factory.mktemp("s") / "d")
            stack.callback(made[name].close)
        yield made


def run_dir(daemon: SanlockDaemon) -> str:
    return os.path.dirname(daemon._log.name)


@asynccontextmanager
async def host(
    name: str, daemons: dict[str, SanlockDaemon], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Station]:
    monkeypatch.setenv("SANLOCK_RUN_DIR", run_dir(daemons[name]))
    # The daemon gets a path of this as an argument, and splits arguments at blanks.
    async with station(name, storage, "paxos-lease", OPTIONS, run_dirs=tmp_path / r"r \x") as made:
        yield made


@pytest.fixture
async def pair(
    leaves_nothing: None, daemons: dict[str, SanlockDaemon], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Station, Station]]:
    async with (
        host("host-a", daemons, storage, tmp_path, monkeypatch) as a,
        host("host-b", daemons, storage, tmp_path, monkeypatch) as b,
    ):
        yield a, b


async def refused(station: Station, mode: Mode = EXCLUSIVE, name: str = "img") -> Busy:
    with pytest.raises(Busy) as caught:
        await station.acquire(mode, name)
    return caught.value


async def test_what_lockd_may_expect(pair: tuple[Station, Station]) -> None:
    """The contract, in one run: joining takes seconds."""
    a, b = pair
    # One excludes the other, who is told who it is.
    grant = await a.acquire()
    assert (grant.mode, grant.token) == (EXCLUSIVE, 1)
    assert (await refused(b)).holder == a.holder(EXCLUSIVE)
    assert (await refused(b, SHARED)).holder.host == "host-a"
    assert await b.holder_seen() == a.holder(EXCLUSIVE)
    assert await a.holder_seen() is None  # lockd knows what this host holds
    await a.release(grant)
    assert await b.holder_seen() is None
    # After a release the other has it at once, and the token grows.
    for turn in range(3):
        grant = await b.acquire()
        assert grant.token == turn * 2 + 2
        await refused(a)
        await b.release(grant)
        await a.release(await a.acquire())
    # Hosts share, and the mode changes.
    first, second = await a.acquire(SHARED), await b.acquire(SHARED)
    with pytest.raises(Busy):
        await a.backend.convert(first, EXCLUSIVE, a.holder(EXCLUSIVE))
    assert first.mode is SHARED
    assert (await b.holder_seen()) is not None
    await b.release(second)
    await a.backend.convert(first, EXCLUSIVE, a.holder(EXCLUSIVE))
    await refused(b, SHARED)
    await a.backend.convert(first, SHARED, a.holder(SHARED))
    second = await b.acquire(SHARED)
    await a.release(first)
    await b.release(second)
    # Images have nothing to do with each other; more of them than one connection could have.
    grants = [await a.acquire(name=f"img{number}") for number in range(10)]
    other = await b.acquire(name="other")
    await refused(b, name="img7")
    for grant in [*grants]:
        await a.release(grant)
    await b.release(other)
    # The lock lives in what is to be kept, and a release ends it also for those who keep it.
    grant = await a.acquire()
    kept = [os.dup(fd) for fd in grant.keep]
    await a.release(grant)
    await b.release(await b.acquire())
    for fd in kept:
        os.close(fd)
    hosts = {each.name: each for each in await b.backend.hosts()}
    if hosts:  # the daemon does not know before its first renewal
        assert hosts["host-b"].here
    with pytest.raises(Denied):
        await b.backend.confirm_dead("host-a")
    await whoever_keeps_the_connection_keeps_the_lock(a, b)


async def whoever_keeps_the_connection_keeps_the_lock(a: Station, b: Station) -> None:
    """lockd dies, and the mount daemon has a descriptor, with which the next lockd goes on."""
    grant = await a.acquire()
    kept, handed_over = os.dup(grant.keep[0]), os.dup(grant.keep[0])
    a.backend._held.pop(f"i-{grant.image.ino:x}").client.close()  # type: ignore[attr-defined]
    await trio.sleep(0.5)
    await refused(b)
    taken = await a.backend.adopt(grant.image, EXCLUSIVE, a.holder(EXCLUSIVE), [handed_over], grant.token)
    assert (taken.mode, taken.token) == (EXCLUSIVE, grant.token)
    await refused(b)
    await a.release(taken)
    with pytest.raises(GrantLost):
        await a.backend.adopt(grant.image, EXCLUSIVE, a.holder(EXCLUSIVE), [kept], grant.token)
    os.close(kept)
    grant = await a.acquire()
    a.backend._held.pop(f"i-{grant.image.ino:x}").client.close()  # type: ignore[attr-defined]
    with trio.fail_after(10):
        while await b.holder_seen() is not None:
            await trio.sleep(0.1)
    await b.release(await b.acquire())


@pytest.mark.long
async def test_lockfs_and_sanlock_exclude_each_other(
    daemons: dict[str, SanlockDaemon], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One host has lockfs's own engine, the other the daemon; one lockspace, the same leases."""
    options = {"takeover": "sanlock", "io_timeout": "1"}
    async with (
        host("host-a", daemons, storage, tmp_path, monkeypatch) as a,
        station("host-b", storage, "paxos-lease", options, run_dirs=tmp_path / "r") as b,
    ):
        for first, second in ((a, b), (b, a), (a, b)):
            grant = await first.acquire()
            assert (await refused(second)).holder.host == first.host
            await first.release(grant)
        one, two = await a.acquire(SHARED), await b.acquire(SHARED)
        await b.release(two)
        await a.release(one)
        await b.release(await b.acquire())


async def test_names_as_libvirt_has_them(
    daemons: dict[str, SanlockDaemon], storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lockspace, lease and file are those of libvirt's sanlock driver; and the lease is that of lockfs's own engine."""
    directory = tmp_path / "disk_lease_dir"
    directory.mkdir()
    own = {"names": "libvirt", "leases": str(directory), "takeover": "sanlock", "io_timeout": "1"}
    monkeypatch.setenv("SANLOCK_RUN_DIR", run_dir(daemons["host-a"]))
    with pytest.raises(MountError, match="names=libvirt needs leases="):
        async with station("host-a", storage, "paxos-lease", {**OPTIONS, "names": "libvirt"}, run_dirs=tmp_path / "r"):
            pass
    async with (
        station("host-a", storage, "paxos-lease", {**own, "engine": "sanlock"}, run_dirs=tmp_path / "r") as a,
        station("host-b", storage, "paxos-lease", own, run_dirs=tmp_path / "r") as b,
    ):
        grant = await a.acquire()
        name = libvirt_name(b"/mnt/images/img")
        assert f"r __LIBVIRT__DISKS__:{name}:{directory}/{name}:0:1 p " in daemons["host-a"].client("status")
        assert (await refused(b)).holder.host == "host-a"
        await a.release(grant)
        await b.release(await b.acquire())


async def losses(station: Station, found: list[Grant]) -> None:
    async for grant in station.backend.lost():
        found += [grant]


async def test_all_is_lost_when_the_daemon_is_and_joined_anew_when_it_is_back(
    daemons: dict[str, SanlockDaemon],
    storage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with host("host-a", daemons, storage, tmp_path, monkeypatch) as a:
        found: list[Grant] = []
        nursery.start_soon(losses, a, found)
        grants = [await a.acquire(name=name) for name in ("one", "two")]
        os.kill(daemons["host-a"].process.pid, signal.SIGKILL)
        with trio.fail_after(5):
            while len(found) < 2:
                await trio.sleep(0.05)
        assert {id(grant) for grant in found} == {id(grant) for grant in grants}
        with pytest.raises(LockUnavailable, match="the sanlock daemon has ended"):
            await a.acquire(name="three")
        for grant in grants:
            with pytest.raises(LockUnavailable):
                await a.release(grant)
        assert "the sanlock daemon has ended" in caplog.text
        if not os.environ.get("LOCKFS_LONG"):
            return
        # The next daemon of that name has the same host id at once.
        directory = Path(run_dir(daemons["host-a"]))
        daemons["host-a"].close()
        shutil.rmtree(directory)
        with closing(SanlockDaemon("host-a", directory)), trio.fail_after(30):
            while True:
                try:
                    await a.release(await a.acquire(name="three"))
                except LockUnavailable:
                    await trio.sleep(0.2)
                else:
                    break


async def test_a_lockspace_that_sanlock_gives_up_is_told_as_a_loss(
    daemons: dict[str, SanlockDaemon],
    storage: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    """The record of the host is overwritten: its daemon finds that at its next renewal."""
    async with host("host-a", daemons, storage, tmp_path, monkeypatch) as a:
        await give_up(a, storage, nursery)


async def give_up(a: Station, storage: Path, nursery: trio.Nursery) -> None:
    found: list[Grant] = []
    nursery.start_soon(losses, a, found)
    grant = await a.acquire()
    with open(storage / ".lockfs/leases/lockspace", "r+b") as lockspace:
        lockspace.seek(512 * (a.backend._seat.host_id - 1) + 168)  # type: ignore[attr-defined]
        lockspace.write(b"XXXX")
        os.fsync(lockspace.fileno())
    with trio.fail_after(20):
        while not found:
            await trio.sleep(0.1)
    assert found == [grant]
    with pytest.raises(LockUnavailable):
        await a.acquire(name="another")
    await a.backend.fenced(grant)
    await a.release(grant)


async def test_without_a_daemon_it_is_not_mounted(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANLOCK_RUN_DIR", str(tmp_path))
    with pytest.raises(MountError, match="no sanlock daemon answers"):
        async with station("host-a", storage, "paxos-lease", OPTIONS, run_dirs=tmp_path / "r"):
            pass


async def test_leases_below_the_mountpoint_cannot_be_reached(tmp_path: Path, storage: Path) -> None:
    with pytest.raises(MountError, match="/mnt/images hides them"):
        async with station("host-a", storage, "paxos-lease", {**OPTIONS, "leases": "/mnt/images/x"}, run_dirs=tmp_path):
            pass
