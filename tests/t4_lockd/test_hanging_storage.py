"""A storage whose locks do not answer: who asks is told so in time, nobody else notices, and nothing stays taken."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from harness.host import Host
from harness.lockless import Lockless
from harness.logs import Expected
from t4_lockd.clients import FakeMount, mounted
from t4_lockd.fakes import Lab
from trio.testing import MockClock

from lockfs.errors import LockUnavailable, MountError
from lockfs.lockd.adoption import Adoption
from lockfs.lockd.claims import Claims
from lockfs.lockd.fence import Fencer
from lockfs.lockd.recorder import Recorder
from lockfs.lockd.sources import Sources
from lockfs.lockd.state import State
from lockfs.lockd.storage import STORAGE_TIMEOUT
from lockfs.lockd.succession import Succession
from lockfs.protocol.messages import Mount


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


async def test_a_source_that_hangs(lab: Lab, nursery: trio.Nursery, tmp_path: Path, autojump_clock: MockClock) -> None:
    """A mount of it is refused in time, costs one thread however often it is tried, and holds up no other."""
    autojump_clock.autojump_threshold = 1.0  # what is done in threads takes real time
    claims = Claims(State(), "this-host")
    fencer, recorder = Fencer(nursery, lab.table, lab.events), Recorder()
    succession = Succession(lab.table, claims, Adoption(lab.table, claims, fencer, recorder, "this-host"), recorder)
    sources = Sources(nursery, lab.table, fencer, succession, "this-host", str(tmp_path))
    share = Lockless(tmp_path / "sick", 0, "img")
    sick, well = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (share.path, tmp_path))
    try:
        share.server.send_signal(signal.SIGSTOP)
        for _ in range(3):
            begin = trio.current_time()
            with pytest.raises(MountError, match="sick does not answer"):
                async with sources.shared(Mount(str(share.path), "/mnt", "fuse", {}, "nop"), sick):
                    pass
            assert trio.current_time() - begin == pytest.approx(STORAGE_TIMEOUT, abs=0.1)
            async with sources.shared(Mount(str(tmp_path), "/mnt", "ext4", {}, "nop"), well) as healthy:
                assert sources.all() == [healthy]
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        share.server.send_signal(signal.SIGCONT)
        async with sources.shared(Mount(str(share.path), "/mnt", "fuse", {}, "nop"), sick) as recovered:
            assert recovered.source == str(share.path)
        for each in sources.all():
            await sources.close_if_unused(each)
    finally:
        share.server.send_signal(signal.SIGCONT)
        os.close(sick)
        os.close(well)
        share.close()
    nursery.cancel_scope.cancel()
