"""What lockd may expect of every backend that excludes: one suite, all backends, two hosts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from lockfs_paxos_lease.backend import PaxosBackend
from t3_backends.stations import Open, Station

from lockfs.backend import Busy, Grant, GrantLost, Image, Mode

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED


async def refused(station: Station, mode: Mode = EXCLUSIVE) -> Busy:
    with pytest.raises(Busy) as caught:
        await station.acquire(mode)
    return caught.value


async def test_one_host_excludes_the_other(a: Station, b: Station) -> None:
    grant = await a.acquire()
    assert grant.mode is EXCLUSIVE
    await refused(b, EXCLUSIVE)
    await refused(b, SHARED)
    await a.release(grant)


async def test_after_a_release_the_other_has_it_at_once(a: Station, b: Station) -> None:
    for _ in range(20):
        grant = await a.acquire()
        await refused(b)
        await a.release(grant)
        grant = await b.acquire()
        await refused(a)
        await b.release(grant)


async def test_hosts_share(a: Station, b: Station) -> None:
    first = await a.acquire(SHARED)
    second = await b.acquire(SHARED)
    assert second.mode is SHARED
    await a.release(first)
    await refused(a, EXCLUSIVE)
    await b.release(second)
    await a.release(await a.acquire())


async def test_it_can_be_strengthened_if_nobody_shares(a: Station, b: Station) -> None:
    first = await a.acquire(SHARED)
    second = await b.acquire(SHARED)
    with pytest.raises(Busy):
        await a.backend.convert(first, EXCLUSIVE, a.holder(EXCLUSIVE))
    assert first.mode is SHARED
    await refused(b, EXCLUSIVE)
    await b.release(second)
    await a.backend.convert(first, EXCLUSIVE, a.holder(EXCLUSIVE))
    assert first.mode is EXCLUSIVE
    await refused(b, SHARED)
    await a.release(first)


async def test_it_can_be_weakened(a: Station, b: Station) -> None:
    grant = await a.acquire(EXCLUSIVE)
    await a.backend.convert(grant, SHARED, a.holder(SHARED))
    assert grant.mode is SHARED
    other = await b.acquire(SHARED)
    await a.release(grant)
    await b.release(other)


async def test_images_have_nothing_to_do_with_each_other(a: Station, b: Station) -> None:
    first = await a.acquire(name="one")
    second = await b.acquire(name="two")
    await a.release(first)
    await b.release(second)


async def test_the_holder_is_named(a: Station, b: Station) -> None:
    grant = await a.acquire()
    error = await refused(b)
    assert error.holder == a.holder(EXCLUSIVE)
    assert str(error) == "held by host host-a, process 4711 (qemu-system-x86), VM vm1"
    assert await b.holder_seen() == a.holder(EXCLUSIVE)
    await a.release(grant)


async def test_the_mode_that_is_named_is_that_of_the_lock(a: Station, b: Station) -> None:
    grant = await a.acquire(SHARED)
    assert (await refused(b)).holder.mode is SHARED
    await a.backend.convert(grant, EXCLUSIVE, a.holder(EXCLUSIVE))
    assert (await refused(b)).holder.mode is EXCLUSIVE
    await a.release(grant)


async def test_looking_takes_nothing(a: Station, b: Station) -> None:
    assert await b.holder_seen() is None
    grant = await a.acquire()
    for _ in range(3):
        assert await b.holder_seen() == a.holder(EXCLUSIVE)
    await a.release(grant)
    assert await b.holder_seen() is None
    await b.release(await b.acquire())


@pytest.mark.parametrize("way", ["direct", "lockspace", "lockspace-inode"], indirect=True)
async def test_the_lock_lives_in_what_is_to_be_kept(a: Station, b: Station) -> None:
    """lockd and the mount daemon each keep the descriptors: when one dies, the lock stays.  (A lease has none.)"""
    grant = await a.acquire()
    kept = [os.dup(fd) for fd in (grant.image.fd, *grant.keep)]
    for fd in (grant.image.fd, *grant.keep):
        os.close(fd)
    a.fds.remove(grant.image.fd)
    await refused(b)
    for fd in kept:
        os.close(fd)
    await b.release(await b.acquire())


async def test_a_release_ends_it_also_for_those_who_keep_it(a: Station, b: Station) -> None:
    grant = await a.acquire()
    kept = [os.dup(fd) for fd in (grant.image.fd, *grant.keep)]
    await a.release(grant)
    await b.release(await b.acquire())
    for fd in kept:
        os.close(fd)


@asynccontextmanager
async def successor(station: Station, open_host: Open, grant: Grant) -> AsyncIterator[tuple[Station, Image, list[int]]]:
    """The next lockd of a host, with the descriptors that a mount has kept; the first one's are gone with it."""
    fds = [os.dup(fd) for fd in (grant.image.fd, *grant.keep)]
    os.close(grant.image.fd)
    station.fds.remove(grant.image.fd)
    for fd in grant.keep:
        os.close(fd)
    if isinstance(station.backend, PaxosBackend):
        # Of what it held it knows no more; in one process with its successor it would.
        station.backend._joined.holdings.in_use.clear()
    async with open_host(station.host) as made:
        made.fds.append(fds[0])
        yield made, replace(grant.image, fd=fds[0]), fds[1:]


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_successor_takes_a_lock_up(a: Station, b: Station, open_host: Open, mode: Mode) -> None:
    grant = await a.acquire(mode)
    async with successor(a, open_host, grant) as (heir, image, keep):
        adopted = await heir.backend.adopt(image, mode, heir.holder(mode), keep, grant.token)
        assert (adopted.mode, adopted.token) == (mode, grant.token)
        await refused(b)
        assert (await b.holder_seen()) == a.holder(mode)
        await heir.release(adopted)
        await b.release(await b.acquire())


