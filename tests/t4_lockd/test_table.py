"""The lock table: who is granted what, who waits how long, and what is left of what went wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from harness.waiting import wait_until
from t4_lockd.fakes import DEV, OTHER, FakeBackend, Lab, StorageError
from trio.testing import MockClock, wait_all_tasks_blocked

from lockfs.backend import Image, Mode
from lockfs.errors import LockUnavailable
from lockfs.lockd import storage
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.table import LOCAL_GRACE
from lockfs.protocol.errors import HeldError, NotHeld

EXCLUSIVE, SHARED = Mode.EXCLUSIVE, Mode.SHARED


@asynccontextmanager
async def lasts(seconds: float, slack: float = 0.001) -> AsyncIterator[None]:
    """Check how long something takes on the virtual clock."""
    begin = trio.current_time()
    yield
    took = trio.current_time() - begin
    assert seconds - 1e-6 <= took <= seconds + slack


async def refused(lab: Lab, owner: str, mode: Mode = EXCLUSIVE, *, wait: float = 0.0) -> HeldError:
    with pytest.raises(HeldError) as caught:
        await lab.acquire(owner, mode=mode, wait=wait)
    return caught.value


# Owners on this host -----------------------------------------------------------------------------


async def test_an_owner_shares_with_itself_and_the_last_release_frees(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    await lab.acquire("x", mounted=lab.b)
    await lab.acquire("x")
    assert lab.backend.calls == ["acquire exclusive 1"]
    await lab.release("x")
    await lab.release("x", mounted=lab.b)
    assert lab.backend.calls == ["acquire exclusive 1"]
    await lab.release("x")
    assert lab.backend.calls == ["acquire exclusive 1", "release 1"]


async def test_another_owner_is_refused_after_the_grace_for_a_release_under_way(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    async with lasts(LOCAL_GRACE):
        error = await refused(lab, "y")
    assert error.here
    assert error.holder.command == "x"
    assert (await refused(lab, "y", SHARED)).here
    await lab.release("x")


async def test_a_release_within_the_grace_is_enough(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")

    async def release_soon() -> None:
        await trio.sleep(LOCAL_GRACE * 0.9)
        await lab.release("x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release_soon)
        async with lasts(LOCAL_GRACE * 0.9):
            await lab.acquire("y")
    await lab.release("y")


async def test_who_is_willing_to_wait_does(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    async with lasts(3):
        await refused(lab, "y", wait=3)
    await lab.release("x")


async def test_many_share_and_the_lock_is_as_strong_as_it_must_be(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    await lab.acquire("y", mode=SHARED)
    assert lab.backend.calls == ["acquire shared 1"]
    await refused(lab, "z")
    await lab.release("x", mode=SHARED)
    await lab.release("y", mode=SHARED)


async def test_the_only_owner_may_strengthen_and_weaken(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    await lab.acquire("x", mode=EXCLUSIVE)
    await refused(lab, "y", SHARED)
    await lab.release("x", mode=EXCLUSIVE)
    await lab.acquire("y", mode=SHARED)
    assert lab.backend.calls == ["acquire shared 1", "convert exclusive 1", "convert shared 1"]
    await lab.release("x", mode=SHARED)
    await lab.release("y", mode=SHARED)


async def test_a_hold_is_not_added_to_a_grant_that_is_being_weakened(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    lock = await lab.acquire("x")
    lab.backend.delay = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.release, "x")
        await wait_all_tasks_blocked()
        await lab.acquire("x")
        assert lock.grant
        assert lock.grant.mode is EXCLUSIVE
    assert lock.grant.mode is EXCLUSIVE
    await lab.release("x")
    await lab.release("x", mode=SHARED)


async def test_one_of_many_may_not_strengthen(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    await lab.acquire("y", mode=SHARED)
    assert (await refused(lab, "x")).holder.command == "y"
    await lab.release("y", mode=SHARED)
    await lab.acquire("x")
    await lab.release("x")
    await lab.release("x", mode=SHARED)


async def test_what_is_not_held_cannot_be_released(autojump_clock: MockClock, lab: Lab) -> None:
    with pytest.raises(NotHeld):
        await lab.release("x")
    await lab.acquire("x")
    for owner, mode, mounted in [("y", EXCLUSIVE, lab.a), ("x", SHARED, lab.a), ("x", EXCLUSIVE, lab.b)]:
        with pytest.raises(NotHeld):
            await lab.release(owner, mode=mode, mounted=mounted)
    assert lab.backend.calls == ["acquire exclusive 1"]
    await lab.release("x")
    with pytest.raises(NotHeld):
        await lab.release("x")


async def test_a_mount_that_is_gone_holds_nothing(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", 1)
    await lab.acquire("x", 2)
    await lab.acquire("x", 2, mounted=lab.b)
    for lock in lab.table.abandon(lab.a):
        await lab.table.settle(lock)
    assert "release 1" in lab.backend.calls
    assert "release 2" not in lab.backend.calls
    await lab.release("x", 2, mounted=lab.b)


async def test_a_backend_that_excludes_nobody_refuses_nobody(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.excludes = False
    for owner in "xyz":
        await lab.acquire(owner)
    for owner in "xyz":
        await lab.release(owner)


async def test_the_descriptor_of_the_first_is_kept_and_no_other(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    await lab.acquire("x")
    await refused(lab, "y")
    wait_until(lambda: lab.open_fds() == lab.fds[:1], 5, "the others are closed")
    await lab.release("x")
    wait_until(lambda: lab.open_fds() == lab.fds[:1], 5, "the first stays with the last hold")
    await lab.release("x")


async def test_a_lock_of_an_overlapping_share_is_respected_but_not_shared(
    autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery
) -> None:
    below = lab.mount(lab.make_share("/srv/below", FakeBackend(), nursery), "c")
    await lab.acquire("x")
    with pytest.raises(HeldError):
        await lab.acquire("y", mounted=below)
    with pytest.raises(LockUnavailable, match="by way of /srv, which /srv/below overlaps"):
        await lab.acquire("x", mounted=below)
    await lab.release("x")
    await lab.acquire("y", mounted=below)
    await lab.release("y", mounted=below)


# Fairness ----------------------------------------------------------------------------------------


async def test_waiters_come_in_their_order(autojump_clock: MockClock, lab: Lab) -> None:
    order: list[str] = []

    async def take(owner: str) -> None:
        await lab.acquire(owner, wait=100)
        order.append(owner)
        await trio.sleep(1)
        await lab.release(owner)

    async with trio.open_nursery() as nursery:
        for owner in "abcdefgh":
            nursery.start_soon(take, owner)
            await wait_all_tasks_blocked()
    assert "".join(order) == "abcdefgh"


async def test_those_who_share_do_not_starve_one_who_does_not(autojump_clock: MockClock, lab: Lab) -> None:
    async def share(number: int) -> None:
        await trio.sleep(number * 0.5)
        await lab.acquire(f"s{number}", mode=SHARED, wait=100)
        await trio.sleep(1)
        await lab.release(f"s{number}", mode=SHARED)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(share, number)
        await trio.sleep(2.1)
        async with lasts(0.9):
            await lab.acquire("x", wait=100)
        await lab.release("x")


async def test_who_waits_behind_others_is_not_refused_what_is_free(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("s1", mode=SHARED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused_in, lab, "x", 5)
        await wait_all_tasks_blocked()
        # It queues behind x, but nobody who holds the lock is in its way.
        async with lasts(LOCAL_GRACE):
            await lab.acquire("s2", mode=SHARED)
    await lab.release("s1", mode=SHARED)
    await lab.release("s2", mode=SHARED)


async def refused_in(lab: Lab, owner: str, seconds: float) -> None:
    async with lasts(seconds):
        await refused(lab, owner, wait=seconds)


async def test_the_owner_does_not_queue_behind_those_who_wait_for_it(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused_in, lab, "y", 5)
        await wait_all_tasks_blocked()
        async with lasts(0):
            await lab.acquire("x")
    await lab.release("x")
    await lab.release("x")


# Other hosts -------------------------------------------------------------------------------------


async def test_another_host_has_it(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.elsewhere[1] = OTHER
    async with lasts(0):
        error = await refused(lab, "x")
    assert not error.here
    assert error.holder == OTHER


async def test_it_is_looked_for_often_at_first_and_then_less(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.elsewhere[1] = OTHER
    async with lasts(2):
        await refused(lab, "x", wait=2)
    # 10, 15, 22.5, 34, 50, 50, ... ms
    assert 42 <= len(lab.backend.calls) <= 46


async def test_it_is_had_when_the_other_host_lets_go(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.elsewhere[1] = OTHER

    async def let_go() -> None:
        await trio.sleep(0.5)
        del lab.backend.elsewhere[1]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(let_go)
        async with lasts(0.5, slack=0.05):
            await lab.acquire("x", wait=1)
    await lab.release("x")


async def test_another_host_is_in_the_way_of_strengthening(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    lab.backend.elsewhere[1] = OTHER
    assert not (await refused(lab, "x")).here
    await lab.release("x", mode=SHARED)


async def test_who_holds_it(autojump_clock: MockClock, lab: Lab) -> None:
    async def look() -> list[tuple[str, bool]]:
        fd = os.open("/dev/null", os.O_RDWR)
        lab.fds.append(fd)
        image = Image(fd, DEV, 1, b"img", b"/mnt/img")
        found = await lab.table.inspect(lab.a, image, Descriptor(fd, lab.closer))
        return [(each.host, each.here) for each in found]

    assert await look() == []
    lab.backend.elsewhere[1] = OTHER
    assert await look() == [("other-host", False)]
    del lab.backend.elsewhere[1]
    await lab.acquire("x", mode=SHARED)
    await lab.acquire("y", mode=SHARED)
    assert await look() == [("this-host", True)] * 2
    await lab.release("x", mode=SHARED)
    await lab.release("y", mode=SHARED)


# A release is never behind a wait, an image never behind another ---------------------------------


async def test_a_release_does_not_wait_behind_who_waits(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    lab.backend.elsewhere[1] = OTHER
    async with trio.open_nursery() as nursery:
        # It polls another host, and so asks the backend again and again.
        nursery.start_soon(refused_elsewhere, lab, "x", 5)
        await trio.sleep(1.003)
        async with lasts(0):
            await lab.release("x", mode=SHARED)
        lab.backend.elsewhere[1] = OTHER


async def refused_elsewhere(lab: Lab, owner: str, wait: float) -> None:
    with pytest.raises(HeldError) as caught:
        await lab.acquire(owner, wait=wait)
    assert not caught.value.here


async def test_images_do_not_wait_for_each_other(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.hang[1] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.acquire, "x", 1)
        await wait_all_tasks_blocked()
        async with lasts(0):
            await lab.acquire("x", 2)
            await lab.release("x", 2)
        lab.backend.hang[1].set()
    await lab.release("x", 1)


# Storage that does not answer --------------------------------------------------------------------


async def test_an_acquire_that_hangs_is_given_up_and_undone_when_it_comes_back(
    autojump_clock: MockClock, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.backend.hang[1] = trio.Event()
    async with lasts(storage.STORAGE_TIMEOUT):
        with pytest.raises(LockUnavailable, match="did not answer within 10 s"):
            await lab.acquire("x")
    assert "has not answered for 10 s" in caplog.text
    async with lasts(0):
        with pytest.raises(LockUnavailable, match="has not answered an earlier request yet"):
            await lab.acquire("y")
    # The thread works with its descriptor still.
    assert lab.open_fds()[:1] == lab.fds[:1]
    await lab.acquire("x", 2)
    await lab.release("x", 2)
    lab.backend.hang.pop(1).set()
    await wait_all_tasks_blocked()
    assert lab.backend.calls[-1] == "release 1"
    assert lab.table.locks == {}
    await lab.acquire("y")
    await lab.release("y")


async def test_a_strengthening_that_hangs_is_undone_too(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x", mode=SHARED)
    lab.backend.hang[1] = trio.Event()
    with pytest.raises(LockUnavailable):
        await lab.acquire("x")
    lab.backend.hang.pop(1).set()
    await wait_all_tasks_blocked()
    assert lab.backend.calls[-2:] == ["convert exclusive 1", "convert shared 1"]
    await lab.acquire("y", mode=SHARED)
    await lab.release("x", mode=SHARED)
    await lab.release("y", mode=SHARED)


async def test_a_release_that_hangs_is_done_when_the_storage_comes_back(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    lab.backend.hang[1] = trio.Event()
    async with lasts(storage.STORAGE_TIMEOUT):
        await lab.release("x")
    with pytest.raises(NotHeld):
        await lab.release("x")
    with pytest.raises(LockUnavailable):
        await lab.acquire("y")
    lab.backend.hang.pop(1).set()
    await wait_all_tasks_blocked()
    await lab.acquire("y")
    await lab.release("y")


async def test_a_hanging_storage_costs_a_bounded_number_of_calls(
    autojump_clock: MockClock, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    never = trio.Event()
    for ino in range(300):
        lab.backend.hang[ino] = never

    async def fail(ino: int) -> None:
        with pytest.raises(LockUnavailable):
            await lab.acquire("x", ino)

    async with trio.open_nursery() as nursery:
        for ino in range(storage.MAX_OVERDUE):
            nursery.start_soon(fail, ino)
    before = len(lab.backend.calls)
    async with lasts(0):
        for ino in range(100, 300):
            await fail(ino)
    assert len(lab.backend.calls) == before
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == 1
    lab.backend.hang.clear()
    never.set()
    await wait_all_tasks_blocked()
    await lab.acquire("x", 200)
    await lab.release("x", 200)


async def test_a_backend_that_says_it_cannot_say(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.fail[1] = StorageError("no locks here")
    with pytest.raises(StorageError, match="no locks here"):
        await lab.acquire("x")
    del lab.backend.fail[1]
    await lab.acquire("x")
    await lab.release("x")


async def test_a_backend_that_breaks_grants_nothing(
    autojump_clock: MockClock, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.backend.fail[1] = ZeroDivisionError("oops")
    with pytest.raises(LockUnavailable, match="oops"):
        await lab.acquire("x")
    assert "failed in an unexpected way" in caplog.text
    del lab.backend.fail[1]
    lab.backend.granted.clear()
    await lab.acquire("x")
    await lab.release("x")


async def test_a_release_that_fails_keeps_nobody_out(
    autojump_clock: MockClock, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    await lab.acquire("x")
    lab.backend.fail[1] = StorageError("no locks here")
    await lab.release("x")
    assert "could not give back" in caplog.text
    del lab.backend.fail[1]
    lab.backend.granted.clear()
    await lab.acquire("y")
    await lab.release("y")


# Callers that go, locks that go ------------------------------------------------------------------


async def test_a_cancelled_wait_leaves_nothing(autojump_clock: MockClock, lab: Lab) -> None:
    await lab.acquire("x")
    with trio.move_on_after(2) as scope:
        await lab.acquire("y", wait=10)
    assert scope.cancelled_caught
    (lock,) = lab.table.locks.values()
    assert not lock.queue
    await lab.release("x")


async def test_a_cancelled_call_waits_for_the_storage_and_tells_what_it_got(autojump_clock: MockClock, lab: Lab) -> None:
    lab.backend.delay = 3
    got = []
    with trio.move_on_after(1) as scope:
        got.append(await lab.acquire("x"))
    assert not scope.cancelled_caught
    assert got
    await lab.release("x")


async def test_a_lost_lock_is_not_granted_before_its_holders_are_gone(
    autojump_clock: MockClock, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    dropped: list[str] = []
    lock = await lab.acquire("x")
    await lab.acquire("x", mounted=lab.b)
    assert lock.grant
    with lab.events.watch(lambda: dropped.append("dropped")) as events:
        lab.table.lose(lab.share, lock.grant)
        told = [await anext(events), await anext(events)]
    assert [(event.kind, event.mountpoint, event.image) for event in told] == [
        ("lost", "/mnt/a", "/mnt/img"),
        ("lost", "/mnt/b", "/mnt/img"),
    ]
    assert "lost the lock on /mnt/img" in caplog.text
    with pytest.raises(LockUnavailable, match="was lost"):
        await lab.acquire("x")
    await lab.release("x")
    await lab.release("x", mounted=lab.b)
    await lab.acquire("y")
    await lab.release("y")


async def test_many_hammer_one_image_and_one_holds_it(autojump_clock: MockClock, lab: Lab) -> None:
    """Forty tasks of as many owners; an independent count of who is inside."""
    inside: dict[str, int] = {"exclusive": 0, "shared": 0}
    times = 0

    async def hammer(number: int) -> None:
        nonlocal times
        mode = SHARED if number % 4 == 0 else EXCLUSIVE
        for turn in range(25):
            await trio.sleep((number * 7 + turn * 13) % 11 / 1000)
            try:
                await lab.acquire(f"o{number}", mode=mode, wait=(number + turn) % 5 / 10)
            except HeldError:
                continue
            inside[mode.value] += 1
            times += 1
            assert inside["exclusive"] <= 1
            assert not (inside["exclusive"] and inside["shared"])
            await trio.sleep((number + turn) % 3 / 100)
            inside[mode.value] -= 1
            await lab.release(f"o{number}", mode=mode)

    lab.backend.delay = 0.0007
    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(hammer, number)
    assert times > 100
