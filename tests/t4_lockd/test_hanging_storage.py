"""A storage whose locks do not answer: who asks is told so in time, nobody else notices, and nothing stays taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from harness.host import Host
from harness.lockless import Lockless
from harness.logs import Expected
from t4_lockd.clients import FakeMount, mounted

from lockfs.errors import LockUnavailable
from lockfs.lockd.storage import STORAGE_TIMEOUT


@pytest.fixture
def hanging(lockd: Host, tmp_path: Path) -> Iterator[Lockless]:
    """A share on which locks hang."""
    share = Lockless(tmp_path / "hanging", 0, "img")
    yield share
    share.close()


@pytest.mark.slow
async def test_locks_that_hang(lockd: Host, hanging: Lockless, storage: Path, expect_log: Expected) -> None:
    expect_log("the storage of .*/hanging has not answered for 10 s")

    async def unavailable(mount: FakeMount, seconds: float) -> None:
        begin = time.monotonic()
        with pytest.raises(LockUnavailable, match=r"the storage of .*/hanging (did|has) not"):
            await mount.acquire("x")
        assert seconds - 0.5 <= time.monotonic() - begin <= seconds + 3

    async with mounted(lockd.run_dir, hanging.path) as sick, mounted(lockd.run_dir, storage) as well:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(unavailable, sick, STORAGE_TIMEOUT)
            slowest = 0.0
            for _ in range(50):
                begin = time.monotonic()
                await well.acquire("x")
                await well.release("x")
                slowest = max(slowest, time.monotonic() - begin)
                await trio.sleep(0.05)
        assert slowest < 1
        await unavailable(sick, 0)
        assert await sick.client.locks() == []
        hanging.go_on()
        with trio.fail_after(10):
            while "has answered all requests" not in lockd.log():
                await trio.sleep(0.05)
        await sick.acquire("y")
        await sick.release("y")
        assert await sick.client.locks() == []