async def test_what_is_taken_up_is_not_given_back_with_the_rest(a: Station, b: Station, open_host: Open) -> None:
    grant = await a.acquire()
    async with successor(a, open_host, grant) as (heir, image, keep):
        adopted = await heir.backend.adopt(image, EXCLUSIVE, heir.holder(EXCLUSIVE), keep, grant.token)
        await heir.backend.inherit()
        await refused(b)
        await heir.release(adopted)
        await b.release(await b.acquire())


async def test_what_was_taken_up_can_be_changed(a: Station, b: Station, open_host: Open) -> None:
    grant = await a.acquire(EXCLUSIVE)
    async with successor(a, open_host, grant) as (heir, image, keep):
        adopted = await heir.backend.adopt(image, EXCLUSIVE, heir.holder(EXCLUSIVE), keep, grant.token)
        await heir.backend.convert(adopted, SHARED, heir.holder(SHARED))
        await b.release(await b.acquire(SHARED))
        await heir.backend.convert(adopted, EXCLUSIVE, heir.holder(EXCLUSIVE))
        await refused(b, SHARED)
        await heir.release(adopted)


async def test_a_stronger_lock_than_is_wanted_is_taken_up_as_it_is(a: Station, open_host: Open) -> None:
    grant = await a.acquire(EXCLUSIVE)
    async with successor(a, open_host, grant) as (heir, image, keep):
        adopted = await heir.backend.adopt(image, SHARED, heir.holder(SHARED), keep, grant.token)
        assert adopted.mode is EXCLUSIVE
        await heir.release(adopted)


async def test_a_lock_that_is_gone_is_not_taken_again(a: Station, b: Station, open_host: Open) -> None:
    """Whether or not somebody else has had it meanwhile, or has it now."""
    grant = await a.acquire()
    async with successor(a, open_host, grant) as (heir, image, keep):
        adopted = await heir.backend.adopt(image, EXCLUSIVE, heir.holder(EXCLUSIVE), keep, grant.token)
        kept = [os.dup(fd) for fd in keep]
        await heir.release(adopted)
        others: list[Grant | None] = [None, await b.acquire()]
        for other in reversed(others):
            for mode in Mode:
                with pytest.raises(GrantLost):
                    await heir.backend.adopt(image, mode, heir.holder(mode), kept, grant.token)
            if other is not None:
                await b.release(other)
        for fd in kept:
            os.close(fd)
        await b.release(await b.acquire())


