"""A real sanlock asks for a lease that a host with lockfs holds, gracefully and by force."""

from __future__ import annotations

import logging
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
from t3_backends.sanlock_daemon import Daemon
from t3_backends.stations import Station, station

from lockfs.backend import Busy, Grant

PATIENCE = 20.0


async def acquire_in_the_end(host: Station) -> Grant:
    """Take the image once the sanlock has noticed that its process has ended."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                return await host.acquire()
            except Busy:
                await trio.sleep(0.05)


async def test_sanlock_asks_and_then_demands(
    leaves_nothing: None, storage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"takeover": "sanlock", "io_timeout": "1"}
    async with station("host-a", storage, "paxos-lease", options, run_dirs=tmp_path / "run") as a:
        grant, other = await a.acquire(), await a.acquire(name="other")
        leases = storage / ".lockfs" / "leases"
        space = (leases / "lockspace").read_bytes()[56:104].rstrip(b"\0").decode()
        name = f"i-{grant.image.ino:x}"
        lease = f"{space}:{name}:{leases / name}.lease:0"
        asker = await trio.to_thread.run_sync(Daemon, "asker", tmp_path / "asker")
        try:

            async def client(*arguments: str | Path) -> str:
                return await trio.to_thread.run_sync(asker.client, *arguments)

            await client("add_lockspace", "-s", f"{space}:20:{leases}/lockspace:0", "-o", "1")
            await client("request", "-r", f"{lease}:{2}", "-f", "2")
            with trio.fail_after(PATIENCE), caplog.at_level(logging.WARNING):
                while not any("host asker asks" in record.message for record in caplog.records):
                    await trio.sleep(0.05)
            assert not grant.forced
            await client("request", "-r", f"{lease}:{2}", "-f", "1")
            with trio.fail_after(PATIENCE):
                async with aclosing(a.backend.lost()) as losses:  # type: ignore[type-var]
                    lost = await anext(losses)
            assert lost is grant
            assert grant.forced
            await a.release(grant)
            holder = await trio.to_thread.run_sync(asker.command, lease, "/bin/true")
            assert await trio.to_thread.run_sync(holder.wait) == 0
            await a.release(other)
            await a.release(await acquire_in_the_end(a))
        finally:
            await trio.to_thread.run_sync(asker.close)
