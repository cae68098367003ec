"""Many at once: connections, locks, and who hammers one image over the socket."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from harness import processes
from harness.host import Host
from harness.waiting import wait_until
from t4_lockd.clients import FakeMount, bare, mounted

from lockfs.lockd.daemon import raise_descriptor_limit
from lockfs.protocol import messages as m
from lockfs.protocol.errors import HeldError

LOCKS = 10_000
CONNECTIONS = 1000


@pytest.fixture
def many_descriptors() -> None:
    """Allow this process as many as it takes."""
    raise_descriptor_limit()


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_connections(lockd: Host) -> None:
    before = len(processes.descriptors(lockd.lockd()))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(bare(lockd.run_dir)) for _ in range(CONNECTIONS)]
        for connection in connections:
            connection.call("io.lockfs.Lockd.GetStatus")
        for connection in connections:
            assert connection.receive()["parameters"]["host"] == "host-a"
        assert len(processes.descriptors(lockd.lockd())) >= before + CONNECTIONS
    wait_until(lambda: len(processes.descriptors(lockd.lockd())) <= before, 10, "all are closed")


async def take_and_hold(mount: FakeMount, names: Iterator[str], held: list[str]) -> None:
    for name in names:
        for fd in await mount.acquire("x", name):
            os.close(fd)
        held.append(name)


async def test_ten_thousand_locks(lockd: Host, storage: Path) -> None:
    """Each is on a file of its own; all of them are listed, named on the share, and freed with their mount."""
    async with mounted(lockd.run_dir, storage, mountpoint="/mnt2") as stays:
        before = len(processes.descriptors(lockd.lockd()))
        async with mounted(lockd.run_dir, storage) as mount:
            names, held = (f"{number}.img" for number in range(LOCKS)), []
            async with trio.open_nursery() as nursery:
                for _ in range(32):
                    nursery.start_soon(take_and_hold, mount, names, held)
            assert len(held) == LOCKS
            listed = await mount.client.locks()
            assert sorted(lock.image.relative for lock in listed) == sorted(held)
            status, _ = await mount.client.call(m.GetStatus(), m.Status)
            assert status.locks == LOCKS
            assert len(processes.descriptors(lockd.lockd())) >= before + LOCKS
            begin = time.monotonic()
            with pytest.raises(HeldError):
                await stays.acquire("y", "4711.img")
            assert time.monotonic() - begin < 5
        with trio.fail_after(60):
            while (await stays.client.call(m.GetStatus(), m.Status))[0].locks:
                await trio.sleep(0.1)
        assert list((storage / ".lockfs" / "holders").iterdir()) == []
        wait_until(lambda: len(processes.descriptors(lockd.lockd())) <= before + 5, 10, "all are closed")


async def test_many_on_two_hosts_hammer_few_images(lockd: Host, host_b: Host, storage: Path) -> None:
    """Who is inside is counted apart from any lock."""
    host_b.run("python", "-P", "-c", "from lockfs.protocol.start import *; ensure_lockd(run_dir())")
    inside: dict[str, list[str]] = {"one": [], "two": []}
    entered = refusals = 0

    async def hammer(mount: FakeMount, owner: str, name: str) -> None:
        nonlocal entered, refusals
        for turn in range(10):
            try:
                await mount.acquire(owner, name, wait=turn % 3 / 10)
            except HeldError:
                refusals += 1
                continue
            inside[name].append(owner)
            entered += 1
            assert inside[name] == [owner]
            await trio.sleep(0.002)
            inside[name].remove(owner)
            await mount.release(owner, name)

    async with mounted(lockd.run_dir, storage) as a, mounted(host_b.run_dir, storage) as b:
        async with trio.open_nursery() as nursery:
            for number in range(40):
                mount, name = (a, b)[number % 2], ("one", "two")[number // 2 % 2]
                nursery.start_soon(hammer, mount, f"o{number}", name)
        assert entered > 50
        assert await a.client.locks() == await b.client.locks() == []
    assert refusals > 0
