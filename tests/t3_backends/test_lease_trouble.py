"""Storage that hangs, is slow or fails, while leases are held on it or wanted."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.backend import PaxosBackend
from lockfs_paxos_lease.driver import boottime
from lockfs_paxos_lease.engine.timing import Timing
from lockfs_paxos_lease.watchdog import Watchdog
from t3_backends.lease_storage import Trouble
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Grant, GrantLost, Mode
from lockfs.errors import LockUnavailable, MountError

TAKEOVER = 6.0
FENCE = TAKEOVER / 2
LATER = 30.0

Made = tuple[Station, Trouble]
Open = Callable[..., AbstractAsyncContextManager[Made]]


@pytest.fixture
def host(storage: Path, tmp_path: Path) -> Open:
    """Start hosts, each with its own way to the storage, which can be made to misbehave."""

    @asynccontextmanager
    async def start(
        name: str, share: Path = storage, trouble: Trouble | None = None, **options: str
    ) -> AsyncIterator[Made]:
        trouble = trouble or Trouble()
        opened = station(
            name, share, "paxos-lease", {"takeover": f"{TAKEOVER:g}", **options}, run_dirs=tmp_path / "run",
            load=lambda context: PaxosBackend(context, trouble),
        )  # fmt: skip
        try:
            async with opened as made:
                try:
                    yield made, trouble
                finally:
                    trouble.heal()
        finally:
            trouble.heal()
            with trio.CancelScope(shield=True):
                while trouble.waiting:
                    await trio.sleep(0.01)

    return start


async def next_loss(made: Station) -> tuple[Grant, float]:
    stream = made.backend.lost()
    assert isinstance(stream, AsyncGenerator)
    with trio.fail_after(LATER):
        async with aclosing(stream):
            async for grant in stream:
                return grant, boottime()
    raise AssertionError("the stream has ended")


def valid_until(made: Station) -> float:
    backend = made.backend
    assert isinstance(backend, PaxosBackend)
    membership = backend._joined._membership
    assert membership is not None
    return membership.valid_until


async def test_a_storage_that_hangs_costs_the_lease_before_its_time_is_over(
    host: Open, caplog: pytest.LogCaptureFixture
) -> None:
    async with host("host-a") as (a, trouble):
        grant = await a.acquire()
        shared = await a.acquire(name="other")
        trouble.hangs = lambda what, path: True
        until = valid_until(a)
        lost, at = await next_loss(a)
        assert at < until, "it was told after others may count on it"
        assert at > until - FENCE
        again, _ = await next_loss(a)
        assert {id(lost), id(again)} == {id(grant), id(shared)}
        with pytest.raises(LockUnavailable, match=r"could not be renewed|no valid lease"):
            await a.acquire(name="another")
        trouble.heal()
        await a.release(grant)
        await a.release(shared)
    assert "could not be renewed" in caplog.text


async def test_a_storage_that_fails_costs_the_lease_in_the_same_way(host: Open) -> None:
    async with host("host-a") as (a, trouble):
        grant = await a.acquire()
        trouble.fails = lambda what, path: OSError(errno.EIO, os.strerror(errno.EIO))
        until = valid_until(a)
        lost, at = await next_loss(a)
        assert lost is grant
        assert at < until
        trouble.heal()
        await a.release(grant)


async def test_nothing_is_lost_if_the_storage_comes_back_in_time(host: Open, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with host("host-a") as (a, trouble):
        grant = await a.acquire()
        trouble.hangs = lambda what, path: path == "lockspace"
        before = valid_until(a)
        with trio.fail_after(LATER):
            while not trouble.waiting:
                await trio.sleep(0.01)
        await trio.sleep(TAKEOVER / 8 * 1.5)  # one call has been given up by now
        trouble.heal()
        with trio.fail_after(LATER):
            while valid_until(a) < before + FENCE:
                await trio.sleep(0.05)
        assert a.backend._lost.statistics().current_buffer_used == 0  # type: ignore[attr-defined]
        await a.release(grant)
    assert "is renewed again" in caplog.text


@pytest.mark.parametrize("released", [True, False])
async def test_after_a_loss_the_host_joins_again_at_once_if_all_was_given_back(host: Open, released: bool) -> None:
    async with host("host-a") as (a, trouble):
        grant = await a.acquire()
        trouble.hangs = lambda what, path: path == "lockspace"
        await next_loss(a)
        backend = a.backend
        assert isinstance(backend, PaxosBackend)
        with trio.fail_after(LATER):
            while backend._joined._membership is not None:
                await trio.sleep(0.05)
        if released:
            await a.release(grant)
        begin = boottime()
        trouble.heal()
        with trio.fail_after(LATER):
            while True:
                try:
                    other = await a.acquire(name="img" if released else "other")
                    break
                except LockUnavailable:
                    await trio.sleep(0.05)
        assert (boottime() - begin < TAKEOVER * 3 / 4) is released, "others wait so long for who may still write"
        assert backend._joined.membership().generation == 2
        await a.release(other)
        if not released:
            await a.release(grant)


async def test_one_share_that_hangs_is_nothing_to_another(host: Open, storage: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with host("host-a") as (a, trouble), host("host-a", other) as (b, _):
        grant, kept = await a.acquire(), await b.acquire()
        trouble.hangs = lambda what, path: True
        lost, _ = await next_loss(a)
        assert lost is grant
        with trio.fail_after(LATER):
            for number in range(5):
                await b.release(await b.acquire(name=f"image{number}"))
        assert b.backend._lost.statistics().current_buffer_used == 0  # type: ignore[attr-defined]
        await b.release(kept)
        trouble.heal()
        await a.release(grant)


async def test_an_acquire_on_a_storage_that_hangs_says_so_and_leaves_nothing(host: Open) -> None:
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        await b.release(await b.acquire())
        trouble.hangs = lambda what, path: what == "write" and path.endswith(".lease")
        with pytest.raises(LockUnavailable, match="could not be written"):
            await a.acquire()
        trouble.heal()
        with trio.fail_after(LATER):
            while True:
                try:
                    grant = await b.acquire()
                    break
                except Busy:
                    await trio.sleep(0.05)
        with pytest.raises(Busy, match="host-b"):
            await a.acquire()
        await b.release(grant)


@pytest.mark.parametrize("number", range(6))
async def test_whichever_call_of_an_acquire_fails_nobody_is_locked_out(host: Open, number: int) -> None:
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        await b.release(await b.acquire())
        seen = 0

        def fails(what: str, path: str) -> OSError | None:
            nonlocal seen
            if what == "open" or not path.endswith(".lease"):
                return None
            seen += 1
            return OSError(errno.EIO, os.strerror(errno.EIO)) if seen == number + 1 else None

        trouble.fails = fails
        with pytest.raises(LockUnavailable, match="Input/output error"):
            await a.acquire()
        assert seen > number
        await b.release(await b.acquire())
        await a.release(await a.acquire())


async def test_who_gives_up_an_acquire_holds_nothing(host: Open) -> None:
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        await b.release(await b.acquire())
        for number in range(6):
            seen = 0
            scope = trio.CancelScope()
            token = trio.lowlevel.current_trio_token()

            def cancel(what: str, path: str) -> bool:
                nonlocal seen
                if what != "open" and path.endswith(".lease"):
                    seen += 1
                    if seen == number + 1:  # noqa: B023
                        token.run_sync_soon(scope.cancel)  # noqa: B023
                return False

            trouble.hangs = cancel
            with scope:
                await a.acquire()
            trouble.hangs = lambda what, path: False
            if scope.cancelled_caught:
                assert a.backend._in_use.all() == []  # type: ignore[attr-defined]
            else:
                await a.release(a.backend._in_use.all()[0].grant)  # type: ignore[attr-defined]
            await b.release(await b.acquire())


async def test_a_share_that_cannot_be_written_to_is_not_mounted(host: Open, storage: Path) -> None:
    with pytest.raises(MountError, match="no leases can be kept"):
        async with host("host-a", leases=str(storage / "missing")):
            pass


async def test_a_lockspace_that_is_none_is_not_overwritten(host: Open, storage: Path) -> None:
    for content in (bytes(1 << 20), os.urandom(1 << 20), b"short"):
        leases = storage / ".lockfs" / "leases"
        leases.mkdir(parents=True, exist_ok=True)
        (leases / "lockspace").write_bytes(content)
        with pytest.raises(MountError):
            async with host("host-a"):
                pass
        assert (leases / "lockspace").read_bytes() == content


async def test_a_lease_that_is_damaged_refuses_and_others_go_on(host: Open, storage: Path) -> None:
    async with host("host-a") as (a, _):
        await a.release(await a.acquire())
        path = next((storage / ".lockfs" / "leases").glob("*.lease"))
        with path.open("r+b") as file:
            file.seek(40)
            file.write(b"\xff")
        with pytest.raises(
            LockUnavailable, match=rf"the lease .*{path.name} is damaged: at byte 0 .*checksum"
        ) as caught:
            await a.acquire()
        assert f"lockfs lease check {path}" in str(caught.value)
        with pytest.raises(LockUnavailable, match="damaged"):
            await a.holder_seen()
        await a.release(await a.acquire(name="another"))


async def test_files_of_leases_appear_whole_whoever_makes_them(host: Open, storage: Path) -> None:
    """Two hosts that make the lockspace, and the same leases, at once."""
    async with trio.open_nursery() as nursery:
        ready = [trio.Event(), trio.Event()]

        async def race(number: int) -> None:
            async with host(f"host-{number}") as (made, _):
                ready[number].set()
                for each in ready:
                    await each.wait()
                for image in range(10):
                    try:
                        await made.release(await made.acquire(name=f"image{image}"))
                    except Busy:
                        pass

        for number in range(2):
            nursery.start_soon(race, number)
    leases = storage / ".lockfs" / "leases"
    assert sorted(path.suffix for path in leases.iterdir()) == ["", *[".lease"] * 10]
    assert {path.stat().st_size for path in leases.iterdir()} == {1 << 20}


async def test_two_shares_of_one_host_use_the_same_leases(host: Open, storage: Path, tmp_path: Path) -> None:
    """They are one host to the others, and exclude each other where their names for images meet."""
    leases, other = tmp_path / "leases", tmp_path / "other"
    leases.mkdir()
    other.mkdir()
    options = {"leases": str(leases), "key": "path"}
    async with host("host-b", **options) as (b, _), host("host-a", **options) as (a, _):
        async with host("host-a", other, **options) as (second, _):
            assert sorted(each.name for each in await second.backend.hosts()) == ["host-a", "host-b"]
            grant = await second.acquire(name="one")
            with pytest.raises(Busy, match="host-a"):
                await b.acquire(name="one")
            with pytest.raises(Busy, match="host-a"):
                await a.acquire(name="one")
            await a.release(await a.acquire(name="two"))
            await second.release(grant)
        # The lockspace is not left as long as one of them uses it.
        grant = await a.acquire(name="one")
        with pytest.raises(Busy, match="host-a"):
            await b.acquire(name="one")
        await a.release(grant)
        with pytest.raises(MountError, match="another takeover=, io_timeout=, host_id= or watchdog="):
            async with host("host-a", other, **{**options, "host_id": "9"}):
                pass


class FakeWatchdog:
    """A watchdog on paper, which says when it was fed."""

    def __init__(self) -> None:
        self.armed = False
        self.fed: list[float] = []

    def arm(self, timeout: int) -> None:
        self.armed = True

    def feed(self) -> None:
        self.fed.append(boottime())

    def disarm(self) -> bool:
        self.armed = False
        return True


async def test_a_watchdog_is_fed_while_renewals_work_and_again_when_all_is_fenced(host: Open) -> None:
    async with host("host-a") as (a, trouble):
        device, backend = FakeWatchdog(), a.backend
        assert isinstance(backend, PaxosBackend)
        backend._joined._watchdog = Watchdog(device, Timing.own(TAKEOVER))
        grant = await a.acquire()
        assert device.armed
        with trio.fail_after(LATER):
            while len(device.fed) < 2:
                await trio.sleep(0.05)
        trouble.hangs = lambda what, path: True
        lost, at = await next_loss(a)
        assert all(each < at for each in device.fed)
        before = len(device.fed)
        await trio.sleep(1)
        assert len(device.fed) == before, "fed although nobody knows whether it is fenced"
        await backend.fenced(lost)
        with trio.fail_after(LATER):
            while len(device.fed) < before + 2:
                await trio.sleep(0.05)
        trouble.heal()
        await a.release(grant)
        with trio.fail_after(LATER):
            while device.armed:
                await trio.sleep(0.05)


async def left_behind(host: Open, run_dir: Path) -> Grant:
    """Return a grant of a lockd that is gone as if it had been killed directly after a renewal."""
    async with host("host-a") as (a, _):
        grant = await a.acquire()
        backend = a.backend
        assert isinstance(backend, PaxosBackend)
        with trio.fail_after(LATER):
            while valid_until(a) < boottime() + FENCE - 0.2:  # just renewed, and noted
                await trio.sleep(0.01)
        await trio.sleep(0.2)
        said = [(path, path.read_bytes()) for path in run_dir.rglob("*") if path.is_file()]
        assert backend._joined.area is not None
        sector = await backend._joined.area.read(0, 512, 1.0)
        lease = next(path for path in a.share.rglob("*.lease"))
        held = lease.read_bytes()
        await backend.release(grant)
        lockspace = lease.with_name("lockspace")
    with lockspace.open("r+b") as file:
        file.write(sector)
    with lease.open("r+b") as file:
        file.write(held)
    for path, content in said:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return grant


@pytest.mark.parametrize("looks", [0, 1])
async def test_a_successor_on_storage_that_hangs_says_in_time_that_all_is_lost(
    host: Open, tmp_path: Path, looks: int
) -> None:
    """It cannot look, or only once; but when its predecessor's lease has run out, it knows so."""
    grant = await left_behind(host, tmp_path / "run" / "host-a")
    begin = boottime()
    trouble = Trouble()
    # The first look is that of the mount itself.
    trouble.hangs = lambda what, path: (
        path == "lockspace" and what != "open" and trouble.calls.count(("read", path)) > looks
    )
    async with host("host-a", trouble=trouble) as (a, _):
        heir = a.backend
        assert isinstance(heir, PaxosBackend)
        answers = []
        with trio.fail_after(LATER):
            while GrantLost not in answers:
                try:
                    await heir.adopt(grant.image, grant.mode, a.holder(grant.mode), [], grant.token)
                except (LockUnavailable, GrantLost) as error:
                    answers.append(type(error))
                await trio.sleep(0.05)
        assert boottime() - begin < FENCE + 0.5
        with pytest.raises(LockUnavailable):
            await a.acquire()
        await heir.inherit()
        await heir.fenced(grant)
        await trio.sleep(FENCE)
        trouble.heal()
        with trio.fail_after(LATER):
            while True:
                try:
                    again = await a.acquire()
                    break
                except LockUnavailable:
                    await trio.sleep(0.05)
        assert heir._joined.membership().generation == 2
        await a.release(again)