async def test_a_weaker_lock_than_was_held_is_lost(a: Station, b: Station, open_host: Open) -> None:
    grant = await a.acquire(SHARED)
    other = await b.acquire(SHARED)
    async with successor(a, open_host, grant) as (heir, image, keep):
        with pytest.raises(GrantLost):
            await heir.backend.adopt(image, EXCLUSIVE, heir.holder(EXCLUSIVE), keep, grant.token)
        adopted = await heir.backend.adopt(image, SHARED, heir.holder(SHARED), keep, grant.token)
        await heir.release(adopted)
        await b.release(other)


async def test_nothing_is_left_on_the_share(open_host: Open, storage: Path, lockspace: Path, way: str) -> None:
    async with open_host("host-a") as a, open_host("host-b") as b:
        for mode in Mode:
            grant = await a.acquire(mode)
            if mode is SHARED:
                await b.release(await b.acquire(mode))
            else:
                await refused(b)
            await a.release(grant)
    assert list(lockspace.iterdir()) == []
    left = sorted(str(path.relative_to(storage)) for path in storage.rglob("*"))
    leases = [".lockfs/leases", f".lockfs/leases/i-{(storage / 'img').stat().st_ino:x}.lease", ".lockfs/leases/lockspace"]
    leases.append(".lockfs/naming")
    assert left == [".lockfs", ".lockfs/holders", *(leases if way == "paxos-lease" else []), "img"]


async def test_it_knows_its_own_host_and_what_that_holds(a: Station) -> None:
    grant = await a.acquire()
    (here,) = [host for host in await a.backend.hosts() if host.here]
    assert (here.name, here.state, here.holds) == ("host-a", "live", [a.holder(grant.mode).path])
    await a.release(grant)
    (here,) = [host for host in await a.backend.hosts() if host.here]
    assert here.holds == []


async def test_no_loss_is_told_and_stop_ends_the_stream(open_host: Open) -> None:
    async def listen(station: Station, found: list[Grant]) -> None:
        found.extend([grant async for grant in station.backend.lost()])

    found: list[Grant] = []
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery, open_host("host-a") as a:
            nursery.start_soon(listen, a, found)
            await a.release(await a.acquire())
            await trio.testing.wait_all_tasks_blocked()
    assert found == []


async def test_forty_tasks_on_four_hosts_hammer_one_image(open_host: Open) -> None:
    """In no moment two are inside; `inside` is counted apart from any lock."""
    inside: list[str] = []
    entered = refusals = 0

    async def hammer(station: Station, number: int) -> None:
        nonlocal entered, refusals
        # One call at a time for one image of a host: that is lockd's part of the contract.
        for turn in range(12):
            async with turns[station.host]:
                try:
                    grant = await station.acquire()
                except Busy:
                    refusals += 1
                else:
                    inside.append(station.host)
                    entered += 1
                    assert inside == [station.host]
                    await trio.sleep((number + turn) % 3 / 1000)
                    inside.remove(station.host)
                    await station.release(grant)
            await trio.sleep((number * 7 + turn) % 5 / 1000)

    async with (
        open_host("h1") as h1, open_host("h2") as h2, open_host("h3") as h3, open_host("h4") as h4,
        trio.open_nursery() as nursery,
    ):  # fmt: skip
        stations = [h1, h2, h3, h4]
        turns = {each.host: trio.Lock() for each in stations}
        for number in range(40):
            nursery.start_soon(hammer, stations[number % 4], number)
    assert entered >= 10
    assert refusals >= 10
