"""An acquire and a release as what they are to the storage: one turn of a thread each, and what may come in between."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease import naming, people
from lockfs_paxos_lease.backend import PaxosBackend
from lockfs_paxos_lease.disk.lane import Lane, Series
from t3_backends.lease_storage import Trouble
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Image, Mode
from lockfs.errors import LockUnavailable

NAME = "user.lockfs.lease"
LATER = 30.0
SOON = 0.2

Made = tuple[Station, Trouble]
Open = Callable[[str], AbstractAsyncContextManager[Made]]


@pytest.fixture
def host(leaves_nothing: None, storage: Path, tmp_path: Path) -> Open:
    """Start hosts, each with its own way to the leases, which can be made to misbehave."""

    @asynccontextmanager
    async def start(name: str) -> AsyncIterator[Made]:
        trouble = Trouble()
        opened = station(
            name, storage, "paxos-lease", {"takeover": "16"}, run_dirs=tmp_path / "run",
            load=lambda context: PaxosBackend(context, trouble),
        )  # fmt: skip
        async with opened as made:
            try:
                yield made, trouble
            finally:
                trouble.heal()

    return start


def paxos(made: Station) -> PaxosBackend:
    assert isinstance(made.backend, PaxosBackend)
    return made.backend


def lease_of(storage: Path) -> Path:
    (lease,) = (storage / ".lockfs" / "leases").glob("i-*.lease")
    return lease


def card_of(storage: Path, image: Image) -> Path:
    return storage / ".lockfs" / "holders" / f"{image.ino:x}.json"


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(LATER):
        while not condition():
            await trio.sleep(0.005)


# How much it is ----------------------------------------------------------------------------------


async def test_an_acquire_and_a_release_are_one_turn_of_one_thread_each(
    host: Open, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host("host-a") as (a, _):
        image, who = a.image(), a.holder(Mode.EXCLUSIVE)
        await a.release(await a.backend.acquire(image, Mode.EXCLUSIVE, who))
        backend, turns = paxos(a), list[str]()
        area = await backend._place.lease("any")
        renewals = backend._joined.area
        assert renewals is not None
        real_series, real_call = Lane.series, Lane.call

        async def series(self: Lane, what: Series) -> bool:
            if self is not renewals.lane:
                turns.append("the leases'" if self is area.lane else "another")
            return await real_series(self, what)

        async def call(self: Lane, *arguments: object, **more: object) -> object:
            turns.append("a call")
            return await real_call(self, *arguments, **more)  # type: ignore[arg-type]

        files = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patched:
            patched.setattr(Lane, "series", series)
            patched.setattr(Lane, "call", call)
            grant = await a.backend.acquire(image, Mode.EXCLUSIVE, who)
            assert turns == ["the leases'"]
            assert card_of(storage, image).exists()
            assert len(os.listdir("/proc/self/fd")) == files + 1
            await a.release(grant)
            assert turns == ["the leases'"] * 2
        assert len(os.listdir("/proc/self/fd")) == files, "the lease is still open"
        assert not card_of(storage, image).exists()


# The lease ---------------------------------------------------------------------------------------


async def test_a_lease_whose_file_is_removed_while_it_is_got_is_got_anew(host: Open, storage: Path) -> None:
    """As by who removes leases that nobody needs: the file that was opened is not the lease any more."""
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        await a.release(await a.acquire())
        lease, seen = lease_of(storage), [0]

        def removes(what: str, path: str) -> bool:
            if what == "read" and path == lease.name:
                seen[0] += 1
                if seen[0] == 1:
                    lease.unlink()
            return False

        trouble.hangs = removes
        grant = await a.acquire()
        assert lease.exists()
        with pytest.raises(Busy, match="host-a"):  # by the file that is there now
            await b.acquire()
        await a.release(grant)


async def test_a_file_that_was_replaced_between_two_acquires_is_the_lease(host: Open, storage: Path) -> None:
    async with host("host-a") as (a, _), host("host-b") as (b, _):
        await a.release(await a.acquire())
        lease_of(storage).unlink()
        grant = await b.acquire()
        with pytest.raises(Busy, match="host-b"):
            await a.acquire()
        await b.release(grant)
        await a.release(await a.acquire())


async def test_what_an_image_is_called_is_looked_at_before_anything_is_made(host: Open, storage: Path) -> None:
    async with host("host-a") as (a, _), host("host-b") as (b, _):
        image = a.image()
        os.setxattr(storage / "img", NAME, b"named")
        grant = await a.acquire()
        leases = storage / ".lockfs" / "leases"
        assert sorted(each.name for each in leases.iterdir()) == ["lockspace", "named.lease"]
        with pytest.raises(Busy, match="host-a"):
            await b.acquire()
        # The name that it would have without that is free, for who has it.
        os.setxattr(b.image("other").fd, NAME, f"i-{image.ino:x}".encode())
        other = await b.acquire(name="other")
        await a.release(grant)
        await a.release(await a.acquire())
        await b.release(other)


async def test_a_name_that_was_only_supposed_does_not_make_forget_what_is_to_be_given_back(
    host: Open, storage: Path
) -> None:
    """The lease has the name by which the image was called before, and nobody has touched it since."""
    async with host("host-a") as (a, trouble), host("host-b") as (b, _):
        grant = await a.acquire()
        trouble.fails = lambda what, path: (
            OSError(errno.EIO, os.strerror(errno.EIO)) if what == "write" and path.endswith(".lease") else None
        )
        with pytest.raises(LockUnavailable, match="Input/output error"):
            await a.release(grant)
        trouble.heal()
        os.setxattr(storage / "img", NAME, b"named")
        await a.release(await a.acquire())
        os.removexattr(storage / "img", NAME)
        with pytest.raises(Busy, match="host-a"):
            await b.acquire()
        await a.backend.inherit()
        await b.release(await b.acquire())


# Storage that hangs ------------------------------------------------------------------------------


async def test_a_source_that_hangs_keeps_no_lease_from_being_given_back(
    host: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host("host-a") as (a, _), host("host-b") as (b, _):
        backend, go = paxos(a), threading.Event()
        grants = [await a.acquire(name=f"image-{number}") for number in range(12)]
        backend._naming.now = lambda image: str(go.wait())  # type: ignore[method-assign]
        backend._people._cards.remove = lambda ino: go.wait() and None  # type: ignore[method-assign]
        refused: list[str] = []

        async def in_vain(number: int) -> None:
            with pytest.raises(LockUnavailable, match="cannot tell how the lease on") as caught:
                await a.acquire(name=f"another-{number}")
            refused.append(str(caught.value))

        with monkeypatch.context() as patched:
            patched.setattr(naming, "FILE_TIMEOUT", SOON)
            patched.setattr(people, "TIMEOUT", SOON)
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(in_vain, number)
            assert len(refused) == 40
            async with trio.open_nursery() as nursery:
                for grant in grants:
                    nursery.start_soon(a.release, grant)
        lanes = [(await backend._place.lease("any")).lane, backend._naming._lane, backend._people._lane]
        most = naming.THREADS + people.THREADS, naming.THREADS, people.THREADS
        assert all(0 < lane.busy <= limit for lane, limit in zip(lanes, most, strict=True))
        for number in range(len(grants)):
            await b.release(await b.acquire(name=f"image-{number}"))
        assert backend._in_use.all() == []
        go.set()
        await until(lambda: not any(lane.busy for lane in lanes))


async def test_an_open_that_is_late_leaves_no_file_open(
    host: Open, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host("host-a") as (a, trouble):
        image = a.image()
        files = len(os.listdir("/proc/self/fd"))
        trouble.hangs = lambda what, path: what == "open" and path.endswith(".lease")
        with monkeypatch.context() as patched:
            patched.setattr("lockfs_paxos_lease.taking.FILE_TIMEOUT", SOON)
            with pytest.raises(LockUnavailable, match=r"cannot open .*\.lease: no answer within"):
                await a.backend.acquire(image, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
        assert paxos(a)._in_use.all() == []
        trouble.heal()
        await until(lambda: not trouble.waiting)
        await until(lambda: len(os.listdir("/proc/self/fd")) == files)
        await a.release(await a.acquire())


async def test_when_a_backend_has_stopped_all_its_files_are_closed(host: Open) -> None:
    files = len(os.listdir("/proc/self/fd"))
    async with host("host-a") as (a, _):
        for number in range(4):
            await a.acquire(name=f"image-{number}")
    assert len(os.listdir("/proc/self/fd")) == files


# The card ----------------------------------------------------------------------------------------


async def test_the_card_is_gone_before_the_lease_is_free(host: Open, storage: Path) -> None:
    async with host("host-a") as (a, trouble):
        grant = await a.acquire()
        card, there = card_of(storage, grant.image), list[bool]()
        assert card.exists()

        def looks(what: str, path: str) -> bool:
            if what == "write" and path.endswith(".lease"):
                there.append(card.exists())
            return False

        trouble.hangs = looks
        await a.release(grant)
        assert there
        assert not any(there)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_card_that_hangs_keeps_nobody_and_is_none_when_it_comes_late(
    host: Open, storage: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    monkeypatch.setattr(people, "TIMEOUT", LATER if cancelled else SOON)  # of no consequence where nothing hangs
    async with host("host-a") as (a, _), host("host-b") as (b, _):
        cards = paxos(a)._people._cards
        real, writes, go, written = cards.write, threading.Event(), threading.Event(), threading.Event()

        def write(*arguments: object) -> None:
            writes.set()
            go.wait()
            real(*arguments)  # type: ignore[arg-type]
            written.set()

        cards.write = write  # type: ignore[method-assign]
        image = a.image()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def give_up() -> None:
                    await until(writes.is_set)
                    if cancelled:
                        scope.cancel()

                nursery.start_soon(give_up)
                grant = await a.backend.acquire(image, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
        assert scope.cancelled_caught is cancelled
        assert [held.grant for held in paxos(a)._in_use.all()] == ([] if cancelled else [grant])
        if cancelled:
            await b.release(await b.acquire())
        else:
            with pytest.raises(Busy, match="host-a"):
                await b.acquire()
            await a.release(grant)
        go.set()
        await until(written.is_set)
        await until(lambda: not card_of(storage, image).exists())
        await b.release(await b.acquire())


async def test_a_lock_that_was_lost_while_it_was_got_is_not_granted(host: Open, storage: Path) -> None:
    """What was told lost was told without it; so it must not come after that."""
    async with host("host-a") as (a, _):
        backend = paxos(a)
        joined = backend._joined
        cards, member = backend._people._cards, joined._membership
        real = cards.write

        def write(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            joined._membership = None

        cards.write = write  # type: ignore[method-assign]
        image = a.image()
        with pytest.raises(LockUnavailable, match="no valid lease"):
            await a.backend.acquire(image, Mode.EXCLUSIVE, a.holder(Mode.EXCLUSIVE))
        joined._membership, cards.write = member, real  # type: ignore[method-assign]
        assert backend._in_use.all() == []
        assert not card_of(storage, image).exists()
        await a.release(await a.acquire())