async def test_a_successor_on_storage_that_answers_in_time_goes_on(host: Open, tmp_path: Path) -> None:
    grant = await left_behind(host, tmp_path / "run" / "host-a")
    trouble = Trouble()
    trouble.hangs = lambda what, path: path == "lockspace"
    async with host("host-a", trouble=trouble) as (a, _):
        heir = a.backend
        assert isinstance(heir, PaxosBackend)
        assert heir.deadline is not None
        assert not heir.deadline.is_lost
        trouble.heal()
        with trio.fail_after(LATER):
            adopted = await heir.adopt(grant.image, grant.mode, a.holder(grant.mode), [], grant.token)
        assert adopted.token == grant.token
        assert heir._joined.membership().generation == 1
        await a.release(adopted)


async def test_a_lockd_without_a_predecessor_does_not_start_on_storage_that_hangs(
    host: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockfs_paxos_lease.directory.FILE_TIMEOUT", 0.5)
    async with host("host-a") as (a, _):
        await a.release(await a.acquire())
    trouble = Trouble()
    trouble.hangs = lambda what, path: path == "lockspace"
    with pytest.raises(LockUnavailable, match="no answer"):
        async with host("host-a", trouble=trouble):
            pass


async def test_what_could_not_be_given_back_is_given_back_later(host: Open) -> None:
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        grant = await a.acquire()
        await a.backend.inherit()
        trouble.fails = lambda what, path: (
            OSError(errno.EIO, os.strerror(errno.EIO)) if what == "write" and path.endswith(".lease") else None
        )
        with pytest.raises(LockUnavailable, match="Input/output error"):
            await a.release(grant)
        with pytest.raises(Busy, match="host-a"):
            await b.acquire()
        trouble.heal()
        with trio.fail_after(LATER):
            while True:
                try:
                    await b.release(await b.acquire())
                    break
                except Busy:
                    await trio.sleep(0.05)


async def test_a_grant_says_no_more_than_there_is_when_it_could_not_be_weakened(host: Open) -> None:
    """Others may share it already: what is left of it must not be taken for all of it."""
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        grant = await a.acquire()
        seen = 0

        def fails(what: str, path: str) -> OSError | None:
            nonlocal seen
            seen += what == "write" and path.endswith(".lease")
            return OSError(errno.EIO, os.strerror(errno.EIO)) if seen == 2 and what == "write" else None

        trouble.fails = fails
        with pytest.raises(LockUnavailable, match="Input/output error"):
            await a.backend.convert(grant, Mode.SHARED, a.holder(Mode.SHARED))
        trouble.fails = lambda what, path: None
        assert grant.mode is Mode.SHARED
        other = await b.acquire(Mode.SHARED)
        with pytest.raises(Busy, match="host-b"):
            await a.backend.convert(grant, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
        await b.release(other)
        await a.backend.convert(grant, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
        await a.release(grant)
