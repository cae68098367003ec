"""What lockd does of a fence by itself: whom it tells, what it keeps of a mount, and what it says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from harness.host import Host
from harness.logs import Expected
from harness.waiting import wait_until
from t4_lockd.clients import FakeMount, bare, mounted
from t4_lockd.fakes import DEV, Lab
from trio.testing import MockClock

from lockfs.errors import LockUnavailable
from lockfs.lockd.descriptor import Descriptor
from lockfs.lockd.fence import PATIENCE, PATIENCE_IN_ALL, Fencer
from lockfs.lockd.threads import Threads, TooSlow
from lockfs.protocol import messages as m
from lockfs.protocol.errors import InvalidCall, UnknownMount
from lockfs.protocol.messages import FencedImage, FenceTarget, Order

LOCKD = "io.lockfs.Lockd"


@asynccontextmanager
async def daemon(lab: Lab, name: str = "a", *, obeys: bool = True, takes: float = 0) -> AsyncIterator[list[Order]]:
    """Be the daemon of a mount, which *takes* so many seconds for each order; yields the orders that it gets."""
    mount = lab.share.mounts[name]
    got: list[Order] = []

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        with mount.orders.listen() as orders:
            task_status.started()
            async for order in orders:
                got.append(order)
                await trio.sleep(takes)
                if obeys:
                    mount.orders.obeyed(order.serial)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        yield got
        nursery.cancel_scope.cancel()


# Whom it tells -------------------------------------------------------------------------------------


async def test_a_loss_is_told_to_the_daemon(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    fencer = Fencer(nursery, lab.table, lab.events)
    lock = await lab.acquire("x", node=7)
    assert lock.grant is not None
    with lab.events.watch(lambda: None) as events:
        async with daemon(lab) as told, daemon(lab, "b") as told_b:
            fencer.lose(lab.share, lock.grant)
            with pytest.raises(LockUnavailable, match="was lost"):
                await lab.acquire("x")
            await trio.sleep(1)
        assert [(order.kind, order.images) for order in told] == [("fence", [FencedImage(DEV, 1, [7])])]
        assert told_b == []
        kinds = [(await anext(events)).kind for _ in range(2)]
        assert kinds == ["lost", "fenced"]
    await lab.release("x")
    await lab.acquire("y")
    await lab.release("y")


async def test_what_is_lost_at_once_is_told_at_once(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    fencer = Fencer(nursery, lab.table, lab.events)
    for ino in range(1, 2501):
        await lab.acquire("x", ino, node=1000 + ino)
    async with daemon(lab) as told:
        for grant in list(lab.backend.granted.values()):
            fencer.lose(lab.share, grant)
        await trio.sleep(1)
    assert [len(order.images) for order in told] == [100] * 25
    assert {image.nodes[0] - image.ino for order in told for image in order.images} == {1000}
    for ino in range(1, 2501):
        await lab.release("x", ino)


async def test_all_mounts_by_which_it_is_held_are_told(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    fencer = Fencer(nursery, lab.table, lab.events)
    await lab.acquire("x", node=7)
    await lab.acquire("x", node=9, mounted=lab.b)
    async with daemon(lab) as told, daemon(lab, "b") as told_b:
        results = await fencer.fence_these([FenceTarget("/mnt/img")], "test")
    assert [order.images[0].nodes for order in told + told_b] == [[7], [9]]
    assert sorted((each.mountpoint, each.fenced) for each in results) == [("/mnt/a", True), ("/mnt/b", True)]
    await lab.release("x")
    await lab.release("x", mounted=lab.b)


async def test_a_daemon_that_does_not_obey_is_a_problem(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    """Such a one is killed, if it has given lockd the means to do the rest without it."""
    fencer = Fencer(nursery, lab.table, lab.events)
    await lab.acquire("x", node=7)
    begin = trio.current_time()
    async with daemon(lab, obeys=False):
        (result,) = await fencer.fence_these([FenceTarget(dev=DEV, ino=1)], "test")
    assert not result.fenced
    assert "does not answer" in result.problems[0]
    assert trio.current_time() - begin == pytest.approx(PATIENCE)
    await lab.release("x")


@pytest.mark.parametrize(
    ("takes", "images", "obeyed"),
    [(0.19, 500, True), (0.26, 500, False), (0.19, 600, False), (0.09, 1500, True)],
)
async def test_a_daemon_that_goes_on_is_waited_for(
    takes: float, images: int, obeyed: bool, autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery
) -> None:
    """But not for more than a second, for each thousand images if there are more."""
    fencer = Fencer(nursery, lab.table, lab.events)
    for ino in range(1, images + 1):
        await lab.acquire("x", ino, node=1000 + ino)
    begin = trio.current_time()
    async with daemon(lab, takes=takes):
        results = await fencer.fence_these([FenceTarget(dev=DEV, ino=ino) for ino in range(1, images + 1)], "test")
    took = trio.current_time() - begin
    assert {each.fenced for each in results} == {obeyed}
    in_all = PATIENCE_IN_ALL * max(1, images / 1000)
    assert took == pytest.approx(takes * images / 100 if obeyed else PATIENCE if takes > PATIENCE else in_all)
    for ino in range(1, images + 1):
        await lab.release("x", ino)


async def test_what_is_not_held_is_not_fenced(autojump_clock: MockClock, lab: Lab, nursery: trio.Nursery) -> None:
    fencer = Fencer(nursery, lab.table, lab.events)
    results = await fencer.fence_these([FenceTarget("/mnt/img"), FenceTarget(dev=DEV, ino=5)], "test")
    assert [(each.image, each.fenced, each.problems) for each in results] == [
        ("/mnt/img", False, ["this host does not hold it"]),
        ("inode 5 of device 7", False, ["this host does not hold it"]),
    ]


async def test_a_later_listener_takes_the_place_of_an_earlier(autojump_clock: MockClock, lab: Lab) -> None:
    with lab.a.orders.listen() as first, lab.a.orders.listen() as second:
        assert [order async for order in first] == []
        assert not await lab.a.orders.fence([FencedImage(1, 2, [3])], "", 0.5)
        assert (await second.receive()).images == [FencedImage(1, 2, [3])]
    assert not await lab.a.orders.fence([FencedImage(1, 2, [3])], "", 0.5)


# What it keeps of a mount --------------------------------------------------------------------------


def attach(mount: FakeMount, data: m.DataPath = "gated") -> m.Attach:
    return m.Attach(mount.registered.mount_id, os.makedev(0, 4000), data)


async def give(mount: FakeMount, call: m.Attach) -> tuple[int, int]:
    """Attach with two pipes in place of a root and a connection; return their other ends."""
    pipes = [os.pipe(), os.pipe()]
    try:
        await mount.client.call(call, m.Attached, [given for given, _ in pipes])
    except BaseException:
        for _, end in pipes:
            os.close(end)
        raise
    finally:
        for given, _ in pipes:
            os.close(given)
    return pipes[0][1], pipes[1][1]


def closed(fd: int) -> bool:
    """Say whether nobody has the other end of a pipe open any more."""
    try:
        os.write(fd, b"x")
    except BrokenPipeError:
        return True
    return False


async def test_it_keeps_both_until_the_mount_is_gone(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        ends = await give(mount, attach(mount))
        (status,) = (await mount.client.call(m.GetStatus(), m.Status))[0].mounts
        assert (status.data, status.daemon_gone) == ("gated", False)
        assert not closed(ends[0])
        assert not closed(ends[1])
    for end in ends:
        wait_until(lambda end=end: closed(end), 10, "lockd to close what it kept")
        os.close(end)


async def test_a_mount_that_is_mounted_nowhere_is_let_go(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        ends = await give(mount, attach(mount))
        detach = m.Detach(mount.registered.mount_id)
        await mount.acquire("x")
        assert (await mount.client.call(detach, m.Detached))[0] == m.Detached(False)
        assert not closed(ends[0])
        await mount.release("x")
        assert (await mount.client.call(detach, m.Detached))[0] == m.Detached(True)
        for end in ends:
            wait_until(lambda end=end: closed(end), 10, "lockd to close what it kept")
            os.close(end)
        # What would be opened now could not be fenced.
        with pytest.raises(LockUnavailable, match="has been unmounted"):
            await mount.acquire("x")


async def test_it_takes_them_once(lockd: Host, storage: Path, expect_log: Expected) -> None:
    expect_log("attached already")
    async with mounted(lockd.run_dir, storage) as mount:
        first = await give(mount, attach(mount))
        with pytest.raises(InvalidCall, match="attached already"):
            await give(mount, attach(mount))
        assert not closed(first[0])
    for end in first:
        os.close(end)


@pytest.mark.parametrize("call", [
    (m.Attach("nobody", 1, "gated"), m.Attached), (m.Detach("nobody"), m.Detached), (m.Obeyed("nobody", 1), m.Noted),
    (m.Orders("nobody"), m.Order),
], ids=lambda call: type(call[0]).__name__)  # fmt: skip
async def test_only_the_daemon_speaks_for_its_mount(
    lockd: Host, storage: Path, call: tuple[msgspec.Struct, type[msgspec.Struct]]
) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        with pytest.raises(UnknownMount):
            await _call(mount, *call)


async def _call(mount: FakeMount, request: msgspec.Struct, reply: type[msgspec.Struct]) -> None:
    if isinstance(request, m.Orders):
        async with mount.client.orders(request.mount_id):
            return
    await mount.client.call(request, reply, [0, 0] if isinstance(request, m.Attach) else [])


async def test_obeyed_without_an_order_means_nothing(lockd: Host, storage: Path) -> None:
    async with mounted(lockd.run_dir, storage) as mount:
        await mount.client.call(m.Obeyed(mount.registered.mount_id, 99), m.Noted)


def test_orders_are_a_stream(lockd: Host) -> None:
    with bare(lockd.run_dir) as connection:
        connection.call(f"{LOCKD}.Orders", {"mount_id": "x"})
        assert connection.receive()["error"].endswith("ExpectedMore")


async def test_a_daemon_hears_of_a_fence(lockd: Host, storage: Path, expect_log: Expected) -> None:
    expect_log("lost the lock|fenced")
    async with mounted(lockd.run_dir, storage) as mount, mount.client.orders(mount.registered.mount_id) as orders:
        await mount.acquire("x")
        image = mount.image()
        results: list[m.FenceResult] = []

        async def fence() -> None:
            answer, _ = await mount.client.call(m.Fence([FenceTarget(image.path)], "because"), m.Fenced)
            results.extend(answer.results)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fence)
            order = await anext(orders)
            assert (order.kind, order.reason) == ("fence", "because")
            assert [(each.dev, each.ino) for each in order.images] == [(image.dev, image.ino)]
            await mount.client.call(m.Obeyed(mount.registered.mount_id, order.serial), m.Noted)
        assert [(each.image, each.fenced) for each in results] == [(image.path, True)]
        with pytest.raises(LockUnavailable, match="was lost"):
            await mount.acquire("x")
        await mount.release("x")


# Threads -------------------------------------------------------------------------------------------


@pytest.fixture
def descriptor(lab: Lab) -> tuple[Descriptor, int]:
    """A descriptor, and the other end of its pipe."""
    given, other = os.pipe()
    return Descriptor(given, lab.closer), other


async def test_a_call_that_hangs_is_given_up_and_keeps_what_it_uses(
    lab: Lab, nursery: trio.Nursery, descriptor: tuple[Descriptor, int]
) -> None:
    kept, other = descriptor
    threads, go_on = Threads(nursery, 1), threading.Event()
    with pytest.raises(TooSlow):
        await threads.run(0.05, go_on.wait, [kept])
    kept.close()
    assert not closed(other)
    # There is no thread for another one, which is given up before it begins.
    begun: list[int] = []
    with pytest.raises(TooSlow):
        await threads.run(0.05, lambda: begun.append(1))
    go_on.set()
    wait_until_closed = time.monotonic() + 10
    while not closed(other):
        assert time.monotonic() < wait_until_closed
        await trio.sleep(0.01)
    os.close(other)
    assert await threads.run(10, lambda: 5) == 5
    assert begun == []


async def test_what_a_call_raises_is_raised(nursery: trio.Nursery) -> None:
    with pytest.raises(OSError, match="No such file"):
        await Threads(nursery, 1).run(10, lambda: os.stat("/nonexistent"))


async def test_for_each_goes_on_while_something_comes_back(nursery: trio.Nursery) -> None:
    hangs = threading.Event()

    def look(number: int) -> int:
        if number == 3:
            raise OSError("no")
        if number == 5:
            hangs.wait()
        time.sleep(0.01)
        return number * 2

    results: dict[int, int] = {}
    begin = trio.current_time()
    await Threads(nursery, 2).for_each(0.1, look, range(30), results)
    assert results == {number: number * 2 for number in range(30) if number not in (3, 5)}
    assert trio.current_time() - begin < 5
    hangs.set()


async def test_for_each_gives_up_when_nothing_does(nursery: trio.Nursery) -> None:
    hangs = threading.Event()
    results: dict[int, bool] = {}
    begin = trio.current_time()
    await Threads(nursery, 2).for_each(0.1, lambda _: hangs.wait(), range(30), results)
    assert results == {}
    assert trio.current_time() - begin < 1
    hangs.set()
